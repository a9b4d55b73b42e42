"""Recording, against deltas computed apart from the forward pass; summaries, storing, replay, the reference's folders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from peft import get_peft_model
from transformers import GenerationConfig, StoppingCriteria

import realigner as ra
from realigner.analysis import text_maps
from realigner.analysis.per_run import twins
from realigner.errors import RealignerError, UsageError
from realigner.generation import answer, encode_prompts
from realigner.irm_config import IRMConfig
from realigner.traces import RunLabel, TraceWriter, texts_of, verify_trace
from realigner.traces.layout import TEXT_SUMS, text_dataset
from realigner.traces.recording import NO_TOKEN
from realigner.traces.summary import BatchSummary, summarise
from realigner.tuner import tuner_of
from tests.planted import planted_trace
from tests.reference import first
from tests.tiny import tiny_pair

SHORT: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
PROMPTS = ["Why is the sky blue?", "Who?", "How many?"]
ASKED = (("anger-7", "Why?"), ("joy-7", "When?"))


@pytest.fixture
def model() -> Any:
    host, _ = tiny_pair()
    torch.manual_seed(4)
    return get_peft_model(host, IRMConfig(output_std=0.3, layers=[0, 2], input_scale=1.0, delta_scale=1.0)).eval()


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
        deltas: torch.Tensor = tuner_of(model).registry.network("default")(seen["x"] + seen["o"])[0]
    return deltas


def test_generation_is_recorded_exactly(model: Any) -> None:
    """Left-padded batch, cached: each prompt's tokens, positions and deltas are those of its text alone."""
    tokenizer = model.realigner.tokenizer
    inputs = encode_prompts(tokenizer, PROMPTS, torch.device("cpu"))
    with ra.strength(model, 0.5), ra.record(model, keep="raw", questions=PROMPTS) as trace:
        assert not trace
        out = model.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert trace["delta"].dims == ("token", "layer", "neuron")
    assert trace["text_question"].values.tolist() == PROMPTS
    new = out[:, inputs["input_ids"].shape[1] :]
    assert trace["text_reply"].values.tolist() == [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert trace["layer"].values.tolist() == [0, 2]
    width = inputs["input_ids"].shape[1]
    for n in range(len(PROMPTS)):
        part = trace.isel(token=np.flatnonzero(trace["prompt"].values == n))
        text = out[n, int((~inputs["attention_mask"][n].bool()).sum()) : -1].tolist()  # the last token is never read
        assert part["token_id"].values.tolist() == text
        assert part["position"].values.tolist() == list(range(len(text)))
        assert int(part["is_generated"].sum()) == out.shape[1] - width - 1
        assert [str(t) for t in part["token_text"].values] == [tokenizer.decode([t]) for t in text]
        # h0 of a realigned text depends on the text alone: layer 0's attention is upstream of every delta.
        want = 0.5 * expected(model, text)
        assert np.allclose(part["delta"].values, want.numpy(), atol=1e-5)
    assert trace.attrs["runs"]["default"]["strength"] == 0.5


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
    assert not tuner_of(model).settings.observers
    assert "generate" not in vars(tuner_of(model).model)
    with pytest.raises(ZeroDivisionError), ra.record(model):
        raise ZeroDivisionError
    assert not tuner_of(model).settings.observers


def test_two_irms_are_two_runs(model: Any) -> None:
    model.add_adapter("second", IRMConfig(layers=[1]))
    model.base_model.set_adapter(["default", "second"])
    with ra.record(model, keep="raw") as trace:
        model(input_ids=torch.arange(2, 9)[None])
    assert trace["text_run"].values.tolist() == ["default", "second"]
    assert trace["run"].values.tolist() == ["default"] * 7 + ["second"] * 7
    assert trace["layer"].values.tolist() == [0, 1, 2]
    second = trace.isel(token=slice(7, None), text=[1])
    for name in ("delta", "energy", "sum"):
        assert np.isnan(second[name].sel(layer=[0, 2])).all()
        assert not np.isnan(second[name].sel(layer=1)).any()
    assert set(second["top_layer"].values.ravel().tolist()) == {1, -1}


def test_what_cannot_be_recorded_is_refused(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(RealignerError, match="record"), ra.record(model):
            model.generate(input_ids=ids, max_new_tokens=2, **options)
    with pytest.raises(UsageError, match="no IRM"), ra.record(tiny_pair()[0]):
        pass


@pytest.mark.parametrize("keep", ["summary", "raw", "replay"])
def test_zarr_round_trip(model: Any, tmp_path: Path, keep: Any) -> None:
    with ra.record(model, keep=keep) as trace:
        answer(model, model.realigner.tokenizer, PROMPTS, max_new_tokens=4)
    path = ra.save_trace(trace, tmp_path / "t.zarr", dtype="float32")
    xr.testing.assert_identical(ra.load_trace(path).astype(object), trace.astype(object))
    plain = xr.open_zarr(path)  # without us
    assert plain["run"].values.tolist() == trace["run"].values.tolist()
    if keep == "raw":
        assert np.array_equal(plain["delta"].values, trace["delta"].values)
        ra.save_trace(trace, tmp_path / "half.zarr")
        half = ra.load_trace(tmp_path / "half.zarr")["delta"]
        assert half.dtype == np.float16
        assert np.allclose(half.values, trace["delta"].values, rtol=1e-3, atol=1e-6)
        shutil.rmtree(tmp_path / "half.zarr")
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


def test_the_strength_noted_is_the_one_that_ran(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    with ra.record(model) as trace, ra.strength(model, 0.25):
        model(input_ids=ids)
    assert trace.attrs["runs"]["default"]["strength"] == 0.25
    with ra.record(model):
        model(input_ids=ids)
        with ra.strength(model, 0.25), pytest.raises(UsageError, match="record each strength separately"):
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


def test_nothing_is_recorded_after_a_reply_was_stopped(model: Any) -> None:
    """A row that a stopping criterion ends has as many tokens as it has alone."""

    class Third(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= width + 3] + [False] * (len(input_ids) - 1))

    inputs = encode_prompts(model.realigner.tokenizer, PROMPTS, torch.device("cpu"))
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = model.generate(**inputs, **options, stopping_criteria=[Third()])
    with ra.record(model) as trace:
        out = model.generate(**inputs, **options, stopping_criteria=[Third()])
    assert torch.equal(out, plain)
    assert trace["count"].values[:, 1:].sum(axis=1).tolist() == [2] + [7] * (len(PROMPTS) - 1)
    tokenizer = model.realigner.tokenizer
    words = [tokenizer.decode(token) for token in out[1, width:-1]]
    at, word = next((at, word) for at, word in enumerate(words) if word.isascii() and word.isprintable())
    with ra.record(model) as trace:
        model.generate(**inputs, **options, stop_strings=[word], tokenizer=tokenizer)
    assert trace["count"].values[1, 1:].sum() == at
    assert "_get_stopping_criteria" not in vars(model.get_base_model())


def test_padding_is_left_out_whatever_the_cache(model: Any) -> None:
    """With a static cache the host's forward is not given the mask of the call."""
    inputs = encode_prompts(model.realigner.tokenizer, PROMPTS, torch.device("cpu"))
    assert not inputs["attention_mask"].all()
    traces = []
    for cache in ("dynamic", "static"):
        with ra.record(model, questions=PROMPTS) as trace:
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache)
        traces.append(trace)
    for name in ("count", "position", "token_id", "turn"):
        np.testing.assert_array_equal(traces[0][name], traces[1][name])
    first, second = (trace["sum_abs"].values for trace in traces)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-7)


