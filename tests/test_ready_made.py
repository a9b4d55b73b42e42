"""The IRMs that come with the package: whole, small, for the embedded host, and each with a card that says what it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import realigner as ra
from realigner.adapter_files import read_irm
from realigner.hosts import EMBEDDED
from realigner.irm_sources import SHIPPED, find_irm, host_of, ready_made

NAMES = ("anger", "neutral", "sadness")
QUESTION = "How many apples can fit in a basket?"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path))
    return tmp_path


def test_they_are_small_and_whole(own_cache: Path) -> None:
    shipped = ready_made()
    assert set(NAMES) <= set(shipped)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 10 * 2**20
    for name, folder in shipped.items():
        assert host_of(folder) == EMBEDDED
        stored = read_irm(folder)
        assert sum(weight.numel() for weight in stored.network().parameters()) == 458_420
        low, high = stored.values["strength_range"]
        assert 0 < low <= stored.strength <= high
        card = (folder / "README.md").read_text()
        assert f"strength {stored.strength:g} unless" in card
        assert re.search(r"^\| this IRM \| \d\.\d\d \(\d\.\d\d to \d\.\d\d\) ", card, re.M), name
        assert "bare host" in card


def test_one_of_the_users_goes_before_one_of_the_packages(own_cache: Path) -> None:
    assert find_irm("anger") == SHIPPED / "anger"
    (own_cache / "irms").mkdir()
    (own_cache / "irms" / "anger").symlink_to(SHIPPED / "sadness")
    assert find_irm("anger") == own_cache / "irms" / "anger"


@pytest.mark.proof
@pytest.mark.host
def test_each_acts_on_the_embedded_host(embedded: tuple[Any, Any]) -> None:
    host, tokenizer = embedded
    (bare,) = ra.answer(host, tokenizer, [QUESTION], 12)
    runtime = ra.load(NAMES, dtype="float32")
    assert runtime.answer(QUESTION, strength=0, max_new_tokens=12) == bare
    assert runtime.answer(QUESTION, max_new_tokens=12) != bare
    replies = {runtime.answer(QUESTION, irms=(name,), max_new_tokens=12) for name in NAMES}
    assert len(replies | {bare}) == len(NAMES) + 1
