"""Find which axes of a forward's tensors are the same axis, from rules for every operation.

A product ``[a, b] x [b, c] -> [a, c]`` joins three pairs, an addition the axes that it aligns, a view those that it keeps.
`roles` watches every operation of a forward and joins them (union-find). What is then in one class with the last axis of a
layer's input is the residual stream, whatever a host calls its modules and however it stores its matrices; sizes are
not used. An operation without a rule here joins nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves


class Axis(NamedTuple):
    """An axis of a tensor, counted from the front."""

    tensor: torch.Tensor
    number: int


@dataclass
class Joined:
    """The effect of an operation on axes: pairs that are one axis, and those that it sums, averages or contracts."""

    pairs: list[tuple[Axis, Axis]] = field(default_factory=list)
    spent: list[Axis] = field(default_factory=list)

    def pair(self, a: torch.Tensor, i: int, b: torch.Tensor, j: int) -> None:
        i, j = i % a.dim(), j % b.dim()
        if a.shape[i] == b.shape[j] > 1:
            self.pairs.append((Axis(a, i), Axis(b, j)))

    def spend(self, a: torch.Tensor, i: int) -> None:
        self.spent.append(Axis(a, i % a.dim()))

    def align(self, a: torch.Tensor, b: torch.Tensor) -> Joined:
        """Joins the axes of two tensors from the last one on, as broadcasting does."""
        for k in range(1, min(a.dim(), b.dim()) + 1):
            self.pair(a, -k, b, -k)
        return self


Rule = Callable[[Sequence[Any], dict[str, Any], Sequence[torch.Tensor]], Joined]


# --- one rule for each kind of operation ------------------------------------------------------------------------------------


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested arguments or results, in their order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _aligned(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    joined = Joined()
    for out in outs:
        for tensor in tensors_in((args, kwargs)):
            joined.align(tensor, out)
    return joined


def _viewed(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    """Views of the same memory: axes of one length along which one step in memory is taken are one axis."""
    x, joined = args[0], Joined()
    for out in outs:
        free = list(range(x.dim()))
        for new, step in enumerate(zip(out.shape, out.stride(), strict=True)):
            old = next((n for n in free if (x.shape[n], x.stride(n)) == step), None)
            if old is not None:
                free.remove(old)
                joined.pair(x, old, out, new)
    return joined


def _moved(x: torch.Tensor, out: torch.Tensor, order: Sequence[int | None]) -> Joined:
    """``order``: for each axis of the result the axis of `x` that it is, or None."""
    joined = Joined()
    for new, old in enumerate(order):
        if old is not None:
            joined.pair(x, old, out, new)
    return joined


def _without(x: torch.Tensor, gone: set[int]) -> list[int]:
    return [n for n in range(x.dim()) if n not in gone]


def _cat(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    out, joined = outs[0], Joined()
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    for x in args[0]:
        if x.dim() == out.dim():
            for n in _without(out, {dim}):
                joined.pair(x, n, out, n)
        elif x.dim() + 1 == out.dim():  # stack
            joined.pairs += _moved(x, out, [None if n == dim else n - (n > dim) for n in range(out.dim())]).pairs
    return joined


def _along(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    """Operations that pick, put or add along one axis and keep the others."""
    x, dim, joined = args[0], args[1] % max(args[0].dim(), 1), Joined()
    for tensor in tensors_in((args[1:], kwargs)):
        if tensor.dim() == x.dim() == outs[0].dim():
            for n in _without(x, {dim}):
                joined.pair(tensor, n, outs[0], n)
    for n in _without(x, {dim}):
        joined.pair(x, n, outs[0], n)
    if x.shape == outs[0].shape:
        joined.align(x, outs[0])
    return joined


def _index(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    """``x[i, j, ...]`` with tensors, read or written (then the values come third)."""
    x, out, joined = args[0], outs[0], Joined()
    ends = [(n, index) for n, index in enumerate(args[1]) if index is not None]
    widths = [index.dim() if index.dtype in (torch.bool, torch.uint8) else 1 for _, index in ends]
    after = x.dim() - (ends[-1][0] + sum(widths) - len(widths) + 1)  # axes behind the last index
    picked = [tensor for tensor in (args[2:3] if len(args) > 2 else [out]) if isinstance(tensor, torch.Tensor)]
    if len(args) > 2:
        joined.align(x, out)
    for tensor in picked:
        for k in range(1, min(after, tensor.dim()) + 1):
            joined.pair(x, -k, tensor, -k)
        if len(args) == 2 and ends[-1][0] - ends[0][0] == len(ends) - 1:
            for n in range(ends[0][0]):
                joined.pair(x, n, tensor, n)
    return joined


def _lookup(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    joined = Joined()
    joined.pair(args[0], -1, outs[0], -1)
    return joined


def _product(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    """``[..., n, k] x [..., k, m] -> [..., n, m]``; the second may be a vector."""
    a, b, out, joined = args[0], args[1], outs[0], Joined()
    if b.dim() == 1:
        joined.pair(a, -1, b, 0)
        joined.pair(a, 0, out, 0)
        joined.spent = [Axis(a, a.dim() - 1), Axis(b, 0)]
        return joined
    joined.pair(a, -1, b, -2)
    joined.pair(b, -1, out, -1)
    joined.pair(a, -2, out, -2)
    for tensor in (a, b):
        if tensor.dim() == out.dim() == 3:
            joined.pair(tensor, 0, out, 0)
    joined.spend(a, -1)
    joined.spend(b, -2)
    return joined


def _added_product(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    return _product(args[1:], kwargs, outs).align(args[0], outs[0])


def _linear(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    x, weight, out, joined = args[0], args[1], outs[0], Joined()
    for n in range(x.dim() - 1):
        joined.pair(x, n, out, n)
    joined.pair(x, -1, weight, 1)
    joined.pair(weight, 0, out, -1)
    joined.spend(x, -1)
    joined.spend(weight, 1)
    return joined.align(args[2], out) if len(args) > 2 and args[2] is not None else joined


def _convolution(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    x, weight, bias, out, groups, joined = args[0], args[1], args[2], outs[0], args[8], Joined()
    joined.pair(x, 0, out, 0)
    outer, inner = (1, 0) if args[6] else (0, 1)  # transposed
    joined.pair(weight, outer, out, 1)
    if bias is not None:
        joined.pair(bias, 0, out, 1)
    if groups == 1:
        joined.pair(x, 1, weight, inner)
        joined.spend(x, 1)
        joined.spend(weight, inner)
    elif groups == x.shape[1]:
        joined.pair(x, 1, out, 1)
    return joined


def _attention(args: Sequence[Any], kwargs: dict[str, Any], _: Sequence[torch.Tensor]) -> Joined:
    return Joined(spent=[Axis(tensor, n) for tensor in tensors_in((args, kwargs)) for n in range(tensor.dim())])


def _normed(args: Sequence[Any], _: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    joined = Joined()
    for tensor in tensors_in((args[0], args[2:4])):
        joined.align(tensor, outs[0])
    for n in range(1, len(args[1]) + 1):
        joined.spend(args[0], -n)
    return joined


def _reduced(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    x, joined = args[0], Joined()
    given = [kwargs.get("dim"), *(a for a in args[1:] if not isinstance(a, bool))]
    numbers = [d for d in given if isinstance(d, int)]
    dims: Sequence[int] = next((d for d in given if isinstance(d, list | tuple) and d), numbers[:1] or range(x.dim()))
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    for out in outs:
        kept: Sequence[int | None] = (
            [None if n in gone else n for n in range(x.dim())] if out.dim() == x.dim() else _without(x, gone)
        )
        joined.pairs += _moved(x, out, kept).pairs
    for n in gone:
        joined.spend(x, n)
    return joined


def _made(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]) -> Joined:
    """Tensors that take another's shape but not its values."""
    return _attention(args, kwargs, outs)


