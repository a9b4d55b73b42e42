"""Measurements of an index from a host's weights alone, which are never loaded: ``realigner explain --weights-only``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from realigner.explain.predict import weight_table
from realigner.explain.verdict import check_index, index_facts, outlier_sign
from realigner.explain.weights import weights_of
from realigner.files import Artifact, read_object, taken

WEIGHTS_FILE = "weights.json"


def weights_report(host: PreTrainedModel | str | Path, index: int | None = None, count: int = 5) -> dict[str, Any]:
    """Measure an index, or the strongest outliers, from weights alone; a checkpoint is never loaded.

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
    check_index(index, width)
    looked = next(table[name] for name in ("head_reach", "final_gain", "head_norm", "embedding_norm") if name in table)
    size = looked.to_numpy(dtype=float)
    apart = np.abs(np.log(np.maximum(size, 1e-30) / np.median(size)))
    chosen = [index] if index is not None else np.argsort(-apart, kind="stable")[:count].tolist()
    entries = []
    for number in chosen:
        facts = index_facts(table, number)
        outliers = [f"{f.about} {f.times_median:.2g} times the median" for f in facts if outlier_sign(f.times_median)]
        words = "; ".join(outliers) or "no outlier"
        entries.append({"index": number, "words": words, "facts": [fact.model_dump(mode="json") for fact in facts]})
    facts_of = {key: weights.attrs[key] for key in ("host", "model_type", "norm", "tied")}
    return {**facts_of, "neurons": width, "layers": weights.sizes["layer"], "indices": entries}


def save_weights_report(found: dict[str, Any], out: str | Path, force: bool = False) -> Path:
    """Write what `weights_report` found to ``weights.json`` in a folder, in place of an older one only with `force`.

    Raises:
        RealignerError: when one is there, or it cannot be written.
    """
    path = Path(out) / WEIGHTS_FILE
    with taken(path, WEIGHTS, force) as place:
        place.write(json.dumps(found, indent=2) + "\n")
    return path


def _is_report(path: Path) -> None:
    read_object(path)["indices"][0]["facts"]


WEIGHTS = Artifact("measurements of a host's weights", _is_report)
