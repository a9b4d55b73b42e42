"""Every way to run a model: the same numbers as a host whose layers were rewritten by hand (tests/reference.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

import realigner as ra
from realigner.errors import RealignerError
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import tuner_of
from tests.reference import FAMILIES as EVERY_FAMILY, reference_host

FAMILIES = ("llama", "gemma3_text", "gpt2", "olmo2", "gpt_neox")
STRENGTH = 0.7
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}
QUANTISED = {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 8, "axis_key": 0, "axis_value": 0}


def attach(host: Any, **config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(host, IRMConfig(output_std=0.3, **config)).eval()


def reference_of(model: Any, bare: Any, family: str) -> Any:
    network = tuner_of(model).registry.network("default")
    weights = {key: value.detach() for key, value in network.state_dict().items()}
    return reference_host(bare, family, weights, network.layers, True, STRENGTH, in_place=True)


def pair(family: str, prepare: Callable[[Any], Any] = lambda host: host) -> tuple[Any, Any]:
    """A model with an IRM, and its reference; `prepare` is applied to both hosts first."""
    model = attach(prepare(tiny_host(family)))
    return model, reference_of(model, prepare(tiny_host(family)), family)


def prompts(batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(7)
    return model.generate(**inputs, **(settings | options))


def same(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    assert torch.equal(got.sequences, want.sequences)
    assert all((a - b).abs().max() < tolerance for a, b in zip(got.logits, want.logits, strict=True))


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "quantised": {"cache_implementation": "quantized", "cache_config": QUANTISED},
    "chunked prefill": {"prefill_chunk_size": 4},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "several replies": {"do_sample": True, "num_return_sequences": 3},
}


# transformers itself refuses its quantised cache for sliding windows (Gemma3).
WAYS = [
    pytest.param(f, c, s, marks=[pytest.mark.slow] if c == "quantised" else [])
    for f in FAMILIES
    for c in CACHES
    for s in STRATEGIES
    if (f, c) != ("gemma3_text", "quantised")
]


@pytest.mark.parametrize(("family", "cache", "strategy"), WAYS)
def test_caches_and_strategies(family: str, cache: str, strategy: str, request: pytest.FixtureRequest) -> None:
    if cache == "quantised":
        request.getfixturevalue("compiler")
    model, reference = pair(family)
    options = CACHES[cache] | STRATEGIES[strategy]
    with ra.strength(model, STRENGTH):
        got = generated(model, prompts(), **options)
    same(got, generated(reference, prompts(), **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding(family: str) -> None:
    """A bare draft model proposes, the realigned one verifies several tokens at once: its own tokens come out."""
    model, reference = pair(family)
    draft = tiny_host(family, seed=3)
    with ra.strength(model, STRENGTH):
        got = generated(model, prompts(1), assistant_model=draft)
        alone = generated(model, prompts(1))
    same(got, generated(reference, prompts(1), assistant_model=draft))
    assert torch.equal(got.sequences, alone.sequences)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family: str, side: str) -> None:
    """A padded row gives the logits that it gives alone."""
    model, reference = pair(family)
    short = prompts(1, 5)["input_ids"] + 1
    padding = torch.zeros((1, 4), dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    ids = torch.cat([prompts(1)["input_ids"], row])
    mask = torch.ones_like(ids)
    mask[1] = (row != 0)[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    with torch.no_grad(), ra.strength(model, STRENGTH):
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = model(input_ids=short).logits
    with torch.no_grad():
        want = reference(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert (got - want)[mask.bool()].abs().max() < 1e-5
    assert (got[1, real] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_batch(family: str) -> None:
    """Continuous batching packs requests of several lengths into one row."""
    model, reference = pair(family)
    requests = [row.tolist() for row in prompts(3)["input_ids"]]
    requests[1] = requests[1][:4]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def tokens(host: Any) -> list[list[int]]:
        small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, page_size=16)
        results = host.generate_batch(requests, settings, small, warmup=False)
        return [results[key].generated_tokens for key in sorted(results)]

    with ra.strength(model, STRENGTH):
        got = tokens(model)
        alone = [
            generated(model, {"input_ids": torch.tensor([r])}, max_new_tokens=6).sequences[0, len(r) :].tolist()
            for r in requests
        ]
    assert got == tokens(reference) == alone


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family: str, dtype: torch.dtype) -> None:
    model, reference = pair(family, lambda host: host.to(dtype))
    bare = tiny_host(family).to(dtype)
    with torch.no_grad():
        want = reference(**prompts()).logits
        with ra.strength(model, STRENGTH):
            got = model(**prompts()).logits
        assert got.dtype == dtype
        assert (got - want).abs().max() < TOLERANCE[dtype] * want.abs().max()
        with ra.strength(model, 0.0):
            assert torch.equal(model(**prompts()).logits, bare(**prompts()).logits)


def quanto(weights: str) -> Callable[[Any], Any]:
    def quantise(host: Any) -> Any:
        from optimum import quanto

        quanto.quantize(host, weights=getattr(quanto, weights))
        quanto.freeze(host)
        return host

    return quantise


@pytest.mark.proof
@pytest.mark.parametrize("weights", ["qint8", "qint4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("compiler")
def test_quantised_hosts(family: str, weights: str, tmp_path: Path) -> None:
    """Weights in int8 or int4: the same numbers; and an IRM of the host in full precision loads onto it."""
    whole = attach(tiny_host(family))
    whole.save_pretrained(tmp_path)
    config = tuner_of(whole).peft_config["default"]
    model, reference = pair(family, quanto(weights))
    with ra.strength(model, STRENGTH):
        got = generated(model, prompts())
    same(got, generated(reference, prompts()))
    again = attach(model.unload(), input_scale=config.input_scale, delta_scale=config.delta_scale)
    with ra.strength(again, STRENGTH):
        got = generated(again, prompts())
    loaded = ra.load_irm(again.unload(), tmp_path)
    with ra.strength(loaded, STRENGTH):
        same(generated(loaded, prompts()), got)


def on_disk(host: Any, folder: Path) -> Any:
    return disk_offload(host, str(folder), execution_device=torch.device("cpu"))


def in_memory(host: Any, folder: Path) -> Any:
    return cpu_offload(host, execution_device=torch.device("cpu"))


def mixed(host: Any, folder: Path) -> Any:
    """Layer 1 on disk, everything else in memory, as a device map would have it."""
    stack = next(name for name, module in host.named_modules() if isinstance(module, torch.nn.ModuleList))
    places = {name: "cpu" for name, module in host.named_modules() if not list(module.children()) and f"{stack}.1" not in name}
    return dispatch_model(host, places | {f"{stack}.1": "disk"}, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("place", [on_disk, in_memory, mixed])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_layers(family: str, place: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    bare = tiny_host(family)
    model = attach(place(tiny_host(family), tmp_path))
    reference = reference_of(model, bare, family)
    with ra.strength(model, STRENGTH):
        got = generated(model, prompts())
    same(got, generated(reference, prompts()))


# --- gradients ------------------------------------------------------------------------------------------------------------


def gradients(model: Any, calls: int = 1, between: bool = False) -> dict[str, torch.Tensor]:
    """Gradients after `calls` forwards on different inputs, then one backward over their sum (dropout seeded)."""
    model.zero_grad()
    torch.manual_seed(0)
    losses = []
    for call in range(calls):
        tokens = prompts()["input_ids"] + call
        losses.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        if between:
            with torch.no_grad():
                model(input_ids=tokens.flip(1))
    sum(losses).backward()
    bank = tuner_of(model).registry
    return {name: p.grad.clone() for name, p in bank.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("calls", "between"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", [f for f in EVERY_FAMILY if f != "opt"])
def test_checkpointing_is_exact(family: str, calls: int, between: bool) -> None:
    """Non-reentrant checkpointing: also forward-forward-backward, with a no_grad forward in between."""
    model = attach(tiny_host(family))
    model.train()
    want = gradients(model, calls, between)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, calls, between)
    assert want
    assert set(got) == set(want)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_gradients_match_the_reference() -> None:
    model = attach(tiny_host("llama"))
    network = tuner_of(model).registry.network("default")
    weights = {key: value.detach().clone().requires_grad_(True) for key, value in network.state_dict().items()}
    reference = reference_host(tiny_host("llama"), "llama", weights, network.layers, True, 1.0)
    reference(input_ids=prompts()["input_ids"], labels=prompts()["input_ids"]).loss.backward()
    got = gradients_of_one(model)
    for name, weight in weights.items():
        assert weight.grad is not None
        assert torch.allclose(got[name], weight.grad, atol=1e-7, rtol=1e-4), name


def gradients_of_one(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=prompts()["input_ids"], labels=prompts()["input_ids"]).loss.backward()
    network = tuner_of(model).registry.network("default")
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_reentrant_checkpointing_is_refused() -> None:
    model = attach(tiny_host("llama"))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RealignerError, match="use_reentrant"):
        model(input_ids=prompts()["input_ids"], labels=prompts()["input_ids"])


@pytest.mark.proof
def test_checkpointing_is_exact_when_compiled() -> None:
    torch._dynamo.reset()
    model = attach(tiny_host("llama"))
    want = gradients(model.train(), 1, False)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(torch.compile(model.train(), backend="aot_eager"), 1, False)
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-8), name


def test_checkpointing_is_refused_where_layers_drop_activations() -> None:
    """OPT's layers drop by themselves, and are only checkpointed in training mode."""
    model = attach(tiny_host("opt"))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(RealignerError, match="OPTDecoder: its layers drop activations at random"):
        model(input_ids=prompts()["input_ids"], labels=prompts()["input_ids"])


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_the_host_is_trained_through_without_dropout(family: str) -> None:
    """Training mode is the IRM's: what the loss is taken of is what evaluation gives, to the bit."""
    host = tiny_host(family)
    for module in host.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.5)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = attach(host)
    with torch.no_grad():
        want = model.eval()(**prompts()).logits
    assert torch.equal(model.train()(**prompts()).logits, want)
    assert tuner_of(model).registry.network("default").training