def test_a_config_that_names_no_setting_leaves_it_to_the_hosts_own(model: Any) -> None:
    """As in `generate`: beams would be recorded as one text, and what a batch puts after a reply's end as its tokens."""
    ids = torch.arange(2, 16).reshape(2, 7)
    own = tuner_of(model).model.generation_config
    own.num_beams = 3
    with pytest.raises(RealignerError, match="num_beams=3"), ra.record(model):
        model.generate(input_ids=ids, generation_config=GenerationConfig(max_new_tokens=4))
    own.num_beams = 1
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0, "pad_token_id": 0}
    torch.manual_seed(1)
    free = model.generate(input_ids=ids, **options, eos_token_id=None)
    own.eos_token_id = int(free[0, 9])  # the third token of the first row's reply
    for how in ({"generation_config": GenerationConfig(**options)}, {"given": GenerationConfig(**options)}):
        torch.manual_seed(1)
        with ra.record(model) as trace:
            model.generate(ids, *([how.pop("given")] if "given" in how else ()), **how)
        assert int((trace["is_generated"].values & (trace["prompt"].values == 0)).sum()) == 2


def test_more_that_cannot_be_recorded(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    host = tuner_of(model).model
    host.generation_config.num_beams = 2
    with pytest.raises(RealignerError, match="num_beams"), ra.record(model):
        model.generate(input_ids=ids, max_new_tokens=2)
    host.generation_config.num_beams = 1
    for config in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(RealignerError, match="is not supported"), ra.record(model):
            model.generate(ids, GenerationConfig(max_new_tokens=2, **config))  # as the second argument
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(RealignerError, match="past_key_values"), ra.record(model):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(RealignerError, match="decoder"), ra.record(model):
        host.model(input_ids=ids)


def test_nested_records_both_see(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    with ra.record(model, keep="raw") as outer, ra.record(model, keep="raw") as inner:
        model.generate(input_ids=ids, max_new_tokens=3)
    assert np.array_equal(outer["delta"].values, inner["delta"].values)
    assert "generate" not in vars(tuner_of(model).model)


# --- summaries, against the same numbers from raw deltas -----------------------------------------------------------------


def check_summary(trace: xr.Dataset, tolerance: float = 1e-5) -> None:
    """Every reduction of every text, computed from its deltas in float64."""
    for text in texts_of(trace):
        layers = [layer for layer in range(text.sizes["layer"]) if not np.isnan(text["energy"].values[:, layer]).any()]
        delta = text["delta"].values[:, layers].astype(np.float64)
        new = text["is_generated"].values
        nth = np.cumsum(new)
        where = [~new, new & (nth <= 10), new & (nth > 10)]
        assert text["count"].values[0].tolist() == [int(w.sum()) for w in where]
        for part, chosen in enumerate(where):
            own = delta[chosen]
            want = {"sum": own.sum(0), "sum_abs": abs(own).sum(0), "sum_sq": (own**2).sum(0)}
            want["max_abs"] = abs(own).max(0, initial=0)
            for key, value in want.items():
                np.testing.assert_allclose(text[key].values[0, part][layers], value, rtol=tolerance, atol=tolerance)
        for key, value in {"energy": delta**2, "l1": abs(delta), "l4": delta**4, "small": abs(delta) < 1e-4}.items():
            np.testing.assert_allclose(text[key].values[:, layers], value.sum(-1), rtol=tolerance, atol=1e-12)
        count = min(delta.size, text.sizes["rank"])
        top = np.sort(abs(delta), axis=None)[::-1][:count]
        np.testing.assert_allclose(abs(text["top_value"].values[0][:count]), top, rtol=1e-6)
        assert np.isnan(text["top_value"].values[0][count:]).all()
        assert (text["top_position"].values[0][count:] == -1).all()
        places = [text[key].values[0][:count] for key in ("top_position", "top_layer", "top_neuron")]
        assert len(set(zip(*places, strict=True))) == count
        named = text["delta"].sel(layer=xr.DataArray(places[1], dims="r"), neuron=xr.DataArray(places[2], dims="r"))
        got = named.isel(token=xr.DataArray(places[0], dims="r")).values
        np.testing.assert_allclose(got, text["top_value"].values[0][:count], rtol=1e-6)


@pytest.mark.parametrize("top", [5, 300, 10_000])
def test_summaries_are_those_of_the_deltas(model: Any, top: int) -> None:
    with ra.record(model, keep="raw", top=top) as trace:
        answer(model, model.realigner.tokenizer, PROMPTS, max_new_tokens=37, batch_size=2)
        model(input_ids=torch.arange(2, 60)[None])
    check_summary(trace)
    with ra.record(model, top=top) as alone:
        answer(model, model.realigner.tokenizer, PROMPTS, max_new_tokens=37, batch_size=2)
        model(input_ids=torch.arange(2, 60)[None])
    assert "delta" not in alone
    xr.testing.assert_identical(alone, trace.drop_vars("delta"))


@given(
    delta=arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=40), elements=st.floats(-50, 50, width=16)),
    prompt=st.integers(0, 40),
    top=st.integers(1, 200),
    block=st.integers(1, 50),
)
@settings(max_examples=60, deadline=None)
def test_summaries_of_anything_in_blocks_of_any_size(delta: np.ndarray, prompt: int, top: int, block: int) -> None:
    delta = delta + np.linspace(0, 1e-2, delta.size, dtype=np.float32).reshape(delta.shape)  # no ties
    n = len(delta)
    tokens = {"position": np.arange(n), "is_generated": np.arange(n) >= prompt, "token_id": np.arange(n)}
    tokens["token_text"] = np.array([""] * n, dtype=object)
    summary = summarise(delta, tokens["is_generated"], top, block)
    text = text_dataset(RunLabel("r"), 0, "", range(delta.shape[1]), tokens, summary, delta)
    check_summary(text, 1e-3)


