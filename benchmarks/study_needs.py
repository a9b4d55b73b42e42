"""What the study (`study.py`) takes on a host: memory, disk and operations, from its config alone.

    python benchmarks/study_needs.py [--host HOST]

Without --host: of Llama-2-7B's config, into docs/results/llama-2.md between its marks. Memory and disk are the guards'
(`training.preflight`); operations are counted: a token takes 2 for each weight forward, as many backward through the host's
activations, and twice as many for the IRM's own weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from study import ARMS, FULL, MORE_SEEDS, SEEDS, layer_sets
from transformers import AutoConfig

from realigner.data import TONES
from realigner.files import write_text
from realigner.hosts import load_config
from realigner.training import Recipe, make_recipe
from realigner.training.preflight import Memory, estimate_memory

DOCS = Path(__file__).resolve().parent.parent / "docs" / "results" / "llama-2.md"
BEGIN, END = "<!-- needs: written by benchmarks/study_needs.py -->", "<!-- end of needs -->"
PER_SECOND = 1e14  # operations a GPU is taken to do: a third of what an A100 is sold for in bfloat16
PAPER_ROWS = 60_000  # of each tone
_RULE = "| --- | --- | --- | --- | --- |"


def llama_2_7b() -> Any:
    """The config of Llama-2-7B: transformers' default for a Llama."""
    return AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"])


def needs(config: Any) -> str:
    """The tables, as Markdown."""
    sets = layer_sets(int(config.get_text_config(decoder=True).num_hidden_layers))
    sizes = ["| arm | parameters of an IRM | memory | host; IRM, Adam; activations | operations a step |", _RULE]
    totals = ["| arm | trained runs | steps of each | GPU hours | all IRMs on disk |", _RULE]
    lessons = {name: (arm.recipe, FULL.keys(arm), FULL.rows) for name, arm in ARMS.items()}
    for name, (source, keys, rows) in (lessons | {"paper, its own size": ("paper", {}, PAPER_ROWS)}).items():
        recipe = make_recipe(source, dtype="bfloat16", device="cpu", **keys)
        per_epoch = math.ceil((1 - recipe.validation - recipe.test) * rows / recipe.batch_size)
        steps = recipe.steps or round((recipe.epochs or 0) * per_epoch)
        more = len(MORE_SEEDS) if name in ARMS and ARMS[name].more_seeds else 0
        each = [_memory(config, recipe.changed(layers=layers)) for layers in sets]
        trained = [memory for memory in each for _ in range(len(SEEDS) * len(TONES))] + [each[0]] * more
        twins = [memory for memory in each for _ in SEEDS]
        hours = sum(_operations(memory, recipe) for memory in trained) * steps / PER_SECOND / 3600
        disk = _gib(sum(4 * memory.irm_parameters for memory in trained + twins))
        whole = each[0]
        parts = "; ".join(map(_gib, (whole.host, whole.irm, whole.activations)))
        if name in ARMS:
            operations = _operations(whole, recipe)
            sizes.append(f"| {name} | {whole.irm_parameters:,} | {_gib(whole.total)} | {parts} | {operations:.1e} |")
        totals.append(f"| {name} | {len(trained)} | {steps:,} | {hours:,.1f} | {disk} |")
    return "\n".join([*sizes, "", *totals])


def _memory(config: Any, recipe: Recipe) -> Memory:
    return estimate_memory(config, recipe, longest=recipe.max_length, targets=recipe.max_length)


def _operations(memory: Memory, recipe: Recipe) -> float:
    """Of a step."""
    return recipe.batch_size * recipe.max_length * (4.0 * memory.host_parameters + 6.0 * memory.irm_parameters)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="a hub id or a folder")
    host = parser.parse_args().host
    table = needs(llama_2_7b() if host is None else load_config(host))
    print(table)
    if host is None:
        before, rest = DOCS.read_text().split(BEGIN)
        write_text(DOCS, "\n\n".join([before + BEGIN, table, END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
