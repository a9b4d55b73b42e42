"""The layout of a trace: names and shapes in its `xarray.Dataset`, how a text becomes a trace, and how traces are joined.

A *text* is one run's tokens of one prompt and its reply. All texts lie one after the other on one flat ``token`` axis, because
runs answer the same prompt at different lengths; every token carries its labels.

============  ===============================================================================================================
on ``token``  coordinates ``run``, ``tone``, ``seed``, ``prompt``, ``position``, ``is_generated``, ``token_id``, ``token_text``;
              ``turn``, the number of the message in the conversation whose content the token is of, from 0 (-1: the chat
              template's own, or not known), and ``role``, whose message that is (empty for those);
              ``energy``, ``l1``, ``l4`` (sums over neurons of delta^2, ``|delta|``, delta^4) and ``small`` (how many
              ``|delta|`` are below 1e-4), each ``[token, layer]``; on request ``delta [token, layer, neuron]`` and
              ``h0 [token, neuron]``
on ``text``   coordinates ``text_run``, ``text_tone``, ``text_seed``, ``text_prompt``, ``text_question``, ``text_reply``;
              ``sum``, ``sum_abs``, ``sum_sq``, ``max_abs`` of delta ``[text, part, layer, neuron]``; the text's largest values
              ``top_value``, ``top_position``, ``top_layer``, ``top_neuron [text, rank]``
others        ``part``: the prompt, the first 10 generated tokens (the paper's choice), the rest; ``layer``; ``neuron``
attributes    ``source``, ``layout``, ``host``, ``runs`` (run -> tone, seed, strength, irm, sha256, network,
              untrained), and whatever the
              maker noted under ``notes`` (the bare host's replies, how replies were made)
============  ===============================================================================================================

Numbers are NaN in layers that a run's IRM does not add to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from realigner.dialogues import spoken
from realigner.errors import UsageError

SOURCE = "realigner.record"  # the attribute that marks a trace of realigner
LAYOUT = 2
PARTS = ("prompt", "opening", "rest")
OPENING = 10  # generated tokens in the part "opening"
TOP = 10_000  # largest values kept of a text
SMALL = 1e-4  # the paper's threshold for a value that counts as zero ("sparsity")
UNTRAINED = "untrained"  # the tone of a baseline

TOKEN_LABELS = ("run", "tone", "seed", "prompt", "position", "is_generated", "token_id", "token_text", "turn", "role")
LATER = ("turn", "role")  # labels that traces recorded before there were conversations do not have
TEXT_LABELS = ("text_run", "text_tone", "text_seed", "text_prompt", "text_question", "text_reply")
TOKEN_SUMS = ("energy", "l1", "l4", "small")
TEXT_SUMS = ("sum", "sum_abs", "sum_sq", "max_abs")
TOPS = ("top_value", "top_position", "top_layer", "top_neuron")
ALWAYS = (*TOKEN_SUMS, "count", *TEXT_SUMS, *TOPS)
ON_REQUEST = ("delta", "h0")
MOST = {"token": 5_000_000, "text": 1_000_000, "part": len(PARTS), "layer": 10_000, "neuron": 1_000_000, "rank": 1 << 23}


def _arrays() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for dim, names in (("token", TOKEN_LABELS), ("text", TEXT_LABELS)):
        for name in names:
            is_words = name.removeprefix("text_") in ("run", "tone", "question", "reply", "token_text", "role")
            found[name] = (dim,), ("string" if is_words else "bool" if name == "is_generated" else "int64",)
    found |= {"layer": (("layer",), ("int64",)), "neuron": (("neuron",), ("int64",)), "part": (("part",), ("string",))}
    found |= dict.fromkeys(TOKEN_SUMS, (("token", "layer"), ("float32",)))
    found |= dict.fromkeys(TEXT_SUMS, (("text", "part", "layer", "neuron"), ("float32",)))
    found |= {name: (("text", "rank"), ("float32" if name == "top_value" else "int32",)) for name in TOPS}
    found["count"] = ("text", "part"), ("int64",)
    found["delta"] = ("token", "layer", "neuron"), ("float16", "float32")
    found["h0"] = ("token", "neuron"), ("float32",)
    return found


ARRAYS = _arrays()  # of every array there can be: its dimensions, the types it is stored in


@dataclass(frozen=True)
class RunLabel:
    """The run that a text belongs to, and what is needed to reproduce it.

    Attributes:
        run: name, unique within a trace.
        tone: the tone it was trained for; `UNTRAINED` for a baseline.
        seed: of the initial weights and the data order.
        strength: the IRM's strength while it was recorded.
        irm: the IRM's folder.
        sha256: of the network's weights (`adapter_hash`); `replay` refuses other weights.
        network: a hash of the network's shape; runs of the same one are compared with the same untrained twin.
    """

    run: str
    tone: str = ""
    seed: int = 0
    strength: float = 1.0
    irm: str = ""
    sha256: str = ""
    network: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything but the name, as stored in a trace's attributes."""
        facts = asdict(self)
        del facts["run"]
        return facts | {"untrained": self.tone == UNTRAINED}


