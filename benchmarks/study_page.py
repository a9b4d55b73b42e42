"""The page of a study (`study.py`), made from its records alone: every number on it is in one of them.

    python benchmarks/study_page.py [docs/results/paper-on-smollm2]

The folder holds a record of each arm, size.json, differences.json and, once the cause was asked for, explain.json; the page is
written beside it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realigner.analysis.consensus import rank_biased_overlap
from realigner.analysis.resampling import interval, ranks
from realigner.explain.verdict import CAUSES
from realigner.files import read_object, write_text
from realigner.markdown import escaped

Record = Mapping[str, Any]
TITLES = {"paper": "the paper's recipe", "defects": "with its code's two mistakes", "compact": "compact network"}
ABOUT = {
    "paper": "the paper's network and its recipe, without the mistakes of its code",
    "defects": "the same with them (labels are shifted twice, so that each position learns the token after the next; padding "
    "counts in the loss), over all layers alone",
    "compact": "realigner's default network and recipe (prompts in the host's chat template, the loss on replies alone)",
}
STATISTICS = {
    "icc": "striation: intraclass correlation over layers",
    "icc without 10": "the same without the 10 leading indices",
    "neuron over layer": "variance (omega squared) by neuron minus that by layer",
    "overlap": "consensus: rank-biased overlap of runs that differ in tone and seed",
    "overlap, same seed": "the same for runs that differ in tone alone",
}
MAIN = "one_leader"  # the paper's main finding
PAPER_SAYS = {
    "neuron_over_layer": "What is added lines up by neuron index, not by layer",
    "striation": "Its heat maps have vertical lines: an index in every layer",
    "one_leader": "Index 1512 stands out in all runs",
    "shared_indices": "It does so whatever the tone and the data",
    "early": "Most of the largest values fall early in a text (Figure 3)",
}
PAPER_ROWS = 60_000  # of each tone
_TELLING = ("recurs", "moves", "no channel", "gain", "ordinary", "random host")  # conclusions that are told in short
_SHOWN, _LEADERS = 160, 4  # characters of a reply; indices in a cell


def differences(arm: Record) -> dict[str, dict[str, float]]:
    """By how much the statistics of an arm with changes exceed those of the same runs without.

    Draws are paired: the n-th has the same prompts and tones in both.

    Args:
        arm: its record.

    Returns:
        statistic -> ``plain``, ``other``, ``value`` (their difference), ``low``, ``high`` (95%), ``n``; and in how many of the
        runs (``pairs``) it ``rose``.
    """
    found = {}
    for name in STATISTICS:
        a, b = arm["unchanged"][name], arm["compared"][name]
        value = b["value"] - a["value"]
        low, high = interval(value, np.array(b["draws"]) - np.array(a["draws"]), a["n"])
        of_a, of_b = a.get("by_run", {}), b.get("by_run", {})
        rose = sum(of_b[run] > of_a[run] for run in of_a)
        rounded = {key: round(number, 5) for key, number in (("value", value), ("low", low), ("high", high))}
        found[name] = {"plain": a["value"], "other": b["value"], **rounded, "n": a["n"], "rose": rose, "pairs": len(of_a)}
    return found


def by_layers(record: Record) -> list[dict[str, Any]]:
    """An arm's trained runs by the layers they act on.

    Returns:
        For each set of ``layers``, in the order of the runs: ``runs``, their number; ``icc`` and ``difference`` (variance by
        neuron minus that by layer), means over runs; ``overlap``, the mean rank-biased overlap of the ``pairs`` of runs that
        differ in tone and seed, None without any; and ``leaders``: index -> in how many runs it leads, most often first.
    """
    trained = [run for run in record["runs"] if run["steps"]]
    found = []
    for layers in dict.fromkeys(run["layers"] for run in trained):
        own = [run for run in trained if run["layers"] == layers]
        ranked = ranks(-np.array([record["scores"][run["run"]] for run in own]))
        pairs = [
            (a, b)
            for (a, one), (b, other) in combinations(enumerate(own), 2)
            if one["tone"] != other["tone"] and one["seed"] != other["seed"]
        ]
        overlaps = [rank_biased_overlap(ranked[a], ranked[b]) for a, b in pairs]
        entry: dict[str, Any] = {"layers": layers, "runs": len(own), "pairs": len(pairs)}
        for key, name in (("icc", "icc"), ("difference", "neuron over layer")):
            entry[key] = float(np.mean([record["compared"][name]["by_run"][run["run"]] for run in own]))
        entry["overlap"] = float(np.mean(overlaps)) if overlaps else None
        entry["leaders"] = _counted(record["compared"]["leader share"]["by_run"][run["run"]] for run in own)
        found.append(entry)
    return found


def standing(record: Record, index: int, layers: str | None = None) -> dict[str, Any]:
    """How an index ranks in an arm's trained runs, of one set of layers or of all: ``runs``, ``first`` (in how many it leads),
    ``median``, ``best``, ``worst``.
    """
    own = [run["run"] for run in record["runs"] if run["steps"] and layers in (None, run["layers"])]
    placed = sorted(rank_of(record["scores"][run], index) for run in own)
    middle = _number(float(np.median(placed)))
    return {"runs": len(own), "first": placed.count(1), "median": middle, "best": placed[0], "worst": placed[-1]}


def rank_of(scores: Sequence[float], index: int) -> int:
    """An index's place among a run's scores ``[neuron]``; 1 is the largest."""
    return 1 + sum(score > scores[index] for score in scores)


def page(folder: Path) -> str:
    """The page of the records in a folder, as Markdown."""
    arms = {arm: read_object(folder / f"{arm}.json") for arm in TITLES}
    size, change = (read_object(folder / f"{name}.json") for name in ("size", "differences"))
    why = read_object(folder / "explain.json") if (folder / "explain.json").is_file() else None
    paper, defects = arms["paper"], arms["defects"]
    trained = [run for run in paper["runs"] if run["steps"]]
    verdicts = {arm: {own["key"]: own for own in record["verdicts"]} for arm, record in arms.items()}
    asked = [own for key, own in verdicts["paper"].items() if key in PAPER_SAYS and key != MAIN]
    leader, without, mistaken = (own["leader share"] for own in (paper["compared"], defects["unchanged"], defects["compared"]))
    question = paper["replies"][0]["question"]
    said = {
        arm: {own["run"]: own["reply"] for own in record["replies"] if own["question"] == question}
        for arm, record in arms.items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["escaped"] = escaped
    layer_sets = {run["layers"] for run in trained}
    index = why["index"] if why else leader["index"]
    sets = [(arm, own) for arm, record in arms.items() for own in by_layers(record)]
    return environment.get_template("study.md.j2").render(
        name=folder.name,
        arms=[
            {"name": arm, "title": _title(arm), "about": ABOUT[arm], "runs": sum(run["steps"] > 0 for run in record["runs"])}
            for arm, record in arms.items()
        ],
        led=lambda leaders: ", ".join(f"{index} ({count})" for index, count in leaders[:_LEADERS]),
        several_sets=len(layer_sets) > 1,
        prompts=verdicts["paper"][MAIN]["prompts"],
        overlap_pairs=defects["compared"]["overlap"]["pairs"],
        host=paper["host"],
        dtypes=_dtypes(arms),
        squad=paper["squad"],
        stream=f"{paper['layers']} layers of {paper['neurons']}",
        version=paper["realigner"],
        size=size,
        rows_share=size["rows"] / PAPER_ROWS,
        trained=trained,
        twins=len(paper["runs"]) - len(trained),
        parameters=max(run["parameters"] for run in trained),
        steps=_range(run["steps"] for run in trained),
        runs_here=f"{len(trained)}, of three tones, two seeds, "
        + ("all layers and each third of them" if len(layer_sets) > 1 else "all layers"),
        percent=lambda share: f"{100 * share:.0f}%",
        titles=list(TITLES.values()),
        others=list(TITLES)[1:],
        claims=[
            {
                "paper": PAPER_SAYS.get(key, "(no claim)"),
                "measured": f"{own['claim']} ({own['measure']})",
                "found": [_verdict(verdicts[arm].get(key)) for arm in arms],
            }
            for key, own in verdicts["paper"].items()
        ],
        main=verdicts["paper"][MAIN],
        others_asked={
            answer: [_claimed(own) for own in asked if own["verdict"] == answer]
            for answer in ("supported", "not supported", "cannot tell")
        },
        counts=[
            {"title": _title(arm), **{key: own["striation"][key] for key in ("runs", "n", "prompts", "tokens")}}
            for arm, own in verdicts.items()
        ],
        leader=leader,
        without=without,
        mistaken=mistaken,
        index=index,
        standings=[
            {"title": _title(arm), "layers": own["layers"], **standing(arms[arm], index, own["layers"])} for arm, own in sets
        ],
        sets=[{"arm": arm, "title": _title(arm), **own} for arm, own in sets],
        mistaken_ranks=standing(defects, index),
        compact_ranks=standing(arms["compact"], index),
        width=paper["neurons"],
        leaders=_counted(leader["by_run"].values()),
        compact_leaders=_counted(arms["compact"]["compared"]["leader share"]["by_run"].values()),
        effects=[_changed(name, change[name]) for name in ("icc", "overlap")],
        same_leader=_in_common(without["by_run"], mistaken["by_run"]),
        trained_again=_in_common(*(own["icc"]["by_run"] for own in (defects["unchanged"], paper["compared"]))) < without["n"],
        same_leader_again=_in_common(without["by_run"], leader["by_run"]),
        mistakes=[
            {**own, "about": STATISTICS[name], "unit": defects["compared"][name]["unit"]} for name, own in change.items()
        ],
        seeds=[{**record["seeds"], "title": _title(arm)} for arm, record in arms.items() if "seeds" in record],
        why=why,
        cause=CAUSES[why["cause"]] if why else "",
        found_out=[
            f"{own['question'][:1].lower()}{own['question'][1:]}"
            for own in (why["conclusions"] if why else ())
            if own.get("key") in _TELLING and own["answer"] == "supported"
        ],
        losses=[{"title": _title(arm), **_losses(record)} for arm, record in arms.items()],
        question=question,
        replies=[{"run": run, "said": [_cut(said[arm].get(run, "")) for arm in arms]} for run in said["paper"]],
    )


def _dtypes(arms: Mapping[str, Record]) -> str:
    """The host's dtype: ``bfloat16``; or which arms had which, as ``bfloat16 (compact network), float32 (…)``."""
    found: dict[str, list[str]] = {}
    for arm, record in arms.items():
        found.setdefault(record["dtype"], []).append(TITLES[arm])
    return next(iter(found)) if len(found) == 1 else ", ".join(f"{dtype} ({', '.join(own)})" for dtype, own in found.items())