def test_memory_does_not_grow_with_the_text() -> None:
    """What a summary holds after 200 and after 2,000 tokens differs by the few numbers that are kept of each token."""

    def held(tokens: int) -> int:
        batch = BatchSummary(1, top=50)
        for _ in range(tokens):
            batch.add(torch.randn(1, 4, 64), np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool))
        (row,) = batch.rows
        sums: list[torch.Tensor] = [getattr(part, key) for part in row.parts if part.count for key in TEXT_SUMS]
        large = sum(value.numel() for value in sums) + sum(part[0].numel() for part in batch._waiting)
        assert 50 <= row.candidates <= 100
        return large + sum(len(part) for part in row.tokens["energy"]) - tokens

    assert held(2000) <= held(200) + 16 * 4 * 64


# --- replay -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_replayed_deltas_are_those_recorded(model: Any, tmp_path: Path, scale: float) -> None:
    tokenizer = model.realigner.tokenizer
    with ra.strength(model, scale), ra.record(model, keep="raw") as raw, ra.record(model, keep="replay") as kept:
        answer(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert "delta" not in kept
    kept = ra.load_trace(ra.save_trace(kept, tmp_path / "t.zarr"))
    network = tuner_of(model).registry.network("default")
    again = ra.replay(kept, {"default": network})
    np.testing.assert_allclose(again["delta"].values, raw["delta"].values, rtol=1e-4, atol=1e-6)
    assert set(again.variables) == set(raw.variables)
    with torch.no_grad():
        network.output.bias[3] += 1e-3
    with pytest.raises(RealignerError, match="recorded with an IRM of sha256"):
        ra.replay(kept, {"default": network})
    with pytest.raises(UsageError, match="no network"):
        ra.replay(kept, {})
    with pytest.raises(UsageError, match="no h0"):
        ra.replay(raw, {"default": network})


# --- stores that can die, and that are damaged ------------------------------------------------------------------------------

WRITER = """
import sys
import numpy as np
from realigner.traces import RunLabel, TraceWriter
from realigner.traces.layout import text_dataset
from realigner.traces.summary import summarise
with TraceWriter(sys.argv[1], "host", range(3)) as writer:
    for text in range(10_000):
        n = 5 + text % 40
        delta = np.random.default_rng(text).normal(size=(n, 3, 50)).astype(np.float32)
        tokens = {"position": np.arange(n), "is_generated": np.arange(n) >= 4, "token_id": np.arange(n)}
        tokens["token_text"] = np.array(["x"] * n, dtype=object)
        label = RunLabel("a" if text < 5 else "b")
        summary = summarise(delta, tokens["is_generated"], 20)
        writer.append((text_dataset(label, text, "?", range(3), tokens, summary, delta), label))
        print(text, flush=True)
"""


@pytest.mark.slow
def test_a_killed_recording_leaves_the_finished_prompts(tmp_path: Path) -> None:
    """SIGKILL at moments that no one chose: what is there is whole, with and without us."""
    rng = np.random.default_rng(7)
    for nth in range(6):
        path = tmp_path / f"{nth}.zarr"
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3 + nth):
            process.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.15)))
        os.kill(process.pid, signal.SIGKILL)
        said = 3 + nth + len(process.stdout.readlines())
        process.wait()
        assert not path.exists()
        left = tmp_path / f"{nth}.zarr.unfinished"
        with pytest.raises(RealignerError, match=r"unfinished is there"):
            ra.load_trace(path)
        trace = ra.load_trace(left)
        assert trace.sizes["text"] in (said, said + 1)  # killed between writing a text and saying so
        check_half(trace)
        assert xr.open_zarr(left).sizes["text"] == trace.sizes["text"]
        assert verify_trace(left) > 0


