"""The mean of a run's weights over its steps, in place of the last step's (Izmailov et al. 2018, arXiv 1803.05407)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

_MEAN = "mean"  # of a parameter: the mean of its values; while that is in the parameter, the value of the last step


def average_weights(optimizer: Optimizer, after: int) -> None:
    """Have an optimiser keep the mean of its parameters' values over all steps after the first `after`.

    ``optimizer.eval()`` puts the means into the parameters, ``optimizer.train()`` the last values: Trainer calls both, as
    schedule-free optimisers want it. Means and mode are in the optimiser's state, saved and loaded with it.

    Args:
        optimizer: any optimiser with torch's interface. Sharded parameters have sharded means.
        after: number of steps at the start that are left out of the mean.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> average_weights(optimizer, after=1)
        >>> for _ in range(3):
        ...     weight.grad = -torch.ones(1)
        ...     optimizer.step()
        >>> optimizer.eval(); weight.item()
        2.5
        >>> optimizer.train(); weight.item()
        3.0
    """
    for group in optimizer.param_groups:
        group |= {"steps_done": 0, "mean_in_place": False}
    optimizer.register_step_post_hook(partial(_count, after))
    own: Any = optimizer
    own.eval, own.train = partial(_swap, optimizer, True), partial(_swap, optimizer, False)


@torch.no_grad()
def _count(after: int, optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        group["steps_done"] += 1
        count = group["steps_done"] - after
        for parameter in group["params"] if count > 0 else ():
            state = optimizer.state[parameter]
            if count == 1:
                state[_MEAN] = parameter.clone()
            else:
                state[_MEAN].lerp_(parameter, 1 / count)


@torch.no_grad()
def _swap(optimizer: Optimizer, mean: bool) -> None:
    for group in optimizer.param_groups:
        if group["mean_in_place"] != mean:
            group["mean_in_place"] = mean
            for parameter in group["params"]:
                if (kept := optimizer.state[parameter].get(_MEAN)) is not None:
                    last = parameter.clone()
                    parameter.copy_(kept)
                    kept.copy_(last)