def _in_common(own: Record, other: Record) -> int:
    """In how many of its runs another record has the same value."""
    return sum(other[run] == value for run, value in own.items())


def _title(arm: str) -> str:
    return TITLES[arm][:1].upper() + TITLES[arm][1:]


def _claimed(found: Record) -> str:
    """A claim with its measure, its value and the untrained twins'."""
    bare = "" if found["untrained"] is None else f"; untrained {found['untrained']:.3f}"
    value = "" if found["value"] is None else f" ({found['measure']}: {found['value']:.3f}{bare})"
    return f"{found['claim'][:1].lower()}{found['claim'][1:]}{value}"


def _verdict(found: Record | None) -> str:
    """A verdict as a table's cell: what was found, what it was decided by, and why."""
    if found is None or found["value"] is None:
        return "-"
    parts = [f"{found['value']:.3f}"]
    if found["key"] == MAIN:
        parts += [] if found["null"] is None else [f"by chance {found['null']:.3f}"]
    else:
        if found["difference"] is None or found["key"] == "neuron_over_layer":  # which its own interval decides too
            parts[0] += _interval(found, "low", "high")
        if found["difference"] is not None:
            parts.append(f"minus untrained: {found['difference']:+.3f}{_interval(found, 'difference_low', 'difference_high')}")
    parts += [] if found["p_adjusted"] is None else [f"p {found['p_adjusted']:.2g}"]
    return f"**{found['verdict']}**: {'; '.join(parts)}. {found['why']}"