def check_half(trace: xr.Dataset) -> None:
    for number, text in enumerate(texts_of(trace)):
        want = np.random.default_rng(number).normal(size=(5 + number % 40, 3, 50)).astype(np.float32)
        np.testing.assert_allclose(text["delta"].values, want, rtol=1e-3, atol=1e-5)
        assert set(text["prompt"].values.tolist()) == {number}
    assert set(trace.attrs["runs"]) == set(trace["text_run"].values.tolist())


def test_one_process_writes_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(RealignerError, match="unfinished trace is there"):
        TraceWriter(path, "host", range(3))
    with pytest.raises(RealignerError, match="another process is writing there"):
        TraceWriter(path, "host", range(3), force=True)
    process.kill()
    process.wait()
    writer = TraceWriter(path, "host", range(3), force=True)  # a dead process holds nothing
    with pytest.raises(RealignerError, match="nothing was recorded"):
        writer.close()
    assert ra.load_trace(tmp_path / "t.zarr.unfinished").sizes["text"] > 0  # nothing took its place
    assert [left.name for left in tmp_path.iterdir()] == ["t.zarr.unfinished"]


@pytest.mark.parametrize("name", ["delta", "sum_abs", "token_text", "count", "h0"])
def test_a_damaged_chunk_is_named(model: Any, tmp_path: Path, name: str) -> None:
    keep: Any = "replay" if name == "h0" else "raw"
    with ra.record(model, keep=keep) as trace:
        answer(model, model.realigner.tokenizer, PROMPTS, max_new_tokens=20)
    path = ra.save_trace(trace, tmp_path / "t.zarr")
    assert verify_trace(path) > 10
    chunk = sorted(p for p in (path / name / "c").rglob("*") if p.is_file())[-1]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(RealignerError, match=rf"t.zarr: .*{name}"):
        verify_trace(path)
    chunk.unlink()
    with pytest.raises(RealignerError, match=rf"{name}/c/.* is missing"):
        verify_trace(path)


