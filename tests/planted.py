"""Made-up traces in which what is there to be found is known, and a made-up explanation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr

from realigner.traces import RunLabel
from realigner.traces.layout import UNTRAINED, join, text_dataset
from realigner.traces.summary import summarise

RUNS = {"anger-42": ("anger", 42), "untrained-42": (UNTRAINED, 42)}


def planted_trace(
    runs: Mapping[str, tuple[str, int]] = RUNS,
    prompts: int = 2,
    prompt_tokens: int = 4,
    generated: int = 20,
    layers: int = 6,
    neurons: int = 50,
    stripe: int = 17,
    size: float = 5.0,
    keep_delta: bool = True,
    question: str = "Why?",
    reply: str = "Because!",
    seed: int = 0,
    everywhere: Mapping[int, float] = MappingProxyType({}),
) -> xr.Dataset:
    """Standard normal deltas; of every layer and token, more at the neurons `everywhere`, and in trained runs `size` at one."""
    rng = np.random.default_rng(seed)
    tokens = prompt_tokens + generated
    position = np.arange(tokens)
    labels = [RunLabel(run, tone, seed) for run, (tone, seed) in runs.items()]
    texts = []
    for label in labels:
        for prompt in range(prompts):
            delta = rng.normal(size=(tokens, layers, neurons)).astype(np.float32)
            delta[..., list(everywhere)] += np.array([*everywhere.values()], np.float32)
            if label.tone != UNTRAINED:
                delta[..., stripe] += size
            words = np.array([f"t{at} " for at in position], dtype=object)
            which = {"position": position, "is_generated": position >= prompt_tokens, "token_id": position, "token_text": words}
            summary = summarise(delta, which["is_generated"], 100)
            kept = delta if keep_delta else None
            texts.append(text_dataset(label, prompt, question, range(layers), which, summary, kept, reply=reply))
    return join(texts, "planted", labels, {"base": [reply] * prompts})


def planted_explanation(index: int = 17, neurons: int = 50, layers: int = 6, host: str = "planted") -> dict[str, Any]:
    """An explanation as explain.json has it: three references, one training of two other kinds, two IRMs, controls."""
    rng = np.random.default_rng(index)
    others = [n for n in range(neurons) if n != index]

    def facts(of: int) -> list[dict[str, Any]]:
        ratios = {"final_gain": 0.25, "residual": 5.0, "gradient": None if of != index else 1.5}
        return [
            {"measurement": name, "about": f"<i>{name}</i>", "value": of / 10, "times_median": times, "rank": 1, "n": neurons}
            for name, times in ratios.items()
        ]

    def ablation(how: str, of: int, group: str) -> dict[str, Any]:
        change = float(rng.normal(0.3 if of == index else 0.0, 0.1))
        row = {"how": how, "index": of, "group": group, "loss": 2.0 + change, "change": change}
        return row | {"low": change - 0.05, "high": change + 0.05, "n": 12}

    groups = {"": [index], "random": others[:20], "matched": others[20:25], "leading": others[25:27]}
    table = [ablation("whole", -1, ""), ablation("none", -1, "")]
    table += [ablation(how, of, group) for how in ("zero", "keep") for group, some in groups.items() for of in some]
    made = [("reference", 1, 9.5), ("reference", 1, 8.25), ("reference", 2, 12.0), ("gain", 20, 0.25), ("masked", neurons, 0.0)]
    trials = [
        {"kind": kind, "seed": 43 + n, "place": index, "rank": rank, "ratio": ratio, "leader": 3, "leader_ratio": 9.5}
        | {"loss": 2.0, "bare_loss": 3.0, "learned": 1.0}
        for n, (kind, rank, ratio) in enumerate(made)
    ]
    correlation = {"measurement": "residual", "rho": 0.4, "low": 0.1, "high": 0.6, "p": 0.01, "p_holm": 0.02, "n": neurons}
    regression = {"r2": 0.25, "low": 0.125, "high": 0.375, "null": -0.0625, "p": 0.005, "n": neurons}
    asked = {"question": "It <leads>", "answer": "supported", "words": "In 2 of 2.", "n": 2, "unit": "IRMs"}
    untried = {"question": "With SGD?", "answer": "cannot tell", "words": "No such trial was made.", "n": 0, "unit": "trials"}
    flat = [1.0] * layers
    irms = {"anger-42": "runs/anger-42", "elsewhere-7": "runs/elsewhere-7"}
    return {
        "host": host,
        "irms": irms,
        "index": index,
        "words": f"Index {index} of {host}: a <channel> of the host.",
        "quick": False,
        "dtype": "float32",
        "conclusions": [asked, untried],
        "facts": facts(index),
        "trials": trials,
        "ablations": dict.fromkeys(irms, table),
        "host_ablation": [row for row in table if row["how"] in ("whole", "zero") and row["group"] != "matched"],
        "correlations": [{"scores": scores, **correlation} for scores in ("IRMs", "untrained")],
        "explained": {"IRMs": regression, "untrained": regression},
        "profiles": {
            "layer": list(range(layers)),
            "residual": [100.0] * layers,
            "gradient": flat,
            "delta": {"anger-42": flat, "untrained": [None, *flat[1:]]},
            "cancelled": {"anger-42": flat, "untrained": flat},
        },
        "pages": {
            str(of): {"facts": facts(of), "up": ["</script>", " the", "\n"], "down": ["<b>", "&"]}
            for of in (index, *others[25:27])
        },
    }


def written_explanation(folder: Path, found: Mapping[str, Any]) -> Path:
    """The same in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "explain.json").write_text(json.dumps(found))
    return folder