def _interval(found: Record, low: str, high: str) -> str:
    return "" if found[low] is None else f" ({found[low]:.3f} to {found[high]:.3f})"


def _changed(name: str, change: Record) -> str:
    """A statistic without the mistakes and with them."""
    about = {"icc": "striation", "overlap": "agreement between runs that differ in tone and seed"}[name]
    interval = f"{change['value']:+.4f}, {change['low']:+.4f} to {change['high']:+.4f}"
    return f"{about} is {change['plain']:.3f} without and {change['other']:.3f} with them (difference {interval})"


def _counted(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Each index and how often it is there, most often first."""
    return Counter(indices).most_common()


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _losses(record: Record) -> dict[str, Any]:
    runs = [run for run in record["runs"] if "kept_loss" in run]
    keys = {"steps": "steps", "first": "first_loss", "kept": "kept_loss"}
    return {"runs": len(runs)} | {name: _range(run[key] for run in runs) for name, key in keys.items()}


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1].rstrip()}…"


def _range(values: Iterable[float]) -> str:
    found: Sequence[float] = sorted(values)
    first, last = (f"{value:.2f}" if isinstance(value, float) else f"{value:,}" for value in (found[0], found[-1]))
    return first if first == last else f"{first} to {last}"


def write_page(folder: Path) -> Path:
    """Write the page beside its records."""
    place = folder.parent / f"{folder.name}.md"
    write_text(place, page(folder))
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/results/paper-on-smollm2"))
    print(write_page(parser.parse_args().folder))


if __name__ == "__main__":
    main()
