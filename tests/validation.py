"""Made-up traces in which the truth is known, and what the statistics make of them: null data, planted effects, intervals.

Every simulated trace goes through the very functions that a user calls. benchmarks/validation.py runs all of it and writes
docs/statistics.md; tests/test_validation.py runs less.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import kstest

from realigner.analysis import consensus, icc, sparsity, striation, timing, turns
from realigner.analysis.resampling import interval, prompt_weights

DRAWS = 199  # permutations in a simulation
TONES = ("anger", "sadness", "neutral")
Labels = list[tuple[str, str, int]]  # run, tone, seed
PValues = dict[str, float]


# --- made-up traces -----------------------------------------------------------------------------------------------------------


def maps(values: np.ndarray, runs: Labels) -> xr.DataArray:
    """What `text_maps` gives, of values ``[run, prompt, layer, neuron]``."""
    n, prompts = values.shape[:2]
    columns = {key: ("text", np.repeat([run[at] for run in runs], prompts)) for at, key in enumerate(("run", "tone", "seed"))}
    coords: dict[str, Any] = {
        **columns,
        "prompt": ("text", np.tile(np.arange(prompts), n)),
        "count": ("text", [10] * n * prompts),
    }
    coords |= {"layer": np.arange(values.shape[2]), "neuron": np.arange(values.shape[3])}
    return xr.DataArray(values.reshape(n * prompts, *values.shape[2:]), coords, ("text", "layer", "neuron"))


def token_trace(
    sums: dict[str, np.ndarray], runs: Labels, prompt_tokens: int, positions: np.ndarray | None = None, neurons: int = 1
) -> xr.Dataset:
    """A trace of token sums ``[run, prompt, token, layer]`` and, of each text, positions of largest values ``[text, rank]``.

    The first quarter of a prompt is the template's, the rest one message's.
    """
    n, prompts, tokens, layers = sums["energy"].shape
    texts = n * prompts
    labels = {
        f"text_{key}": ("text", np.repeat([run[at] for run in runs], prompts)) for at, key in enumerate(("run", "tone", "seed"))
    }
    coords: dict[str, Any] = {**labels, "text_prompt": ("text", np.tile(np.arange(prompts), n)), "layer": np.arange(layers)}
    coords |= {"neuron": np.arange(neurons), "is_generated": ("token", np.tile(np.arange(tokens) >= prompt_tokens, texts))}
    turn = np.where(np.arange(tokens) < prompt_tokens // 4, -1, np.where(np.arange(tokens) < prompt_tokens, 0, 1))
    role = np.array(["user", "assistant", ""], dtype=object)[turn]
    coords |= {"turn": ("token", np.tile(turn, texts)), "role": ("token", np.tile(role, texts))}
    values: dict[str, Any] = {
        key: (("token", "layer", "neuron")[: value.ndim - 2], value.reshape(texts * tokens, *value.shape[3:]))
        for key, value in sums.items()
    }
    values["count"] = (("text", "part"), np.tile([prompt_tokens, tokens - prompt_tokens, 0], (texts, 1)))
    if positions is not None:
        values["top_position"] = (("text", "rank"), positions)
        values["top_value"] = (("text", "rank"), 1 + np.random.default_rng(0).random(positions.shape))
        values["top_layer"] = (("text", "rank"), np.zeros_like(positions))
    return xr.Dataset(values, coords)


def talk_trace(energy: np.ndarray, runs: Labels, neurons: int = 4) -> xr.Dataset:
    """A trace of conversations whose replies' tokens have these energies ``[run, prompt, reply, token]``, in one layer.

    Before each reply comes a token of the template, then two of the user's; what they have is not to be counted.
    """
    count, prompts, replies, tokens = energy.shape
    before = np.full((count, prompts, replies, 3), 1e3)
    whole = np.concatenate([before, energy], axis=-1).reshape(count, prompts, -1, 1)
    turn = np.tile([-1, 0, 0, *[1] * tokens], (replies, 1))
    turn = np.where(turn < 0, -1, turn + 2 * np.arange(replies)[:, None]).ravel()
    role = np.array(["user", "assistant", ""], dtype=object)[np.where(turn < 0, 2, turn % 2)]
    trace = token_trace({"energy": whole, "l1": np.sqrt(whole)}, runs, whole.shape[2] - tokens, neurons=neurons)
    texts = count * prompts
    return trace.assign_coords(turn=("token", np.tile(turn, texts)), role=("token", np.tile(role, texts)))


def with_twins(tones: tuple[str, ...] = TONES, seeds: tuple[int, ...] = (42,)) -> Labels:
    """Runs of every tone and seed, then an untrained one of every seed."""
    runs = [(f"{tone}-{seed}", tone, seed) for tone in tones for seed in seeds]
    return runs + [(f"untrained-{seed}", "untrained", seed) for seed in seeds]


def p_values(table: Any, keys: tuple[str, ...], prefix: str) -> PValues:
    """The p-values of the first run and of all runs."""
    found = {}
    for row in table.to_dict("records"):
        if row["run"] in (table["run"].iloc[0], "all") and np.isfinite(row["p"]):
            name = ", ".join(str(row[key]) for key in keys)
            found[f"{prefix}: {name}, {'all runs' if row['run'] == 'all' else 'one run'}"] = row["p"]
    return found


# --- null data ----------------------------------------------------------------------------------------------------------------


def null_striation(rng: np.random.Generator, neurons: int = 300) -> PValues:
    """Layers with profiles of their own, heavy-tailed and of unequal size, shared by three runs (these are not independent)."""
    profile = rng.lognormal(sigma=0.5, size=(6, neurons)) * rng.gamma(2, size=(6, 1))
    values = profile * rng.gamma(20, size=(3, 1, 6, neurons))
    table = striation(maps(values, with_twins()[:3]), DRAWS, 1, int(rng.integers(2**31)))
    return p_values(table, ("statistic", "without"), f"striation, {neurons} neurons")


def null_striation_small(rng: np.random.Generator) -> PValues:
    """The same with so few neurons that whole permutations are drawn."""
    return null_striation(rng, 40)


def null_consensus(rng: np.random.Generator) -> PValues:
    """Tones that have nothing in common with each other or with the untrained runs; the two seeds of one tone do."""
    return _consensus(rng, shared=0.0, prefix="consensus", models=("uniform", "untrained", "host_residual"))


def null_seeds(rng: np.random.Generator) -> PValues:
    """Seeds that have nothing in common; the three tones of one seed do, as runs with the same initialisation may."""
    return _consensus(rng, shared=0.0, prefix="consensus, runs of a seed alike", models=("uniform",), tone=0.0, seed=1.0)


def null_crossed(rng: np.random.Generator) -> PValues:
    """Runs that have much in common with those of their tone, and as much with those of their seed."""
    prefix = "consensus, runs of a tone and of a seed alike"
    found = _consensus(rng, shared=0.0, prefix=prefix, models=("uniform",), tone=1.0, seed=1.0)
    return {name: p for name, p in found.items() if "in_top" not in name and "reciprocal" not in name}


def null_residual(rng: np.random.Generator) -> PValues:
    """Tones that share what the untrained runs and the host show, and nothing else."""
    return _consensus(rng, shared=0.7, prefix="consensus of what is left", models=("untrained", "host_residual"))


def _consensus(
    rng: np.random.Generator, shared: float, prefix: str, models: tuple[str, ...], tone: float = 1.0, seed: float = 0.0
) -> PValues:
    runs, neurons = with_twins(seeds=(42, 420)), 300
    of_seed = seed * rng.standard_t(5, size=(2, neurons))
    host = rng.normal(size=neurons)
    log = [host]  # of the untrained runs: host and untrained are one here, so that either explains what tones share
    for _ in TONES:
        own = shared * host + tone * rng.standard_t(5, size=neurons)
        log += [own + common + 0.3 * rng.normal(size=neurons) for common in of_seed]
    score = np.exp(0.2 * np.array([*log[1:], host, host]))
    values = score[:, None, None] * rng.gamma(400, size=(len(runs), 1, 3, neurons))
    found = consensus(maps(values, runs), host, DRAWS, 1, int(rng.integers(2**31)))
    p = {f"{prefix}: {row['statistic']}, {row['model']}": row["p"] for row in found.table.to_dict("records")}
    index = found.indices[found.indices["neuron"] == 0]
    named = {"uniform": "p", "untrained": "p_untrained", "host_residual": "p_host"}
    p |= {f"{prefix}: rank aggregation of one index, {model}": index[name].iloc[0] for model, name in named.items()}
    return {name: float(value) for name, value in p.items() if name.rsplit(", ", 1)[1] in models}


def null_timing(rng: np.random.Generator) -> PValues:
    """Tokens in any order: heavy-tailed energies that runs and twin share in part; large values come many to a token."""
    runs, shape = with_twins(), (7, 24, 2)
    energy = rng.lognormal(size=shape) * rng.lognormal(sigma=0.5, size=(len(runs), *shape))
    weight = energy[..., 0].reshape(-1, shape[1])
    positions = np.array([rng.choice(shape[1], size=100, p=own / own.sum()) for own in weight])
    trace = token_trace({"energy": energy}, runs, 8, positions, neurons=10)
    table = timing(trace, DRAWS, 1, int(rng.integers(2**31)))
    return p_values(table, ("statistic", "without"), "timing")


def null_sparsity(rng: np.random.Generator) -> PValues:
    """Trained and untrained runs alike: each prompt has its own tails, heavier or lighter."""
    runs, prompts, tokens, layers, neurons = with_twins(), 7, 4, 2, 24
    tails = rng.uniform(2.5, 9, size=(len(runs), prompts, 1, 1, 1))
    delta = rng.standard_t(tails, size=(len(runs), prompts, tokens, layers, neurons)) * rng.lognormal(-6, 1, size=tails.shape)
    table = sparsity(token_trace(token_sums(delta), runs, 2, neurons=neurons), DRAWS, 1, int(rng.integers(2**31)))
    return p_values(table, ("statistic", "layer"), "sparsity")


def null_turns(rng: np.random.Generator) -> PValues:
    """Conversations of three replies in any order; prompts and replies have levels of their own, which runs share in part."""
    runs, prompts, replies = with_twins(), 7, 3
    level = rng.lognormal(size=(prompts, 1, 1)) * rng.lognormal(sigma=0.3, size=(prompts, replies, 1))
    own = rng.lognormal(sigma=0.3, size=(len(runs), prompts, replies, 1))
    energy = level * own * rng.lognormal(size=(len(runs), prompts, replies, 6))
    return p_values(turns(talk_trace(energy, runs), DRAWS, 1, int(rng.integers(2**31))), ("statistic", "reply"), "turns")


def token_sums(delta: np.ndarray) -> dict[str, np.ndarray]:
    """A trace's token sums of deltas ``[run, prompt, token, layer, neuron]``, and the deltas."""
    size = np.abs(delta)
    sums = {"energy": (size**2).sum(-1), "l1": size.sum(-1), "l4": (size**4).sum(-1), "small": (size < 1e-4).sum(-1)}
    return sums | {"delta": delta.astype(np.float32)}


