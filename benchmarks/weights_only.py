"""Seconds and peak memory of the weight-only measurements of Llama-2-7B's shape, read from a sharded checkpoint on disk.

    python benchmarks/weights_only.py [--layers 32] [--width 4096] [--inner 11008] [--vocabulary 32000] [--repeats 1]

The checkpoint is synthetic: float16, three shards and an index, every tensor of Llama-2-7B under its name, random values in
what is measured (norms, embedding, head, o_proj, down_proj: 4.5 GB). What is not (q, k, v, gate and up) is there in header and
length, but as holes in the files that take no disk: whoever read them would find zeros. One channel (1512) has a final gain of
5e-05, where the others have 1.5 to 2. It is written into a temporary folder (made in `--folder`) and deleted afterwards.

The measuring process is fresh, imports counted. Peak memory is its `ru_maxrss`, everything mapped included; the limit is 2 GiB.
(`ru_maxrss` counts what this process had when it forked, too; VmHWM, printed beside it, does not.) The files have just been
written and may still be in the page cache, so no disk is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from realigner.files import write_text

HERE = Path(__file__).resolve().parent
LIMIT = 2.0  # GiB
INDEX, PLANTED = 1512, 5e-05
SHARDS = 3
READ = ("norm", "embed_tokens", "lm_head", "o_proj", "down_proj")  # in the names of what has values


def shapes(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the host, in the order of its layers."""
    width, inner = options.width, options.inner
    yield "model.embed_tokens.weight", (options.vocabulary, width)
    for layer in range(options.layers):
        here = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{here}.self_attn.{name}_proj.weight", (width, width)
        yield f"{here}.mlp.gate_proj.weight", (inner, width)
        yield f"{here}.mlp.up_proj.weight", (inner, width)
        yield f"{here}.mlp.down_proj.weight", (width, inner)
        yield f"{here}.input_layernorm.weight", (width,)
        yield f"{here}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (options.vocabulary, width)


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A tensor's values in float16; matrices repeat a few thousand random rows, which costs less to draw."""
    if len(shape) > 1:
        some = rng.standard_normal((min(shape[0], 4096), shape[1]), dtype=np.float32).astype(np.float16)
        return np.resize(some * np.float16(0.02), shape)
    gains = rng.uniform(1.5, 2.0, shape) if name == "model.norm.weight" else rng.uniform(0.3, 0.6, shape)
    if name == "model.norm.weight":
        gains[INDEX % len(gains)] = PLANTED
    return gains.astype(np.float16)


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    """A safetensors file: the header's length in 8 bytes, the header in JSON, the values; a hole where there are none."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name, shape in tensors:
        starts[name], size = end, 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            if any(part in name for part in READ):
                file.seek(8 + len(text) + starts[name])
                file.write(values(name, shape, rng).data)
        file.truncate(8 + len(text) + end)


def write_checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """config.json, the shards and their index."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.width,
        "intermediate_size": options.inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.width // 128),
        "num_key_value_heads": max(1, options.width // 128),
        "vocab_size": options.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), list(shapes(options))
    placed: dict[str, str] = {}
    for number in range(SHARDS):
        own = tensors[len(tensors) * number // SHARDS : len(tensors) * (number + 1) // SHARDS]
        shard = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        write_shard(folder / shard, own, rng)
        placed |= {name: shard for name, _ in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def step(folder: Path) -> None:
    """In a process of its own: measure, and print what was found, seconds without imports, and memory in GiB."""
    from realigner.explain.weights import weights_of

    started = time.perf_counter()
    found = weights_of(folder)
    seconds = time.perf_counter() - started
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    kept = {key.rstrip(":"): int(rest[0]) / 2**20 for key, *rest in lines if key.startswith(("Rss", "VmHWM"))}
    gain = np.abs(found["final_gain"].values)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "at_the_end_gib": kept,
                "smallest_gain_at": int(gain.argmin()),
                "smallest_gain": float(gain.min()),
                "median_gain": float(np.median(gain)),
                "smallest_reach_at": int(found["head_reach"].values.argmin()),
                "missing": sum(int(found[name].isnull().sum()) for name in found.data_vars),
            }
        )
    )


def measured(folder: Path) -> dict[str, object]:
    """What `step` says of itself."""
    done = subprocess.run([sys.executable, __file__, "--step", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in (("layers", 32), ("width", 4096), ("inner", 11008), ("vocabulary", 32000), ("repeats", 1)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step(options.step)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        needed = 2 * sum(int(np.prod(shape)) for name, shape in shapes(options) if any(part in name for part in READ))
        if shutil.disk_usage(folder).free < needed + 2**30:
            raise SystemExit(f"{folder}: {needed / 1e9:.1f} GB and 1 to spare are needed; give another place with --folder")
        write_checkpoint(folder, options)
        files = list(folder.glob("*.safetensors"))
        size, disk = sum(f.stat().st_size for f in files) / 1e9, sum(512 * f.stat().st_blocks for f in files) / 1e9
        results = [measured(folder) for _ in range(options.repeats)]
    print(f"{options.layers} layers, {options.width} wide: {size:.1f} GB of tensors in {SHARDS} shards, {disk:.1f} GB on disk")
    for result in results:
        print(json.dumps(result))
    peak = max(float(str(result["peak_gib"])) for result in results)
    found = all(result["smallest_gain_at"] == result["smallest_reach_at"] == INDEX % options.width for result in results)
    print(f"peak {peak:.2f} GiB, limit {LIMIT:.0f}: {'kept' if peak <= LIMIT else 'BROKEN'}; ", end="")
    print(f"the planted gain at {INDEX % options.width}: {'found' if found else 'NOT FOUND'}")
    document = {"shape": {key: getattr(options, key) for key in ("layers", "width", "inner", "vocabulary")}, "gb": size}
    write_text(HERE / "results" / "weights_only.json", json.dumps(document | {"runs": results}, indent=2) + "\n")
    if peak > LIMIT or not found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