@pytest.mark.parametrize("how", ["wrapper", "by hand"])
def test_checkpointing_by_others(how: str) -> None:
    """PyTorch's wrapper (FSDP's) is followed; code that recomputes a layer by itself is refused, in the backward pass."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
    from torch.utils.checkpoint import checkpoint

    model = attach(tiny_host("llama"))
    model.train()
    want = gradients(model, 2, True)
    layers = tuner_of(model).sites.layers
    model.zero_grad()
    if how == "wrapper":
        apply_activation_checkpointing(
            model.base_model.model,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda m: any(m is layer for layer in layers),
        )
        got = gradients(model, 2, True)
        assert all(torch.equal(got[name], want[name]) for name in want)
        return
    forward = layers[1].forward
    layers[1].forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with pytest.raises(RealignerError, match="layer 1 is recomputed by a checkpointing that an IRM cannot follow"):
        gradients(model, 1, False)


# --- compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_in_one_graph_and_strength_costs_no_recompilation(family: str) -> None:
    """``fullgraph=True`` refuses a graph break; the compiler is then asked how often it compiled."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, _ = pair(family)
    counter = CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for value in (1.0, 0.9, 0.5, 0.25, 0.1, 0.0, -0.5, -1.0, 2.0, 3.0, 1.5):
            with ra.strength(model, value):
                got = compiled(**prompts(), use_cache=False).logits
                assert (got - model(**prompts(), use_cache=False).logits).abs().max() < 1e-5
    assert counter.frame_count == 1


