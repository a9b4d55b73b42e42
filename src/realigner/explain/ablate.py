"""What an index is good for: the loss without its delta, with that delta's mean, with nothing but it, beside other indices.

Every ablation of a delta is an edit of the IRM's last layer (the rows that make index i's deltas); one of the host, of what
writes into its residual stream there. Both are undone afterwards. Losses are teacher-forced, per row, so that each comparison
is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from realigner.analysis.resampling import change_per_target, prompt_weights
from realigner.console import progress
from realigner.errors import UsageError
from realigner.explain.edits import silenced
from realigner.explain.example_batches import Rows
from realigner.explain.roles import find_stream
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
    irm = tuner.registry.network(tuner.registry.names[0])
    changes = _Changes(rows.losses(model), seed)
    with model.disable_adapter():  # type: ignore[operator]
        changes.add("none", -1, [""], rows.losses(model)[0])
    groups = _groups(index, controls)
    with progress("ablating", len(groups) * len(hows), quiet) as task:
        for how in hows:
            for number, own in groups.items():
                with edited_output(irm, number, how, mean):
                    changes.add(how, number, own, rows.losses(model)[0])
                task.advance()
    return changes.table()


def host_ablations(
    host: PreTrainedModel,
    rows: Rows,
    index: int,
    controls: Mapping[str, Sequence[int]],
    seed: int = 0,
    quiet: bool = True,
) -> pd.DataFrame:
    """The bare host's loss with its residual stream 0 at an index, and at others: what the host itself needs there.

    Args:
        host: without an IRM; left as it was.
        rows: what losses are taken on.
        index: of the residual stream.
        controls: other indices, by group.
        seed: of the intervals' resamples.
        quiet: show no progress.

    Returns:
        As `delta_ablations`, how ``"zero"``, and ``"whole"``: the host as it is.

    Raises:
        RealignerError: as `find_stream`.
    """
    stream = find_stream(host)
    changes = _Changes(rows.losses(host), seed)
    groups = _groups(index, controls)
    with progress("ablating the host", len(groups), quiet) as task:
        for number, own in groups.items():
            with silenced(host, stream, number):
                changes.add("zero", number, own, rows.losses(host)[0])
            task.advance()
    return changes.table()


def _groups(index: int, controls: Mapping[str, Sequence[int]]) -> dict[int, list[str]]:
    """Every index to be ablated, once, with the groups that it is in; that of the index in question is ""."""
    groups = {index: [""]}
    for group, some in controls.items():
        for other in some:
            groups.setdefault(other, []).append(group)
    return groups


class _Changes:
    """Losses under ablations, each with its change from the whole."""

    def __init__(self, whole: tuple[np.ndarray, np.ndarray], seed: int) -> None:
        self.whole, self.counts = whole
        self.weights = prompt_weights(len(self.counts), 1000, np.random.default_rng(seed))
        self.entries: list[dict[str, Any]] = []
        self.add("whole", -1, [""], self.whole)

    def add(self, how: str, index: int, groups: Sequence[str], sums: np.ndarray) -> None:
        """An ablation's summed loss of each row ``[row]``, as a row of each group that the index is in."""
        change, low, high = change_per_target(sums - self.whole, self.counts, self.weights)
        found = {"loss": sums.sum() / self.counts.sum(), "change": change, "low": low, "high": high, "n": len(self.counts)}
        self.entries += [{"how": how, "index": index, "group": group, **found} for group in groups]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.entries)


def against_controls(table: pd.DataFrame, how: How) -> dict[str, float]:
    """How an index's ablation compares with its controls': ``change, low, high, n``, and for each group of controls their
    mean change and the share ``p`` of them that is at least as large (the index counted as one of them); ``none``: the change
    with no delta at all, where that was measured.

    Keeping an index alone is the better the smaller its change, so there p counts those at most as large.
    """
    own = table[(table["how"] == how) & (table["group"] == "")].iloc[0]
    found = {key: float(own[key]) for key in ("change", "low", "high", "n")}
    sign = -1.0 if how == "keep" else 1.0
    none = table[table["how"] == "none"]["change"]
    if len(none):
        found["none"] = float(none.iloc[0])
    for group in ("random", "matched"):
        others = table[(table["how"] == how) & (table["group"] == group)]["change"].to_numpy()
        found[group] = float(others.mean()) if len(others) else float("nan")
        found[f"p_{group}"] = float((1 + (sign * others >= sign * own["change"]).sum()) / (1 + len(others)))
    return found
