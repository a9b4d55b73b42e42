"""What weights alone say of an index, in words and figures: ``realigner explain --weights-only``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from realigner.analysis.tables import records
from realigner.explain.predict import weight_table
from realigner.explain.verdict import index_facts, oddness, refuse_index
from realigner.explain.weights import weights_of


def weights_report(host: PreTrainedModel | str | Path, index: int | None = None, count: int = 5) -> dict[str, Any]:
    """What weights alone say of an index, or of those that are furthest out of the ordinary; a checkpoint is never loaded.

    Args:
        host: in memory, or a folder with config.json and safetensors.
        index: None: the `count` indices whose reach (head's column times gain) is furthest from the median, in ratio.

    Returns:
        ``host, model_type, norm, tied, neurons, layers``, and ``indices``: each with ``index``, ``words`` and ``facts``.

    Raises:
        RealignerError: naming the file or tensor that is missing or damaged.
        UsageError: for an index that the host does not have.
    """
    weights = weights_of(host)
    table, width = weight_table(weights), weights.sizes["neuron"]
    refuse_index(index, width)
    looked = next(table[name] for name in ("head_reach", "final_gain", "head_norm", "embedding_norm") if name in table)
    size = looked.to_numpy(dtype=float)
    apart = np.abs(np.log(np.maximum(size, 1e-30) / np.median(size)))
    chosen = [index] if index is not None else np.argsort(-apart, kind="stable")[:count].tolist()
    entries = []
    for number in chosen:
        facts = index_facts(table, number)
        odd = facts[facts["times_median"].map(oddness) != 0]
        told = [f"{about} {times:.2g} times the median" for about, times in zip(odd["about"], odd["times_median"], strict=True)]
        words = "; ".join(told) or "nothing out of the ordinary"
        entries.append({"index": number, "words": words, "facts": records(facts)})
    facts_of = {key: weights.attrs[key] for key in ("host", "model_type", "norm", "tied")}
    return {**facts_of, "neurons": width, "layers": weights.sizes["layer"], "indices": entries}
