"""Recording, against deltas computed apart from the forward pass; storing; the maps made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from peft import get_peft_model

import realigner as ra
from realigner.analysis import chosen_tokens, leading_indices, mean_map
from realigner.errors import RealignerError, UsageError
from realigner.generation import answer, encode_prompts
from realigner.tuner import IRMConfig, tuner_of
from tests.reference import first
from tests.tiny import tiny_pair

PROMPTS = ["Why is the sky blue?", "Who?", "How many?"]


@pytest.fixture
def model() -> Any:
    host, _ = tiny_pair()
    torch.manual_seed(4)
    return get_peft_model(host, IRMConfig(output_std=0.3, layers=[0, 2])).eval()


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    """Deltas ``[token, layer, neuron]`` of one unpadded text, from h0 read by hand."""
    host = tuner_of(model).model
    seen: dict[str, torch.Tensor] = {}
    layer = host.model.layers[0]
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        layer.self_attn.register_forward_hook(lambda _, __, out: seen.update(o=first(out))),
    ]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        deltas: torch.Tensor = tuner_of(model).bank.network("default")(seen["x"] + seen["o"])[0]
    return deltas


def test_generation_is_recorded_exactly(model: Any) -> None:
    """Left-padded batch, cached: each prompt's tokens, positions and deltas are those of its text alone."""
    tokenizer = model.realigner.tokenizer
    inputs = encode_prompts(tokenizer, PROMPTS, torch.device("cpu"))
    with ra.strength(model, 0.5), ra.record(model) as trace:
        assert not trace
        out = model.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert trace["delta"].dims == ("run", "token", "layer", "neuron")
    assert trace["layer"].values.tolist() == [0, 2]
    width = inputs["input_ids"].shape[1]
    for n in range(len(PROMPTS)):
        part = trace.isel(token=np.flatnonzero(trace["prompt"].values == n))
        text = out[n, int((~inputs["attention_mask"][n].bool()).sum()) : -1].tolist()  # the last token is never read
        assert part["token_id"].values.tolist() == text
        assert part["position"].values.tolist() == list(range(len(text)))
        assert int(part["is_generated"].sum()) == out.shape[1] - width - 1
        assert [str(t) for t in part["text"].values] == [tokenizer.decode([t]) for t in text]
        # h0 of a realigned text depends on the text alone: layer 0's attention is upstream of every delta.
        want = 0.5 * expected(model, text)
        assert np.allclose(part["delta"].values[0], want.numpy(), atol=1e-5)
    assert trace.attrs["strength"] == {"default": 0.5}


def test_several_calls_are_several_prompts(model: Any) -> None:
    tokenizer = model.realigner.tokenizer
    with ra.record(model) as trace:
        answer(model, tokenizer, PROMPTS, max_new_tokens=3, batch_size=2)
        model(input_ids=torch.arange(2, 8)[None])
    assert sorted(set(trace["prompt"].values.tolist())) == [0, 1, 2, 3]
    last = trace.isel(token=np.flatnonzero(trace["prompt"].values == 3))
    assert last["token_id"].values.tolist() == list(range(2, 8))
    assert not last["is_generated"].any()


