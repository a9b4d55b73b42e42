"""The input of a report: traces, the records of their runs, and explanations, each with the trace of its host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr
from safetensors import SafetensorError, safe_open

from realigner.analysis import Analysis
from realigner.dialogues import spoken
from realigner.errors import RealignerError
from realigner.evaluation.evaluation_file import is_evaluation
from realigner.explain.explanation import RESULT_FILE, Explanation, is_explanation, read_explanation
from realigner.traces.store import is_trace, load_trace
from realigner.training.run_dir import ADAPTER_FILES, read_metrics, read_run

_PREFIX = "irm."  # of an IRM's weights in its file


@dataclass(frozen=True)
class ReportInput:
    """What a report shows of one trace.

    Attributes:
        name: of the trace.
        trace: recorded deltas of runs, untrained twins among them.
        records, logs: run -> its run.json, and its losses by step, for the runs whose folder still exists.
        analysis: statistics and verdicts; without them the page has maps, replies and charts only.
        explained: explanations of indices of its host.
    """

    name: str
    trace: xr.Dataset
    records: dict[str, dict[str, Any]]
    logs: dict[str, Sequence[dict[str, Any]]]
    analysis: Analysis | None = None
    explained: tuple[Explanation, ...] = ()

    @property
    def trained(self) -> list[str]:
        """The runs that are not untrained twins."""
        return [run for run, facts in self.trace.attrs["runs"].items() if not facts["untrained"]]

    def answers(self) -> list[dict[str, Any]]:
        """The prompts with the replies: ``prompt``, ``base`` (if recorded), and one for each run.

        Of a dialogue, which each run plays in its own way, ``prompt`` has the questions and a run the list of its replies.
        """
        labels = (self.trace[f"text_{key}"].values.tolist() for key in ("prompt", "run", "question", "reply"))
        notes, asked, said = self.trace.attrs["notes"], dict[int, dict[str, str]](), dict[int, dict[str, str]]()
        for prompt, run, question, reply in zip(*labels, strict=True):
            asked.setdefault(prompt, {})[run] = question
            said.setdefault(prompt, {})[run] = reply
        for prompt, reply in enumerate(notes.get("base", [])):
            if prompt in said:
                own = dict(enumerate(notes.get("base_questions", [])))
                asked[prompt]["base"] = own.get(prompt, next(iter(asked[prompt].values())))
                said[prompt]["base"] = reply
        return [_answered(asked[prompt], said[prompt]) for prompt in asked if any(asked[prompt].values())]


def _answered(asked: dict[str, str], said: dict[str, str]) -> dict[str, Any]:
    """A prompt with its replies.

    Args:
        asked, said: run -> what it was asked, with all that was said before, and its reply.
    """
    first = next(iter(asked.values()))
    if len(set(asked.values())) == 1:
        return {"prompt": first, **said}
    earlier = {run: [text for role, text in spoken(text) if role == "assistant"] for run, text in asked.items()}
    questions = "\n".join(f"{role}: {text}" for role, text in spoken(first) if role != "assistant")
    return {"prompt": questions} | {run: [*earlier[run], reply] for run, reply in said.items()}


def gather(name: str, trace: xr.Dataset) -> ReportInput:
    """A trace with the records of its runs, as far as their folders still hold the weights that were traced."""
    found = {run: Path(own["irm"]) for run, own in trace.attrs["runs"].items() if not own["untrained"] and _is_there(own)}
    records = {run: record for run, folder in found.items() if (record := read_run(folder))}
    return ReportInput(name, trace, records, {run: read_metrics(found[run]) for run in records})


def read_inputs(sources: Sequence[Path]) -> list[ReportInput]:
    """The traces among some folders, each with the explanations of its host.

    Raises:
        RealignerError: for a damaged trace or explanation, or an explanation of another host.
    """
    inputs = [gather(source.name, load_trace(source)) for source in sources if is_trace(source)]
    explained = [read_explanation(source) for source in sources if is_explanation(source)]
    homes = [home_of(item, [part.trace for part in inputs]) for item in explained]
    return [
        replace(part, explained=tuple(item for item, home in zip(explained, homes, strict=True) if home == at))
        for at, part in enumerate(inputs)
    ]


def untraced(sources: Sequence[Path]) -> list[Path]:
    """The sources that must be traced first: neither traces, explanations, evaluations, nor runs that a trace among them has.

    Where explanations have no trace beside them, the IRMs that were explained.

    Raises:
        RealignerError: for a damaged explanation, or an explained IRM that no longer exists.
    """
    explained = [source for source in sources if is_explanation(source)]
    sources = [source for source in sources if source in explained or not is_evaluation(source)]
    if explained and len(explained) == len(sources):
        items = [read_explanation(source) for source in explained]
        for item in items:
            for name, folder in item.irms.items():
                if not Path(folder).is_dir():
                    raise RealignerError(
                        f"{item.folder / RESULT_FILE}: its IRM {name} was in {folder}, which is not there (from {Path.cwd()}); "
                        "give its folder, or a trace of it, as a source too"
                    )
        return [Path(folder) for item in items for folder in item.irms.values()]
    facts = [own for source in sources if is_trace(source) for own in load_trace(source).attrs["runs"].values()]
    traced = {Path(own["irm"]).resolve() for own in facts if _is_there(own)}
    left = [source for source in sources if not is_trace(source) and source not in explained]
    return [source for source in left if not (runs := _runs_in(source)) or not runs <= traced]


def _is_there(run: Mapping[str, Any]) -> bool:
    """Whether the folder of a traced run holds the weights that were traced; another training may stand there now."""
    file = Path(run["irm"]) / ADAPTER_FILES[1]
    if not run["irm"] or not file.is_file():
        return False
    try:
        return run["sha256"] in ("", _adapter_hash(file))
    except SafetensorError:  # a damaged file, which is not what was traced
        return False


def _adapter_hash(file: Path) -> str:
    """`traces.recording.adapter_hash` of a file of weights, without torch."""
    digest = hashlib.sha256()
    with safe_open(file, "np") as tensors:
        for key in sorted(key for key in tensors.keys() if key.startswith(_PREFIX)):  # noqa: SIM118
            values = tensors.get_tensor(key)
            digest.update(f"{key.removeprefix(_PREFIX)} torch.{values.dtype} {list(values.shape)}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()


def _runs_in(place: Path) -> set[Path]:
    """The IRM that a folder is, or those of the sweep that it is; as `find_runs`, which needs torch, and a report does not."""
    config, _ = ADAPTER_FILES
    if (place / config).is_file():
        return {place.resolve()}
    return {file.parent.resolve() for file in place.glob(f"*/{config}") if not file.parent.name.endswith(".unfinished")}


def check_hosts(sources: Sequence[Path], host: str) -> None:
    """Raise for the first explanation of another host than `host` and those of the traces (unnamed ones match any)."""
    hosts = [host, *(str(load_trace(source).attrs["host"]) for source in sources if is_trace(source))]
    names = {Path(name).name for name in hosts}
    for item in (read_explanation(source) for source in sources if is_explanation(source)):
        if not names & {item.host, ""}:
            raise _other_host(item, names)


def home_of(item: Explanation, traces: Sequence[xr.Dataset]) -> int:
    """The position of the trace that an explanation is shown with: of its host, the one with most of its IRMs.

    Raises:
        RealignerError: if none is of its host.
    """
    fitting: dict[int, int] = {}  # place -> how many of the explained IRMs it has
    for place, trace in enumerate(traces):
        name, shared = _host(trace), len(set(item.irms) & set(trace.attrs["runs"]))
        same = name == item.host if name else shared  # a host made in Python has no name
        whole = trace.sizes["neuron"] == item.width and {item.index, *item.pages} <= set(trace["neuron"].values.tolist())
        if same and whole:
            fitting[place] = shared
    if not fitting:
        hosts = {f"{_host(trace) or 'an unnamed host'} ({trace.sizes['neuron']} indices)" for trace in traces}
        raise _other_host(item, hosts)
    return max(fitting, key=fitting.__getitem__)


def _other_host(item: Explanation, hosts: Iterable[str]) -> RealignerError:
    return RealignerError(
        f"{item.folder}: explains index {item.index} of {item.host} ({item.width} indices), and the sources are of "
        f"{', '.join(sorted(hosts))}; give a trace or runs of {item.host} with it, or leave it out"
    )


def _host(trace: xr.Dataset) -> str:
    return Path(str(trace.attrs["host"])).name
