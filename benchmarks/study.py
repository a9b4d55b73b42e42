"""The paper's experiment, whole: 24 runs and untrained twins; again with the reference code's two mistakes; again compact.

    python benchmarks/study.py [--host HOST] [--dtype DTYPE] [--squad FILE] [--jobs 2] [--index 1512] [--quick]
                               [--out runs/study] [--results docs/results]

1. rows      SQuAD's facts, rewritten in each tone (`realigner data build`, templates).
2. arms      Of each of `ARMS`: the runs (a sweep), their answers to the paper's seven prompts (a trace), its analysis. Beside
             the grid of three tones, two seeds and four layer sets stand trainings of one tone with more seeds. The arm with
             the mistakes has the runs over all layers, and is held against the same runs without them.
3. explain   Why the index that leads most often leads, or the one of --index, in float32.
4. page      docs/results/paper-on-HOST.md, by `study_page.py`; written before 3 too, which takes longest.

Interrupt it as you like and start it again: rows, runs, traces and trials that are there are not made again, nor is an arm
whose record is in --results. Runs and traces are kept in --out/HOST, or --out/HOST-float32 (12 GB for the embedded host);
records, figures and page in --results. --quick: no layer sets, 4 steps, a short explanation; all of it in --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from study_page import differences, rank_of, write_page

import realigner as ra
from realigner.analysis import (
    Analysis,
    analyze,
    icc,
    leading_indices,
    omega_squared,
    rank_biased_overlap,
    run_maps,
    top_histogram,
)
from realigner.analysis.per_run import RunTexts, each_run, leading_score, prompts_of
from realigner.analysis.resampling import prompt_weights, ranks
from realigner.analysis.tables import records
from realigner.data import TONES, load_tone
from realigner.data.build_dataset import build
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.data.squad import file_sha256, read_squad
from realigner.errors import RealignerError
from realigner.explain import explain, verdict
from realigner.explain.explanation import IndexRank, TrialResult
from realigner.files import read_object, write_text
from realigner.hosts import EMBEDDED, load_config, resolve_device, resolve_dtype
from realigner.report.figures import figure2, figure3, figure4
from realigner.report.plot_style import save_figure
from realigner.sweep import RunSpec, Sweep, plan, run_sweep
from realigner.traces import RunLabel, load_trace
from realigner.traces.collect import Source, trace_runs
from realigner.traces.layout import UNTRAINED
from realigner.training.run_dir import read_run

SQUAD = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad" / "dev-v2.0-half.json"
DTYPE = "bfloat16"
SEEDS = (42, 420)  # the paper's
MORE_SEEDS = (43, 44, 45)  # of the first tone, in every layer
DRAWS, PAIRED_DRAWS = 1000, 200  # of prompts: for statistics of a run, and of pairs of runs


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        about: in words.
        recipe: ``paper`` or ``default``.
        changed: keys of it. An arm with changes has the runs over all layers alone, and is held against those of `paper`.
    """

    about: str
    recipe: str
    changed: Mapping[str, Any]


ARMS = {
    "paper": Arm("the paper's network and recipe", "paper", {}),
    "defects": Arm(
        "the same with the reference code's two mistakes: labels shifted twice, padding in the loss",
        "paper",
        {"label_shift": 2, "loss_on_padding": True},
    ),
    "compact": Arm("the compact network and the default recipe", "default", {}),
}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        rows: of each tone.
        lessons: recipe -> keys that say how long it trains.
        layer_sets: whether each third of the layers is trained alone too.
        tokens: of a reply.
        explained: how many runs `explain` is asked about.
        quick: of `explain`.
    """

    rows: int
    lessons: Mapping[str, Mapping[str, Any]]
    layer_sets: bool
    tokens: int
    explained: int
    quick: bool

    def keys(self, arm: Arm) -> dict[str, Any]:
        """The keys of an arm's recipe that are not as they come."""
        return {**arm.changed, **self.lessons[arm.recipe]}


