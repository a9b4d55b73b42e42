"""Ablate one index: zero its delta, replace it by its mean or keep nothing else, compared with control indices.

An ablation of a delta edits the IRM's last layer (the rows that produce index i's deltas); one of the host edits everything
that writes into its residual stream at the index. Both are undone afterwards. Losses are teacher-forced and per row, so that
comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from realigner.analysis.resampling import change_per_target, prompt_weights
from realigner.console import progress
from realigner.errors import UsageError
from realigner.explain.edits import silenced
from realigner.explain.example_batches import ExampleBatches
from realigner.explain.explanation import Ablation
from realigner.explain.roles import find_stream
from realigner.irm import IRM
from realigner.training.preflight import free_memory
from realigner.tuner import tuner_of

How = Literal["zero", "mean", "keep"]
HOWS: tuple[How, ...] = ("zero", "mean", "keep")


@contextmanager
def in_float32(host: PreTrainedModel) -> Iterator[torch.dtype]:
    """Compute in float32 within a block: rounding in half precision hides changes as small as one index's.

    The weights are restored bit for bit. Nothing is changed if the host is quantised or partly offloaded, or if there is no
    memory for weights of twice the size. The block is given the dtype that is used.
    """
    half = [own for own in (*host.parameters(), *host.buffers()) if own.dtype in (torch.bfloat16, torch.float16)]
    free = free_memory(host.device)
    grown = sum(own.numel() * 4 for own in half)  # while a tensor is converted both copies are there; the largest is small
    whole = getattr(host, "hf_quantizer", None) is None and all(own.device.type != "meta" for own in host.parameters())
    if not half or not whole or (free is not None and grown > free):
        yield host.dtype
        return
    before = [own.dtype for own in half]
    try:
        for own in half:
            own.data = own.data.float()
        yield torch.float32
    finally:
        for own, dtype in zip(half, before, strict=True):
            own.data = own.data.to(dtype)


@contextmanager
def edited_output(irm: IRM, index: int, how: How, mean: np.ndarray | None = None) -> Iterator[None]:
    """Change an IRM's deltas at one index, in every layer, within a block.

    Args:
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
        if how == "mean" and mean is not None:  # before the deltas are scaled
            scale = irm.delta_scale if irm.layer_scales is None else irm.layer_scales[:, 0].cpu().numpy()
            biases[:, index] = torch.as_tensor(mean[:, index] / (1.0 if scale is None else scale)).to(bias)
        yield
    finally:
        weight.copy_(before[0])
        bias.copy_(before[1])