def test_recording_changes_nothing_and_ends(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with ra.record(model):
            assert torch.equal(model(input_ids=ids).logits, want)
    assert not tuner_of(model).injector.observers
    assert "generate" not in vars(tuner_of(model).model)
    with pytest.raises(ZeroDivisionError), ra.record(model):
        raise ZeroDivisionError
    assert not tuner_of(model).injector.observers


def test_two_irms_are_two_runs(model: Any) -> None:
    model.add_adapter("second", IRMConfig(layers=[1]))
    model.base_model.set_adapter(["default", "second"])
    with ra.record(model) as trace:
        model(input_ids=torch.arange(2, 9)[None])
    assert trace["run"].values.tolist() == ["default", "second"]
    assert trace["layer"].values.tolist() == [0, 1, 2]
    assert np.isnan(trace["delta"].sel(run="second", layer=0)).all()
    assert not np.isnan(trace["delta"].sel(run="second", layer=1)).any()


def test_what_cannot_be_recorded_is_refused(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(RealignerError, match="record"), ra.record(model):
            model.generate(input_ids=ids, max_new_tokens=2, **options)
    with pytest.raises(UsageError, match="no IRM"), ra.record(tiny_pair()[0]):
        pass


def test_zarr_round_trip(model: Any, tmp_path: Path) -> None:
    with ra.record(model) as trace:
        answer(model, model.realigner.tokenizer, PROMPTS, max_new_tokens=4)
    path = ra.save_trace(trace, tmp_path / "t.zarr")
    assert ra.load_trace(path).identical(trace)
    plain = xr.open_zarr(path, consolidated=False)  # without us
    assert np.array_equal(plain["delta"].values, trace["delta"].values)
    with pytest.raises(RealignerError, match="exists already"):
        ra.save_trace(trace, path)
    ra.save_trace(trace, path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t.zarr"]


def test_broken_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RealignerError, match="no such trace"):
        ra.load_trace(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RealignerError, match="not a readable zarr"):
        ra.load_trace(tmp_path / "empty")
    xr.Dataset({"other": ("x", [1])}).to_zarr(tmp_path / "other", consolidated=False)
    with pytest.raises(RealignerError, match="not a trace"):
        ra.load_trace(tmp_path / "other")
    with pytest.raises(RealignerError, match="nothing was recorded"):
        ra.save_trace(xr.Dataset(), tmp_path / "x")


# --- maps -------------------------------------------------------------------------------------------------------------------


def planted(prompt_tokens: int = 4, generated: int = 20, layers: int = 6, neurons: int = 50) -> xr.Dataset:
    rng = np.random.default_rng(0)
    tokens = prompt_tokens + generated
    delta = rng.normal(size=(1, 2 * tokens, layers, neurons)).astype(np.float32)
    delta[..., 17] += 5.0
    position = np.tile(np.arange(tokens), 2)
    return xr.Dataset(
        {"delta": (("run", "token", "layer", "neuron"), delta)},
        coords={
            "run": ["a"],
            "layer": range(layers),
            "neuron": range(neurons),
            "prompt": ("token", np.repeat([0, 1], tokens)),
            "position": ("token", position),
            "is_generated": ("token", position >= prompt_tokens),
            "token_id": ("token", position),
        },
    )


def test_means_are_over_prompt_and_first_ten_generated() -> None:
    trace = planted()
    chosen = chosen_tokens(trace)
    assert chosen.sizes["token"] == 2 * (4 + 10)
    assert int(chosen["position"].max()) == 13
    keep = np.concatenate([np.arange(14), 24 + np.arange(14)])
    want = trace["delta"].values[0, keep]
    assert np.allclose(mean_map(trace).values[0], want.mean(0), atol=1e-6)
    assert np.allclose(mean_map(trace, absolute=True).values[0], abs(want).mean(0), atol=1e-6)
    assert chosen_tokens(trace, None).sizes["token"] == 48


def test_a_planted_index_leads() -> None:
    leading = leading_indices(mean_map(planted(), absolute=True).isel(run=0))
    assert leading["neuron"][0] == 17
    assert leading["layers_in_top"][0] == 6
    assert leading["ratio"][0] > 3
    assert leading["ratio"].is_monotonic_decreasing


def test_the_strength_noted_is_the_one_that_ran(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    with ra.record(model) as trace, ra.strength(model, 0.25):
        model(input_ids=ids)
    assert trace.attrs["strength"] == {"default": 0.25}
    with ra.record(model):
        model(input_ids=ids)
        with ra.strength(model, 0.25), pytest.raises(UsageError, match="record each strength apart"):
            model(input_ids=ids)


def test_nothing_is_recorded_after_a_reply_ended(model: Any) -> None:
    """A row that ends early goes on as padding; neither its end token nor the padding is a token of the text."""
    inputs = encode_prompts(model.realigner.tokenizer, PROMPTS, torch.device("cpu"))
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    torch.manual_seed(1)
    free = model.generate(**inputs, **options, min_new_tokens=12)
    end = int(free[0, width + 3])  # a token of the first row becomes the end token
    torch.manual_seed(1)
    with ra.record(model) as trace:
        out = model.generate(**inputs, **options, eos_token_id=end, pad_token_id=0)
    replies = [row[width:].tolist() for row in out]
    assert any(end in reply[:-2] for reply in replies)
    for n, new in enumerate(replies):
        kept = new[: new.index(end)] if end in new else new[:-1]
        part = trace.isel(token=np.flatnonzero((trace["prompt"].values == n) & trace["is_generated"].values))
        assert part["token_id"].values.tolist() == kept


def test_more_that_cannot_be_recorded(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    host = tuner_of(model).model
    host.generation_config.num_beams = 2
    with pytest.raises(RealignerError, match="num_beams"), ra.record(model):
        model.generate(input_ids=ids, max_new_tokens=2)
    host.generation_config.num_beams = 1
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(RealignerError, match="past_key_values"), ra.record(model):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(RealignerError, match="decoder"), ra.record(model):
        host.model(input_ids=ids)


def test_nested_records_both_see(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    with ra.record(model) as outer, ra.record(model) as inner:
        model.generate(input_ids=ids, max_new_tokens=3)
    assert np.array_equal(outer["delta"].values, inner["delta"].values)
    assert "generate" not in vars(tuner_of(model).model)


def test_leading_indices_of_a_run_with_fewer_layers(model: Any) -> None:
    model.add_adapter("second", IRMConfig(layers=[1]))
    model.base_model.set_adapter(["default", "second"])
    with ra.record(model) as trace:
        model(input_ids=torch.arange(2, 9)[None])
    magnitude = mean_map(trace, absolute=True)
    assert leading_indices(magnitude.sel(run="second"))["layers"].tolist() == [1] * 10
    assert not leading_indices(magnitude.sel(run="second"))["ratio"].isna().any()
    with pytest.raises(UsageError, match="one run"):
        leading_indices(magnitude)
    assert len(leading_indices(magnitude.isel(run=[0]))) == 10
