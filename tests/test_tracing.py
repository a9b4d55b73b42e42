"""Whole traces of several runs and their untrained twins, on a tiny host."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import realigner as ra
from realigner.analysis import run_maps
from realigner.dialogues import Asked, Dialogue, play, readable
from realigner.errors import RealignerError, UsageError
from realigner.hosts import load_host
from realigner.traces import load_trace, texts_of
from realigner.traces.collect import find_runs, sources_of, trace_runs
from realigner.tuner import load_irm, tuner_of
from tests.tiny import TEMPLATE, some_rows, tiny_folder

PROMPTS = ["Why?", "How many apples can fit in a basket?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host's folder and, in runs/, three runs: two tones of one seed and one of another."""
    root = tmp_path_factory.mktemp("tracing")
    host, tokenizer = load_host(str(tiny_folder(root / "host")), dtype="float32", device="cpu")
    for tone, seed in (("anger", 42), ("sadness", 42), ("anger", 7)):
        options: dict[str, Any] = {"steps": 2, "batch_size": 2, "samples": 0, "report_to": []}
        run = ra.train(host, tokenizer, some_rows(tone=tone), root / "runs" / f"{tone}{seed}", seed=seed, **options)
        run.model.unload()
    return root


@pytest.fixture
def pair(place: Path) -> tuple[Any, Any]:
    return load_host(str(place / "host"), dtype="float32", device="cpu")


