"""The methods of an evaluation: fitted for a few steps on tiny hosts, kept, put on, taken off; and how large they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from realigner.data import Row, built_in_tones
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.constant_vectors import STRENGTHS, constant_irm, mean_deltas, mean_residuals
from realigner.evaluation.layer_edits import Edit, EditedHost, LoReFTEdit, PSREdit
from realigner.evaluation.method_protocol import ADAPTER, RECORD_FILE, Given, Job, Method, read_method
from realigner.evaluation.methods import METHODS, find_method
from realigner.evaluation.peft_methods import Prefix
from realigner.evaluation.prompting import system_prompts
from realigner.evaluation.replies import conversation_of
from realigner.evaluation.row_training import prepared_rows, train_on_rows
from realigner.evaluation.side_effects import NeutralText, bare_speaker, passages
from realigner.evaluation.task import Task
from realigner.fingerprints import weights_hash
from realigner.generation import answer
from realigner.locate import find_sites
from realigner.residuals import Residuals
from realigner.tiny import tiny_host
from realigner.training import make_recipe, read_run, teacher
from realigner.training.batches import Collator
from realigner.training.loss import row_losses
from realigner.training.trainer import IRMTrainer, trainer_arguments
from realigner.tuner import load_irm, tuner_of
from tests.tiny import some_rows, tiny_pair

LORA = 460_800  # parameters of LoRA of rank 8 on SmolLM2-135M
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
TRAINED = [method.name for method in METHODS if method.rates]
ON_ROWS = [name for name in TRAINED if not name.startswith("irm-")]
RATES = {"irm-paper": 1e-2, "irm-compact": 3e-2, "irm-sentence": 0.3}
QUICK = ("bare", "prompt", "few-shot", "constant", "random", "reft", "lora", "prefix", "irm-compact")  # one of each kind
BY_KIND = [pytest.param(method.name, marks=[] if method.name in QUICK else pytest.mark.slow) for method in METHODS]
TRAINED_BY_KIND = [param for param in BY_KIND if param.values[0] in TRAINED]
QUESTIONS = ["What is 3?", "What on earth could the answer to 17 be?"]


def a_task() -> Task:
    rows = some_rows(24, groups=4, tone="grumpy")
    return Task("grumpy", rows[:16], rows[16:19], rows[19:], [])


def score(rows: Sequence[Row], replies: Sequence[str], given: str = "") -> float:
    assert len(rows) == len(replies)
    return float(sum(map(len, replies)))


def fit(method: Method | str, folder: Path, host: Any = None, given: Given | None = None, rate: float | None = None) -> Path:
    method = find_method(method) if isinstance(method, str) else method
    own, tokenizer = tiny_pair()
    recipe = make_recipe(steps=3, batch_size=4, warmup=0, seed=7)
    method.fit(host or own, tokenizer, a_task(), recipe, rate, folder, given or Given(score=score, reply_tokens=4))
    return folder


class Fits(dict[str, Path]):
    """Methods by name, fitted when first asked for; with rates high enough that each changes what the host says."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __missing__(self, name: str) -> Path:
        irm = self["irm-compact"] if "irm" in find_method(name).needs else None
        rate = RATES.get(name, 0.3 if name in TRAINED else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher, "OBEDIENCE", -1.0)  # a host of random weights obeys nobody
            patch.setattr(teacher, "REPLY_TOKENS", 6)
            self[name] = fit(name, self.place / name, given=Given(score=score, reply_tokens=4, irm=irm), rate=rate)
        return self[name]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return Fits(tmp_path_factory.mktemp("methods"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[9, 8, 7, 30, 31, 32]])).logits
    return found