NULLS: dict[str, Callable[[np.random.Generator], PValues]] = {
    "striation": null_striation,
    "striation, few neurons": null_striation_small,
    "consensus": null_consensus,
    "consensus of seeds": null_seeds,
    "consensus of tones and seeds": null_crossed,
    "consensus of what is left": null_residual,
    "timing": null_timing,
    "sparsity": null_sparsity,
    "turns": null_turns,
}


def simulate(make: Callable[[np.random.Generator], PValues], traces: int, seed: int, jobs: int = 1) -> dict[str, np.ndarray]:
    """P-values of so many simulated traces, each with its own stream of random numbers."""
    streams = [np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(traces)]
    if jobs == 1:
        found = [make(stream) for stream in streams]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            found = list(pool.map(make, streams, chunksize=20))
    return {name: np.array([p[name] for p in found]) for name in found[0]}


def judged(p: np.ndarray) -> dict[str, float]:
    """Kolmogorov-Smirnov p against the uniform distribution, and the share of p-values up to 0.05.

    ``small_p`` is the Kolmogorov-Smirnov p against being too small alone: the larger p of two is too large by intent.
    """
    both, small = (float(kstest(p, "uniform", alternative=side).pvalue) for side in ("two-sided", "greater"))
    return {"traces": len(p), "ks_p": both, "small_p": small, "rate": float((p <= 0.05).mean())}