@dataclass
class Summary:
    """The reductions of one text, in numpy; shapes as in the module's table, without the ``text`` axis."""

    count: np.ndarray
    text_sums: dict[str, np.ndarray]
    token_sums: dict[str, np.ndarray]
    top_value: np.ndarray
    top_position: np.ndarray
    top_layer: np.ndarray  # offsets into `layers`
    top_neuron: np.ndarray


def parts_of(is_generated: np.ndarray, generated_before: int = 0) -> np.ndarray:
    """The part (index into `PARTS`) of each of a text's consecutive tokens, after `generated_before` generated ones."""
    nth = generated_before + np.cumsum(is_generated)
    return np.where(is_generated, np.where(nth <= OPENING, 1, 2), 0)


def text_spans(trace: xr.Dataset) -> list[slice]:
    """Where each text lies on the token axis."""
    stops = np.cumsum(trace["count"].values.sum(axis=1)).astype(int).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def unlabelled(tokens: int) -> dict[str, np.ndarray]:
    """The labels ``turn`` and ``role`` of tokens whose conversation is not known."""
    return {"turn": _column(-1, tokens), "role": _column("", tokens)}


def text_dataset(
    label: RunLabel,
    prompt: int,
    question: str,
    layers: Sequence[int],
    tokens: Mapping[str, np.ndarray],
    summary: Summary,
    delta: np.ndarray | None = None,
    h0: np.ndarray | None = None,
    reply: str = "",
) -> xr.Dataset:
    """One text as a dataset.

    Args:
        label, prompt, question: the run, the prompt's number and its text.
        layers: the layers that the run's IRM adds to.
        tokens: ``position``, ``is_generated``, ``token_id``, ``token_text``, one value a token; ``turn`` and ``role`` where
            the conversation is known.
        summary: its reductions.
        delta: ``[token, layer, neuron]``, where raw deltas are kept.
        h0: ``[token, neuron]``, where deltas are to be recomputed from it.
        reply: the generated text.
    """
    n = len(tokens["position"])
    labels = {"run": label.run, "tone": label.tone, "seed": label.seed, "prompt": prompt}
    coords: dict[str, Any] = {"layer": np.asarray(layers, dtype=np.int64)}
    coords["neuron"] = np.arange(summary.text_sums["sum"].shape[-1], dtype=np.int64)
    coords["part"] = np.array(PARTS, dtype=object)
    coords |= {key: ("token", _column(value, n)) for key, value in labels.items()}
    coords |= {key: ("token", value) for key, value in (unlabelled(n) | dict(tokens)).items()}
    coords |= {
        f"text_{key}": ("text", _column(value, 1)) for key, value in (labels | {"question": question, "reply": reply}).items()
    }
    values: dict[str, Any] = {key: (("token", "layer"), value) for key, value in summary.token_sums.items()}
    values["count"] = (("text", "part"), summary.count[None])
    values |= {key: (("text", "part", "layer", "neuron"), value[None]) for key, value in summary.text_sums.items()}
    named = np.append(coords["layer"], -1).astype(np.int32)  # an offset of -1 is no layer
    tops = (summary.top_value, summary.top_position, named[summary.top_layer], summary.top_neuron)
    values |= {key: (("text", "rank"), value[None]) for key, value in zip(TOPS, tops, strict=True)}
    if delta is not None:
        values["delta"] = (("token", "layer", "neuron"), delta)
    if h0 is not None:
        values["h0"] = (("token", "neuron"), h0)
    return xr.Dataset(values, coords)