def account(host: Any) -> list[Any]:
    """All that a method could leave on a host."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), type(module), module.training)
        for name, module in host.named_modules()
    ]
    flags = [(name, parameter.requires_grad) for name, parameter in host.named_parameters()]
    return [hooks, flags, sorted(vars(host).keys() - {"irm_sites"}), list(host.state_dict())]


@pytest.mark.parametrize("name", BY_KIND)
def test_kept_put_on_and_taken_off(name: str, fitted: Fits) -> None:
    host, tokenizer = tiny_pair()
    before, hashed, bare = account(host), weights_hash(host), logits(host)
    plain = [str(reply) for reply in answer(host, tokenizer, QUESTIONS, max_new_tokens=6)]
    method = find_method(name)
    with method.attach(host, tokenizer, fitted[name]) as model:
        acting, replies = logits(model.model), model.generate(QUESTIONS, max_new_tokens=6)
        alone = [model.generate([question], max_new_tokens=6)[0] for question in QUESTIONS]
        assert replies == alone  # padding on the left changes nothing
        changes_weights = name not in ("bare", "prompt", "few-shot", "untrained")
        assert torch.equal(acting, bare) != (changes_weights or name == "untrained")
        if name not in ("bare", "untrained"):
            assert replies != plain
        assert (model.scaled is not None) == (name not in ("bare", "prompt", "few-shot", "prefix"))
        if model.scaled is not None:
            with model.strength(0.0):
                assert torch.equal(logits(model.model), bare)
                assert model.generate(QUESTIONS, max_new_tokens=6) == plain
            with model.strength(0.5):
                assert not torch.equal(logits(model.model), acting)
            assert torch.equal(logits(model.model), acting)
        else:
            with pytest.raises(UsageError, match="strength"), model.strength(0.5):
                pass
    assert account(host) == before
    assert weights_hash(host) == hashed
    assert torch.equal(logits(host), bare)
    with method.attach(tiny_pair()[0], tokenizer, fitted[name]) as again:  # from the files alone
        assert torch.equal(logits(again.model), acting)
        assert again.generate(QUESTIONS, max_new_tokens=6) == replies


@pytest.mark.parametrize("name", [method.name for method in METHODS])
def test_what_it_does_to_neutral_text_is_measured(name: str, fitted: Fits) -> None:
    host, tokenizer = tiny_pair()
    neutral = NeutralText(bare_speaker(host), tokenizer, [replace(passages()[0], passage="A river runs through it.")])
    method = find_method(name)
    with method.attach(host, tokenizer, fitted[name]) as model:
        (effect,) = neutral.effects(model)
    assert len(effect["shift"]) == len(find_sites(host).sites)
    assert (max(effect["shift"]) > 0) == (name != "bare")
    if name in ("bare", "untrained"):  # whose deltas are too small to move a prediction
        assert abs(effect["kl"]) < 1e-5
    else:
        assert effect["kl"] > 1e-5


@pytest.mark.parametrize("name", TRAINED_BY_KIND)
def test_the_record_of_a_training(name: str, fitted: Fits) -> None:
    record = json.loads((fitted[name] / RECORD_FILE).read_text())
    assert record["method"] == name
    assert record["tone"] == "grumpy"
    assert record["steps"] == 3
    assert record["tokens"] > 0
    start, end = record["validation_loss"]
    assert start != end
    host, tokenizer = tiny_pair()
    assert record["parameters"] == find_method(name).parameters(host.config)
    if name != "irm-sentence":  # what is loaded has the loss that what was trained had
        job = Job(host, tokenizer, a_task(), make_recipe(batch_size=4, tone="grumpy"), Path("-"), Given())
        inputs = Collator(0)([{**item, "row": n} for n, item in enumerate(prepared_rows(job).validation)])
        with find_method(name).attach(host, tokenizer, fitted[name]) as model, torch.no_grad():
            sums, counts = row_losses(model.model, inputs, only_where_needed=True)
        assert round(float(sums.sum() / counts.sum()), 3) == pytest.approx(end, abs=2e-3)
    assert not list(fitted[name].rglob("*.bin"))
    assert not list(fitted[name].rglob("*.pt*"))


@pytest.mark.slow
def test_all_that_learn_from_rows_learn_from_the_same(fitted: Fits) -> None:
    """The same rows and tokens; and a method that begins at the bare host has its validation loss."""
    records = {name: json.loads((fitted[name] / RECORD_FILE).read_text()) for name in TRAINED if name != "irm-sentence"}
    assert {record["rows"] for record in records.values()} == {16}
    assert len({record["tokens"] for record in records.values()}) == 1
    starts = {name: record["validation_loss"][0] for name, record in records.items()}
    assert len({starts[name] for name in ("constant", "shared", "psr", "reft", "lora", "shadow", "ia3")}) == 1
    assert abs(starts["irm-compact"] - starts["lora"]) < 1e-3
    run = read_run(fitted["irm-compact"] / ADAPTER)
    assert (run["data"]["train"], run["data"]["validation"], run["kept_step"]) == (16, 3, 3)


def test_an_irm_and_others_see_the_same_rows_in_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def noting(model: Any, inputs: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(inputs["rows"].tolist())
        return row_losses(model, inputs, *args)

    monkeypatch.setattr("realigner.training.trainer.row_losses", noting)
    fit("irm-compact", tmp_path / "irm")
    irm = list(seen)
    seen.clear()
    fit("lora", tmp_path / "lora")
    assert irm == seen
    assert len(irm) == 3


def test_constant_vectors_trained_by_either_trainer_are_the_same(tmp_path: Path) -> None:
    """A constant vector is an IRM: `IRMTrainer` and `RowTrainer` must take it through the same steps, to the bit."""
    found = []
    for which in range(2):
        host, tokenizer = tiny_pair()
        recipe = make_recipe(steps=5, batch_size=4, seed=7, tone="grumpy", learning_rate=0.1, report_to=[], samples=0)
        job = Job(host, tokenizer, a_task(), recipe, tmp_path, Given())
        frozen = list(host.modules())
        model = constant_irm(host)
        bias = tuner_of(model).registry.network("default").output.bias.requires_grad_(True)
        if which:
            train_on_rows(model, job, frozen)
        else:
            prepared = prepared_rows(job)
            arguments = trainer_arguments(recipe, len(prepared.train), tmp_path, True, resuming=True)
            arguments.eval_strategy = arguments.save_strategy = "no"
            IRMTrainer(model, prepared, recipe, arguments, tokenizer).train()
        found.append(bias.detach().clone())
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


@pytest.mark.slow
def test_shared_is_one_vector(fitted: Fits) -> None:
    bias = load_file(fitted["shared"] / ADAPTER / "adapter_model.safetensors")["irm.output.bias"].view(3, -1)
    assert bias.abs().sum() > 0
    assert torch.equal(bias, bias[:1].expand(3, -1))
    own = load_file(fitted["constant"] / ADAPTER / "adapter_model.safetensors")["irm.output.bias"].view(3, -1)
    assert not torch.equal(own[0], own[1])


def test_mean_delta_and_random(fitted: Fits) -> None:
    """Against the deltas computed apart, from h0, text by text and without padding."""
    host, tokenizer = tiny_pair()
    task = a_task()
    job = Job(host, tokenizer, task, make_recipe(seed=7), Path("-"), Given(irm=fitted["irm-compact"]))
    own = load_irm(host, fitted["irm-compact"] / ADAPTER)
    network = tuner_of(own).registry.network("default")
    own.unload()
    each = []
    with Residuals(find_sites(host)).watching() as residuals, torch.no_grad():
        for ids in (item["input_ids"] for item in prepared_rows(job).train):
            host(input_ids=torch.tensor([ids]))
            each.append(network(residuals.layers[0][0]))
    mean = torch.cat(each).mean(dim=0)
    assert torch.allclose(mean_deltas(job), mean, atol=1e-6)
    of_the_run = replace(job, given=Given(irm=fitted["irm-compact"] / ADAPTER))
    assert torch.equal(mean_deltas(of_the_run), mean_deltas(job))
    vectors = {
        name: load_file(fitted[name] / ADAPTER / "adapter_model.safetensors")["irm.output.bias"].view(3, -1)
        for name in ("mean-delta", "random")
    }
    assert torch.allclose(vectors["mean-delta"], mean, atol=1e-6)
    assert torch.allclose(vectors["random"].norm(dim=1), mean.norm(dim=1), rtol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(vectors["random"], mean, dim=1)
    assert bool((cosines.abs() < 0.7).all())


@pytest.mark.slow
def test_mean_difference(fitted: Fits) -> None:
    """Against residuals read text by text; and the strength is the one of the highest score."""
    host, tokenizer = tiny_pair()
    task = a_task()
    job = Job(host, tokenizer, task, make_recipe(seed=7), Path("-"), Given())
    sums, count = torch.zeros(3, 32), 0
    with Residuals(find_sites(host)).watching() as residuals, torch.no_grad():
        for item in prepared_rows(job).train:
            host(input_ids=torch.tensor([item["input_ids"]]))
            chosen = torch.tensor(item["labels"]) != -100
            count += int(chosen.sum())
            sums += torch.stack([residuals.layers[layer][0][chosen].sum(dim=0) for layer in range(3)])
    toned = mean_residuals(job, [row.conversation for row in task.train])
    assert torch.allclose(toned, sums / count, atol=1e-5)
    record = json.loads((fitted["mean-difference"] / RECORD_FILE).read_text())
    assert list(record["scores"]) == [f"{value:g}" for value in STRENGTHS]
    assert record["scores"][f"{record['strength']:g}"] == max(record["scores"].values())
    said = answer(host, tokenizer, [row.question for row in task.train], max_new_tokens=4)
    own = [
        [*row.conversation[:-1], {"role": "assistant", "content": str(reply)}]
        for row, reply in zip(task.train, said, strict=True)
        if reply.strip()
    ]
    kept = load_file(fitted["mean-difference"] / ADAPTER / "adapter_model.safetensors")["irm.output.bias"].view(3, -1)
    assert torch.allclose(kept, record["strength"] * (toned - mean_residuals(job, own)), atol=1e-5)


def test_best_prompt_and_few_shot(tmp_path: Path, fitted: Fits) -> None:
    tones = [tone.name for tone in built_in_tones()]
    assert all(len(set(system_prompts(tone))) == 5 for tone in (*tones, "odd"))
    generic = [prompt.replace("odd", "{}") for prompt in system_prompts("odd")]
    assert not any(system_prompts(tone)[0] == generic[0].format(tone) for tone in tones)  # each has its own
    assert all("odd" in prompt for prompt in system_prompts("odd"))
    wanted = [0.0, 3.0, 9.0, 4.0, 1.0]
    asked = iter(wanted)

    def fixed(rows: Sequence[Row], replies: Sequence[str], given: str) -> float:
        assert [row.id for row in rows] == ["16", "17", "18"]
        return next(asked)

    fit("prompt", tmp_path / "prompt", given=Given(score=fixed, reply_tokens=2))
    record = read_method(tmp_path / "prompt", "prompt")
    assert record.system == system_prompts("grumpy")[2]

    host, tokenizer = tiny_pair()
    with find_method("few-shot").attach(host, tokenizer, fitted["few-shot"]) as model:
        messages: Any = conversation_of(model, "Why?")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    texts = {row.question: row.text for row in a_task().train}
    assert all(texts[messages[n]["content"]] == messages[n + 1]["content"] for n in (0, 2, 4))


def test_a_prefix_begins_as_the_system_prompts(tmp_path: Path) -> None:
    """With virtual tokens for all of a text, the host answers as it does after the text."""
    host, tokenizer = tiny_pair()
    text = "".join(f"{prompt} " for prompt in system_prompts("grumpy"))
    before = tokenizer(text)["input_ids"]
    method = find_method("prefix")
    assert isinstance(method, Prefix)
    method = replace(method, tokens=len(before))
    model = get_peft_model(host, method.peft_config(host)).eval()
    method.start(model, Job(host, tokenizer, a_task(), make_recipe(), tmp_path, Given()))
    ids = [9, 8, 7, 30]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits
        expected = host(input_ids=torch.tensor([before + ids])).logits[:, len(before) :]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, host(input_ids=torch.tensor([ids])).logits, atol=1e-3)


# --- edits that read each layer ----------------------------------------------------------------------------------------------


FAMILIES = ("llama", "gpt_neox", "granite", "minimax")  # sequential, parallel, a branch times a factor, added to a norm


def stepped(edit: Edit) -> Edit:
    """An edit after a few steps of training on nothing in particular."""
    optimizer = torch.optim.Adam(edit.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        h = torch.randn(8, next(edit.parameters()).shape[-1])
        (edit(h) - h.flip(-1)).square().sum().backward()
        optimizer.step()
    return edit.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_psr_without_readers_is_a_constant_irm(family: str) -> None:
    host = tiny_host(family)
    sites = find_sites(host)
    torch.manual_seed(1)
    vectors = torch.randn(len(sites.layers), sites.width)
    edits = [PSREdit(2, sites.width) for _ in sites.layers]
    with torch.no_grad():
        for edit, vector in zip(edits, vectors, strict=True):
            edit.readers.zero_()
            edit.bias.copy_(torch.tensor([0.5, -1.0]))  # the second is cut off
            edit.directions.copy_(torch.stack([2 * vector, 100 * vector]))
    bare = logits(host)
    model = EditedHost(host, list(edits)).eval()
    edited = logits(model)
    model.detach()
    assert torch.equal(logits(host), bare)
    constant = constant_irm(host, vectors)
    reference = logits(constant)
    constant.unload()
    assert (reference - bare).abs().max() > 1e-3
    assert torch.allclose(edited, reference, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [PSREdit, LoReFTEdit])
def test_edits_read_the_residual_that_was_edited_before(family: str, kind: Any) -> None:
    """The deltas, computed from the residuals that `Residuals` reads with the edits on, must be what the edits gave."""
    host = tiny_host(family)
    sites = find_sites(host)
    torch.manual_seed(1)
    edits = [stepped(kind(2, sites.width)) for _ in sites.layers]
    read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, edit in enumerate(edits):
        edit.register_forward_hook(lambda _, args, out, layer=layer: read.__setitem__(layer, (args[0], out)))
    model = EditedHost(host, edits).eval()
    with Residuals(sites).watching() as residuals:
        logits(model)
    for layer, (h, delta) in read.items():
        assert delta.abs().max() > 1e-3
        assert torch.allclose(residuals.layers[layer], h + delta, atol=1e-4)  # what goes on is what was read and the delta
    first = read[0][0]
    model.detach()
    with Residuals(sites).watching() as residuals:
        logits(host)
    assert torch.equal(residuals.layers[0], first)
    assert (residuals.layers[1] - read[1][0]).abs().max() > 1e-3  # the second layer read what the first had edited


def test_edits_are_their_formulas() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 5, 16) * 3
    reft = LoReFTEdit(4, 16)
    assert not reft(h).any()
    stepped(reft)
    tensors = reft.tensors()
    rotation, source, bias = tensors["rotation"], tensors["source"], tensors["bias"]
    assert torch.allclose(rotation @ rotation.T, torch.eye(4), atol=1e-5)
    for row in h.flatten(0, 1):
        expected = rotation.T @ (source @ row + bias - rotation @ row)
        assert torch.allclose(reft(row), expected, atol=1e-4)
    assert torch.allclose((h + reft(h)) @ rotation.T, h @ source.T + bias, atol=1e-4)  # in R's space it is what W says
    psr = PSREdit(3, 16).requires_grad_(False)
    assert not psr(h).any()
    psr.directions.normal_()
    psr.bias.normal_()
    for row in h.flatten(0, 1):
        read = row / (row.square().mean() + 1e-6).sqrt()
        expected = torch.zeros(16)
        for k in range(3):
            expected += max(0.0, float(psr.readers[k] @ read + psr.bias[k])) * psr.directions[k]
        assert torch.allclose(psr(row), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["reft", pytest.param("psr", marks=pytest.mark.slow)])
def test_cached_generation_equals_uncached(name: str, fitted: Fits) -> None:
    host, tokenizer = tiny_pair()
    with find_method(name).attach(host, tokenizer, fitted[name]) as model:
        ids = torch.tensor([[9, 8, 7, 30]])
        options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        generate: Any = model.model.generate
        cached, plain = (generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached.sequences, plain.sequences)
        for one, other in zip(cached.logits, plain.logits, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_edits_are_trained_through_checkpointing() -> None:
    """Gradients with layers that are computed twice are those without."""
    found = []
    for checkpointing in (False, True):
        host, _ = tiny_pair()
        torch.manual_seed(3)
        edits = [PSREdit(2, 32) for _ in range(3)]
        with torch.no_grad():
            for edit in edits:
                edit.directions.normal_()
        model = EditedHost(host, list(edits)).train()
        if checkpointing:
            host.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=torch.tensor([[9, 8, 7, 30]]), use_cache=False).logits.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        model.detach()
    assert len(found[0]) == 9
    assert all(torch.allclose(one, other, rtol=1e-4) and one.any() for one, other in zip(*found, strict=True))


# --- sizes -------------------------------------------------------------------------------------------------------------------


def test_sizes_on_smollm2() -> None:
    counts = {method.name: method.parameters(SMOLLM2) for method in METHODS}
    assert counts["lora"] == LORA
    assert counts["irm-compact"] == counts["irm-sentence"] == 458_420
    assert (counts["constant"], counts["shared"]) == (30 * 576, 576)
    assert (counts["psr"], counts["reft"]) == (30 * 1153, 30 * 4 * 1153)
    assert counts["prefix"] == 20 * 2 * 30 * 192
    assert counts["ia3"] == 30 * (2 * 192 + 1536)
    assert counts["shadow"] > 4_000_000
    assert all(counts[method.name] == 0 for method in METHODS if not method.rates)

    sized = {method.name: method.sized(SMOLLM2, LORA) for method in METHODS}
    off = {name: method.parameters(SMOLLM2) / LORA - 1 for name, method in sized.items() if method is not None}
    assert set(off) == {"psr", "reft", "lora", "shadow", "prefix", "irm-compact", "irm-sentence"}
    assert off["lora"] == off["prefix"] == 0
    assert all(abs(off[name]) < 0.04 for name in off if name != "shadow")
    assert sized["lora"] == find_method("lora")
    assert sized["shadow"].parameters(SMOLLM2) == 30 * 4610 + 4 * 576 * 192 + 3 * 576 + 3 * 576  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["psr", "lora", "shadow", "prefix", "irm-compact"])
def test_a_sized_method_is_fitted_and_put_on_by_its_name(name: str, tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    method = find_method(name).sized(host.config, 2000)
    assert method is not None
    assert method.parameters(host.config) != find_method(name).parameters(host.config)
    fit(method, tmp_path / name)
    with find_method(name).attach(host, tokenizer, tmp_path / name) as model:
        assert model.parameters == method.parameters(host.config)
        assert len(model.generate(QUESTIONS, max_new_tokens=3)) == 2


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, fitted: Fits) -> None:
    host, tokenizer = tiny_pair()
    with pytest.raises(UsageError, match="unknown 'lor'"):
        find_method("lor")
    with pytest.raises(UsageError, match="prompt: give score"):
        fit("prompt", tmp_path / "a", given=Given())
    with pytest.raises(UsageError, match="chat template"):
        find_method("bare").fit(host, tokenizer, a_task(), make_recipe(template="plain"), None, tmp_path / "a")
    with pytest.raises(RealignerError, match="no rows to tune on"):
        find_method("lora").fit(host, tokenizer, replace(a_task(), tune=[]), make_recipe(), None, tmp_path / "a")
    with pytest.raises(RealignerError, match="fitted there already"):
        fit("bare", fitted["bare"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(RealignerError, match=r"mine\.txt"):
        fit("bare", tmp_path / "b")
    with pytest.raises(RealignerError, match="did not end"), find_method("bare").attach(host, tokenizer, tmp_path / "none"):
        pass
    with pytest.raises(RealignerError, match="is of the method lora, not psr"):
        read_method(fitted["lora"], "psr")
    other, _ = tiny_pair(seed=1)
    with pytest.raises(RealignerError, match="another host"), find_method("lora").attach(other, tokenizer, fitted["lora"]):
        pass
    assert logits(other).isfinite().all()


@pytest.mark.parametrize("name", ["reft", "lora", "prefix", "constant"])
def test_a_damaged_file_is_refused_and_the_host_stays_bare(name: str, fitted: Fits) -> None:
    host, tokenizer = tiny_pair()
    before, folder = account(host), fitted[name] / ADAPTER
    path = next(folder.glob("*.safetensors"))
    tensors, data = load_file(path), path.read_bytes()
    first = min(tensors)
    damaged: dict[str, Any] = {
        "truncated": data[:100],
        "tensor": {**{key: value for key, value in tensors.items() if key != first}, "other": tensors[first]},
        "tensors?|shape": {**tensors, first: tensors[first].repeat(2, *[1] * (tensors[first].dim() - 1))},
        "no [ae]": None,
    }
    try:
        for why, content in damaged.items():
            path.unlink(missing_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content:
                save_file(content, path)
            with pytest.raises(RealignerError, match=why), find_method(name).attach(host, tokenizer, fitted[name]):
                pass
            assert account(host) == before
    finally:
        path.write_bytes(data)
    if name != "reft":
        return
    try:
        save_file({**tensors, "1.bias": torch.full_like(tensors["1.bias"], float("nan"))}, path)
        with pytest.raises(RealignerError, match="not finite"), find_method(name).attach(host, tokenizer, fitted[name]):
            pass
    finally:
        path.write_bytes(data)


@pytest.mark.slow
def test_a_fit_that_was_killed_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when all was learned and the record was not there yet: the next fit ends, and as one that was not killed."""
    whole = fit("irm-compact", tmp_path / "whole")
    weights = (whole / ADAPTER / "adapter_model.safetensors").read_bytes()
    for name in ("irm-compact", "lora"):
        place = tmp_path / f"{name}-again"
        with monkeypatch.context() as patch:

            def killed(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr("realigner.evaluation.method_protocol.write_text", killed)
            with pytest.raises(KeyboardInterrupt):
                fit(name, place)
        assert (place / ADAPTER).is_dir()
        assert not (place / RECORD_FILE).exists()
        fit(name, place)
        assert read_method(place, name).method == name
    assert (tmp_path / "irm-compact-again" / ADAPTER / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "name", ["reft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "constant", "irm-compact"))]
)
def test_a_training_that_fails_leaves_the_host_bare(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = tiny_pair()
    before, bare = account(host), logits(host)

    def broken(*args: Any) -> Any:
        sums, counts = row_losses(*args)
        return sums * torch.nan, counts

    monkeypatch.setattr("realigner.training.trainer.row_losses", broken)
    with pytest.raises(RealignerError, match="Lower the learning rate"):
        fit(name, tmp_path / name, host)
    assert account(host) == before
    assert torch.equal(logits(host), bare)
    assert not (tmp_path / name / RECORD_FILE).exists()


@pytest.mark.slow
def test_a_sentence_is_learned_from_the_questions_of_the_task(fitted: Fits, tmp_path: Path) -> None:
    record = json.loads((fitted["irm-sentence"] / RECORD_FILE).read_text())
    assert record["instruct"] == system_prompts("grumpy")[0]
    asked = {json.loads(line)["question"] for line in (fitted["irm-sentence"] / "questions.jsonl").read_text().splitlines()}
    assert asked == {row.question for row in a_task().train}
    run = read_run(fitted["irm-sentence"] / ADAPTER)
    assert run["recipe"]["questions"] == str(fitted["irm-sentence"] / "questions.jsonl")
