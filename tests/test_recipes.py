"""Recipes: files, settings, errors that name file, line and key; and the losses they ask for, computed by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from peft import get_peft_model

from realigner.data import Row, encode_rows
from realigner.errors import RealignerError, UsageError
from realigner.irm_config import IRMConfig
from realigner.training import Recipe, make_recipe, read_recipe, train
from realigner.training.batches import prepare
from realigner.training.recipe import BUILT_IN, parse_setting, to_yaml
from realigner.training.trainer import IRMTrainer, evaluation_every, steps_per_epoch, total_steps, trainer_arguments
from realigner.tuner import tuner_of
from tests.tiny import some_rows, tiny_pair


def test_the_built_in_recipes() -> None:
    assert read_recipe("default") == Recipe()
    paper = read_recipe("paper")
    assert (paper.learning_rate, paper.decay, paper.batch_size, paper.epochs, paper.patience) == (1e-4, 0.85, 8, 15, 6)
    assert (paper.evaluations_per_epoch, paper.max_length, paper.loss_on, paper.preset) == (4, 128, "text", "paper")
    assert (paper.label_shift, paper.loss_on_padding, paper.l1, paper.steps) == (1, False, 0, None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_survives_its_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(to_yaml(read_recipe(name, ["layers=[0, 5]", "tone=anger"])))
    assert read_recipe(tmp_path / "r.yaml") == read_recipe(name, ["layers=[0, 5]", "tone=anger"])


def test_settings() -> None:
    recipe = read_recipe("paper", ["learning_rate=1e-3", "layers=0-3", "report_to=wandb,trackio", "l1=1e-4", "patience=null"])
    assert (recipe.learning_rate, recipe.layers, recipe.l1, recipe.patience) == (1e-3, "0-3", 1e-4, None)
    assert recipe.report_to == ["wandb", "trackio"]
    assert read_recipe("default", ["layers=5"]).layers == "5"
    assert read_recipe("default", ["epochs=2"]).steps is None
    assert read_recipe("paper", ["steps=7"]).steps == 7
    assert make_recipe("default", steps=3) == Recipe(steps=3)
    assert make_recipe("paper", patience=None).patience is None


def test_epochs_without_steps_count(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("tone: anger\nepochs: 3\n")
    made = [Recipe(epochs=3), Recipe().changed(epochs=3), make_recipe(epochs=3), make_recipe(steps=7).changed(epochs=3)]
    made += [read_recipe(file), read_recipe("default", ["epochs=3"])]
    assert {(recipe.steps, recipe.epochs) for recipe in made} == {(None, 3)}
    both = [Recipe(epochs=3, steps=7), Recipe().changed(epochs=3, steps=7), Recipe(epochs=3, steps=7).changed(seed=1)]
    assert {(recipe.steps, recipe.epochs) for recipe in both} == {(7, 3)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "settings: unknown key 'stepz'; did you mean 'steps'?"),
        ("steps", "setting 'steps': write key=value, for example steps=100"),
        ("=3", "setting '=3': write key=value"),
        ("steps=-1", "settings: steps: -1: input should be greater than or equal to 0"),
        ("steps=null", "settings: give steps or epochs; both are null"),
        ("label_shift=3", "settings: label_shift: 3: input should be 1 or 2"),
        ("report_to=excel", "settings: report_to: 'excel': input should be 'tensorboard', 'wandb' or 'trackio'"),
        ("accumulate=3", "batch_size 4 cannot be divided into 3 equal parts"),
        ("test=0.95", "validation and test together leave no rows"),
        ("layers=[0", "is not a YAML value"),
    ],
)
def test_bad_settings_are_one_line(setting: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe("default", [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 10\nseed: x\n", ":2: seed: 'x': input should be a valid integer"),
        ("steps: 10\n\nlearning: 3\n", ":3: unknown key 'learning'; did you mean 'learning_rate'?"),
        ("steps: 10\nseed: 1\nsteps: 20\n", ":3: not read (duplicate key 'steps', first on line 1)"),
        ("chat_template_kwargs:\n  a: 1\n  b: 2\n  a: 3\n", ":4: not read (duplicate key 'a', first on line 2)"),
        ("steps: [10\nseed: 1\n", ":2: not valid YAML"),
        ("- steps\n", "is not a list of 'key: value' lines"),
        ("just words\n", "is not a list of 'key: value' lines"),
        ("steps: null\nepochs: null\n", "give steps or epochs"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_bad_files_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RealignerError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a file nor one of default, paper"):
        read_recipe("papper")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RealignerError, match="not UTF-8"):
        read_recipe(tmp_path / "binary.yaml")


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.builds(yaml.safe_dump, st.dictionaries(st.sampled_from(list(Recipe.model_fields)), st.none() | st.integers() | st.text() | st.lists(st.integers()))))  # fmt: skip  # noqa: E501
def test_any_text_is_a_recipe_or_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        recipe = read_recipe(path)
    except RealignerError as error:
        said = str(error)
    else:
        said = str(isinstance(recipe, Recipe))
    assert len(said.splitlines()) == 1


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_setting_is_one_or_one_line(text: str) -> None:
    try:
        said, _ = parse_setting(text)
    except UsageError as error:
        said = repr(str(error))
    assert said


# The losses.


def rows_of(count: int = 16) -> list[Row]:
    """Rows of different lengths."""
    dice = random.Random(0)
    return [row.model_copy(update={"text": row.text + " No!" * dice.randint(0, 6)}) for row in some_rows(count)]


def by_hand(
    logits: torch.Tensor, ids: list[int], labels: list[int], shift: int, padded: int | None, pad: int
) -> tuple[float, int]:
    """Summed loss and number of targets of one row, position by position, in plain Python."""
    if padded is not None:
        labels = labels + [pad] * (padded - len(labels))
    total, count = 0.0, 0
    for t in range(len(labels) - shift):
        target = labels[t + shift]
        if target != -100:
            row = logits[t].double()
            total += float(torch.logsumexp(row, 0) - row[target])
            count += 1
    return total, count


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("l1", [0.0, 1e-4])
@pytest.mark.parametrize("loss_on", ["text", "reply"])
def test_the_papers_loss_is_the_one_computed_by_hand(
    tmp_path: Path, shift: int, padding: bool, l1: float, loss_on: str
) -> None:
    """A batch of rows through IRMTrainer, against each row alone, unpadded (or padded by hand), with a plain forward."""
    recipe = make_recipe(
        "paper", label_shift=shift, loss_on_padding=padding, l1=l1, loss_on=loss_on, max_length=96, steps=1, report_to=[],
        layers="0-1",
    )  # fmt: skip
    host, tokenizer = tiny_pair()
    prepared = prepare(rows_of(), tokenizer, host.config, recipe)
    torch.manual_seed(1)
    model = get_peft_model(host, IRMConfig(preset="paper", layers="0-1"))
    arguments = trainer_arguments(recipe, len(prepared.train), tmp_path, cpu=True, resuming=False)
    trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer=tokenizer)
    rows = [trainer.train_dataset[n] for n in range(8)]
    batch = trainer.data_collator(rows)
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(model, batch, num_items_in_batch=items).item()

    sizes: list[torch.Tensor] = []
    tuner_of(model).injector.observers.append(lambda _, __, delta: sizes.append(delta))
    total, count, deltas = 0.0, 0, 0.0
    for row in rows:
        assert (
            row["input_ids"] == encode_rows(tokenizer, [prepared.split.train[row["row"]]], 96, "plain", loss_on)[0]["input_ids"]
        )
        ids = row["input_ids"] + [0] * (96 - len(row["input_ids"])) * padding
        mask = [1] * len(row["input_ids"]) + [0] * (len(ids) - len(row["input_ids"]))
        sizes.clear()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask])).logits[0]
        own_total, own_count = by_hand(logits, ids, row["labels"], shift, 96 if padding else None, pad=0)
        total, count = total + own_total, count + own_count
        deltas += sizes[0].double().abs().sum().item()
    assert items == count
    assert loss == pytest.approx(total / count + l1 / 2 * deltas, rel=2e-5)


def test_the_l1_term_has_the_same_gradients_with_checkpointing(tmp_path: Path) -> None:
    """The layer that the deltas come from is recomputed in the backward pass; what only watches sees them once."""
    recipe = make_recipe(l1=1e-2, max_length=96, steps=1, report_to=[], dropout=0.0, learning_rate=1e-3)
    gradients: list[list[Any]] = []
    seen = []
    for checkpointed in (False, True):
        host, tokenizer = tiny_pair()
        prepared = prepare(rows_of(), tokenizer, host.config, recipe)
        torch.manual_seed(1)
        model = get_peft_model(host, IRMConfig(preset="compact"))
        if checkpointed:
            host.gradient_checkpointing_enable({"use_reentrant": False})
        arguments = trainer_arguments(recipe, len(prepared.train), tmp_path, cpu=True, resuming=False)
        trainer = IRMTrainer(model.train(), prepared, recipe, arguments, tokenizer=tokenizer)
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
        watched = Mock(in_loss=False)
        tuner_of(model).injector.observers.append(watched)
        items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        loss: Any = trainer.compute_loss(model, batch, num_items_in_batch=items)
        loss.backward()
        gradients.append([parameter.grad for parameter in tuner_of(model).registry.parameters()])
        seen.append(watched.call_count)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert any(bool(gradient.any()) for gradient in gradients[0])
    assert seen == [1, 1]


def test_the_quirks_change_the_loss() -> None:
    """Each switch does something: four losses, all different (the hand-computed test would pass if both sides ignored it)."""
    losses = set()
    for shift in (1, 2):
        for padding in (False, True):
            host, tokenizer = tiny_pair()
            recipe = make_recipe("paper", label_shift=shift, loss_on_padding=padding, max_length=96)
            prepared = prepare(rows_of(), tokenizer, host.config, recipe)
            model = get_peft_model(host, IRMConfig())
            arguments = trainer_arguments(recipe, len(prepared.train), Path("unused"), cpu=True, resuming=False)
            trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer=tokenizer)
            batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
            losses.add(round(trainer.compute_loss(model, batch).item(), 6))
    assert len(losses) == 4


def test_the_papers_schedule(tmp_path: Path) -> None:
    """0.85 after each epoch, four evaluations an epoch, no warm-up; the learning rates of a real run."""
    host, tokenizer = tiny_pair()
    recipe = make_recipe("paper", epochs=3, steps=None, batch_size=2, samples=0, report_to=[], max_length=64)
    run = train(host, tokenizer, some_rows(40, groups=20), tmp_path / "run", recipe, quiet=True)
    from realigner.training import read_metrics

    entries = read_metrics(tmp_path / "run")
    every = run.record["data"]["train"] // 2
    assert run.record["data"]["test"] > 0
    rates = [entry["learning_rate"] for entry in entries if "loss" in entry]
    assert len(rates) == 3 * every
    assert rates == pytest.approx([1e-4 * 0.85 ** (step // every) for step in range(3 * every)])
    evaluated = [entry["step"] for entry in entries if "validation_loss" in entry]
    assert evaluated[:5] == [0, *(-(-every // 4) * n for n in range(1, 5))]


@given(rows=st.integers(1, 5000), batch=st.integers(1, 64), epochs=st.floats(0.01, 20), a_epoch=st.integers(1, 8))
def test_steps_and_epochs(rows: int, batch: int, epochs: float, a_epoch: int) -> None:
    if rows < batch:
        return
    recipe = Recipe(steps=None, epochs=epochs, batch_size=batch, evaluations_per_epoch=a_epoch)
    assert total_steps(recipe, rows) >= 1
    assert abs(total_steps(recipe, rows) - epochs * steps_per_epoch(recipe, rows)) <= 1
    assert 1 <= evaluation_every(recipe, rows) <= max(1, steps_per_epoch(recipe, rows))


def test_layers_below_the_first_delta_are_not_gone_back_through() -> None:
    """The backward pass stops at the first injected layer, and no weight of the host gets a gradient."""
    host, tokenizer = tiny_pair(num_hidden_layers=6)
    del tokenizer
    model = get_peft_model(host, IRMConfig(layers=[4, 5]))
    visited: list[int] = []
    for number, layer in enumerate(host.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, number=number: visited.append(number))
    model(input_ids=torch.arange(2, 9)[None]).logits.sum().backward()
    assert sorted(set(visited)) == [4, 5]
    assert all(parameter.grad is None for parameter in host.parameters())
    assert all(parameter.grad is not None for parameter in tuner_of(model).registry.network("default").parameters())


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"accumulate": 4}, {"accumulate": 2, "gradient_checkpointing": True}]
)
def test_what_saves_memory_changes_no_number(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = make_recipe(steps=8, batch_size=4, samples=0, report_to=[], optimizer="sgd", learning_rate=0.1, dropout=0.0)
    weights = []
    for name, own in (("plain", recipe), ("other", recipe.changed(**options))):
        host, tokenizer = tiny_pair()
        run = train(host, tokenizer, rows_of(24), tmp_path / name, own, quiet=True)
        weights.append(torch.cat([p.flatten() for p in tuner_of(run.model).registry.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_training_gives_the_same_numbers(tmp_path: Path) -> None:
    recipe = make_recipe(
        steps=2, batch_size=4, samples=0, evaluations=1, report_to=[], optimizer="sgd", learning_rate=0.1, dropout=0
    )
    weights = []
    for name in (False, True):
        host, tokenizer = tiny_pair()
        run = train(host, tokenizer, some_rows(), tmp_path / str(name), recipe, compile=name, quiet=True)
        weights.append(torch.cat([p.flatten() for p in tuner_of(run.model).registry.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5


def test_losses_fall_under_the_paper_recipe(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    recipe = make_recipe("paper", steps=80, samples=0, report_to=[], learning_rate=3e-3, evaluations_per_epoch=2)
    run = train(host, tokenizer, some_rows(60, groups=20), tmp_path / "run", recipe, quiet=True)
    losses = run.record["validation_loss"]
    assert losses[-1] < losses[0] - 0.2


def test_the_irms_products_are_bfloat16_only_while_it_is_trained_on_such_a_host(tmp_path: Path) -> None:
    for dtype, products in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        host, tokenizer = tiny_pair()
        host = host.to(dtype)
        recipe = make_recipe(steps=3, batch_size=4, samples=0, report_to=[], dropout=0)
        run = train(host, tokenizer, some_rows(), tmp_path / products, recipe, quiet=True)
        assert run.record["recipe"]["irm_products"] == products
        network = tuner_of(run.model).registry.network("default")
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        h0 = torch.randn(2, 5, host.config.hidden_size)
        assert network.train()(h0).dtype == torch.float32  # trained, it is as any other
        network.training_dtype = torch.bfloat16
        assert network(h0).dtype == torch.bfloat16
        network(h0).float().square().mean().backward()
        assert {parameter.grad.dtype for parameter in network.parameters() if parameter.grad is not None} == {torch.float32}
        exact = network.eval()(h0)
        assert exact.dtype == torch.float32  # validation
        assert torch.allclose(network.train()(h0).float(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