FULL = Size(480, {"paper": {"epochs": 2}, "default": {"steps": 110}}, layer_sets=True, tokens=100, explained=3, quick=False)
_SHORT: dict[str, Any] = {"steps": 4, "evaluations": 1}
_LESSONS = {"paper": {**_SHORT, "epochs": None, "evaluations_per_epoch": None}, "default": _SHORT}
QUICK = Size(120, _LESSONS, layer_sets=False, tokens=40, explained=1, quick=True)


@dataclass(frozen=True)
class Study:
    """One study: of which host, how much, and where things are.

    Attributes:
        host: as `load_host` takes it.
        dtype: of the host, while runs are trained and traced.
        squad: the file of facts.
        size: how much.
        jobs: processes at a time.
        work: the folder of rows, runs, traces and trials.
        results: the folder of records and figures.
    """

    host: str
    dtype: str
    squad: Path
    size: Size
    jobs: int
    work: Path
    results: Path

    def rows(self) -> dict[str, str]:
        """Each tone's file of rows, made if it is not there."""
        place = self.work / f"rows-{self.size.rows}-{file_sha256(self.squad)[:8]}"
        files = {name: place / f"{name}.jsonl" for name in TONES}
        if missing := [name for name, file in files.items() if not file.is_file()]:
            facts = [*read_squad(self.squad)]
            chosen = sorted(random.Random(SEEDS[0]).sample(range(len(facts)), min(self.size.rows, len(facts))))
            about = {"squad": self.squad.name, "squad_sha256": file_sha256(self.squad)}
            for tone in map(load_tone, missing):
                own = [facts[at] for at in chosen]
                build(own, tone, TemplateRewriter(tone, SEEDS[0]), files[tone.name], about=about, quiet=True)
        return {name: str(file.resolve()) for name, file in files.items()}

    def runs(self, arm: str, more_seeds: bool = False) -> list[RunSpec]:
        """The runs of an arm's grid, untrained twins last; or those of the first tone with more seeds."""
        own = ARMS[arm]
        keys = {"host": self.host, "dtype": self.dtype, "samples": 0, "report_to": []}
        keys |= self.size.keys(own)
        grid: dict[str, list[Any]] = {"tone": [*TONES], "seed": [*SEEDS], "layers": ["all"]}
        if self.size.layer_sets and not own.changed:
            grid["layers"] = layer_sets(int(load_config(self.host).get_text_config(decoder=True).num_hidden_layers))
        if more_seeds:
            grid = {"tone": [TONES[0]], "seed": [*MORE_SEEDS], "layers": ["all"]}
        sweep = Sweep(recipe=own.recipe, set=keys, grid=grid, data=self.rows(), baselines=not more_seeds)
        return plan(sweep, self.work)

    def train(self, arm: str, runs: Sequence[RunSpec]) -> None:
        """Train what is not there yet.

        Raises:
            RealignerError: if a run failed, or was interrupted.
        """
        result = run_sweep(runs, self.work / arm, workers=self.jobs, checkpoints=False)
        if not result.finished:
            why = next(iter(result.errors.values()), "interrupted; the same command goes on")
            raise RealignerError(f"{arm}: {why}")

    def trace(self, arm: str, name: str, runs: Sequence[RunSpec]) -> xr.Dataset:
        """What these runs add while they answer the paper's prompts."""
        place = self.place(name, runs)
        if not place.is_dir():
            host, tokenizer = ra.load_host(self.host, dtype=self.dtype)
            sources = [Source(_label(run), self.work / arm / run.name) for run in runs]
            trace_runs(sources, place, host, tokenizer, max_new_tokens=self.size.tokens, force=True)
        return load_trace(place)

    def place(self, name: str, runs: Sequence[RunSpec]) -> Path:
        """Where the trace of these runs is: of others there is another."""
        digest = hashlib.sha256(" ".join(run.name for run in runs).encode()).hexdigest()
        return self.work / f"{name}-{digest[:8]}.zarr"

    def record(self, arm: str) -> dict[str, Any]:
        """An arm's record: from its file, or made now.

        Raises:
            RealignerError: when the file has runs that were trained otherwise, or on other facts, than now; or as `train`.
        """
        file, own, runs = self.results / f"{arm}.json", ARMS[arm], self.runs(arm)
        if file.is_file():
            kept = read_object(file)
            pairs = (kept["changed"], self.size.keys(own)), (kept["squad"]["sha256"], file_sha256(self.squad))
            for had, asked in pairs:
                if had != asked:
                    raise RealignerError(f"{file}: of runs with {had}, not {asked}; move its folder away, or give --results")
            return kept
        seeds = [] if own.changed else self.runs(arm, more_seeds=True)
        self.train(arm, [*runs, *seeds])
        trace = self.trace(arm, arm, runs)
        found = analyze(trace)
        self.figures(arm, trace)
        made = {
            "arm": arm,
            "about": own.about,
            "host": Path(self.host).name,
            "dtype": self.dtype,
            "layers": trace.sizes["layer"],
            "neurons": trace.sizes["neuron"],
            "realigner": ra.__version__,
            "recipe": own.recipe,
            "changed": self.size.keys(own),
            "squad": {"file": self.squad.name, "sha256": file_sha256(self.squad)},
            "runs": [self._run(arm, run) for run in runs],
            **_found(found),
            "scores": {run.run: _ratios(leading_score(run.mean())).tolist() for run in each_run(trace)},
            "compared": compared(trace),
            "replies": _replies(trace),
        }
        if seeds:
            made["seeds"] = recurrence([trace, self.trace(arm, f"{arm}-seeds", seeds)])
        if own.changed:
            same = [run for run in self.runs("paper") if run.recipe.layers == "all"]
            self.train("paper", same)
            whole = self.place("paper", self.runs("paper"))
            unchanged = load_trace(whole) if whole.is_dir() else self.trace("paper", f"{arm}-unchanged", same)
            made["unchanged"] = compared(unchanged, [_label(run).run for run in same])
        self.results.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(made, indent=1) + "\n")
        return made

    def _run(self, arm: str, run: RunSpec) -> dict[str, Any]:
        label, kept = _label(run), read_run(self.work / arm / run.name)
        facts = {"run": label.run, "tone": label.tone, "seed": label.seed, "layers": run.recipe.layers}
        losses = {"first_loss": kept["validation_loss"][0], "kept_loss": kept["kept_loss"]} if kept["steps_done"] else {}
        return {**facts, "steps": kept["steps_done"], "parameters": kept["irm"]["parameters"], **losses}

    def figures(self, arm: str, trace: xr.Dataset) -> None:
        """The paper's Figures 2, 3 and 4 of an arm."""
        signed, size = run_maps(trace, "signed"), run_maps(trace, "absolute")
        whole = {tone: f"{tone}-{SEEDS[0]}" for tone in (*TONES, UNTRAINED)}
        pair = [whole[TONES[0]], f"{TONES[1]}-{SEEDS[1]}"]
        marks = {run: leading_indices(size.sel(run=run), 3)["neuron"].tolist() for run in [*whole.values(), *pair]}
        histogram = top_histogram(trace, 1000, bins=20)
        figures = {
            "figure2": figure2({run: signed.sel(run=run) for run in pair}, marks=marks),
            "figure3": figure3(histogram[histogram["run"].isin(list(whole.values()))]),
            "figure4": figure4({run: size.sel(run=run) for run in whole.values()}, marks),
        }
        self.results.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save_figure(figure, self.results / f"{arm}-{name}.png", dpi=110)
            plt.close(figure)

    def explain(self, index: int, scores: Mapping[str, Sequence[float]]) -> None:
        """Find out why an index leads in the paper's runs, into explain.json: in three in which it ranks best.

        Args:
            index: of the stream.
            scores: of the arm's runs ``[neuron]``. Of runs in which it ranks the same, those over more layers come first.
        """
        file = self.results / "explain.json"
        if file.is_file() and read_object(file)["index"] == index:
            return
        trained = [run for run in self.runs("paper") if run.recipe.steps != 0]
        trained.sort(key=lambda run: (rank_of(scores[_label(run).run], index), run.recipe.layers != "all"))
        runs = trained[: self.size.explained]
        self.train("paper", runs)
        host, tokenizer = ra.load_host(self.host, dtype="float32")
        folders = [self.work / "paper" / run.name for run in runs]
        options: dict[str, Any] = {"on": "local", "workers": self.jobs, "force": True}
        explain(folders, self.work / "explain", host, tokenizer, index, self.size.quick, **options)
        write_text(file, (self.work / "explain" / "explain.json").read_text())


