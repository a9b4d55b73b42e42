"""Find a host's decoder layers and, in each, the site: the branch whose output the delta is added to.

Names lie (``post_attention_layernorm`` means two opposite things in Llama and Gemma2), so the site is found from numbers:

1. One short forward records each layer's input x, its children's outputs o and inputs h, and its output.
2. Sequential layer: the site is the earliest child with ``h == x + scale * o`` for the input h of a later child (the
   reader), where the layer's output is that same h plus a later child's output. Parallel layer (GPT-NeoX, Phi): no child
   reads the post-attention residual and ``out == x + o1 + o2``; the site is o1, the earlier of the two.
3. Proof: a second forward adds a random delta at every site. Reader and output must move by exactly that delta, in every
   layer. A host that fails is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from realigner.errors import RealignerError
from realigner.hosts import text_config

CONTEXT_KEY = "irm_context"  # the keyword argument that carries a forward's deltas from the decoder to its layers
_PROBE_TOKENS = 7
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Site:
    """The proven place of one layer where a delta joins the residual stream.

    Attributes:
        layer: index of the layer.
        branch: name of the layer's child whose output the delta is added to.
        kind: ``"sequential"``, or ``"parallel"`` where the layer's own MLP does not see the delta.
        scale: the layer computes ``x + scale * branch`` (1 but for Granite's kind); the delta is divided by it.
        reader: the child that reads the post-attention residual; empty for parallel layers.
        carrier: the child that receives the decoder's extra keyword arguments; empty where none does.
    """

    layer: int
    branch: str
    kind: str
    scale: float
    reader: str
    carrier: str


@dataclass(frozen=True)
class HostSites:
    """The decoder, its layers and the site of each."""

    decoder: nn.Module
    layers: nn.ModuleList
    path: str
    sites: tuple[Site, ...]

    def summary(self) -> dict[str, Any]:
        """The finding as JSON for an adapter's config; one value where all layers agree, else a list."""
        found: dict[str, Any] = {"layers": self.path}
        for key in ("branch", "kind", "scale", "reader"):
            values = [getattr(site, key) for site in self.sites]
            found[key] = values[0] if len(set(values)) == 1 else values
        return found


@dataclass(eq=False)
class _Call:
    """One call of a layer's child: its name, the residual-shaped tensors it read, and the one it returned."""

    child: str
    inputs: list[torch.Tensor]
    output: torch.Tensor | None


@dataclass
class _LayerRecord:
    """What one forward showed of a layer: input x, output, the calls of its children in order, the context's carrier."""

    x: torch.Tensor | None = None
    out: torch.Tensor | None = None
    calls: list[_Call] = field(default_factory=list)
    carrier: str = ""


@dataclass(frozen=True)
class _Finding:
    """A layer's site as arithmetic: out == x + scale * branch + scale2 * other, read at `reader` when sequential."""

    branch: int
    scale: float
    other: int
    scale2: float
    reader: tuple[int, int] | None  # (call, which of its inputs)


def find_layers(host: nn.Module, path: str | None = None) -> tuple[nn.Module, nn.ModuleList, str]:
    """The text decoder, its layers and their path within the host.

    Raises:
        RealignerError: when no ModuleList of the configured number of layers is there; name it with `path`.
    """
    count = int(text_config(host).num_hidden_layers)
    get_decoder = getattr(host, "get_decoder", None)
    decoder: nn.Module = get_decoder() if callable(get_decoder) else host
    prefix = next((name for name, module in host.named_modules() if module is decoder), "")
    if path is not None:
        try:
            layers = host.get_submodule(path)
        except AttributeError:
            raise RealignerError(f"layers_path: the host has no module {path!r}") from None
        if not isinstance(layers, nn.ModuleList) or len(layers) != count:
            raise RealignerError(f"layers_path: {path!r} is not a list of the host's {count} layers")
        return decoder, layers, path
    lists = [
        (sum(p.numel() for p in module.parameters()), f"{prefix}.{name}".strip("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise RealignerError(f"{type(host).__name__}: found no list of {count} decoder layers; name it with layers_path")
    _, found, module = max(lists, key=lambda entry: entry[0])
    return decoder, module, found


def find_sites(host: nn.Module, path: str | None = None) -> HostSites:
    """Probe a host and prove the site of every layer (two short forwards; the host is left as it was).

    Args:
        host: a transformers causal language model.
        path: where its decoder layers are, when `find_layers` cannot tell.

    Raises:
        RealignerError: naming the layer and the reason, when a site cannot be proven. Such a host is refused.

    Example:
        >>> from realigner.census import tiny_host
        >>> find_sites(tiny_host("llama")).summary()["branch"]
        'self_attn'
    """
    decoder, layers, path = find_layers(host, path)
    name = type(host).__name__
    with _as_in_evaluation(host), torch.no_grad():
        clean = _run(host, decoder, layers)
        findings = []
        for index, record in enumerate(clean):
            finding = _find(record, _config_scales(host))
            if finding is None:
                raise RealignerError(f"{name}: layer {index} has no post-attention residual the probe can prove; refused")
            findings.append(finding)
        _prove(name, _run(host, decoder, layers, findings, clean), findings)
    sites = tuple(_site(index, record, finding) for index, (record, finding) in enumerate(zip(clean, findings, strict=True)))
    return HostSites(decoder, layers, path, sites)


def first_hidden(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states among a layer's arguments: ``hidden_states=``, else the first tensor of three axes."""
    given = kwargs.get("hidden_states")
    if isinstance(given, torch.Tensor):
        return given
    return next((a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3), None)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor a module returned: itself, or the first of its tuple."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def _site(index: int, record: _LayerRecord, finding: _Finding) -> Site:
    return Site(
        layer=index,
        branch=record.calls[finding.branch].child,
        kind="parallel" if finding.reader is None else "sequential",
        scale=finding.scale,
        reader="" if finding.reader is None else record.calls[finding.reader[0]].child,
        carrier=record.carrier,
    )


# --- the two forwards ---------------------------------------------------------------------------------------------------


def _run(
    host: nn.Module,
    decoder: nn.Module,
    layers: nn.ModuleList,
    findings: Sequence[_Finding] | None = None,
    clean: Sequence[_LayerRecord] | None = None,
) -> list[_LayerRecord]:
    """One short forward, recorded; with `findings`, a random delta is added at each site (see `_random_delta`)."""
    records = [_LayerRecord() for _ in layers]
    device = next(host.parameters()).device
    vocabulary = int(text_config(host).vocab_size)
    ids = (torch.arange(1, _PROBE_TOKENS + 1, device=None if device.type == "meta" else device) * 37) % vocabulary
    with ExitStack() as stack:
        for index, (layer, record) in enumerate(zip(layers, records, strict=True)):
            site_call = None if findings is None else findings[index].branch
            _watch(stack, layer, record, site_call, index)
        arguments: dict[str, Any] = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        try:
            decoder(**arguments, **{CONTEXT_KEY: records})
        except TypeError as error:
            if CONTEXT_KEY not in str(error):
                raise
            for record in records:
                record.calls.clear()
            decoder(**arguments)
    return records


def _watch(stack: ExitStack, layer: nn.Module, record: _LayerRecord, site_call: int | None, seed: int) -> None:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_hidden(args, kwargs)
        record.x = None if x is None else x.clone()

    def after(_: nn.Module, __: Any, output: Any) -> None:
        out = first_tensor(output)
        record.out = None if out is None else out.clone()

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    for name, child in layer.named_children():

        def child_before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
            if CONTEXT_KEY in kwargs:
                kwargs = {key: value for key, value in kwargs.items() if key != CONTEXT_KEY}
                record.carrier = record.carrier or name
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            seen = [] if record.x is None else [t.reshape(record.x.shape).clone() for t in tensors if _alike(t, record.x)]
            record.calls.append(_Call(name, seen, None))
            return args, kwargs

        def child_after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
            call = next(c for c in reversed(record.calls) if c.child == name)
            out = first_tensor(output)
            if out is None or record.x is None or not _alike(out, record.x):
                return None
            if site_call is None or record.calls.index(call) != site_call:
                call.output = out.reshape(record.x.shape).clone()
                return None
            moved = out + _random_delta(out, seed)
            call.output = moved.reshape(record.x.shape).clone()
            return (moved, *output[1:]) if isinstance(output, (tuple, list)) else moved

        handles.append(child.register_forward_pre_hook(child_before, with_kwargs=True))
        handles.append(child.register_forward_hook(child_after))
    for handle in handles:
        stack.callback(handle.remove)


def _alike(tensor: torch.Tensor, x: torch.Tensor) -> bool:
    # Some layers flatten batch and position for their MLP: compare sizes, not axes.
    return tensor.dim() > 0 and tensor.numel() == x.numel() and tensor.shape[-1] == x.shape[-1]


def _random_delta(like: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return (noise * like.float().pow(2).mean().sqrt().cpu()).to(like)


@contextmanager
def _as_in_evaluation(host: nn.Module) -> Iterator[None]:
    training = [module for module in host.modules() if module.training]
    host.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- the arithmetic -----------------------------------------------------------------------------------------------------


def _find(record: _LayerRecord, scales: Sequence[float]) -> _Finding | None:
    x, out = record.x, record.out
    if x is None or out is None or out.shape != x.shape:
        return None
    return _sequential(record, x, out, scales) or _parallel(record, x, out, scales)


def _sequential(record: _LayerRecord, x: torch.Tensor, out: torch.Tensor, scales: Sequence[float]) -> _Finding | None:
    found: list[tuple[float, _Finding]] = []
    for i, call in enumerate(record.calls):
        if call.output is None:
            continue
        for j, later in enumerate(record.calls[i + 1 :], start=i + 1):
            for k, h in enumerate(later.inputs):
                scale = _fit(h - x, call.output, scales)
                if scale is None:
                    continue
                error = _error(h, x + scale * call.output, scale * call.output)
                rest = _rest(record, j, out - h, out, h, scales) if error <= _tolerance(h) else None
                if rest is not None:
                    found.append((error, _Finding(i, scale, *rest, (j, k))))
    if not found:
        return None
    # In half precision a branch and its norm are nearly proportional: the earliest of the best matches, not of all.
    best = min(error for error, _ in found)
    return next(finding for error, finding in found if error <= max(10 * best, 1e-6))


def _rest(
    record: _LayerRecord, start: int, difference: torch.Tensor, out: torch.Tensor, h: torch.Tensor, scales: Sequence[float]
) -> tuple[int, float] | None:
    """The later call (and scale) whose output is what the layer adds to the post-attention residual."""
    for m in range(len(record.calls) - 1, start - 1, -1):
        output = record.calls[m].output
        scale = None if output is None else _fit(difference, output, scales)
        if output is not None and scale is not None and _error(out, h + scale * output, output) <= _tolerance(out):
            return m, scale
    return None


def _parallel(record: _LayerRecord, x: torch.Tensor, out: torch.Tensor, scales: Sequence[float]) -> _Finding | None:
    outputs = [(i, call.output) for i, call in enumerate(record.calls) if call.output is not None]
    for i, o1 in outputs:
        for j, o2 in outputs:
            if i < j:
                scale = _fit(out - x, o1 + o2, scales)
                if scale is not None and _error(out, x + scale * (o1 + o2), scale * o1) <= _tolerance(out):
                    return _Finding(i, scale, j, scale, None)
    return None


def _fit(difference: torch.Tensor, branch: torch.Tensor, scales: Sequence[float]) -> float | None:
    """The scalar s with ``difference == s * branch`` in the least-squares sense, snapped to 1 or to a config's number."""
    a, b = difference.double().flatten(), branch.double().flatten()
    energy = torch.dot(b, b)
    if not bool(torch.isfinite(energy)) or energy == 0:
        return None
    scale = float(torch.dot(a, b) / energy)
    for known in (1.0, *scales):
        if abs(scale - known) <= min(10 * _tolerance(branch), 0.1) * known:
            return known
    return scale if scale > 1e-3 else None


def _error(actual: torch.Tensor, expected: torch.Tensor, branch: torch.Tensor) -> float:
    """RMS difference over the branch's RMS, so that a tiny branch cannot hide; 0 when equal to the bit."""
    if torch.equal(actual, expected):
        return 0.0
    difference = (actual.double() - expected.double()).pow(2).mean().sqrt()
    return float(difference / branch.double().pow(2).mean().sqrt())


def _tolerance(tensor: torch.Tensor) -> float:
    return _TOLERANCE.get(tensor.dtype, 1e-4)


def _config_scales(host: nn.Module) -> list[float]:
    values = vars(text_config(host)).items()
    return [float(v) for k, v in values if (isinstance(v, float) and "multiplier" in k) or k == "residual_scale"]


def _prove(name: str, moved: Sequence[_LayerRecord], findings: Sequence[_Finding]) -> None:
    for index, (record, finding) in enumerate(zip(moved, findings, strict=True)):
        x, out = record.x, record.out
        if x is None or out is None:
            raise RealignerError(f"{name}: layer {index} did not run the same way twice; refused")
        branch, other = record.calls[finding.branch].output, record.calls[finding.other].output
        if branch is None or other is None:
            raise RealignerError(f"{name}: layer {index} did not run the same way twice; refused")
        residual = x + finding.scale * branch
        where = f"{name}: layer {index}: a delta at {record.calls[finding.branch].child}"
        if finding.reader is not None:
            call, which = finding.reader
            if _error(record.calls[call].inputs[which], residual, branch) > _tolerance(x):
                raise RealignerError(f"{where} misses its reader; refused")
        if _error(out, residual + finding.scale2 * other, branch) > _tolerance(x):
            raise RealignerError(f"{where} misses the skip path; refused")