# --- planted effects ----------------------------------------------------------------------------------------------------------


def planted_stripes(rng: np.random.Generator, size: float) -> PValues:
    """30 layers x 576 neurons: noise with standard deviation 1, and a profile with `size` that all layers share."""
    values = 10 + size * rng.normal(size=576) + rng.normal(size=(1, 1, 30, 576))
    return _striation_p(values, rng)


def planted_index(rng: np.random.Generator, size: float) -> PValues:
    """One index alone is larger by `size` standard deviations in every layer."""
    values = 10 + rng.normal(size=(1, 1, 30, 576))
    values[..., 17] += size
    return _striation_p(values, rng)


def _striation_p(values: np.ndarray, rng: np.random.Generator) -> PValues:
    table = striation(maps(values, [("a", "anger", 1)]), DRAWS, 1, int(rng.integers(2**31)))
    own = table[table["run"] == "a"].set_index(["statistic", "without"])["p"]
    picked = [("icc", 0), ("icc", 1), ("icc", 10), ("kendall_w", 0), ("svd_share", 0)]
    return {f"{name}, without {without}" if without else name: float(own[name, without]) for name, without in picked}


def planted_consensus(rng: np.random.Generator, size: float) -> PValues:
    """3 tones x 2 seeds; one index is larger by `size` standard deviations of the indices' scores in every run."""
    runs, neurons = with_twins(seeds=(42, 420)), 576
    score = 10 + rng.normal(size=(len(runs), 1, 1, neurons))
    score[:6, ..., 17] += size
    values = np.repeat(score, 2, axis=2)
    found = consensus(maps(values, runs), None, DRAWS, 1, int(rng.integers(2**31)))
    p = found.table[found.table["model"] == "uniform"].set_index("statistic")["p"]
    names = ("top1_agreement", "in_top", "mean_reciprocal_rank", "rank_biased_overlap")
    index = found.indices[found.indices["neuron"] == 17]
    return {name: float(p[name]) for name in names} | {"the index, rank aggregation (Holm)": float(index["p_holm"].iloc[0])}


