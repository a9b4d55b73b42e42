"""One recipe for hosts of every size: what an IRM knows of its host's residual stream, and what follows from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from peft import PeftModel, get_peft_model

import realigner as ra
from realigner.data import authored
from realigner.errors import UsageError
from realigner.irm import EDITIONS, IRM
from realigner.locate import find_sites
from realigner.residuals import delta_scale, delta_scales, residual_sizes
from realigner.sweep.grid import Sweep, plan
from realigner.tiny import tiny_host
from realigner.training import Recipe, make_recipe, read_recipe, train
from realigner.training.recipe import LATER_KEYS, to_yaml
from realigner.tuner import load_irm, tuner_of
from tests.scaled_hosts import scaled_host
from tests.tiny import some_rows, tiny_pair
from tests.trained_hosts import DEEP, FAMILIES, longest_above, losses_by_step, trained_host

PRE_NORM = ("llama", "gemma2")  # the second with norms of branches, a tied head, gains of 1 + w


def test_sizes_are_those_of_the_residual() -> None:
    host = tiny_host("llama", max_position_embeddings=128)
    ids = torch.randint(host.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    read: list[torch.Tensor] = []  # what the norm before the MLP is given: the residual
    for layer in host.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        host(input_ids=ids)
    expected = [float((h**2).mean(-1).sqrt().median()) for h in read]
    assert residual_sizes(host, find_sites(host)) == pytest.approx(expected, rel=1e-6)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40),
    st.floats(1e-4, 1e4),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_the_scale_follows_the_stream(sizes: list[float], factor: float, random: Any) -> None:
    layers = sorted(random.sample(range(len(sizes)), random.randint(1, len(sizes))))
    scale, scales = delta_scale(sizes, layers), delta_scales(sizes, layers)
    assert delta_scales([factor * size for size in sizes], layers) == pytest.approx([factor * one for one in scales])
    assert delta_scale([factor * size for size in sizes], layers) == pytest.approx(factor * scale)
    moved = [sum(one <= site for one in layers) * scale / sizes[site] for site in range(layers[0], len(sizes))]
    assert math.sqrt(sum(one**2 for one in moved) / len(moved)) == pytest.approx(2.26)


def test_the_scales_are_where_they_are_said_to_be() -> None:
    torch.manual_seed(0)
    plain = IRM(8, (0, 2), (16,), 4, 0.1, input_norm=True)
    scaled = IRM(8, (0, 2), (16,), 4, 0.1, input_norm=True, input_scale=0.01, delta_scale=3.0)
    scaled.load_state_dict(plain.state_dict())
    h0 = torch.randn(2, 3, 8)
    assert torch.allclose(scaled(0.01 * h0), 3 * plain(h0), rtol=1e-5, atol=1e-6)
    by_layer = IRM(8, (0, 2), (16,), 4, 0.1, input_norm=True, delta_scale=[3.0, 0.5])
    by_layer.load_state_dict(plain.state_dict())
    assert torch.allclose(by_layer(h0), plain(h0) * torch.tensor([[3.0], [0.5]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_scales_are_measured_once_and_saved(preset: str, tmp_path: Path) -> None:
    host = tiny_host("llama")
    sizes = residual_sizes(host, find_sites(host))
    torch.manual_seed(0)
    model = get_peft_model(host, ra.IRMConfig(preset=preset, layers=[1, 2], output_std=0.3))
    config, network = tuner_of(model).peft_config["default"], tuner_of(model).registry.network("default")
    if preset == "compact":
        assert (config.input_scale, config.delta_scale) == (sizes[0], delta_scales(sizes, [1, 2]))
        assert config.edition == 2
    assert (network.input_scale, network.delta_scale) == (config.input_scale or 1.0, config.delta_scale or 1.0)
    ids = torch.arange(3, 13)[None]
    logits = model(input_ids=ids).logits
    second = ra.IRMConfig(preset=preset, layers=[1, 2])
    model.add_adapter("second", second)  # measured on the bare host, though the first acts
    assert (second.input_scale, second.delta_scale) == (config.input_scale, config.delta_scale)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.unload()
    assert torch.equal(load_irm(host, tmp_path)(input_ids=ids).logits, logits)


def test_adapters_of_before_have_no_scales(tmp_path: Path) -> None:
    host, ids = tiny_host("llama"), torch.arange(3, 13)[None]
    torch.manual_seed(0)
    model = get_peft_model(host, ra.IRMConfig(input_scale=1.0, delta_scale=1.0, output_std=0.3, edition=1))
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    host = model.unload()
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in values.items() if key != "edition" and not key.endswith("_scale")})
    )
    assert torch.equal(load_irm(host, tmp_path)(input_ids=ids).logits, logits)
    ra.unload(host)
    assert torch.equal(PeftModel.from_pretrained(host, tmp_path)(input_ids=ids).logits, logits)


@pytest.mark.parametrize("key", ["input_scale", "delta_scale"])
@pytest.mark.parametrize("value", [0, -1.0, "1", True, math.nan, math.inf])
def test_a_scale_is_a_number_above_0(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{key}: .* is not a number above 0"):
        ra.IRMConfig(**{key: value})


def test_recipes_of_before_mean_what_they_meant(tmp_path: Path) -> None:
    values = Recipe(learning_rate=0.01, tone="anger").model_dump()
    old = {key: value for key, value in values.items() if key not in LATER_KEYS}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old))
    assert read_recipe(tmp_path / "run.yaml").delta_scale == 1.0
    (tmp_path / "now.yaml").write_text(to_yaml(Recipe(tone="anger")))
    assert read_recipe(tmp_path / "now.yaml") == Recipe(tone="anger")
    (tmp_path / "mine.yaml").write_text("tone: anger\nsteps: 10\n")
    assert read_recipe(tmp_path / "mine.yaml") == Recipe(tone="anger", steps=10)


def test_a_preset_named_later_is_the_preset(tmp_path: Path) -> None:
    compact, paper = make_recipe(), make_recipe("paper")
    for changed in (make_recipe(preset="paper"), read_recipe("default", ["preset=paper"]), compact.changed(preset="paper")):
        assert (changed.shape.dropout, changed.shape.edition) == (paper.shape.dropout, paper.shape.edition) == (0.0, 1)
    assert paper.changed(preset="compact").shape == compact.shape
    assert (compact.shape.dropout, compact.shape.edition) == (0.6, EDITIONS[-1])
    assert make_recipe(edition=1).shape.dropout == 0.0
    assert make_recipe(edition=1, dropout=0.2).shape.dropout == make_recipe(preset="paper", dropout=0.2).shape.dropout == 0.2


def test_sweeps_of_before_find_their_runs() -> None:
    scales = {"input_scale": 1.0, "delta_scale": 1.0}
    before = {"default": {"learning_rate": 0.01, "edition": 1, **scales}, "paper": {}}
    runs = [plan(Sweep(recipe=name, set=keys, grid={"tone": ["anger"]}), Path())[0] for name, keys in before.items()]
    assert [run.name for run in runs] == ["92e5e7119ddd", "fa2baacbb3e2"]  # what they were


@pytest.mark.parametrize(
    ("keys", "hidden", "rate"),
    [
        ({}, 576, 1e-2),
        ({}, 64, 1e-2),
        ({}, 4096, 1e-2 * 576 / 4096),
        ({"widths": [1024], "rank": 16}, 576, 1e-2 / 4),
        ({"widths": [128], "rank": 16}, 576, 1e-2),
        ({"preset": "paper"}, 576, 1e-4),
        ({"instruct": "Be angry."}, 576, 3e-3),
    ],
)
def test_the_rate_goes_by_the_widths(keys: dict[str, Any], hidden: int, rate: float) -> None:
    assert Recipe(**keys).rate(hidden) == pytest.approx(rate, rel=0.01)


def test_a_rate_is_settled_when_training_begins(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    run = train(host, tokenizer, some_rows(), tmp_path / "run", steps=1, samples=0, quiet=True)
    assert run.record["recipe"]["learning_rate"] == 0.01
    with pytest.raises(UsageError, match="learning_rate: None is not settled yet"):
        _ = Recipe().peak_rate


def test_the_papers_preset_without_scales_is_the_run_with_scales_of_1() -> None:
    default, paper = make_recipe(), make_recipe("paper")
    before = {"input_scale": 1.0, "delta_scale": 1.0}  # what an unfinished run of before is read as
    assert paper.difference(paper.changed(**before)) is None
    assert default.difference(default.changed(**before)) == "input_scale is null, not 1.0"
    assert paper.changed(delta_scale=2.0).difference(paper) == "delta_scale is 2.0, not 1.0"


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {"max_position_embeddings": 16}),
        ("roberta", {"max_position_embeddings": 20, "pad_token_id": 1}),
        ("whisper", {"max_target_positions": 20}),
        ("mpt", {"max_seq_len": 16}),
        ("prophetnet", {}),
    ],
)
def test_hosts_of_few_positions_are_measured(family: str, sizes: dict[str, Any]) -> None:
    host = tiny_host(family, **sizes)
    assert min(residual_sizes(host, find_sites(host))) > 0


@pytest.mark.parametrize("family", PRE_NORM)
def test_a_scaled_stream_trains_alike(family: str, tmp_path: Path) -> None:
    host, tokenizer = tiny_pair(family)

    def losses(factor: float, **keys: Any) -> list[float]:
        scaled, out = scaled_host(host, factor), tmp_path / f"{factor} {len(keys)}"
        recipe = Recipe(steps=8, evaluations=2, samples=0, report_to=[], **keys)
        found: list[float] = train(scaled, tokenizer, some_rows(), out, recipe, quiet=True).record["validation_loss"]
        return found

    whole = losses(1)
    assert whole[-1] < whole[0] - 0.02
    assert losses(0.01) == pytest.approx(whole, abs=2e-3)
    assert losses(100) == pytest.approx(whole, abs=2e-3)
    assert losses(0.01, input_scale=1.0, delta_scale=1.0) != pytest.approx(whole, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, DEEP])
def test_the_default_recipe_never_makes_a_trained_host_worse(family: str, tmp_path: Path) -> None:
    host, tokenizer = trained_host(family, tmp_path / "host")
    sizes = residual_sizes(host, find_sites(host))
    assert family != DEEP or sizes[-1] > 100 * sizes[0]
    losses = losses_by_step(host, tokenizer, authored("anger"), tmp_path / "run")
    assert losses[-1] < losses[0]
    assert longest_above(losses) <= 5
