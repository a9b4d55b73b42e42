"""What the study (`study.py`) takes on a host: memory, disk and operations, from its config alone.

    python benchmarks/study_needs.py [--host HOST]

Without --host: of Llama-2-7B's config, into docs/results/llama-2.md between its marks. Memory and disk are the guards'
(`training.preflight`); operations are counted: a token takes 2 for each weight forward, as many backward through the host's
activations, and twice as many for the IRM's own weights.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import ARMS, FULL, MORE_SEEDS, SEEDS, layer_sets
from transformers import AutoConfig

from realigner.data import TONES
from realigner.explain.trials import FULL as TRIALS
from realigner.files import write_text
from realigner.hosts import load_config
from realigner.training import Recipe, make_recipe
from realigner.training.preflight import Memory, estimate_memory

DOCS = Path(__file__).resolve().parent.parent / "docs" / "results" / "llama-2.md"
BEGIN, END = "<!-- needs: written by benchmarks/study_needs.py -->", "<!-- end of needs -->"
PER_SECOND = 1e14  # operations a GPU is taken to do: about a third of an A100's peak in bfloat16
PAPER_ROWS = 60_000  # of each tone
_RULE = "| --- | --- | --- | --- | --- |"


def llama_2_7b() -> Any:
    """The config of Llama-2-7B: transformers' default for a Llama."""
    return AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"])


def needs(config: Any) -> str:
    """The tables, as Markdown."""
    sets = layer_sets(int(config.get_text_config(decoder=True).num_hidden_layers))
    sizes = ["| arm | parameters of an IRM | memory | host; IRM, Adam; activations | operations a step |", _RULE]
    totals: list[_Total] = []
    lessons = {name: (arm.recipe, FULL.keys(arm), FULL.rows) for name, arm in ARMS.items()}
    for name, (source, keys, rows) in (lessons | {"paper, its own size": ("paper", {}, PAPER_ROWS)}).items():
        recipe = make_recipe(source, dtype="bfloat16", device="cpu", **keys)
        per_epoch = math.ceil((1 - recipe.validation - recipe.test) * rows / recipe.batch_size)
        steps = recipe.steps or round((recipe.epochs or 0) * per_epoch)
        whole, *parts = (_memory(config, recipe.changed(layers=layers)) for layers in sets)
        if name in ARMS and ARMS[name].changed:
            cells, more = [whole], 0
        else:
            cells, more = [whole, *parts], len(MORE_SEEDS) * (name in ARMS)
        trained = cells * len(SEEDS) * len(TONES) + [whole] * more
        totals.append(_Total.of(name, recipe, steps, trained, cells * len(SEEDS)))
        if name in ARMS:
            memory = "; ".join(map(_gib, (whole.host, whole.irm, whole.activations)))
            operations = f"{_operations(whole, recipe):.1e}"
            sizes.append(f"| {name} | {whole.irm_parameters:,} | {_gib(whole.total)} | {memory} | {operations} |")
        if name == "paper":
            explained = _Total.of("explain, at most", recipe, steps, [whole] * sum(TRIALS.values()), [])
    *study, own_size = totals
    study.append(explained)
    together = f"| together | | | {sum(own.hours for own in study):,.1f} | {_gib(sum(own.disk for own in study))} |"
    header = ["| arm | trained runs | steps of each | GPU hours | all IRMs on disk |", _RULE]
    return "\n".join([*sizes, "", *header, *map(str, study), together, str(own_size)])


@dataclass(frozen=True)
class _Total:
    """What all runs of an arm take: GPU hours, and bytes on disk."""

    name: str
    runs: int
    steps: int
    hours: float
    disk: float

    @classmethod
    def of(cls, name: str, recipe: Recipe, steps: int, trained: list[Memory], twins: list[Memory]) -> _Total:
        operations = steps * sum(_operations(memory, recipe) for memory in trained)
        disk = sum(4.0 * memory.irm_parameters for memory in trained + twins)
        return cls(name, len(trained), steps, operations / PER_SECOND / 3600, disk)

    def __str__(self) -> str:
        return f"| {self.name} | {self.runs} | {self.steps:,} | {self.hours:,.1f} | {_gib(self.disk)} |"


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