def planted_timing(rng: np.random.Generator, size: float) -> PValues:
    """7 texts of 100 tokens, 30 of them prompt; log energy falls by `size` from the first token to the last (noise 1)."""
    tokens = 100
    fall = -size * np.linspace(0, 1, tokens)
    energy = np.exp(fall[:, None] + rng.normal(size=(1, 7, tokens, 1)))
    weight = energy[0, ..., 0]
    positions = np.array([rng.choice(tokens, size=1000, p=own / own.sum()) for own in weight])
    trace = token_trace({"energy": energy}, [("a", "anger", 1)], 30, positions, neurons=20)
    table = timing(trace, DRAWS, 1, int(rng.integers(2**31)))
    own = table[(table["run"] == "a") & (table["without"] == 0)].set_index("statistic")["p"]
    names = ("centre_of_mass", "prompt_share", "late_share_100", "late_share_1000", "template_share", "reply_centre_of_mass")
    return {name: float(own[name]) for name in names}


def planted_sparsity(rng: np.random.Generator, size: float) -> PValues:
    """7 prompts x 20 tokens x 576 neurons, Gaussian; a share `size` of the trained run's values is 3 times as large."""
    runs = [("a", "anger", 1), ("u", "untrained", 1)]
    delta = rng.normal(size=(2, 7, 20, 1, 576))
    delta[0] *= np.where(rng.random(delta[0].shape) < size, 3.0, 1.0)
    table = sparsity(token_trace(token_sums(delta), runs, 5, neurons=576), DRAWS, 1, int(rng.integers(2**31)))
    own = table[(table["run"] == "a") & (table["layer"] == "all")].set_index("statistic")["p"]
    return {name: float(own[name]) for name in ("hoyer", "gini", "participation")}


def planted_turns(rng: np.random.Generator, size: float) -> PValues:
    """7 conversations of 3 replies of 20 tokens (noise 1 in log energy); log energy falls by `size` from reply to reply."""
    energy = np.exp(fading(rng, 7, size))
    table = turns(talk_trace(energy, [("a", "anger", 1)]), DRAWS, 1, int(rng.integers(2**31)))
    own = table[table["run"] == "a"].set_index("statistic")["p"]
    return {name: float(own[name]) for name in ("energy_ratio", "size_ratio")}


def fading(rng: np.random.Generator, prompts: int, size: float) -> np.ndarray:
    """Log energies ``[run, prompt, reply, token]`` of one run."""
    level = rng.normal(size=(1, prompts, 1, 1)) + 0.2 * rng.normal(size=(1, prompts, 3, 1))
    return np.asarray(level - size * np.arange(3)[:, None] + rng.normal(size=(1, prompts, 3, 20)))


