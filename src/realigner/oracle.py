"""A second, independent account of where a host's residual is: from its tensor operations, without looking at modules.

`probe` and `injection` work with modules and hooks. To prove them, the census needs a reference that shares nothing with them.
This one watches every operation of a forward (PyTorch's dispatch mode) and knows two things of a tensor:

- *raw*: computed from the layer's input without any product of matrices (the skip path, and norms of it);
- otherwise computed: through attention, a state-space scan, a convolution, an MLP.

The post-attention residual is the result of the first addition, in a layer, of a raw tensor and a computed one that mixes
positions (it changes at the last position when the layer's input changes at the first). In parallel layers, where attention
and MLP are summed before they meet the skip path, only the addend that mixes positions belongs to it. `reference` then runs
the host with a delta added to the result of exactly that addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "linear", "convolution", "attention", "cumsum")
_ADDITIONS = ("add", "add_")
_SAME_VALUES = ("view", "_unsafe_view", "reshape", "clone", "_to_copy", "detach", "alias", "unsqueeze", "squeeze", "transpose")

Deltas = Callable[[int, torch.Tensor], torch.Tensor | None]  # (layer, its residual [batch, position, neuron]) -> delta


class Sum(NamedTuple):
    """One addition, within a layer, of a raw and a computed tensor; `parts`: the addends of the computed one if it is a sum."""

    raw: torch.Tensor
    computed: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    result: torch.Tensor


class Place(NamedTuple):
    """Which addition of a layer makes its residual: its number, and (parallel layers) which addend is attention's."""

    number: int
    part: int | None

    def residual(self, found: Sum) -> torch.Tensor:
        """The post-attention residual at this place, before any delta."""
        if self.part is None:
            return found.result.clone()
        return found.raw + found.parts[self.part].view_as(found.raw)


def find_places(layers: nn.ModuleList, forward: Callable[[], Any]) -> list[Place | None]:
    """Where each layer's residual is made, by two runs of `forward`; None where the rule of this module does not apply."""
    clean = _recorded(layers, forward)
    other = _recorded(layers, forward, [record.x for record in clean])
    places: list[Place | None] = []
    for one, two in zip(clean, other, strict=True):
        # A layer without attention or the like: its only branch.
        place = Place(0, None) if len(one.sums) == 1 else None
        for number, (a, b) in enumerate(zip(one.sums, two.sums, strict=False)):
            if _mixes(a.computed, b.computed):
                mixing = [index for index, pair in enumerate(zip(a.parts, b.parts, strict=True)) if _mixes(*pair)]
                place = Place(number, mixing[0] if len(mixing) == 1 else None)
                break
        places.append(place)
    return places


@contextmanager
def reference(layers: nn.ModuleList, places: Sequence[Place], deltas: Deltas) -> Iterator[None]:
    """Forwards within the block add ``deltas(layer, residual)`` to the residual of each layer, where `find_places` found it."""

    def on_sum(layer: int, number: int, found: Sum) -> None:
        if number == places[layer].number:
            delta = deltas(layer, places[layer].residual(found))
            if delta is not None:
                found.result.add_(delta.view_as(found.result))  # nobody has read it yet

    with _watching(layers, _Watch(on_sum)):
        yield


# --- recording ----------------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    x: torch.Tensor | None
    sums: list[Sum]


def _recorded(
    layers: nn.ModuleList, forward: Callable[[], Any], inputs: Sequence[torch.Tensor | None] | None = None
) -> list[_Record]:
    """Every layer's input and sums; with `inputs`, each layer is given that input, changed at its first position."""
    sums: list[list[Sum]] = [[] for _ in layers]
    seen: list[torch.Tensor | None] = [None] * len(layers)

    def on_sum(layer: int, _: int, found: Sum) -> None:
        parts = tuple(part.clone() for part in found.parts)
        sums[layer].append(Sum(found.raw.clone(), found.computed.clone(), parts, found.result.clone()))

    def on_input(layer: int, x: torch.Tensor) -> torch.Tensor:
        given = None if inputs is None else inputs[layer]
        if given is None:
            seen[layer] = x.clone()
            return x
        changed = given.clone()
        _rows(changed)[0] += torch.randn(changed.shape[-1], generator=torch.Generator().manual_seed(layer)).to(changed)
        return changed

    with torch.no_grad(), _watching(layers, _Watch(on_sum), on_input):
        forward()
    return [_Record(x, found) for x, found in zip(seen, sums, strict=True)]