def test_runs_and_their_twins_in_one_store(place: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    host, tokenizer = pair
    before = {key: value.clone() for key, value in host.state_dict().items()}
    sources = sources_of(find_runs([place / "runs"]), strength=1.5)
    assert [source.label.run for source in sources] == ["anger-42", "anger-7", "sadness-42", "untrained-42", "untrained-7"]
    trace = trace_runs(sources, tmp_path / "t.zarr", host, tokenizer, PROMPTS, "raw", "float32", max_new_tokens=5, quiet=True)
    assert list(dict.fromkeys(trace["text_run"].values.tolist())) == [source.label.run for source in sources]
    assert trace["text_question"].values.tolist() == PROMPTS * 5
    assert all(facts["strength"] == 1.5 for facts in trace.attrs["runs"].values())
    assert [facts["untrained"] for facts in trace.attrs["runs"].values()] == [False, False, False, True, True]
    assert trace.attrs["notes"]["base"] == ra.answer(host, tokenizer, PROMPTS, max_new_tokens=5)
    assert all(torch.equal(before[key], value) for key, value in host.state_dict().items())
    # A run alone says the same and adds the same as among others.
    model = load_irm(host, place / "runs" / "sadness42")
    with ra.strength(model, 1.5), ra.record(model, keep="raw") as alone:
        replies = ra.answer(model, tokenizer, PROMPTS, max_new_tokens=5)
    sad = trace.isel(token=trace["run"].values == "sadness-42", text=trace["text_run"].values == "sadness-42")
    assert sad["text_reply"].values.tolist() == replies
    np.testing.assert_allclose(sad["delta"].values, alone["delta"].values, atol=1e-6)
    assert sad.attrs["runs"]["sadness-42"]["sha256"] == alone.attrs["runs"]["default"]["sha256"]
    with ra.strength(model, 0.7), ra.record(model) as weaker:
        ra.answer(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert weaker.attrs["runs"]["default"]["strength"] == 0.7  # as it was given, not as float32 has it
    model.unload()


def test_each_run_plays_a_dialogue_itself(place: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    host, tokenizer = pair
    dialogue = Dialogue(("Who was she?", "When?"))
    sources = sources_of(find_runs([place / "runs" / "anger42"]), strength=0.5)
    prompts: list[Asked] = ["Why?", dialogue]
    trace = trace_runs(sources, tmp_path / "t.zarr", host, tokenizer, prompts, max_new_tokens=5, quiet=True)
    assert trace.attrs["notes"]["prompts"] == ["Why?", {"turns": ["Who was she?", "When?"]}]

    def ask(conversations: Any, model: Any = host) -> Sequence[str]:
        return ra.answer(model, tokenizer, conversations, max_new_tokens=5)

    bare = play(prompts, ask)  # the host plays it bare
    assert trace.attrs["notes"]["base_questions"] == [readable(asked) for asked in bare]
    assert trace.attrs["notes"]["base"] == ask(bare)
    model = load_irm(host, place / "runs" / "anger42")
    with ra.strength(model, 0.5):
        own = play(prompts, partial(ask, model=model))
        replies = ask(own, model)
    model.unload()
    mine = trace["text_run"].values == "anger-42"
    assert trace["text_question"].values[mine].tolist() == [readable(asked) for asked in own]
    assert trace["text_reply"].values[mine].tolist() == replies
    plain = trace_runs(sources, tmp_path / "u.zarr", host, tokenizer, ["Why?"], max_new_tokens=5, quiet=True)
    assert set(plain.attrs["notes"]) == {"settings", "prompts", "base"}


def test_twins_are_asked_with_the_variables_of_their_run(place: Path, tmp_path: Path) -> None:
    host, tokenizer = load_host(str(place / "host"), dtype="float32", device="cpu")
    tokenizer.chat_template = "{{ mood }}" + TEMPLATE
    options: dict[str, Any] = {"steps": 1, "batch_size": 2, "samples": 0, "report_to": []}
    for name, mood in (("a", "calm"), ("b", "cross")):
        options["chat_template_kwargs"] = {"mood": mood}
        ra.train(host, tokenizer, some_rows(), tmp_path / name, **options).model.unload()
    trace = trace_runs(
        sources_of([tmp_path / "a"]), tmp_path / "t.zarr", host, tokenizer, ["Why?"], max_new_tokens=2, quiet=True
    )
    asked = ["".join(text["token_text"].values[~text["is_generated"].values]) for text in texts_of(trace)]
    assert asked == ["calm<|user|>Why?<eos>\n<|assistant|>"] * 2
    assert [sorted({*text["turn"].values.tolist()}) for text in texts_of(trace)] == [[-1, 0, 1]] * 2
    with pytest.raises(UsageError, match="different templates"):
        trace_runs(sources_of([tmp_path / "a", tmp_path / "b"]), tmp_path / "u.zarr", host, tokenizer, quiet=True)
    other: dict[str, Any] = {"max_new_tokens": 2, "quiet": True, "chat_template_kwargs": {"mood": "glad"}}
    trace = trace_runs(sources_of([tmp_path / "a"]), tmp_path / "v.zarr", host, tokenizer, ["Why?"], **other)
    assert "glad" in "".join(trace["token_text"].values)
    assert (trace["turn"].values == 0).any()
    assert trace.attrs["notes"]["settings"]["chat_template_kwargs"] == {"mood": "glad"}


def test_a_twin_is_the_run_before_its_first_step(place: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    host, tokenizer = pair
    options: dict[str, Any] = {"steps": 0, "batch_size": 2, "samples": 0, "report_to": []}
    run = ra.train(host, tokenizer, some_rows(), tmp_path / "start", seed=7, **options)
    run.model.unload()
    given = sources_of(find_runs([place / "runs" / "anger7", tmp_path / "start"]))
    assert [source.twin for source in given] == [False, False]  # the baseline given takes the twin's place
    made = sources_of(find_runs([place / "runs" / "anger7"]))
    assert [source.twin for source in made] == [False, True]
    assert run.model.peft_config["default"].dropout > 0  # while training alone
    found = []
    for nth, sources in enumerate((given, made)):
        trace = trace_runs(sources, tmp_path / f"{nth}.zarr", host, tokenizer, PROMPTS, max_new_tokens=3, quiet=True)
        found.append((trace.attrs["runs"]["untrained-7"]["sha256"], run_maps(trace).sel(run="untrained-7").values))
    (hashed, maps), (hashed_twin, maps_of_twin) = found
    assert hashed == hashed_twin
    assert np.array_equal(maps, maps_of_twin)
    assert [s.label.run for s in sources_of(find_runs([place / "runs"]), baselines=False)] == [
        "anger-42",
        "anger-7",
        "sadness-42",
    ]


def test_names_are_told_apart(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "anger42", tmp_path / "other")
    names = [s.label.run for s in sources_of([place / "runs" / "anger42", tmp_path / "other"])]
    assert names == ["anger-42-anger42", "anger-42-other", "untrained-42"]


def test_an_irm_from_a_sentence_is_named_after_its_folder(place: Path, tmp_path: Path) -> None:
    for name, changes in {"pirate": {"instruct": "Answer as a pirate would.", "tone": None, "data": None}, "named": {}}.items():
        shutil.copytree(place / "runs" / "anger42", tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        record["recipe"] |= changes
        record["tone"] = changes.get("instruct") or record["tone"]
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    sources = sources_of([tmp_path / "pirate", tmp_path / "named"], baselines=False)
    assert [(source.label.run, source.label.tone) for source in sources] == [("pirate-42", "pirate"), ("anger-42", "anger")]


def test_what_cannot_be_traced(place: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(RealignerError, match="no such folder"):
        find_runs([tmp_path / "none"])
    with pytest.raises(RealignerError, match="neither"):
        find_runs([tmp_path])
    with pytest.raises(UsageError, match="no IRM"):
        trace_runs([], tmp_path / "t.zarr", *pair)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_trace_keeps_what_was_finished(
    place: Path, pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import realigner.traces.collect as tracing

    asked = []

    def answer(model: Any, *args: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) == 4:  # the bare host, two runs, and then Ctrl-C
            raise KeyboardInterrupt
        return ra.answer(model, *args, **options)

    monkeypatch.setattr(tracing, "answer", answer)
    sources = sources_of(find_runs([place / "runs"]))
    with pytest.raises(KeyboardInterrupt):
        trace_runs(sources, tmp_path / "t.zarr", *pair, PROMPTS, max_new_tokens=3, quiet=True)
    left = load_trace(tmp_path / "t.zarr.unfinished")
    assert left["text_run"].values.tolist() == ["anger-42"] * 2 + ["anger-7"] * 2
    assert all(isinstance(text, xr.Dataset) for text in texts_of(left))
    assert not tuner_hooks(pair[0])


def tuner_hooks(host: Any) -> list[Any]:
    """What is still on a host that should be bare."""
    with pytest.raises(UsageError):
        tuner_of(host)
    return [hook for module in host.modules() for hook in module._forward_hooks.values()]