def test_float16_only_where_it_fits(model: Any, tmp_path: Path) -> None:
    ids = torch.arange(2, 9)[None]
    for scale, dtype in ((1.0, "float16"), (1e-4, "float32"), (900.0, "float16"), (1000.0, "float16")):
        with ra.strength(model, scale), ra.record(model, keep="raw") as trace:
            model(input_ids=ids)
        if scale == 1000.0:
            trace = trace.assign({key: trace[key] * 100 for key in ("delta", "max_abs")})
            dtype = "float32"
        kept = ra.load_trace(ra.save_trace(trace, tmp_path / "t.zarr", force=True))
        assert kept["delta"].dtype == dtype, scale
        np.testing.assert_allclose(kept["delta"].values, trace["delta"].values, rtol=1e-3)
    with pytest.raises(RealignerError, match="does not fit into float16"):
        ra.save_trace(trace, tmp_path / "u.zarr", dtype="float16")


def test_traces_are_joined(model: Any) -> None:
    ids = torch.arange(2, 9)[None]
    parts = []
    for name in ("a", "b"):
        with ra.record(model, keep="raw", labels={"default": RunLabel(name, tone=name, seed=7)}) as trace:
            model(input_ids=ids)
        parts.append(trace)
    both = ra.join_traces(parts)
    assert both["run"].values.tolist() == ["a"] * 7 + ["b"] * 7
    assert both["tone"].values.tolist() == both["run"].values.tolist()
    assert set(both["seed"].values.tolist()) == {7}
    assert set(both.attrs["runs"]) == {"a", "b"}
    xr.testing.assert_identical(both.isel(token=slice(7), text=[0]).drop_attrs(), parts[0].drop_attrs())
    # Prompts of one number are the same in all of them, whichever names it first.
    three = [*parts, both.copy()]
    for trace, prompts in zip(three, ([], ["Why?"], ["Who?"]), strict=True):
        trace.attrs = {**trace.attrs, "notes": {"prompts": prompts}}
    with pytest.raises(UsageError, match=r"prompt 0 is 'Why\?' in one of these traces and 'Who\?'"):
        ra.join_traces(three)
    with ra.strength(model, 2.0), ra.record(model, keep="raw", labels={"default": RunLabel("a")}) as other:
        model(input_ids=ids)
    with pytest.raises(UsageError, match="two runs are named 'a'"):
        ra.join_traces([parts[0], other])
    with ra.record(model) as other:
        model(input_ids=ids)
    with pytest.raises(UsageError, match="keep different things"):
        ra.join_traces([parts[0], other])