def control_indices(score: np.ndarray, index: int, random: int, matched: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """Control indices for an ablation: random ones, and those whose score is closest to the index's.

    Args:
        score: `leading_score` ``[neuron]``.
        random, matched: how many of each; fewer if the host has fewer.
    """
    others = np.array([n for n in range(len(score)) if n != index])
    near = others[np.argsort(np.abs(np.log(score[others] + 1e-30) - np.log(score[index] + 1e-30)), kind="stable")]
    left = np.setdiff1d(others, near[:matched])
    drawn = rng.choice(left, min(random, len(left)), replace=False) if len(left) else left
    return {"random": sorted(drawn.tolist()), "matched": near[:matched].tolist()}


def delta_ablations(
    model: nn.Module,
    rows: ExampleBatches,
    index: int,
    mean: np.ndarray,
    controls: Mapping[str, Sequence[int]],
    hows: Sequence[How] = HOWS,
    seed: int = 0,
    quiet: bool = True,
) -> list[Ablation]:
    """The loss with the delta of an index, or of a control, zeroed, replaced by its mean, or kept alone.

    Args:
        model: a host with one IRM.
        mean: the IRM's mean deltas ``[layer, neuron]``.
        controls: from `control_indices`; an index in several groups is ablated once.
        seed: of the intervals' resamples.

    Returns:
        One entry for each ablation and group ("" is the index itself), with the change from the whole IRM; how ``"whole"``
        and ``"none"`` (index -1) are the IRM as it is and the bare host. How ``"mean"``, which is read beside the same index's
        ``"zero"``, has no controls.
    """
    tuner = tuner_of(model)
    irm = tuner.registry.network(tuner.registry.names[0])

    def edit(how: How, number: int) -> AbstractContextManager[None]:
        return edited_output(irm, number, how, mean)

    bare = model.disable_adapter()  # type: ignore[operator]
    return _ablations(model, rows, index, controls, edit, hows, seed, quiet, bare)


def host_ablations(
    host: PreTrainedModel,
    rows: ExampleBatches,
    index: int,
    controls: Mapping[str, Sequence[int]],
    seed: int = 0,
    quiet: bool = True,
) -> list[Ablation]:
    """The bare host's loss with its residual stream zeroed at an index, and at control indices; it is left unchanged.

    Returns:
        As `delta_ablations`, how ``"zero"``, and ``"whole"``: the host as it is.

    Raises:
        RealignerError: as `find_stream`.
    """
    stream = find_stream(host)
    return _ablations(host, rows, index, controls, lambda _, number: silenced(host, stream, number), ("zero",), seed, quiet)


def _ablations(
    model: nn.Module,
    rows: ExampleBatches,
    index: int,
    controls: Mapping[str, Sequence[int]],
    edit: Callable[[How, int], AbstractContextManager[None]],
    hows: Sequence[How],
    seed: int,
    quiet: bool,
    bare: AbstractContextManager[None] | None = None,
) -> list[Ablation]:
    """Losses under every edit, each with its change from the loss of the whole and once for each group of its index."""
    whole, counts = rows.losses(model)
    weights = prompt_weights(len(counts), 1000, np.random.default_rng(seed))
    entries: list[Ablation] = []

    def add(how: str, number: int, groups: Sequence[str], sums: np.ndarray) -> None:
        change, low, high = change_per_target(sums - whole, counts, weights)
        loss, n = float(sums.sum() / counts.sum()), len(counts)
        for group in groups:
            found = Ablation(how=how, index=number, group=group, loss=loss, change=change, low=low, high=high, n=n)
            entries.append(found)

    add("whole", -1, [""], whole)
    if bare is not None:
        with bare:
            add("none", -1, [""], rows.losses(model)[0])
    groups = {index: [""]}  # "": the index in question
    for group, some in controls.items():
        for other in some:
            groups.setdefault(other, []).append(group)
    edits = [(how, number) for how in hows for number in groups if how != "mean" or number == index]
    with progress("ablating" if bare else "ablating the host", len(edits), quiet) as task:
        for how, number in edits:
            with edit(how, number):
                add(how, number, groups[number], rows.losses(model)[0])
            task.advance()
    return entries


def against_controls(ablations: Sequence[Ablation], how: How) -> dict[str, float]:
    """Compare the ablation of an index with those of its controls.

    Returns:
        ``change, low, high, n`` of the index. For each group of controls, their mean change (``random``, ``matched``) and the
        share with a change at least as large as the index's, which is counted among them (``p_random``, ``p_matched``); for
        `how` ``"keep"``, where small changes are good, at most as large. ``none``: the change without any delta, if measured.
    """
    own = next(entry for entry in ablations if entry.how == how and not entry.group)
    found = {"change": own.change, "low": own.low, "high": own.high, "n": float(own.n)}
    sign = -1.0 if how == "keep" else 1.0
    for none in (entry for entry in ablations if entry.how == "none"):
        found["none"] = none.change
    for group in ("random", "matched"):
        others = np.array([entry.change for entry in ablations if entry.how == how and entry.group == group])
        found[group] = float(others.mean()) if len(others) else float("nan")
        found[f"p_{group}"] = float((1 + (sign * others >= sign * own.change).sum()) / (1 + len(others)))
    return found