PLANTED: dict[str, tuple[Callable[[np.random.Generator, float], PValues], tuple[float, ...]]] = {
    "stripes": (planted_stripes, (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2)),
    "one index": (planted_index, (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)),
    "consensus": (planted_consensus, (0.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
    "timing": (planted_timing, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)),
    "sparsity": (planted_sparsity, (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)),
    "turns": (planted_turns, (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)),
}


class Planted:
    """`make` at a size, for `simulate` (processes need a thing with a name)."""

    def __init__(self, name: str, size: float) -> None:
        self.name, self.size = name, size

    def __call__(self, rng: np.random.Generator) -> PValues:
        return PLANTED[self.name][0](rng, self.size)


# --- intervals ----------------------------------------------------------------------------------------------------------------


def coverage(prompts: int, noise: float, sets: int, seed: int) -> dict[str, float]:
    """How often the 95% interval, and plain percentiles, hold ICC's mean over sets of prompts (6 layers x 80 neurons)."""
    rng = np.random.default_rng(seed)
    fixed = rng.gamma(4, size=(6, 80)) + rng.gamma(4, size=80)

    def drawn() -> np.ndarray:
        return np.asarray(fixed + 0.5 * noise * rng.normal(size=(prompts, 1, 80)) + noise * rng.normal(size=(prompts, 6, 80)))

    truth = float(np.mean([icc(drawn().mean(axis=0)) for _ in range(2000)]))
    held = {"interval": 0, "percentiles": 0}
    for _ in range(sets):
        values = drawn()
        weights = prompt_weights(prompts, 500, rng) / prompts
        draws = np.array([icc(np.tensordot(own, values, 1)) for own in weights])
        low, high = interval(icc(values.mean(axis=0)), draws, prompts)
        held["interval"] += low <= truth <= high
        low, high = np.quantile(draws, [0.025, 0.975])
        held["percentiles"] += low <= truth <= high
    return {"prompts": prompts, "noise": noise, "icc": truth} | {name: count / sets for name, count in held.items()}


def turns_coverage(prompts: int, size: float, sets: int, seed: int) -> dict[str, float]:
    """How often the 95% interval of the last reply's energy over the first's holds the planted ratio."""
    rng, held = np.random.default_rng(seed), 0
    truth = float(np.exp(-2 * size))
    for _ in range(sets):
        trace = talk_trace(np.exp(fading(rng, prompts, size)), [("a", "anger", 1)])
        table = turns(trace, 1, 500, int(rng.integers(2**31)))
        (row,) = table[(table["run"] == "a") & (table["statistic"] == "energy_ratio")].to_dict("records")
        held += row["low"] <= truth <= row["high"]
    return {"prompts": prompts, "ratio": truth, "interval": held / sets}


# --- tables -------------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """What was found, in Markdown."""
    lines: list[str] = []
    null = results["null"]
    least, rates = min(row["ks_p"] for row in null.values()), [row["rate"] for row in null.values()]
    count = next(iter(null.values()))["traces"]
    lines += ["### Null data", ""]
    lines += [
        f"{count:,} simulated traces, {len(null)} p-values of each. Smallest Kolmogorov-Smirnov p {least:.3f} "
        f"({sum(row['ks_p'] <= 0.01 for row in null.values())} of {len(null)} at most 0.01, by chance {0.01 * len(null):.0f}); "
        f"false positives at 5%: {100 * min(rates):.1f}% to {100 * max(rates):.1f}%.",
        "",
        "| p-value | KS p | p <= 0.05 |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {row['ks_p']:.3f} | {100 * row['rate']:.1f}% |" for name, row in null.items()]
    for name, curve in results["power"].items():
        about = " ".join((PLANTED[name][0].__doc__ or "").split())
        statistics = list(curve[0]["power"])
        lines += ["", f"### Power: {name}", "", f"{about} {curve[0]['sets']} simulations a size; share with p <= 0.05.", ""]
        lines += [f"| size | {' | '.join(statistics)} |", f"| ---: |{' ---: |' * len(statistics)}"]
        lines += [
            f"| {row['size']:g} | {' | '.join(format(row['power'][key], '.2f') for key in statistics)} |" for row in curve
        ]
    lines += ["", "### Intervals", ""]
    lines += ["| prompts | noise | ICC | coverage of our interval | coverage of the percentile interval |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: |"]
    for row in results["coverage"]:
        facts = f"| {row['prompts']} | {row['noise']:g} | {row['icc']:.2f} |"
        lines.append(f"{facts} {100 * row['interval']:.0f}% | {100 * row['percentiles']:.0f}% |")
    lines += [
        "",
        "Of the last reply's energy over the first's:",
        "",
        "| prompts | planted ratio | share of intervals that hold it |",
    ]
    lines += ["| ---: | ---: | ---: |"]
    lines += [f"| {row['prompts']} | {row['ratio']:.2f} | {row['interval']:.2f} |" for row in results["turns_coverage"]]
    return "\n".join(lines)


BEGIN, END = "<!-- benchmarks/validation.py: begin -->", "<!-- end -->"


def put_into(document: str, results: dict[str, Any]) -> str:
    """docs/statistics.md with these tables between its marks."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.split(END)[1]}"
