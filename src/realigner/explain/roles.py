"""The role of each parameter of a host in the residual stream: whether it writes, reads or scales it.

Inferred from the operations of one short forward, not from names or sizes (`axes`): a parameter has a role if one of its axes
is the stream's. Then a product that multiplies the axis away reads the stream, one that ends in it writes, a vector that scales
what was just averaged over it is a norm's gain. `edits.permuted` proves a host's roles by an exact symmetry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import realigner.probe as probe
from realigner.errors import RealignerError
from realigner.explain.axes import Axis, Joined, is_made, is_product, rule_of, tensors_in
from realigner.hosts import text_config
from realigner.locate import find_sites
from realigner.sites import HostSites

_TOKENS = 7
_UNKNOWN = float("nan")
_CHANGE = frozenset(("mul", "div", "rsub", "neg", "exp", "pow", "tanh", "sigmoid", "reciprocal", "softplus", "abs"))
_MULTIPLY = ("mul", "div", "native_layer_norm", "_fused_rms_norm", "addcmul", "lerp")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Role:
    """The role of a parameter in the residual stream.

    Attributes:
        kind: ``"embedding"``: rows ``[..., D]`` that are looked up and added to the stream (tokens, positions). ``"read"``: a
            matrix that multiplies the (normed) stream away; the head is one. ``"write"``: a matrix whose products are added to
            it. ``"bias"``: added outside a norm, to what such a matrix gives. ``"gain"``, ``"shift"``: a norm's weight and bias
            over the stream. ``"scale"``: a vector that multiplies the stream outside a norm (RWKV's time mixing).
        axis: which axis of the tensor is the stream; of a matrix within the stream the one that it reads.
        place: ``"embedding"``, ``"attention"`` (whatever mixes positions), ``"mlp"``, ``"final"`` (the last norm), ``"head"``.
            A norm of the stream has the place of the first matrix that reads what it gives; one of a branch's output has the
            branch's. One that feeds both branches of a parallel layer has the place of the one that runs first.
        layer: the layer it is in, or None.
        offset: of a gain: what is added to the weight before it multiplies (Gemma's 1); NaN where the weight is used in
            another way.
        also: other axes of the tensor that are the stream too.
        stays: what it scales or adds is part of the stream (embeddings, writing matrices, their biases and norms; all norms
            of post-norm layers), where a pre-norm's gain only changes what is read.
    """

    kind: str
    axis: int
    place: str
    layer: int | None
    offset: float = 0.0
    also: tuple[int, ...] = ()
    stays: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of the tensor that are the stream."""
        return (self.axis, *self.also)


@dataclass(frozen=True)
class Stream:
    """A host's residual stream, as found in one forward.

    Attributes:
        sites: the host's layers and the site of each.
        roles: parameter name -> role; a tied parameter under each of its names.
        buffers: name -> axes, of the buffers that have the stream as an axis (fixed position tables).
        final: the name of the module that norms the stream last, between the layers and the head; empty if none does.
        broken: what takes the stream apart, so that its indices are no longer alike: operations and where they are.
    """

    sites: HostSites
    roles: dict[str, Role]
    buffers: dict[str, tuple[int, ...]]
    final: str
    broken: tuple[str, ...]


def roles_of(host: nn.Module) -> dict[str, Role]:
    """The role of every parameter that touches the residual stream, by name (tied ones by each of their names).

    Four short forwards (three are `find_sites`'); the host is left as it was. A parameter that a plain forward never uses (a
    cross-attention without an encoder) has no role, but an expert that no token was sent to has its neighbour's.

    Raises:
        RealignerError: where no site can be proven, or the layers do not share one stream.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> roles_of(tiny_host("llama"))["model.layers.1.mlp.down_proj.weight"]
        Role(kind='write', axis=0, place='mlp', layer=1, offset=0.0, also=(), stays=True)
    """
    return find_stream(host).roles


def final_norm(host: nn.Module, stream: Stream | None = None) -> tuple[nn.Module, str]:
    """The module that norms the stream last, before the head, and its name; `stream` is the host's, if at hand.

    Raises:
        RealignerError: as `roles_of`; and where nothing norms the stream there.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> final_norm(tiny_host("gpt2"))[1]
        'transformer.ln_f'
    """
    name = (stream or find_stream(host)).final
    if not name:
        raise RealignerError(f"{type(host).__name__}: nothing norms the residual stream between its layers and its head")
    return host.get_submodule(name), name


def find_stream(host: nn.Module) -> Stream:
    """The stream with its roles, from one set of forwards.

    Raises:
        RealignerError: as `roles_of`.
    """
    sites = find_sites(host)
    watch = _Watch(host, sites)
    with probe.as_in_evaluation(host), torch.no_grad(), watch.hooks(), watch:
        host(input_ids=short_input(host, _TOKENS), use_cache=False)
    return _Roles(host, watch).stream_found()


def short_input(host: nn.Module, tokens: int) -> torch.Tensor:
    """A prompt of `tokens` different tokens, [1, tokens], on the host's device."""
    vocabulary = int(text_config(host).vocab_size)
    return ((torch.arange(1, tokens + 1, device=next(host.parameters()).device) * 37) % vocabulary).unsqueeze(0)


# --- watching -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Value:
    """What is known of a tensor of the forward.

    Attributes:
        nodes: for each axis its node in the union-find.
        source: the parameter (or buffer) whose entries it holds, and `origin`: for each axis which axis of that it is.
        offset: what has been added to those entries.
        raw: computed from the stream without a product.
        uses: the vectors (by the number of their use) that scaled it, or were added, since the last product.
    """

    nodes: tuple[int, ...]
    source: int | None = None
    origin: tuple[int | None, ...] = ()
    offset: float = 0.0
    raw: bool = False
    uses: frozenset[int] = frozenset()


@dataclass(eq=False)
class _Use:
    """One use of a parameter. `feeds`: the first product (by the number of its use) that reads what it scaled."""

    source: int
    name: str
    how: str  # "product", "mul", "add" or "lookup"
    spent: tuple[int, ...]  # axes of the parameter that the product multiplies away
    offset: float
    raw: bool
    layer: int | None
    part: str  # "attention", "mlp" or "single"; outside the layers "before" or "after"
    call: int
    feeds: int | None = None
    stays: bool = False


@dataclass(frozen=True)
class _Operation:
    """One operation of the forward, its tensors, and what it does to their axes."""

    name: str
    product: bool
    args: Any
    inputs: list[tuple[torch.Tensor, _Value]]
    outs: list[torch.Tensor]
    joined: Joined

    def mixes(self) -> bool:
        """Whether positions meet in it: attention, a convolution, a scan."""
        if self.name == "bmm":
            return all(value.source is None for _, value in self.inputs)
        scan = self.name == "cumsum" and self.outs[0].is_floating_point()  # of whole numbers: experts count their tokens
        return "attention" in self.name or "convolution" in self.name or scan


class _Watch(TorchDispatchMode):
    """Joins the axes of one forward's tensors, and notes every use of a parameter."""

    def __init__(self, host: nn.Module, sites: HostSites) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host, self.sites = host, sites
        self.parent: list[int] = []
        self.values: dict[int, _Value] = {}
        self.kept: list[torch.Tensor] = []  # so that no id is used twice
        self.names: dict[int, list[str]] = {}
        self.uses: list[_Use] = []
        self.averaged: list[tuple[int, int, str, str]] = []  # (node, call of a module, its name, part): reductions
        self.lost: list[tuple[int, str]] = []  # (node, what does not keep the axis, and where)
        self.streams: list[int] = []  # nodes of the layers' inputs and outputs
        self.mixing: set[int] = set()  # layers in which positions meet
        self.calls = [(0, "")]  # the modules that run: number of the call, name
        self.count = 0
        self.layer: int | None = None
        self.began = False
        self.past: set[int] = set()  # layers whose branch is done
        tensors = [*host.named_parameters(remove_duplicate=False), *host.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            self.names.setdefault(id(tensor), []).append(name)
            value = self.value(tensor)
            value.source, value.origin = id(tensor), tuple(range(tensor.dim()))
        self.seen: set[int] = set()  # parameters that an operation took

    # axes

    def value(self, tensor: torch.Tensor) -> _Value:
        found = self.values.get(id(tensor))
        if found is None:
            first = len(self.parent)
            self.parent += range(first, first + tensor.dim())
            found = self.values[id(tensor)] = _Value(tuple(range(first, first + tensor.dim())))
            self.kept.append(tensor)
        return found

    def node(self, axis: Axis) -> int:
        return self.value(axis.tensor).nodes[axis.number]

    def root(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = node = self.parent[self.parent[node]]
        return node

    # modules

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow which module and which layer runs."""

        def enter(name: str) -> None:
            self.count += 1
            self.calls.append((self.count, name))

        def leave() -> None:
            self.calls.pop()

        def begin(layer: int, args: Any, kwargs: Any) -> None:
            self.layer, self.began = layer, True
            self._is_stream(probe.first_hidden(args, kwargs))

        def end(output: Any) -> None:
            self._is_stream(probe.first_tensor(output))
            self.layer = None

        handles = []
        try:
            for name, module in self.host.named_modules():
                handles.append(module.register_forward_pre_hook(lambda _, __, name=name: enter(name)))
            for index, (layer, site) in enumerate(zip(self.sites.layers, self.sites.sites, strict=True)):
                branch = layer.get_submodule(site.branch)
                handles += [
                    layer.register_forward_pre_hook(lambda _, *given, index=index: begin(index, *given), with_kwargs=True),
                    branch.register_forward_hook(lambda *_, index=index: self.past.add(index)),
                    layer.register_forward_hook(lambda _, __, output: end(output)),
                ]
            handles += [module.register_forward_hook(lambda *_: leave()) for module in self.host.modules()]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_stream(self, hidden: torch.Tensor | None) -> None:
        assert hidden is not None  # find_sites refuses others
        value = self.value(hidden)
        value.raw = True
        self.streams.append(value.nodes[-1])
        for use in value.uses:
            self.uses[use].stays = True

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        outs = tensors_in(out)
        if not outs:
            return out
        rule = rule_of(func)
        joined = Joined() if rule is None else rule(args, kwargs, outs)
        inputs = [(tensor, self.value(tensor)) for tensor in tensors_in((args, kwargs))]
        self.seen |= {value.source for _, value in inputs if value.source is not None}
        product, made = is_product(rule), is_made(rule)
        op = _Operation(func.overloadpacket.__name__, product, args, inputs, outs, joined)
        call, module = self.calls[-1]
        for a, b in joined.pairs:
            self.parent[self.root(self.node(a))] = self.root(self.node(b))
        kept = {(id(axis.tensor), axis.number) for axis in [axis for pair in joined.pairs for axis in pair] + joined.spent}
        for tensor, value in inputs:
            for number, node in enumerate(value.nodes):
                if (id(tensor), number) not in kept:
                    self.lost.append((node, f"{op.name} in {module or 'the host'}"))
        if not (product or made):
            self.averaged += [(self.node(axis), call, module, self._part()) for axis in joined.spent]
        if self.layer is not None and op.mixes():
            self.mixing.add(self.layer)
        floating = [(tensor, value) for tensor, value in inputs if tensor.is_floating_point() and not made]
        own = [(tensor, value) for tensor, value in floating if value.source is not None]
        if own and len({value.source for _, value in floating}) == 1 and op.name != "embedding":
            self._derive(op, *own[0])
        else:
            self._use(op, floating, own)
        return out

    def _derive(self, op: _Operation, tensor: torch.Tensor, value: _Value) -> None:
        """The results hold a parameter's own entries: as they are, as a view, with a number added."""
        offset = value.offset
        numbers = [a for a in op.args if isinstance(a, int | float) and not isinstance(a, bool)]
        if op.name in ("add", "sub") and len(numbers) == 1:
            offset += numbers[0] if op.name == "add" else -numbers[0]
        elif op.name in _CHANGE:
            offset = _UNKNOWN
        for out in op.outs:
            if out is tensor:
                continue
            origin: list[int | None] = [None] * out.dim()
            for a, b in op.joined.pairs:
                for old, new in ((a, b), (b, a)):
                    if old.tensor is tensor and new.tensor is out:
                        origin[new.number] = value.origin[old.number]
            derived = self.value(out)
            derived.source, derived.origin, derived.offset = value.source, tuple(origin), offset

    def _use(self, op: _Operation, floating: list[tuple[torch.Tensor, _Value]], own: list[tuple[torch.Tensor, _Value]]) -> None:
        """Record which parameters an operation uses, and on what kind of activation; the results inherit it."""
        # raw: an input comes from the stream with no product in between. uses: the parameters (numbers in self.uses) that
        # scaled or shifted the inputs since their last product.
        raw = any(value.raw for _, value in floating)
        uses = frozenset().union(*(value.uses for _, value in floating))
        made: set[int] = set()
        for tensor, value in own:
            assert value.source is not None
            gone = [value.origin[axis.number] for axis in op.joined.spent if axis.tensor is tensor] if op.product else []
            how = "lookup" if op.name == "embedding" else "product" if gone else "add"
            if op.name.startswith(_MULTIPLY) and not (len(op.args) > 3 and op.args[3] is tensor):  # fourth: a norm's shift
                how = "mul"
            spent = tuple(axis for axis in gone if axis is not None)
            offset = _UNKNOWN if op.name.startswith(("div", "lerp")) else value.offset
            name, (call, _) = self._name(value.source), self.calls[-1]
            number = len(self.uses)
            self.uses.append(_Use(value.source, name, how, spent, offset, raw, self.layer, self._part(), call))
            if how != "product":
                made.add(number)
                continue
            # This product reads what the earlier parameters gave: a norm's gain belongs to the first matrix that it feeds.
            for earlier in (self.uses[n] for n in uses):
                earlier.feeds = number if earlier.feeds is None else earlier.feeds
        # After a product or a look-up the history starts anew; a look-up's result is the stream, a product's is not.
        anew = op.product or op.name == "embedding"
        for out in op.outs:
            value = self.value(out)
            if value.source is None:
                value.raw = op.name == "embedding" or (raw and not op.product)
                value.uses = frozenset(made) if anew else uses | made

    def _name(self, source: int) -> str:
        """Of a tied parameter the name by which the module that runs knows it."""
        running = {name for _, name in self.calls}
        own = [name for name in self.names[source] if name.rpartition(".")[0] in running]
        return max(own, key=len) if own else self.names[source][0]

    def _part(self) -> str:
        if self.layer is None:
            return "after" if self.began else "before"
        site = self.sites.sites[self.layer]
        if site.kind == "single":
            return "single"
        if site.kind == "sequential":
            return "mlp" if self.layer in self.past else "attention"
        branch = f"{self.sites.path}.{self.layer}.{site.branch}"
        return "attention" if any(name == branch for _, name in self.calls) else "mlp"


# --- inferring --------------------------------------------------------------------------------------------------------------


class _Roles:
    """Infers the roles from a watched forward."""

    def __init__(self, host: nn.Module, watch: _Watch) -> None:
        self.host, self.watch = host, watch
        roots = [watch.root(node) for node in watch.streams]
        if len(set(roots)) != 1:
            where = next(n for n, root in enumerate(roots) if root != roots[0]) // 2
            raise RealignerError(f"{type(host).__name__}: layer {where} has another residual stream than layer 0; refused")
        self.stream = roots[0]
        norms = [(call, module, part) for node, call, module, part in watch.averaged if watch.root(node) == self.stream]
        self.norms = {call for call, _, _ in norms}
        self.last, self.final = -1, ""
        for call, module, part in norms:
            # Within the last layer: what it gives goes through no other product before the head's.
            feeds = [watch.uses[use.feeds] for use in watch.uses if use.call == call and use.feeds is not None]
            if part == "after" or any(use.part == "after" for use in feeds):
                self.last, self.final = call, module

    def stream_found(self) -> Stream:
        watch, host = self.watch, self.host
        parameters: dict[str, torch.Tensor] = dict(host.named_parameters(remove_duplicate=False))
        roles = {name: role for name, parameter in parameters.items() if (role := self._role(name, parameter)) is not None}
        unseen = {name: parameter.shape for name, parameter in parameters.items() if id(parameter) not in watch.seen}
        roles |= _siblings(unseen, roles, parameters, watch.sites.path)
        buffers = {
            name: axes for name, buffer in host.named_buffers(remove_duplicate=False) if (axes := self._axes(id(buffer)))
        }
        broken = tuple(dict.fromkeys(what for node, what in watch.lost if watch.root(node) == self.stream))
        return Stream(watch.sites, roles, buffers, self.final, broken)

    def _axes(self, source: int) -> tuple[int, ...]:
        nodes = self.watch.values[source].nodes
        return tuple(axis for axis, node in enumerate(nodes) if self.watch.root(node) == self.stream)

    def _role(self, name: str, parameter: torch.Tensor) -> Role | None:
        axes = self._axes(id(parameter))
        uses = [use for use in self.watch.uses if use.source == id(parameter)]
        if not axes or not uses:
            return None
        use = next((use for use in uses if use.name == name), uses[0])
        kind, axis = self._kind(use, axes)
        also = tuple(other for other in axes if other != axis)
        stays = use.stays if use.how in ("mul", "add") else kind != "read" or (bool(also) and use.layer is not None)
        return Role(kind, axis, self._place(use), use.layer, use.offset if kind == "gain" else 0.0, also, stays)

    def _kind(self, use: _Use, axes: tuple[int, ...]) -> tuple[str, int]:
        read = [axis for axis in axes if axis in use.spent]
        if use.how == "product":
            return ("read", read[0]) if read else ("write", axes[0])
        if use.how == "lookup":
            return "embedding", axes[-1]
        if use.call in self.norms:
            return ("gain" if use.how == "mul" else "shift"), axes[-1]
        if use.how == "mul":
            return "scale", axes[-1]
        return ("embedding" if use.part == "before" else "bias"), axes[-1]

    def _place(self, use: _Use) -> str:
        if use.part == "before":
            return "embedding"
        if use.how in ("mul", "add") and use.call in self.norms:
            if use.call == self.last:
                return "final"
            if use.raw and use.feeds is not None:
                place = self._place(self.watch.uses[use.feeds])
                return "mlp" if place == "head" and use.layer is not None else place
        if use.part == "after":
            return "head"
        if use.part == "single":
            return "attention" if use.layer in self.watch.mixing else "mlp"
        return use.part


def _siblings(
    unseen: dict[str, torch.Size], roles: dict[str, Role], parameters: dict[str, torch.Tensor], path: str
) -> dict[str, Role]:
    """Roles for parameters that no token reached, from those that differ from them in a number only (experts)."""
    layer_of = re.compile(rf"^{re.escape(path)}\.(\d+)\.")
    kinds: dict[str, dict[int | None, Role]] = {}
    for name, role in roles.items():
        kinds.setdefault(f"{_NUMBER.sub('#', name)} {list(parameters[name].shape)}", {})[role.layer] = role
    found = {}
    for name, shape in unseen.items():
        alike = kinds.get(f"{_NUMBER.sub('#', name)} {list(shape)}")
        if alike:
            inside = layer_of.match(name)
            layer = int(inside[1]) if inside else None
            found[name] = replace(alike.get(layer) or next(iter(alike.values())), layer=layer)
    return found
