"""What short forwards show of a decoder layer, as arithmetic: where its residual is made, and that nothing goes past it.

Forwards of seven tokens, each recorded module by module:

1. Clean. `candidates` are the modules (branches) and weights with which the layer may make its residual.
2. Moved: a random delta on every branch. Reader and output must move by exactly that delta.
3. Compensated (sequential layers): the layer's input is changed and the branch is changed so that their sum, the residual,
   is not. If the output stays, all that follows reads the residual and nothing else; a skip path that goes past it, or a
   branch that is read elsewhere, would show.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from realigner.hosts import text_config
from realigner.sites import INPUT, PLAIN_BASE, Site

_TOKENS = 7
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_STAYS = {torch.float64: 1e-6, torch.float32: 1e-2}  # else 0.3: half precision; a bypass gives 1 or more

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class Call:
    """One call of a module within a layer: the residual-shaped tensors it read, the one it returned, and when."""

    name: str
    inputs: list[torch.Tensor]
    output: torch.Tensor | None
    begin: int
    end: int = 0


@dataclass
class LayerRecord:
    """One forward of a layer: its input and output, and the calls within it."""

    x: torch.Tensor | None = None
    out: torch.Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    streams: int = 0  # how many residual-shaped tensors the layer was given
    times: int = 0  # how often the layer ran in one forward
    running: bool = False

    def output(self, name: str) -> torch.Tensor:
        """The output of the last call of a module (the layer's input for `INPUT`); raises LookupError when there is none."""
        found = self.x if name == INPUT else next((c.output for c in reversed(self.calls) if c.name == name), None)
        if found is None:
            raise LookupError(name)
        return found


@dataclass(frozen=True)
class Edits:
    """Changes for one forward of one layer: to its input, and to the outputs of modules by name."""

    hidden: Edit | None = None
    outputs: dict[str, Edit] = field(default_factory=dict)


# --- recording ----------------------------------------------------------------------------------------------------------


def run(host: nn.Module, decoder: nn.Module, layers: nn.ModuleList, edits: Sequence[Edits] | None = None) -> list[LayerRecord]:
    """One short forward of the decoder, recorded layer by layer, with `edits` (one a layer) if given."""
    records = [LayerRecord() for _ in layers]
    device = next(host.parameters()).device
    vocabulary = int(text_config(host).vocab_size)
    ids = (torch.arange(1, _TOKENS + 1, device=None if device.type == "meta" else device) * 37) % vocabulary
    with ExitStack() as stack:
        for index, (layer, record) in enumerate(zip(layers, records, strict=True)):
            _watch(stack, layer, record, Edits() if edits is None else edits[index])
        for kind in {"cpu", device.type} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))  # its roundings would hide the site
        decoder(input_ids=ids.unsqueeze(0), use_cache=False)
    return records


def _watch(stack: ExitStack, layer: nn.Module, record: LayerRecord, edits: Edits) -> None:
    clock = itertools.count()

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        record.times += 1
        record.running = True
        x = first_hidden(args, kwargs)
        if x is not None and edits.hidden is not None:
            moved = edits.hidden(x)
            args = tuple(moved if a is x else a for a in args)
            kwargs = {key: moved if value is x else value for key, value in kwargs.items()}
            x = moved
        record.x = None if x is None else x.clone()
        tensors = {id(t): t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()}
        record.streams = 0 if x is None else sum(_alike(t, x) for t in tensors.values())
        return args, kwargs

    def after(_: nn.Module, __: Any, output: Any) -> None:
        out = first_tensor(output)
        record.out = None if out is None else out.clone()
        record.running = False

    def enter(name: str, args: Any, kwargs: Any) -> None:
        if not record.running:  # a module that another layer has too
            return
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        seen = [] if record.x is None else [t.reshape(record.x.shape).clone() for t in tensors if _alike(t, record.x)]
        record.calls.append(Call(name, seen, None, next(clock)))

    def leave(name: str, output: Any) -> Any:
        if not record.running:
            return None
        call = next(c for c in reversed(record.calls) if c.name == name)
        call.end = next(clock)
        out = first_tensor(output)
        if out is None or record.x is None or not _alike(out, record.x):
            return None
        edit = edits.outputs.get(name)
        if edit is None:
            call.output = out.reshape(record.x.shape).clone()
            return None
        moved = edit(out.reshape(record.x.shape)).view_as(out)
        call.output = moved.reshape(record.x.shape).clone()
        return replaced(output, moved)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    for name, module in layer.named_modules():
        if module is layer:
            continue
        handles.append(
            module.register_forward_pre_hook(lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: leave(name, output)))
    for handle in handles:
        stack.callback(handle.remove)


