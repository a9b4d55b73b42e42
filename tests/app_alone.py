"""Run by test_wheel.py in an environment that holds the built wheel with ``[app]``, and nothing of the repository.

A ready-made IRM answers; the app's replies are those, with the map; the command serves the page, and ends on Ctrl-C.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import realigner as ra
from realigner.app.exchange import Asked
from realigner.app.map_page import map_page
from realigner.app.runtime_talker import RuntimeTalker

QUESTION = "How many legs does a spider have?"
COMMAND = Path(sys.executable).with_name("realigner")


def check_replies() -> None:
    runtime, acting = ra.load("anger", dtype="float32", device="cpu"), {"anger": 0.8}
    talker = RuntimeTalker(runtime)
    exchange = talker.begin(Asked(QUESTION, strengths=acting, max_new_tokens=12))
    replies = exchange.wait()
    assert replies["base"] == runtime.answer(QUESTION, strength=0, max_new_tokens=12), replies
    assert replies["realigned"] == runtime.answer(QUESTION, strength=acting, max_new_tokens=12) != replies["base"], replies
    assert exchange.live is not None
    assert exchange.live.trace is not None
    assert "canvas" in map_page(talker.layers, talker.neurons)
    print(replies)


def check_page() -> None:
    process = subprocess.Popen([str(COMMAND), "app", "--irm", "anger", "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Open http://127.0.0.1:"), line
        with urllib.request.urlopen(line.split()[1], timeout=60) as reply:
            page = reply.read().decode()
        assert "realigner" in page
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


if __name__ == "__main__":
    check_replies()
    check_page()
    print("the app works alone")