@pytest.mark.proof
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
@pytest.mark.usefixtures("compiler")
def test_compiled_code_gives_the_same_numbers(family: str) -> None:
    """The default backend, which makes machine code."""
    torch._dynamo.reset()
    model, reference = pair(family)
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad(), ra.strength(model, STRENGTH):
        got = compiled(**prompts(), use_cache=False).logits
    with torch.no_grad():
        assert (got - reference(**prompts(), use_cache=False).logits).abs().max() < 1e-4


# --- the embedded host ------------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.slow
def test_embedded_host(embedded: tuple[Any, Any]) -> None:
    """A real host: cached in three ways and not at all, in a padded batch whose rows give what each gives alone."""
    host, tokenizer = embedded
    bare = copy.deepcopy(host)
    torch.manual_seed(1)
    model = get_peft_model(host, IRMConfig(output_std=0.2)).eval()
    batch = ra.generation.encode_prompts(
        tokenizer, ["How do magnets work?", "Why?", "Who was the first to climb it?"], host.device
    )
    try:
        reference = reference_of(model, bare, "llama")
        options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
        want = generated(reference, batch, **options)
        with ra.strength(model, STRENGTH):
            for cache in ("dynamic", "none", "static", "chunked prefill"):
                same(generated(model, batch, **options, **CACHES[cache]), want, tolerance=1e-3)
            for row in range(3):
                real = batch["attention_mask"][row].bool()
                alone = {"input_ids": batch["input_ids"][row, real][None], "attention_mask": torch.ones(1, int(real.sum()))}
                assert torch.equal(generated(model, alone, **options).sequences[0, -6:], want.sequences[row, -6:])
        by_row = generated(model, batch, **options, strength=[0.0, STRENGTH, STRENGTH], adapter_names=["default"] * 3)
        assert torch.equal(by_row.sequences[1:], want.sequences[1:])
        with model.disable_adapter():
            off = generated(model, batch, **options).sequences[0]
        assert torch.equal(by_row.sequences[0], off)
        assert not torch.equal(off, want.sequences[0])
    finally:
        model.unload()