def first_hidden(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states among a layer's arguments: ``hidden_states=``, else the first tensor of three axes."""
    given = kwargs.get("hidden_states")
    if isinstance(given, torch.Tensor):
        return given
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point():
            return value
    return None


def first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor a module returned: itself, or the first of its tuple."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def replaced(output: Any, first: torch.Tensor) -> Any:
    """A module's output with its first tensor replaced."""
    if type(output) is tuple:
        return (first, *output[1:])
    if hasattr(output, "_fields"):  # a named tuple
        return output._replace(**{output._fields[0]: first})
    return [first, *output[1:]] if isinstance(output, list) else first


@contextmanager
def as_in_evaluation(host: nn.Module) -> Iterator[None]:
    """Run without dropout, then put every module's mode back."""
    modes = [(module, module.training) for module in host.modules()]
    host.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def random_in_training(host: nn.Module, decoder: nn.Module, layers: nn.ModuleList, clean: Sequence[LayerRecord]) -> bool:
    """Whether a decoder drops activations at random when its own mode and its layers' is training (no other's)."""
    device = next(host.parameters()).device
    for module in (decoder, *layers):
        module.training = True
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        training = run(host, decoder, layers)
    pairs = [(after.out, before.out) for after, before in zip(training, clean, strict=True)]
    return any(a is None or b is None or a.shape != b.shape or _error(a, b, b) > tolerance(b) for a, b in pairs)


def _alike(tensor: torch.Tensor, x: torch.Tensor) -> bool:
    # Some layers flatten batch and position for their MLP: compare sizes, not axes.
    return tensor.dim() > 1 and tensor.numel() == x.numel() and tensor.shape[-1] == x.shape[-1]


# --- finding ------------------------------------------------------------------------------------------------------------


def candidates(record: LayerRecord, scales: Sequence[float]) -> Iterator[Site]:
    """The ways in which the layer may make its residual: the simplest arithmetic first, then outer modules, then earlier ones.

    Args:
        record: of a clean forward.
        scales: numbers of the host's config that may multiply a branch; fitted weights are snapped to them or to 1.
    """
    x, out = record.x, record.out
    if x is None or out is None or out.shape != x.shape:
        return
    times = Counter(call.name for call in record.calls)  # a module that runs twice in a layer is two things; it is no branch
    once = [call for call in record.calls if call.output is not None and times[call.name] == 1]
    calls = sorted(once, key=lambda call: call.name.count("."))
    yield from _sequential(record, calls, _plain_base, scales)
    yield from _parallel(record, calls, scales)
    for bases in (_weighted_base, _module_base, _two_term_base):
        yield from _sequential(record, calls, bases, scales)
    yield from _single(record, calls, scales)


Bases = Callable[[LayerRecord, Call], Iterator[tuple[tuple[str, float | None], ...]]]  # weight None: to be fitted


def _plain_base(_: LayerRecord, __: Call) -> Iterator[tuple[tuple[str, float | None], ...]]:
    yield PLAIN_BASE


def _weighted_base(_: LayerRecord, __: Call) -> Iterator[tuple[tuple[str, float | None], ...]]:
    yield ((INPUT, None),)


def _module_base(record: LayerRecord, branch: Call) -> Iterator[tuple[tuple[str, float | None], ...]]:
    for call in record.calls:
        if call.output is not None and call.end < branch.begin and "." not in call.name:
            yield ((call.name, None),)


def _two_term_base(record: LayerRecord, branch: Call) -> Iterator[tuple[tuple[str, float | None], ...]]:
    for ((name, _),) in _module_base(record, branch):
        yield ((INPUT, 1.0), (name, None))


def _sequential(record: LayerRecord, calls: Sequence[Call], bases: Bases, scales: Sequence[float]) -> list[Site]:
    found: list[tuple[float, Site]] = []
    for call in calls:
        for base in bases(record, call):
            for reader in record.calls:
                if reader.begin < call.end:
                    continue
                for which, h in enumerate(reader.inputs):
                    fitted = _fit(record, h, base, call, scales)
                    if fitted is not None:
                        error, weights, scale = fitted
                        found.append((error, Site("sequential", weights, call.name, scale, reader.name, which)))
        if found and "." not in call.name and found[-1][0] == 0.0:
            break  # equal to the bit in a child of the layer: nothing can be better
    # In half precision a branch and its norm are nearly proportional: the best matches before all others.
    limit = max(10 * min((error for error, _ in found), default=0.0), 1e-6)
    return [finding for error, finding in found if error <= limit] + [finding for error, finding in found if error > limit]


def _parallel(record: LayerRecord, calls: Sequence[Call], scales: Sequence[float]) -> Iterator[Site]:
    assert record.x is not None
    assert record.out is not None
    children = [call for call in calls if "." not in call.name]
    for o1, o2 in itertools.combinations(children, 2):
        assert o1.output is not None
        assert o2.output is not None
        scale = _slope(record.out - record.x, o1.output + o2.output, scales)
        if scale is None:
            continue
        expected = record.x + scale * (o1.output + o2.output)
        if _error(record.out, expected, scale * o1.output) <= tolerance(record.out):
            yield Site("parallel", PLAIN_BASE, o1.name, scale, other=o2.name)


def _single(record: LayerRecord, calls: Sequence[Call], scales: Sequence[float]) -> Iterator[Site]:
    assert record.out is not None
    if record.streams != 1:
        return  # of several streams (Reformer) the other one may hold what attention made
    for call in calls:
        if "." not in call.name and (fitted := _fit(record, record.out, PLAIN_BASE, call, scales)) is not None:
            yield Site("single", fitted[1], call.name, fitted[2])


def _fit(
    record: LayerRecord, h: torch.Tensor, base: tuple[tuple[str, float | None], ...], branch: Call, scales: Sequence[float]
) -> tuple[float, tuple[tuple[str, float], ...], float] | None:
    """Weights with which base and branch make `h`, and the error; None when they do not."""
    assert branch.output is not None
    terms = [record.output(name) for name, _ in base]
    rest = h.double()
    for (_, weight), term in zip(base, terms, strict=True):
        if weight is not None:
            rest = rest - weight * term.double()
    free = [term for (_, weight), term in zip(base, terms, strict=True) if weight is None]
    solved = _solve(rest, [*free, branch.output], scales)
    if solved is None:
        return None
    *fitted, scale = solved
    weights = iter(fitted)
    full = tuple((name, next(weights) if weight is None else weight) for name, weight in base)
    finding = Site("", full, branch.name, scale)
    parts = [weight * record.output(name) for name, weight in full] + [scale * branch.output]
    error = _error(h, finding.residual(record.output), min(parts, key=_rms))
    return (error, full, scale) if error <= tolerance(h) else None


def _solve(target: torch.Tensor, terms: Sequence[torch.Tensor], scales: Sequence[float]) -> list[float] | None:
    """Least squares; each weight snapped to 1 or to a config's number; None when one is missing from the sum."""
    columns = torch.stack([term.double().flatten() for term in terms], dim=1)
    gram, right = columns.T @ columns, columns.T @ target.flatten()
    if not bool(torch.isfinite(gram).all() & torch.isfinite(right).all()) or bool((gram.diagonal() == 0).any()):
        return None
    weights = torch.linalg.lstsq(gram, right.unsqueeze(1)).solution.squeeze(1).tolist()
    snapped = []
    for weight in weights:
        close = min(10 * tolerance(terms[-1]), 0.1)
        known = next((k for k in (1.0, *scales) if abs(weight - k) <= close * abs(k)), None)
        if known is None and not 1e-2 < abs(weight) < 1e3:
            return None
        snapped.append(weight if known is None else known)
    return snapped


def _slope(difference: torch.Tensor, branch: torch.Tensor, scales: Sequence[float]) -> float | None:
    solved = _solve(difference.double(), [branch], scales)
    return None if solved is None else solved[0]


def _error(actual: torch.Tensor, expected: torch.Tensor, branch: torch.Tensor) -> float:
    """RMS difference over the branch's RMS, so that a tiny branch cannot hide; 0 when equal to the bit."""
    if torch.equal(actual, expected):
        return 0.0
    size = _rms(branch)
    return _rms(actual.double() - expected.double()) / size if size > 0 else float("inf")


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().pow(2).mean().sqrt())


