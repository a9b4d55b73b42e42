"""Run by test_vllm_engine.py in the engine's environment: one engine, some work, what came of it as JSON.

python tests/serve_engine.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def generated(job: dict[str, Any]) -> dict[str, Any]:
    """All requests at once, some times over; replies that are as they should be, and the engine's counts."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    wanted = json.loads((Path(job["place"]) / "replies.json").read_text())
    replies = wanted["replies"]
    options = {"max_model_len": 256, "max_num_seqs": 32, "block_size": 32, "dtype": "float32", **job.get("options", {})}
    llm = LLM(wanted["host"], skip_tokenizer_init=True, disable_log_stats=False, **options)
    prompts = [{"prompt_token_ids": reply["prompt"]} for reply in replies]

    def params(irms: Any, tokens: int) -> SamplingParams:
        extra = {"irms": irms} if irms else None
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)

    rounds = []
    for _ in range(job.get("rounds", 1)):
        outputs = llm.generate(prompts, [params(r["irms"], len(r["tokens"])) for r in replies], use_tqdm=False)
        right = [list(o.outputs[0].token_ids) == r["tokens"] for o, r in zip(outputs, replies, strict=True)]
        rounds.append({"right": sum(right), "cached": sum(output.num_cached_tokens or 0 for output in outputs)})
    refused: list[str | None] = []
    for irms in job.get("refused", []):
        try:
            llm.generate(prompts[:1], params(irms, 1), use_tqdm=False)
            refused.append(None)
        except VLLMValidationError as error:
            refused.append(str(error))
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {"rounds": rounds, "refused": refused, "preemptions": counts.get("vllm:num_preemptions")}


def stepped(job: dict[str, Any]) -> dict[str, Any]:
    """V2's bookkeeping, with the engine's own classes, on the CPU: the strengths of each step's tokens."""
    import numpy as np
    import torch
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from realigner.adapter_files import read_irm
    from realigner.serving.vllm_model import IRMSlots
    from realigner.serving.vllm_runner import StepState

    host = json.loads((Path(job["place"]) / "replies.json").read_text())["host"]
    config = EngineArgs(host, skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4).create_engine_config()
    device = torch.device("cpu")
    irms = {name: read_irm(Path(job["place"], "irms", name)) for name in ("anger", "sadness")}
    model: Any = torch.nn.Module()
    model.irms = IRMSlots(irms, 0, config.scheduler_config.max_num_batched_tokens, torch.float32, device)
    state = type("State", (StepState, DefaultModelState), {})(config, model, None, device)
    fields = dict.fromkeys(NewRequestData.__dataclass_fields__)

    def add(place: int, name: str, asked: dict[str, float] | None) -> None:
        params = SamplingParams(extra_args={"irms": asked} if asked else None)
        given = {"req_id": name, "sampling_params": params, "prompt_token_ids": [1], "mm_features": [], "block_ids": ([],)}
        state.add_request(place, NewRequestData(**{**fields, **given, "num_computed_tokens": 0}))
        state.apply_staged_writes()

    def step(names: list[str], places: list[int], tokens: list[int], padded: int) -> list[list[float]]:
        batch = InputBatch.make_dummy(len(names), sum(tokens), InputBuffers(4, 256, device))
        batch.req_ids, batch.num_reqs, batch.num_tokens, batch.num_tokens_after_padding = names, len(names), sum(tokens), padded
        batch.idx_mapping, batch.idx_mapping_np = torch.tensor(places), np.array(places)
        batch.query_start_loc = torch.tensor([0, *np.cumsum(tokens)], dtype=torch.int32)
        state.prepare_inputs(batch, None)
        return [[round(value, 3) for value in row] for row in model.irms.strengths[:12].tolist()]

    steps = []
    add(2, "x", {"anger": 0.5})
    add(0, "y", None)
    add(1, "z", {"sadness": 2.0, "anger": -1.0})
    steps.append(step(["x", "y", "z"], [2, 0, 1], [3, 2, 4], 12))
    steps.append(step(["z", "x"], [1, 2], [1, 1], 8))
    state.remove_request("x")
    add(2, "w", {"sadness": 1.0})  # in the place of one that went
    steps.append(step(["w", "y"], [2, 0], [2, 1], 4))
    steps.append(step(["req_0_dummy"], [1], [5], 8))
    steps.append(step(["z"], [1], [1], 1))
    state.prepare_dummy_inputs(1, 4)
    steps.append([[round(value, 3) for value in row] for row in model.irms.strengths[:12].tolist()])
    return {"steps": steps, "slots": model.irms.names}


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    os.environ.update(work.get("environment", {}))
    Path(sys.argv[2]).write_text(json.dumps({"generated": generated, "stepped": stepped}[work["kind"]](work)))