_KINDS: dict[Rule, str] = {
    _aligned: "expand clone copy _to_copy detach alias lift_fresh _softmax _log_softmax cumsum tril triu flip roll sort "
    "topk native_dropout constant_pad_nd slice split split_with_sizes narrow repeat masked_fill where contiguous "
    "_conj squeeze_copy masked_scatter",
    _viewed: "view _unsafe_view reshape _reshape_alias squeeze t transpose permute unsqueeze select unbind",
    _cat: "cat stack",
    _along: "index_select gather index_add index_copy scatter scatter_add scatter_reduce index_fill",
    _index: "index index_put _index_put_impl",
    _lookup: "embedding",
    _product: "mm bmm mv _grouped_mm",
    _added_product: "addmm baddbmm addmv",
    _linear: "linear",
    _convolution: "convolution",
    _normed: "native_layer_norm _fused_rms_norm",
    _reduced: "sum mean amax amin max min var std logsumexp prod any all argmax argmin var_mean std_mean",
    lambda args, kwargs, outs: _reduced((args[0], *args[2:]), kwargs, outs): "linalg_vector_norm norm",  # second: which norm
    _made: "empty_like zeros_like ones_like full_like rand_like new_zeros new_ones new_empty new_full zero fill",
}
_RULES = {name: rule for rule, names in _KINDS.items() for name in names.split()}
_PRODUCTS = (_product, _added_product, _linear, _convolution, _attention)


def rule_of(func: Any) -> Rule | None:
    """The rule of an operation of PyTorch's; None where there is none."""
    name = func.overloadpacket.__name__
    name = name if name.startswith("__") else name.rstrip("_")
    if "attention" in name:
        return _attention
    return _RULES.get(name) or (_aligned if torch.Tag.pointwise in func.tags else None)


def is_product(rule: Rule | None) -> bool:
    """Whether an operation multiplies matrices, so that its result is a new space."""
    return rule in _PRODUCTS


def is_made(rule: Rule | None) -> bool:
    """Whether an operation only uses a tensor's shape."""
    return rule is _made