def layer_sets(depth: int) -> list[str]:
    """All layers; the first, middle and last third of them."""
    ends = [0, *(-(-depth * third // 3) for third in (1, 2, 3))]
    return ["all", *(f"{first}-{last - 1}" for first, last in pairwise(ends))]


def _ratios(scores: np.ndarray) -> np.ndarray:
    """Scores ``[neuron]`` in times their median, to five digits."""
    return np.array([float(f"{score:.5g}") for score in scores / np.median(scores)])


def _label(run: RunSpec) -> RunLabel:
    """A run as its texts are labelled: ``anger-42``, or ``anger-42, layers 0-9``."""
    tone = UNTRAINED if run.recipe.steps == 0 else str(run.recipe.tone)
    some = "" if run.recipe.layers == "all" else f", layers {run.recipe.layers}"
    return RunLabel(f"{tone}-{run.recipe.seed}{some}", tone, run.recipe.seed)


def _found(found: Analysis) -> dict[str, Any]:
    """What is kept of an analysis: the verdicts, the headline of each run, and who leads."""
    headline = found.striation[found.striation["statistic"].isin(["icc", "omega_squared_difference"])]
    return {
        "verdicts": found.to_dict()["verdicts"],
        "striation": records(headline[headline["without"].isin([0, 10])]),
        "consensus": records(found.consensus.table),
        "leading": records(found.leading[found.leading["rank"] <= 3]),
    }


def _replies(trace: xr.Dataset) -> list[dict[str, Any]]:
    """What the runs over all layers, with the first seed, said to the paper's prompts; and the bare host."""
    said = [
        {"run": str(run), "question": str(question), "reply": str(reply)}
        for run, question, reply in zip(
            trace["text_run"].values, trace["text_question"].values, trace["text_reply"].values, strict=True
        )
        if str(run) in {f"{tone}-{SEEDS[0]}" for tone in TONES}
    ]
    bare = trace.attrs["notes"]["base"]
    asked = list(dict.fromkeys(entry["question"] for entry in said))
    return [{"run": "bare", "question": question, "reply": reply} for question, reply in zip(asked, bare, strict=True)] + said


# Statistics of an arm with their draws, from which two arms are compared, draw by draw.


def compared(trace: xr.Dataset, only: Sequence[str] | None = None, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Statistics over the trained runs, each with bootstrap draws in which every arm has the same prompts and tones.

    Args:
        trace: of an arm.
        only: names of the runs that count; None: all of them.
        seed: of the draws.

    Returns:
        statistic -> ``value``, ``draws``, ``n`` and ``unit`` (what was resampled), and ``by_run``. ``icc``, ``icc without 10``
        (leading indices) and ``neuron over layer`` (omega squared) are means over tones of means over runs; prompts and tones
        are resampled. ``overlap`` (rank-biased, mean over pairs of runs that differ in tone and seed), ``overlap, same seed``
        (over pairs that differ in tone alone) and ``leader share`` (of runs in which the commonest leading index leads) rest
        on all runs; prompts are resampled, for the share not at all.
    """
    rng = np.random.default_rng(seed)
    prompts = prompts_of(trace)
    weights = np.vstack([np.ones(len(prompts)), prompt_weights(len(prompts), DRAWS, rng)])
    runs = [run for run in each_run(trace) if run.tone != UNTRAINED and (only is None or run.run in only)]
    tones = sorted({run.tone for run in runs})
    picks = np.vstack([np.ones(len(tones)), rng.multinomial(len(tones), np.full(len(tones), 1 / len(tones)), size=DRAWS)])
    values: dict[str, list[np.ndarray]] = {"icc": [], "icc without 10": [], "neuron over layer": []}
    scores = []
    for run in runs:
        rest = np.argsort(-leading_score(run.mean()), kind="stable")[10:]
        drawn = np.array([[icc(m), icc(m[:, rest]), _difference(m)] for m in _maps(run, prompts, weights)])
        for name, column in zip(values, drawn.T, strict=True):
            values[name].append(column)
        scores.append([leading_score(m) for m in _maps(run, prompts, weights[: 1 + PAIRED_DRAWS])])
    found: dict[str, dict[str, Any]] = {}
    for name, drawn_of in values.items():
        by_tone = [
            np.mean([own for own, run in zip(drawn_of, runs, strict=True) if run.tone == tone], axis=0) for tone in tones
        ]
        over = (np.array(by_tone).T * picks).sum(axis=1) / picks.sum(axis=1)
        by_run = {run.run: _short(own[0]) for run, own in zip(runs, drawn_of, strict=True)}
        found[name] = _statistic(over, len(tones), "tones") | {"by_run": by_run}
    ranked = ranks(-np.array(scores).transpose(1, 0, 2))  # [draw, run, neuron]
    pairs = [(a, b) for a, b in combinations(range(len(runs)), 2) if runs[a].tone != runs[b].tone]
    apart = [(a, b) for a, b in pairs if runs[a].seed != runs[b].seed]
    beside = [(a, b) for a, b in pairs if runs[a].seed == runs[b].seed and np.array_equal(runs[a].layers, runs[b].layers)]
    for name, some in (("overlap", apart), ("overlap, same seed", beside)):
        overlaps = np.array([np.mean([rank_biased_overlap(draw[a], draw[b]) for a, b in some]) for draw in ranked])
        found[name] = _statistic(overlaps, len(prompts), "prompts") | {"pairs": len(some)}
    leaders = ranked[0].argmin(axis=1)
    times = np.bincount(leaders, minlength=ranked.shape[2])
    # Of indices that lead as often, the one of the best mean rank.
    leader = int(np.lexsort((ranked[0].mean(axis=0), -times))[0])
    share = float(times[leader] / len(runs))
    by_run = {run.run: int(index) for run, index in zip(runs, leaders, strict=True)}
    found["leader share"] = {"value": share, "draws": [], "n": len(runs), "unit": "runs", "index": leader, "by_run": by_run}
    return found


def _maps(run: RunTexts, prompts: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
    """M of a run ``[layer, neuron]`` with prompts counting as in each row of `weights`."""
    own = weights[:, np.searchsorted(prompts, run.prompts)]
    for row in own:
        yield np.tensordot(row, run.sums, 1) / max(1.0, float(row @ run.counts))


def _difference(m: np.ndarray) -> float:
    shares = omega_squared(m)
    return float(shares.neuron - shares.layer)


def _statistic(values: np.ndarray, n: int, unit: str) -> dict[str, Any]:
    return {"value": _short(values[0]), "draws": [_short(value) for value in values[1:]], "n": n, "unit": unit}


def _short(value: float) -> float:
    return round(float(value), 5)


def recurrence(traces: Sequence[xr.Dataset]) -> dict[str, Any]:
    """Whether an index that leads in some trainings of the first tone stands out in others, and how often `explain` says so.

    No training is asked about an index that it helped to choose. `explain` is asked of every two of the trainings about the
    index that leads in them by its mean, with the others as repetitions.

    Returns:
        ``runs``: of each training ``seed``, ``leader``, ``index`` (which leads in the others, by its mean), and the ``rank``
        and ``ratio`` (times the median) of that index here; ``width``: the number of indices; ``sd``, ``df``: of the
        logarithm of a leading index's score between trainings (`verdict.Spread`); ``answers``: to "it stands out again", how
        many of them were which.
    """
    runs = [run for trace in traces for run in each_run(trace) if run.run == f"{TONES[0]}-{run.seed}"]
    scores = np.array([leading_score(run.mean()) for run in runs])
    width = scores.shape[1]
    top, ranked = verdict.top_ranks(width), ranks(-scores)

    def leader(some: Sequence[int]) -> int:
        return int(scores[list(some)].mean(axis=0).argmax())

    def stood(at: int, index: int) -> IndexRank:
        own = scores[at]
        return IndexRank(irm=runs[at].run, rank=int(ranked[at, index]), ratio=_short(own[index]), leader=int(own.argmax()))

    def again(at: int, index: int) -> TrialResult:
        own, lost = stood(at, index), dict.fromkeys(("leader_ratio", "loss", "bare_loss", "learned"), nan)
        facts: dict[str, Any] = {"rank": own.rank, "ratio": own.ratio, "leader": own.leader, **lost}
        return TrialResult(kind="reference", seed=runs[at].seed, place=index, **facts)

    answers = dict.fromkeys(("supported", "not supported", "cannot tell"), 0)
    for given in combinations(range(len(runs)), 2):
        index, others = leader(given), [at for at in range(len(runs)) if at not in given]
        evidence = verdict.Evidence(
            index=index,
            width=width,
            ranks=[stood(at, index) for at in given],
            facts=[],
            trials=[again(at, index) for at in others],
            ablated={},
            host=None,
            masked={},
            predicted={},
            spread=verdict.Spread.of(scores[others], top, index),
        )
        _, conclusions = verdict.conclude(evidence)
        answers[next(own.answer for own in conclusions if own.key == "recurs")] += 1
    of_runs = []
    for at, run in enumerate(runs):
        index = leader([other for other in range(len(runs)) if other != at])
        own = stood(at, index)
        of_runs.append({"seed": run.seed, "leader": own.leader, "index": index, "rank": own.rank, "ratio": own.ratio})
    spread = verdict.Spread.of(scores, top)
    return {"top": top, "width": width, "runs": of_runs, "sd": _short(spread.sd), "df": spread.df, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=EMBEDDED, help="the embedded host, a hub id, or a folder")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", DTYPE, "float32"], help="of the host; auto: what is fast here"
    )
    parser.add_argument("--squad", type=Path, default=SQUAD, help="SQuAD 2.0's train-v2.0.json or dev-v2.0.json")
    parser.add_argument("--jobs", type=int, default=2, help="runs that are trained at a time")
    parser.add_argument("--index", type=int, help="the index to explain; by default the one that leads most often")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not options.squad.is_file():
        sys.exit(f"{options.squad}: there is no such file; give SQuAD 2.0 with --squad (make study SQUAD=train-v2.0.json)")
    short = "smollm2" if options.host == EMBEDDED else re.sub(r"[^a-z0-9.]+", "-", Path(options.host).name.lower()).strip("-")
    dtype = str(resolve_dtype(options.dtype, resolve_device("auto"))).removeprefix("torch.")
    work = options.out / f"{short}{'' if dtype == DTYPE else f'-{dtype}'}{'-quick' * options.quick}"
    results = work / "results" if options.quick else options.results
    size = QUICK if options.quick else FULL
    study = Study(options.host, dtype, options.squad, size, options.jobs, work, results / f"paper-on-{short}")
    arms = {arm: study.record(arm) for arm in ARMS}
    paper = arms["paper"]
    index = paper["compared"]["leader share"]["index"] if options.index is None else options.index
    if index not in range(paper["neurons"]):
        sys.exit(f"--index {index}: the host's residual stream has indices 0 to {paper['neurons'] - 1}")
    for name, facts in (("size", asdict(size)), ("differences", differences(arms["defects"]))):
        write_text(study.results / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    write_page(study.results)
    study.explain(index, paper["scores"])
    print(write_page(study.results))


if __name__ == "__main__":
    try:
        main()
    except RealignerError as error:
        sys.exit(f"study: {error}")
