"""What an index is good for: the loss without its delta, with that delta's mean, with nothing but it, beside other indices.

Every ablation is an edit of the IRM's last layer (the rows that make index i's deltas), undone afterwards; the host is not
touched. Losses are teacher-forced, per row, so that each comparison is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from realigner.analysis.resampling import interval, prompt_weights
from realigner.console import progress
from realigner.errors import UsageError
from realigner.explain.rows import Rows
from realigner.irm import IRM
from realigner.tuner import tuner_of

How = Literal["zero", "mean", "keep"]
HOWS: tuple[How, ...] = ("zero", "mean", "keep")


@contextmanager
def edited_output(irm: IRM, index: int, how: How, mean: np.ndarray | None = None) -> Iterator[None]:
    """Change what an IRM gives at one index, in every layer, within a block.

    Args:
        irm: the network.
        index: of the residual stream.
        how: ``"zero"``: no delta there; ``"mean"``: always its mean; ``"keep"``: no delta anywhere else.
        mean: ``[layer, neuron]`` over the IRM's layers, for ``"mean"``.

    Example:
        >>> irm = IRM(hidden_size=4, layers=(0, 1), widths=(8,), rank=0, output_std=1.0)
        >>> with edited_output(irm, 2, "zero"):
        ...     irm(torch.ones(1, 4))[..., 2].abs().max().item()
        0.0
    """
    if how == "mean" and mean is None:
        raise UsageError("ablate: how='mean' needs the mean deltas")
    shape = (len(irm.layers), irm.hidden_size)
    weight, bias = irm.output.weight.data, irm.output.bias.data
    before = weight.clone(), bias.clone()
    rows, biases = weight.view(*shape, -1), bias.view(*shape)
    others = torch.arange(irm.hidden_size, device=weight.device) != index
    try:
        chosen = others if how == "keep" else ~others
        rows[:, chosen], biases[:, chosen] = 0.0, 0.0
        if how == "mean" and mean is not None:
            biases[:, index] = torch.as_tensor(mean[:, index]).to(bias)
        yield
    finally:
        weight.copy_(before[0])
        bias.copy_(before[1])


def control_indices(score: np.ndarray, index: int, random: int, matched: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """Indices to hold an ablation against: any, and those whose deltas are most like the index's in size.

    Args:
        score: each index's ``[neuron]``.
        index: the one in question.
        random, matched: how many of each; fewer where there are fewer.
        rng: what draws them.
    """
    others = np.array([n for n in range(len(score)) if n != index])
    near = others[np.argsort(np.abs(np.log(score[others] + 1e-30) - np.log(score[index] + 1e-30)), kind="stable")]
    left = np.setdiff1d(others, near[:matched])
    drawn = rng.choice(left, min(random, len(left)), replace=False) if len(left) else left
    return {"random": sorted(drawn.tolist()), "matched": near[:matched].tolist()}


def delta_ablations(
    model: nn.Module,
    rows: Rows,
    index: int,
    mean: np.ndarray,
    controls: Mapping[str, Sequence[int]],
    hows: Sequence[How] = HOWS,
    seed: int = 0,
    quiet: bool = True,
) -> pd.DataFrame:
    """The loss with an index's delta taken out, replaced by its mean, or kept alone; and with other indices' instead.

    Args:
        model: a host with one IRM.
        rows: what losses are taken on.
        index: of the residual stream.
        mean: the IRM's mean deltas ``[layer, neuron]``.
        controls: from `control_indices`; an index in several groups is ablated once.
        hows: which ablations.
        seed: of the intervals' resamples.
        quiet: show no progress.

    Returns:
        A row an ablation: ``how``, ``index``, ``group`` ("" for the index itself, "random", "matched", ...; how "whole" and
        "none": the IRM as it is, and the bare host), ``loss`` (nats per target), ``change`` from the whole IRM with its
        95% interval ``low``, ``high`` over rows, and ``n`` rows.
    """
    tuner = tuner_of(model)
    irm = tuner.bank.network(tuner.bank.names[0])
    rng = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = []
    whole, counts = rows.losses(model)
    weights = prompt_weights(len(counts), 1000, rng)

    def add(how: str, number: int, group: str, sums: np.ndarray) -> None:
        change = (sums.sum() - whole.sum()) / counts.sum()
        draws = (weights @ (sums - whole)) / (weights @ counts)
        low, high = interval(change, draws, len(counts))
        entries.append({"how": how, "index": number, "group": group, "loss": sums.sum() / counts.sum()})
        entries[-1] |= {"change": change, "low": low, "high": high, "n": len(counts)}

    add("whole", -1, "", whole)
    with model.disable_adapter():  # type: ignore[operator]
        add("none", -1, "", rows.losses(model)[0])
    wanted = [(index, ""), *((other, group) for group, some in controls.items() for other in some)]
    numbers = dict.fromkeys(number for number, _ in wanted)
    with progress("ablating", len(numbers) * len(hows), quiet) as task:
        for how in hows:
            sums = {}
            for number in numbers:
                with edited_output(irm, number, how, mean):
                    sums[number] = rows.losses(model)[0]
                task.advance()
            for number, group in wanted:
                add(how, number, group, sums[number])
    return pd.DataFrame(entries)


def against_controls(table: pd.DataFrame, how: How) -> dict[str, float]:
    """How an index's ablation compares with its controls': ``change, low, high, n``, and for each group of controls their
    mean change and the share ``p`` of them that is at least as large (the index counted as one of them).

    Keeping an index alone is the better the smaller its change, so there p counts those at most as large.
    """
    own = table[(table["how"] == how) & (table["group"] == "")].iloc[0]
    found = {key: float(own[key]) for key in ("change", "low", "high", "n")}
    sign = -1.0 if how == "keep" else 1.0
    for group in ("random", "matched"):
        others = table[(table["how"] == how) & (table["group"] == group)]["change"].to_numpy()
        found[group] = float(others.mean()) if len(others) else float("nan")
        found[f"p_{group}"] = float((1 + (sign * others >= sign * own["change"]).sum()) / (1 + len(others)))
    return found
