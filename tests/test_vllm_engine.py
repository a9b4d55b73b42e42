"""IRMs in vLLM itself: every request's tokens are those of the transformers host with the same IRMs, asked alone.

The engine runs in an environment of its own (``make serve-env``), each test in a process there. ``make serve-test`` runs these.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import realigner as ra
from realigner.gguf_cache import EMBEDDED
from tests.serve_hosts import SETTINGS, make

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(os.environ.get("REALIGNER_SERVE_PYTHON") or ROOT / ".serve-env" / "bin" / "python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not PYTHON.exists() and os.environ.get("CI") != "true",
        reason="the engine's environment is not installed (make serve-env)",
    ),
]
PROMPTS = 4
ALL = PROMPTS * len(SETTINGS)
QUESTION = "Why is the sky blue? Answer in two sentences, and say which particles scatter the light and which colours reach us."


def in_engine(script: str, job: dict[str, Any], place: Path, limit: int = 600) -> dict[str, Any]:
    """Run a script in the engine's environment; its result, or a failure with the end of what it said."""
    (place / "job.json").write_text(json.dumps(job))
    result = place / "result.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(PYTHON), str(ROOT / "tests" / script), str(place / "job.json"), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    if done.returncode or not result.exists():
        lines = (done.stdout + done.stderr).splitlines()
        raise AssertionError("\n".join([line for line in lines if "realigner.errors" in line] + lines[-30:]))
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def irms_of(place: Path) -> dict[str, str]:
    return {"REALIGNER_IRMS": ",".join(f"{name}={place}/irms/{name}" for name in ("anger", "sadness"))}


def generate(place: Path, **job: Any) -> dict[str, Any]:
    return in_engine("serve_engine.py", {"kind": "generated", "place": str(place), "environment": irms_of(place), **job}, place)


@pytest.fixture(scope="module")
def embedded_place(tmp_path_factory: pytest.TempPathFactory, embedded: Any) -> Path:
    return make(tmp_path_factory.mktemp("embedded"), EMBEDDED)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llama"), "llama")


def test_settings_change_what_is_said(embedded_place: Path, llama: Path) -> None:
    for place in (embedded_place, llama):
        replies = json.loads((place / "replies.json").read_text())["replies"]
        assert len({(tuple(reply["prompt"]), tuple(reply["tokens"])) for reply in replies}) > ALL / 2


@pytest.mark.parametrize("eager", [True, False])
def test_32_requests_at_once_over_8_settings(eager: bool, embedded_place: Path) -> None:
    found = generate(embedded_place, options={"enforce_eager": eager}, rounds=2)
    assert [each["right"] for each in found["rounds"]] == [ALL, ALL]
    assert found["rounds"][1]["cached"] > 0  # of its own setting's blocks alone, or the tokens would be others


def test_a_compiled_graph_is_not_that_of_other_irms(llama: Path, tmp_path: Path) -> None:
    """Two engines on one host, with IRMs of other shapes, one after the other: what was compiled is kept on disk."""
    other = make(tmp_path / "other", "llama", {"anger": {"widths": [24], "rank": 0}, "sadness": {"preset": "paper"}})
    for place in (llama, other, llama):
        assert generate(place)["rounds"][0]["right"] == ALL


def test_chunked_prefill_and_preemption(llama: Path) -> None:
    """Chunks of 64 tokens, and so few blocks that requests are thrown out and come again."""
    options = {"enforce_eager": True, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 14}
    found = generate(llama, options=options, rounds=2, refused=["joy", "anger@x", "anger+anger", 3, {"anger": 1e9}])
    assert [each["right"] for each in found["rounds"]] == [ALL, ALL]
    assert found["preemptions"] > 0
    for message, words in zip(
        found["refused"], ("'joy' is not loaded", "is not a number", "twice", "neither terms", "between"), strict=True
    ):
        assert words in message
        assert "\n" not in message


@pytest.mark.parametrize("host_type", ["qwen3", "gemma2", "gemma3_text", "granite", "gpt2", "mixtral", "phi3"])
def test_families(host_type: str, tmp_path: Path) -> None:
    """The stream in two halves, norms after the branch, a weight of the branch, one stream, experts."""
    place = make(tmp_path, host_type)
    assert generate(place, options={"enforce_eager": True})["rounds"][0]["right"] == ALL


@pytest.mark.parametrize("host_type", ["llama", "gemma2"])
def test_tensor_parallel(host_type: str, tmp_path: Path) -> None:
    """Two workers with half of the host each, and each with the whole of the IRMs."""
    place = make(tmp_path, host_type, sizes={"num_key_value_heads": 2})
    environment = irms_of(place) | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = {"enforce_eager": True, "tensor_parallel_size": 2}
    assert generate(place, options=options, environment=environment)["rounds"][0]["right"] == ALL


def test_the_second_runners_bookkeeping(llama: Path) -> None:
    found = in_engine("serve_engine.py", {"kind": "stepped", "place": str(llama)}, llama)
    assert found["slots"] == {"anger": 0, "sadness": 1}
    bare, x, z, w = [0.0, 0.0], [0.5, 0.0], [-1.0, 2.0], [0.0, 1.0]
    rows = [[x] * 3 + [bare] * 2 + [z] * 4, [z, x], [w] * 2, [], [z], []]
    assert found["steps"] == [each + [bare] * (12 - len(each)) for each in rows]


def test_an_engine_with_the_irm_of_another_host_does_not_start(llama: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "qwen3")
    with pytest.raises(AssertionError, match=r"irm 'anger' was made for another host; of .* the decoder is of type llama"):
        generate(llama, environment=irms_of(other))


def test_the_server_answers_as_answer_does(embedded_place: Path, llama: Path) -> None:
    runtime = ra.load({name: embedded_place / "irms" / name for name in ("anger", "sadness")}, dtype="float32")
    asked: list[dict[str, float]] = [{}, {"anger": 0.7}, {"anger": 1.5}, {"anger": 0.7, "sadness": -0.8}]
    wanted = [
        runtime.answer(QUESTION, max_new_tokens=16, irms=tuple(irms) or "__base__", strength=irms or None) for irms in asked
    ]
    job: dict[str, Any] = {"place": str(embedded_place), "stranger": f"{llama}/irms/anger", "question": QUESTION}
    job |= {"terms": ["", "anger@0.7", "anger@1.5"], "log": str(embedded_place / "server.log")}
    found = in_engine("serve_http.py", job, embedded_place)
    assert "failed" not in found, found["failed"]
    assert found["models"] == ["smollm2", "smollm2+anger"]
    assert [text.strip() for text in found["replies"]] == wanted[:3]
    assert [text.strip() for text in (*found["field"], found["streamed"])] == [wanted[1]] * 3
    assert found["tokens"] == found["asked"] > 0
    statuses = [status for status, _ in found["bad"]]
    assert statuses == [404, 400, 404, 404, 400, 404]
    assert all("\n" not in body["error"]["message"] for _, body in found["bad"])
    assert found["unloaded_asked"] == 404
    assert [status for status, _ in found["load"]] == [201, 400, 400, 400, 400]
    assert "made for another host" in found["load"][3][1]["error"]["message"]
    assert found["loaded_models"] == ["smollm2", "smollm2+anger", "smollm2+sadness"]
    assert found["sadness"].strip() == wanted[3]
    assert [status for status, _ in found["unload"]] == [204, 404]
    assert found["after"].strip() == wanted[0]
    assert found["hits"] > 0
    assert found["exit"] == 0