def with_layers(trace: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    """A trace with more layers, NaN in those that it lacks."""
    if trace["layer"].values.tolist() == list(layers):
        return trace
    return trace.reindex(layer=np.asarray(layers, dtype=np.int64))


def join(
    parts: Sequence[xr.Dataset], host: str, labels: Sequence[RunLabel], notes: Mapping[str, Any] | None = None
) -> xr.Dataset:
    """Several texts' datasets as one trace, in their order, over all layers that any of them has."""
    layers = sorted({int(layer) for part in parts for layer in part["layer"].values})
    wide = [with_layers(part, layers) for part in parts]
    first = wide[0]
    names = {str(name): first[name].dims for name in first.variables}
    joined: dict[str, Any] = {}
    for name, dims in names.items():
        axis = next((at for at, dim in enumerate(dims) if dim in ("token", "text")), None)
        values = [part[name].values for part in wide] if axis is not None else [first[name].values]
        joined[name] = (dims, np.concatenate(values, axis=axis) if axis is not None else values[0])
    coords = {name: value for name, value in joined.items() if name in first.coords}
    trace = xr.Dataset({name: value for name, value in joined.items() if name not in coords}, coords)
    return trace.assign_attrs(attributes(host, labels, notes))


def attributes(host: str, labels: Sequence[RunLabel], notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A trace's attributes.

    Raises:
        UsageError: when two runs have one name and are not the same.
    """
    runs: dict[str, Any] = {}
    for label in labels:
        if not _same(runs.setdefault(label.run, label.facts()), label.facts()):
            raise UsageError(f"trace: two runs are named {label.run!r}; give one of them another name")
    return {"source": SOURCE, "layout": LAYOUT, "host": host, "runs": runs, "notes": dict(notes or {})}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs are the same: in everything, or with the same weights in two folders."""
    folders = {"irm"} if one["sha256"] else set()
    return all(one[key] == other[key] for key in one.keys() - folders)


def join_traces(traces: Sequence[xr.Dataset]) -> xr.Dataset:
    """Several traces of one host as one.

    Texts that several of them share are kept once: those of an untrained twin (of runs of one seed), and those of a trained
    run whose weights are known (`RunLabel.sha256`).

    Raises:
        UsageError: for traces of different hosts, traces that keep different data, different runs of the same name, prompts
            that have one number and are not the same, or a trained run that answers one prompt in several of them.

    Example:
        >>> both = join_traces([anger, sadness])  # doctest: +SKIP
    """
    if not traces:
        raise UsageError("trace: there is nothing to join")
    for what, values in (
        ("are of different hosts", {str(trace.attrs.get("host")) for trace in traces}),
        ("have different numbers of neurons", {trace.sizes["neuron"] for trace in traces}),
        ("keep different things (summaries, deltas, h0)", {tuple(sorted(map(str, trace.data_vars))) for trace in traces}),
        ("keep different numbers of largest values", {trace.sizes["rank"] for trace in traces}),
    ):
        if len(values) > 1:
            raise UsageError(f"trace: these traces {what}: {', '.join(sorted(map(str, values)))}")
    labels = [label for trace in traces for label in labels_of(trace)]
    attributes("", labels)  # which refuses different runs of one name
    _refuse_other_prompts([enumerate(trace.attrs["notes"].get("prompts", [])) for trace in traces])
    _refuse_other_prompts([_questions(trace) for trace in traces])
    there: set[tuple[Any, ...]] = set()
    parts: list[xr.Dataset] = []
    for trace in traces:
        texts, spans = _identities(trace), text_spans(trace)
        new = _new_texts(trace, texts, there)
        parts += [trace] if len(new) == len(texts) else [trace.isel(token=spans[at], text=slice(at, at + 1)) for at in new]
        there |= set(texts)
    return join(parts, str(traces[0].attrs["host"]), labels, traces[0].attrs["notes"])


def _questions(trace: xr.Dataset) -> list[tuple[int, str]]:
    """The number of each text's prompt, and what was asked, as far as that is known: of a dialogue, not the run's replies."""
    asked = zip(trace["text_prompt"].values.tolist(), trace["text_question"].values.tolist(), strict=True)
    return [
        (number, " / ".join(said for role, said in spoken(question) if role != "assistant"))
        for number, question in asked
        if question
    ]


def _refuse_other_prompts(asked: Iterable[Iterable[tuple[int, Any]]]) -> None:
    """Refuse traces in which one number is that of different prompts."""
    known: dict[int, Any] = {}
    for prompts in asked:
        for number, other in prompts:
            if (one := known.setdefault(number, other)) != other:
                raise UsageError(
                    f"trace: prompt {number} is {one!r:.60} in one of these traces and {other!r:.60} in another; record them "
                    "with the same prompts"
                )


def _identities(trace: xr.Dataset) -> list[tuple[Any, ...]]:
    """What makes a text the same in two traces: its run, its prompt (in front), its words and its tokens."""
    ids, spans = trace["token_id"].values, text_spans(trace)
    labels = zip(*(trace[name].values.tolist() for name in ("text_run", "text_prompt", *TEXT_LABELS)), strict=True)
    return [(*label, ids[span].tobytes()) for label, span in zip(labels, spans, strict=True)]


def _new_texts(trace: xr.Dataset, texts: Sequence[tuple[Any, ...]], there: Collection[tuple[Any, ...]]) -> list[int]:
    """Which texts of a trace are not in those before it."""
    answered = {text[:2] for text in there}
    known = {label.run for label in labels_of(trace) if label.sha256}
    new = []
    for at, (text, tone) in enumerate(zip(texts, trace["text_tone"].values, strict=True)):
        run, prompt = text[:2]
        if text in there and (tone == UNTRAINED or run in known):
            continue
        if tone != UNTRAINED and (run, prompt) in answered:
            raise UsageError(f"trace: {run!r} answers prompt {prompt} in several of these traces; leave out all but one")
        new.append(at)
    return new


def labels_of(trace: xr.Dataset) -> list[RunLabel]:
    """The runs in a trace, by its attributes."""
    facts = ("tone", "seed", "strength", "irm", "sha256", "network")
    return [RunLabel(run, **{key: given[key] for key in facts if key in given}) for run, given in trace.attrs["runs"].items()]


def _column(value: Any, n: int) -> np.ndarray:
    if isinstance(value, str):
        return np.array([value] * n, dtype=object)
    return np.full(n, value, dtype=np.int64)