def test_a_run_that_two_traces_share_is_joined_once() -> None:
    first, second = (planted_trace({run: (run[:-2], 7), "untrained-7": ("untrained", 7)}) for run in ("anger-7", "sadness-7"))
    for trace in (first, second):
        trace.attrs["runs"]["untrained-7"] |= {"sha256": "a" * 64, "irm": str(id(trace))}
    both = ra.join_traces([first, second])
    assert both["text_run"].values.tolist() == ["anger-7"] * 2 + ["untrained-7"] * 2 + ["sadness-7"] * 2
    xr.testing.assert_identical(both.isel(text=slice(4), token=slice(96)).drop_attrs(), first.drop_attrs())
    second.attrs["runs"]["untrained-7"]["sha256"] = "b" * 64
    with pytest.raises(UsageError, match="two runs are named 'untrained-7'"):
        ra.join_traces([first, second])
    other = planted_trace({"joy-7": ("joy", 7)})
    for trace, prompts in ((first, ["Why?", "When?"]), (other, ["Why?", "Who?"])):
        trace.attrs["notes"]["prompts"] = prompts
    with pytest.raises(UsageError, match="prompt 1 is 'When\\?' in one of these traces and 'Who\\?' in another"):
        ra.join_traces([first, other])


def test_a_trained_run_counts_once() -> None:
    first, second = planted_trace(), planted_trace()
    with pytest.raises(UsageError, match="'anger-42' answers prompt 0 in several of these traces"):
        ra.join_traces([first, second])
    for trace in (first, second):
        trace.attrs["runs"]["anger-42"]["sha256"] = "a" * 64
    assert ra.join_traces([first, second]).drop_attrs().identical(first.drop_attrs())
    second["token_id"] = second["token_id"] + 1
    with pytest.raises(UsageError, match="'anger-42' answers prompt 0"):
        ra.join_traces([first, second])
    second["text_prompt"] = second["text_prompt"] + 2
    assert ra.join_traces([first, second]).sizes["text"] == 8


def test_questions_of_one_number_are_the_same() -> None:
    first, second = (planted_trace({run: (run[:-2], 7)}, question=question) for run, question in ASKED)
    with pytest.raises(UsageError, match=r"prompt 0 is 'Why\?' in one of these traces and 'When\?' in another"):
        ra.join_traces([first, second])
    second["text_question"] = ("text", np.array(["user: Why?\nassistant: Hm.\nuser: How?"] * 2, dtype=object))
    first["text_question"] = ("text", np.array(["user: Why?\nassistant: Oh!\nuser: How?"] * 2, dtype=object))
    assert ra.join_traces([first, second]).sizes["text"] == 4


def test_a_twin_has_the_network_of_its_run() -> None:
    runs = {"compact-1": ("anger", 1), "paper-1": ("anger", 1), "untrained-1-compact": ("untrained", 1)}
    trace = planted_trace(runs | {"untrained-1-paper": ("untrained", 1)})
    for run, facts in trace.attrs["runs"].items():
        facts["network"] = "compact" if "compact" in run else "paper"
    assert twins(trace) == {"compact-1": "untrained-1-compact", "paper-1": "untrained-1-paper"}
    assert twins(text_maps(trace)) == twins(trace)
    for facts in trace.attrs["runs"].values():  # a trace from before networks were noted
        del facts["network"]
    assert twins(trace)["compact-1"] == "untrained-1-compact"


# --- the reference's folders ------------------------------------------------------------------------------------------------


def reference_folder(root: Path, delta: np.ndarray, prompt: int, layers: list[int]) -> Path:
    """What the reference code writes of ``delta [token, layer, neuron]``: the prompt's last token twice."""
    order = [*range(prompt), *range(prompt - 1, len(delta))]
    for number in (1, 2):
        place = root / f"Prompt{number}_CSVs"
        place.mkdir(parents=True)
        for file, token in enumerate(order, start=1):
            rows = [
                f"{i},{layer},{float(delta[token, at, i])!r}" for at, layer in enumerate(layers) for i in range(delta.shape[2])
            ]
            (place / f"index_value_layer_{file}.csv").write_text("index,layer,value\n" + "\n".join(rows) + "\n")
    return root


