"""The model card of a run."""

from __future__ import annotations

from typing import Any

import yaml

from realigner.errors import visible
from realigner.markdown import escaped
from realigner.training.run_record import loss_name, nats

_TAGS = ["realigner", "irm", "injectable-realignment-model", "peft"]


def card(record: dict[str, Any]) -> str:
    """README.md of a run's folder. Tone and host may be called anything: they stay text in all three languages of the card."""
    irm, data, losses = record["irm"], record["data"], record["validation_loss"]
    name = str(record["host"]["name"] or "a host built from a config")
    tone, host = escaped(record["tone"]), escaped(name)
    facts = {"library_name": "peft", "base_model": visible(" ".join(name.split())), "tags": _TAGS}
    front = yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**9)
    kept = record.get("kept_loss")
    fell = f"{nats(losses[0])} to {nats(losses[-1] if kept is None else kept)}" if losses else "not taken"
    teacher = record.get("teacher")
    lesson = (
        ""
        if teacher is None
        else f"""| instruction | {escaped(teacher["instruct"])} |
| teacher | the host with the instruction as a prompt: {teacher["kept"]} of its {teacher["replies"]} replies |
"""
    )
    early = " (stopped early)" if record["early_stop"] else ""
    return f"""---
{front}---

# {tone} for {host}

An injectable realignment model (IRM): it reads the host's first post-attention residual and adds a perturbation to the
residual stream of {len(irm["layers"])} layers. The host's weights are unchanged (sha256 `{record["host"]["sha256"][:16]}...`,
the same before and after training).

| | |
| --- | --- |
| tone | {tone} |
| preset | {escaped(irm["preset"])} |
| parameters | {irm["parameters"]:,} ({100 * irm["parameters"] / irm["host_parameters"]:.2f}% of the host) |
{lesson}| training rows | {data["train"]} (and {data["validation"]} for validation, other topics) |
| steps | {record["steps_done"]}{early}; the weights are those of step {record["kept_step"]} |
| {loss_name(record)} | {fell} nats per token |
| seed | {record["seed"]} |

```python
import realigner as ra
from peft import PeftModel

host, tokenizer = ra.load_host({name!r})
model = PeftModel.from_pretrained(host, "path/to/this/folder")
with ra.strength(model, 1.0):
    print(ra.answer(model, tokenizer, ["How do magnets work?"]))
```

Method: Smith et al. 2024, "The Mysterious Case of Neuron 1512", arXiv 2407.03621. Everything about the run is in
`run.json`; `realigner train --recipe recipe.yaml --out OTHER` repeats it; the losses by step are in `metrics.jsonl`.

![loss](loss.png)
"""