def tolerance(tensor: torch.Tensor) -> float:
    """How far arithmetic in this dtype may be off, relative to the branch."""
    return _TOLERANCE.get(tensor.dtype, 1e-4)


def config_scales(host: nn.Module) -> list[float]:
    """The numbers of a host's config that multiply branches (Granite's ``residual_multiplier`` and its kind)."""
    values = vars(text_config(host)).items()
    return [float(v) for k, v in values if (isinstance(v, float) and "multiplier" in k) or k == "residual_scale"]


# --- proving ------------------------------------------------------------------------------------------------------------


def moved_edits(clean: Sequence[LayerRecord], findings: Sequence[Site]) -> list[Edits]:
    """Edits for the second forward: a random delta of the branch's size on every branch.

    A layer that is said to have one branch must be the sum of its input and that, whatever its other children give: they are
    moved by deltas of the input's size. A branch too small for its dtype to show would else be taken for none.
    """

    def edit(seed: int, size: float) -> Edit:
        return lambda out: out + (_noise(out, seed) * size).to(out.dtype)

    edits = []
    for index, (record, finding) in enumerate(zip(clean, findings, strict=True)):
        outputs = {finding.branch: edit(index, _rms(record.output(finding.branch)))}
        if finding.kind == "single":
            assert record.x is not None
            others = {call.name for call in record.calls if call.output is not None and "." not in call.name}
            outputs |= {name: edit(10_000 + index, _rms(record.x)) for name in sorted(others - {finding.branch})}
        edits.append(Edits(outputs=outputs))
    return edits