def test_the_references_folders_are_read(tmp_path: Path) -> None:
    delta = np.random.default_rng(0).normal(size=(15, 2, 6)).astype(np.float32)
    folder = reference_folder(tmp_path / "anger_42", delta, 3, [5, 9])
    trace = ra.import_reference(folder, tone="anger", seed=42)
    assert trace.sizes["text"] == 2
    assert trace["layer"].values.tolist() == [5, 9]
    assert set(trace["run"].values.tolist()) == {"anger_42"}
    assert np.array_equal(trace["delta"].values, np.concatenate([delta, delta]))
    assert trace["is_generated"].values.tolist() == 2 * ([False] * 3 + [True] * 12)
    check_summary(trace)
    ra.save_trace(trace, tmp_path / "t.zarr")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("index,layer\n0,5\n", "'value' is missing"),
        ("index,layer,value\n0,5,x\n", ":2: value is 'x'"),
        ("index,layer,value\n0,5,1\n0,5,2\n", "not one value for each"),
        ("index,layer,value\n0,5,1\n1,5,2\n0,9,2\n", "cut off"),
        ("", "cannot be read"),
        ("index,layer,value\n0,5,1\n", "other layers or neurons"),
    ],
)
def test_broken_reference_folders_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    delta = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
    folder = reference_folder(tmp_path / "a", delta, 3, [5, 9])
    (folder / "Prompt2_CSVs" / "index_value_layer_2.csv").write_text(text)
    with pytest.raises(RealignerError, match=rf"index_value_layer_2.csv.*{fault}"):
        ra.import_reference(folder)
    with pytest.raises(RealignerError, match="no folders of the reference code"):
        ra.import_reference(tmp_path)


# --- other threads, embeddings, parts of the text ---------------------------------------------------------------------------


def test_only_the_threads_of_the_block_are_recorded(model: Any) -> None:
    """While one thread records, others generate, by beams too; the trace is the one made alone."""
    inputs = encode_prompts(model.realigner.tokenizer, PROMPTS, torch.device("cpu"))
    with ra.record(model, keep="raw") as want:
        model.generate(**inputs, **SHORT)
    beside = model.generate(**inputs, **SHORT, num_beams=2, strength=0.5)
    done = threading.Event()
    others: list[torch.Tensor] = []

    def work() -> None:
        while not done.is_set():
            others.append(model.generate(**inputs, **SHORT, num_beams=2, strength=0.5))

    thread = threading.Thread(target=work)
    thread.start()
    with ra.record(model, keep="raw") as got:
        model.generate(**inputs, **SHORT)
        inside = threading.Thread(target=lambda: model.generate(**inputs, **SHORT))  # a streamer's, say
        inside.start()
        inside.join()
    done.set()
    thread.join()
    assert all(torch.equal(one, beside) for one in others)
    assert got.sizes["text"] == 2 * want.sizes["text"]
    half = want.sizes["token"]
    assert np.array_equal(got.delta.values[:half], want.delta.values)
    assert np.array_equal(got.delta.values[half:], want.delta.values)


def test_embeddings_are_recorded_as_tokens_without_a_name(model: Any) -> None:
    inputs = encode_prompts(model.realigner.tokenizer, PROMPTS, torch.device("cpu"))
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    with ra.record(model, keep="raw") as want:
        model.generate(**inputs, **SHORT)
        model(**inputs)
    with ra.record(model, keep="raw") as got:
        model.generate(inputs_embeds=embedded, attention_mask=mask, **SHORT)
        model(inputs_embeds=embedded, attention_mask=mask)
    assert np.array_equal(got.delta.values, want.delta.values)
    assert got.text_reply.values.tolist() == want.text_reply.values.tolist()
    unnamed = got.token_id.values == NO_TOKEN
    assert np.array_equal(got.token_id.values[~unnamed], want.token_id.values[~unnamed])
    assert set(got.token_text.values[unnamed]) == {""}
    assert unnamed.sum() == 2 * int(mask.sum())


def test_parts_of_a_text(model: Any) -> None:
    inputs = encode_prompts(model.realigner.tokenizer, PROMPTS, torch.device("cpu"))
    with ra.record(model, keep="raw") as trace:
        model.generate(**inputs, **SHORT, where="reply")
    touched = np.abs(trace.delta.values).max(axis=(1, 2)) > 0
    assert np.array_equal(touched, trace.is_generated.values)
    with pytest.raises(UsageError, match="keep='raw'"), ra.record(model, keep="replay"):
        model.generate(**inputs, **SHORT, where="reply")
    with ra.record(model), pytest.raises(UsageError, match="continuous batches"):
        model.generate_batch(inputs["input_ids"].tolist())
