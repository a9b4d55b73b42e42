"""On a GPU: that calls keep to their settings there too, and milliseconds per token beside the bare host.

    python benchmarks/gpu.py [--hidden 2048] [--layers 16] [--tokens 64] [--repeats 5]

A random Llama of the given size. Exactness is checked in float32 (without TF32), where what a batch does to rounding moves no
token: strength 0, threads, a strength for each token, `where`, continuous batches with and without CUDA graphs, compiled
decoding.
Times are of bfloat16, greedy, cached; ratios are to the bare host of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import realigner as ra
from realigner.files import write_text
from realigner.irm_config import IRMConfig
from realigner.tuner import tuner_of

SIZES: dict[str, Any] = {} if torch.cuda.is_available() else {"num_blocks": 64, "max_batch_tokens": 64, "page_size": 16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU it only shows that the script works
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SETTINGS: list[dict[str, Any]] = [
    {"adapter_names": ["__base__"]},
    {"strength": 0.0},
    {"strength": 1.0},
    {"strength": -2.0},
    {"strength": 3.0, "where": "prompt"},
    {"strength": 3.0, "where": "reply"},
    {"strength": 3.0, "where": 4},
    {"strength": 0.5},
]


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


def make_model(hidden: int, layers: int, dtype: torch.dtype, std: float) -> Any:
    """A random host with a compact IRM that changes its words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256 or 1,
        vocab_size=32_000,
        tie_word_embeddings=False,
    )
    with torch.device(DEVICE):
        host = LlamaForCausalLM(config).to(dtype).eval()
    return get_peft_model(host, IRMConfig(output_std=std, inference_mode=True)).eval()


def prompts(count: int, length: int) -> torch.Tensor:
    return torch.randint(3, 32_000, (count, length), generator=torch.Generator().manual_seed(count + length)).to(DEVICE)


def replies(model: Any, ids: torch.Tensor, tokens: int = 16, **options: Any) -> list[list[int]]:
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **GREEDY, **options)
    return [row[ids.shape[1] :].tolist() for row in out]


def check(model: Any) -> dict[str, bool]:
    """What must hold, by name."""
    ids, found = prompts(2, 12), {}
    with torch.no_grad():
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
        found["strength 0 is the bare host to the bit"] = torch.equal(model(input_ids=ids, strength=0.0).logits, bare)
        by_token = model(input_ids=ids, strength=[[1.0] * 12, [0.0] * 12]).logits
        alone = model(input_ids=ids[:1]).logits
        found["a strength for each token"] = bool((by_token[:1] - alone).abs().max() < 1e-3) and bool(
            (by_token[1:] - bare[1:]).abs().max() < 1e-3
        )
    texts = [prompts(1, 8 + n) for n in range(16)]
    chosen = [SETTINGS[n % len(SETTINGS)] for n in range(16)]
    want = [replies(model, text, **one)[0] for text, one in zip(texts, chosen, strict=True)]
    found["settings change the words"] = len({tuple(reply) for reply in want[:8]}) > 4
    with ThreadPoolExecutor(4) as pool:
        rounds = [pool.submit(replies, model, text, **one) for _ in range(4) for text, one in zip(texts, chosen, strict=True)]
        found["4 threads, 64 generations"] = [future.result()[0] for future in rounds] == want * 4
    given = {
        "strength": [one.get("strength", 1.0) for one in chosen],
        "adapter_names": [one.get("adapter_names", ["default"])[0] for one in chosen],
        "where": [one.get("where", "all") for one in chosen],
    }
    settings = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for graphs in (False, True) if DEVICE.type == "cuda" else (False,):
        name = f"continuous batching, CUDA graphs {'on' if graphs else 'off'}"
        try:
            config = ContinuousBatchingConfig(max_requests_per_batch=8, use_cuda_graph=graphs, **SIZES)
            outputs = model.generate_batch([text[0].tolist() for text in texts], settings, config, **given)
            found[name] = [output.generated_tokens for output in outputs.values()] == want
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            found[name] = False
    first = list(zip(texts, chosen, strict=True))[:8]
    compiled = [replies(model, text, cache_implementation="static", **one)[0] for text, one in first]
    found["static cache, compiled decoding"] = compiled == want[:8]
    return found


def milliseconds(model: Any, batch: int, tokens: int, **options: Any) -> float:
    """Per token of one generation."""
    ids = prompts(batch, 32)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    replies(model, ids, tokens, **options)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / tokens


def measure(model: Any, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per token, and ratios to the bare host, turn by turn."""
    host = tuner_of(model).model
    turns: dict[str, list[float]] = {"bare": [], "idle": [], "compact": []}
    handles = tuner_of(model).injector
    for repeat in range(repeats + 1):
        handles.detach()
        bare = milliseconds(host, batch, tokens)
        handles.attach()
        with model.disable_adapter():
            idle = milliseconds(model, batch, tokens)
        compact = milliseconds(model, batch, tokens)
        if repeat:
            for name, value in zip(turns, (bare, idle, compact), strict=True):
                turns[name].append(value)
    ratios = {name: [a / b for a, b in zip(turns[name], turns["bare"], strict=True)] for name in ("idle", "compact")}
    return {
        "batch": batch,
        "bare_ms": round(statistics.median(turns["bare"]), 3),
        **{name: [round(f(values), 3) for f in (statistics.median, min, max)] for name, values in ratios.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "gpu.json")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{device_name()}, torch {torch.__version__}, realigner {ra.__version__}", flush=True)
    found = check(make_model(512, 8, torch.float32, 0.3))
    for name, held in found.items():
        print(f"{'holds' if held else 'FAILS':6} {name}", flush=True)
    model = make_model(arguments.hidden, arguments.layers, torch.bfloat16, 0.01)
    rows = [measure(model, batch, arguments.tokens, arguments.repeats) for batch in (1, 8, 64)]
    print("batch  bare ms/token  idle (min, max)         compact (min, max)")
    for row in rows:
        idle, compact = (f"{row[key][0]:.3f} ({row[key][1]:.3f}, {row[key][2]:.3f})" for key in ("idle", "compact"))
        print(f"{row['batch']:>5}  {row['bare_ms']:>13.2f}  {idle:<22}  {compact}")
    device = device_name()
    write_text(
        arguments.out, json.dumps({"device": device, "torch": torch.__version__, "holds": found, "rows": rows}, indent=2) + "\n"
    )
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