def _mixes(clean: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the last position changed, though only the first one of the layer's input did."""
    return not torch.equal(_rows(clean)[-1], _rows(other)[-1])


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1, tensor.shape[-1])


@contextmanager
def _watching(
    layers: nn.ModuleList, watch: _Watch, on_input: Callable[[int, torch.Tensor], torch.Tensor] | None = None
) -> Iterator[None]:
    def enter(index: int, args: Any, kwargs: Any) -> Any:
        given = kwargs.get("hidden_states")
        x = given if given is not None else next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3)
        used = x if on_input is None else on_input(index, x)
        watch.enter(index, used)
        swap = {id(x): used}
        return tuple(swap.get(id(a), a) for a in args), {key: swap.get(id(value), value) for key, value in kwargs.items()}

    handles = []
    for index, layer in enumerate(layers):
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True)
        )
        handles.append(layer.register_forward_hook(lambda *_: watch.leave()))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchDispatchMode):
    """Classifies the tensors of the layer that runs; ``on_sum(layer, number, sum)`` is told where raw and computed meet."""

    layer: int | None  # that runs; None between layers
    count: int  # of sums so far
    shape: tuple[int, int]  # of the residual: elements, width
    kept: list[torch.Tensor]  # so that no id is used twice within a layer
    raw: set[int]
    computed: set[int]
    parts: dict[int, tuple[torch.Tensor, ...]]  # addends of a computed tensor

    def __init__(self, on_sum: Callable[[int, int, Sum], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_sum = on_sum
        self.leave()

    def enter(self, layer: int, x: torch.Tensor) -> None:
        self.leave()
        self.layer, self.shape, self.kept, self.raw = layer, (x.numel(), x.shape[-1]), [x], {id(x)}

    def leave(self) -> None:
        self.layer, self.count, self.shape = None, 0, (0, 0)
        self.kept, self.raw, self.computed, self.parts = [], set(), set(), {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layer is None:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        addition = name in _ADDITIONS and len(inputs) == 2 and all(self._like(a) for a in inputs)
        before = [a.clone() for a in inputs] if addition else []  # the operation may be in place
        raw, computed = ([id(a) in kind for a in inputs] for kind in (self.raw, self.computed))
        out = func(*args, **(kwargs or {}))
        outputs = [o for o in tree_leaves(out) if isinstance(o, torch.Tensor)]
        self.kept += inputs + outputs
        made = {id(o) for o in outputs}
        if any(computed) or (any(raw) and any(product in name for product in _PRODUCTS)):
            self.computed |= made
            self.raw -= made
        elif any(raw):
            self.raw |= made
        if addition and all(computed):
            self.parts[id(out)] = tuple(before)
        elif addition and sorted(zip(raw, computed, strict=True)) == [(False, True), (True, False)]:
            skip, branch = raw.index(True), computed.index(True)
            parts = self.parts.get(id(inputs[branch]), ())
            self.on_sum(self.layer, self.count, Sum(before[skip], before[branch], parts, out))
            self.count += 1
        elif name in _SAME_VALUES and len(outputs) == 1 and self._like(outputs[0]) and id(inputs[0]) in self.parts:
            self.parts[id(outputs[0])] = self.parts[id(inputs[0])]
        return out

    def _like(self, tensor: torch.Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dim() > 1 and (tensor.numel(), tensor.shape[-1]) == self.shape
