"""`realigner serve` in a process of its own on 127.0.0.1, for tests, and what may be asked of it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

START = 120.0  # seconds in which a server has to answer


class Server:
    """A server that is up."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self.port = int(url.rsplit(":", 1)[1].partition("/")[0])

    def client(self, key: str = "none", **options: Any) -> Any:
        """The official client (Any: its types want literals)."""
        return openai.OpenAI(base_url=self.url, api_key=key, **{"max_retries": 0, "timeout": 60, **options})

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, Any]:
        """Status and body (parsed, where it is JSON); a body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text
        finally:
            connection.close()

    def chat(self, model: str, question: str = "Why?", **fields: Any) -> tuple[int, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 8, **fields}
        return self.request("POST", "/v1/chat/completions", body)

    def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        _, text = self.request("GET", "/metrics")
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        assert values, name
        return sum(map(float, values))

    def is_idle(self) -> bool:
        return self.metric("realigner_requests_running") == 0 and self.metric("realigner_requests_in_batch") == 0

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)


def eventually(fact: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not (true := fact()) and time.monotonic() < end:
        time.sleep(0.05)
    return true


def begin(irms: Mapping[str, Path], log: Path, *options: str) -> subprocess.Popen[str]:
    """Start a server; it is not up yet."""
    named = [part for name, folder in irms.items() for part in ("--irm", f"{name}={folder}")]
    command = [sys.executable, "-m", "realigner", "serve", *named, "--port", "0", "--dtype", "float32", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


@contextmanager
def serving(irms: Mapping[str, Path], log: Path, *options: str) -> Iterator[Server]:
    """A server that is up, and is ended with the block."""
    process = begin(irms, log, *options)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # a server that fails ends, and so the line
        found = re.search(r" at (http\S+)", line)
        assert found, log.read_text()
        yield Server(process, found[1], log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
        if process.stdout is not None:
            process.stdout.close()