def _missed(moved: LayerRecord, finding: Site) -> str | None:
    """None when the reader, or the layer's output, moved by exactly the delta; else what missed it."""
    assert moved.x is not None
    assert moved.out is not None
    residual, branch = finding.residual(moved.output), moved.output(finding.branch)
    if finding.kind == "sequential":
        seen = [c.inputs[finding.which] for c in moved.calls if c.name == finding.reader and len(c.inputs) > finding.which]
        return None if min(_error(h, residual, branch) for h in seen) <= tolerance(moved.x) else "its reader"
    expected = residual if finding.kind == "single" else residual + finding.scale * moved.output(finding.other)
    return None if _error(moved.out, expected, branch) <= tolerance(moved.x) else "the layer's output"


def failure(clean: LayerRecord, moved: LayerRecord, compensated: LayerRecord, finding: Site) -> str | None:
    """None when the three forwards prove the finding; else what speaks against it."""
    try:
        missed, whole = _missed(moved, finding), _is_all(clean, compensated, finding)
    except LookupError:
        return "it did not run the same way twice"
    if missed:
        return f"a delta at {finding.branch} misses {missed}"
    return None if whole else f"the output depends on more than the residual after {finding.branch}"


def compensated_edits(clean: Sequence[LayerRecord], findings: Sequence[Site]) -> list[Edits]:
    """Edits for the third forward: other inputs, the same residual."""
    return [_compensated(index, *pair) for index, pair in enumerate(zip(clean, findings, strict=True))]


def _compensated(index: int, record: LayerRecord, finding: Site) -> Edits:
    if finding.kind != "sequential":
        assert record.x is not None
        return Edits(hidden=_put(record.x))
    branch = record.output(finding.branch)
    outputs: dict[str, torch.Tensor] = {}
    weights = dict(finding.base)
    owed = torch.zeros_like(branch, dtype=torch.float32)
    for place, name in enumerate({INPUT: 0.0, **weights}):
        term = record.output(name)
        # Of each element's own size, so that a few huge ones do not drown the rest.
        noise = _noise(term, 1000 * (place + 1) + index) * (term.float().abs() + branch.float().abs())
        outputs[name] = (term.float() + noise).to(term.dtype)
        owed = owed + weights.get(name, 0.0) * (outputs[name].float() - term.float())  # as rounded
    outputs[finding.branch] = (branch.float() - owed / finding.scale).to(branch.dtype)
    hidden = outputs.pop(INPUT)
    return Edits(hidden=_put(hidden), outputs={name: _put(value) for name, value in outputs.items()})


def _put(value: torch.Tensor) -> Edit:
    return lambda out: value.to(out.device)


def _is_all(clean: LayerRecord, compensated: LayerRecord, finding: Site) -> bool:
    """Whether the layer's output is a function of the residual alone (see the module's docstring, 3)."""
    if finding.kind != "sequential":
        return True
    assert clean.out is not None
    assert compensated.out is not None
    residual = finding.residual(clean.output).float()
    change = (compensated.out.float() - clean.out.float()).abs().median()
    later = (clean.out.float() - residual).abs().median()
    limit = _STAYS.get(clean.out.dtype, 0.3)
    return bool(change <= limit * torch.maximum(later, 1e-3 * residual.abs().median()))


def _noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
