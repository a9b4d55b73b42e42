"""The mean of a run's weights: against torch's own and by hand; which weights a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from realigner.training import make_recipe, train
from realigner.training.weight_averaging import average_weights
from tests.tiny import some_rows, tiny_pair

STEPS = 8
RECIPE = make_recipe(steps=STEPS, batch_size=4, evaluations=1, samples=0, keep="last", dropout=0.0, report_to=[])


def trained(out: Path, **keys: object) -> dict[str, torch.Tensor]:
    host, tokenizer = tiny_pair()
    train(host, tokenizer, some_rows(), out, RECIPE.changed(**keys), quiet=True)
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_mean_is_that_of_torch(kind: type[torch.optim.AdamW | torch.optim.SGD]) -> None:
    torch.manual_seed(0)
    model, averaged = nn.Linear(3, 2), AveragedModel(nn.Linear(3, 2))
    optimizer: Any = kind(model.parameters(), lr=0.1)
    average_weights(optimizer, after=2)
    for step in range(7):
        optimizer.train()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            averaged.update_parameters(model)
        if step == 4:  # a look in between changes nothing
            optimizer.eval()
    last = [parameter.clone() for parameter in model.parameters()]
    optimizer.eval()
    for own, theirs in zip(model.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)
    optimizer.train()
    assert all(torch.equal(own, before) for own, before in zip(model.parameters(), last, strict=True))


@pytest.mark.proof
def test_a_run_keeps_the_mean_of_its_last_steps(tmp_path: Path) -> None:
    schedule = {"schedule": "constant", "warmup": 0}
    by_step = [
        trained(tmp_path / f"{steps}", steps=steps, average=0.0, **schedule) for steps in range(STEPS // 2 + 1, STEPS + 1)
    ]
    found = trained(tmp_path / "mean", average=0.5, **schedule)
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([weights[name] for weights in by_step]).mean(dim=0))
    assert any(not torch.equal(value, by_step[-1][name]) for name, value in found.items())


def test_averaging_changes_no_step(tmp_path: Path) -> None:
    """A share so small that the last step alone counts gives the last step's weights, with evaluations in between."""
    plain, averaged = (trained(tmp_path / f"{share}", average=share, evaluations=4) for share in (0.0, 1 / STEPS))
    assert all(torch.equal(plain[name], averaged[name]) for name in plain)


def test_it_is_off_by_default() -> None:
    assert make_recipe().average == make_recipe("paper").average == make_recipe(edition=1).average == 0.0
    assert make_recipe("paper", average=0.2).average == 0.2
