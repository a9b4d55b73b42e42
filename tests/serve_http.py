"""Run by test_vllm_engine.py in the engine's environment: `vllm serve` with the plugin, asked by the official client.

python tests/serve_http.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(base: str, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """Status and JSON of a request."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    request = urllib.request.Request(base + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Start the server, ask, stop it."""
    import openai

    from realigner.serving.vllm_command import engine_command, irm_environment

    place = Path(job["place"])
    wanted = json.loads((place / "replies.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    environment = {**os.environ, **irm_environment({"anger": f"{place}/irms/anger"}, admin=True)}
    command = engine_command(wanted["host"], ["--served-model-name", "smollm2", "--host", "127.0.0.1"])
    command += ["--dtype", "float32", "--max-model-len", "256", "--block-size", "32", "--enforce-eager", "--api-key", "key"]
    with Path(job["log"]).open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
    found: dict[str, Any] = {}
    try:
        for _ in range(240):
            if server.poll() is not None:
                return {"failed": Path(job["log"]).read_text()[-3000:]}
            try:
                if ask(base, "/v1/models")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="key", max_retries=0)
        found["models"] = [model.id for model in client.models.list()]

        def text(model: str, **extra: Any) -> str:
            options: Any = {"max_tokens": 16, "temperature": 0, "extra_body": {"repetition_penalty": 1.1, **extra}}
            messages: Any = [{"role": "user", "content": job["question"]}]
            return str(client.chat.completions.create(model=model, messages=messages, **options).choices[0].message.content)

        found["replies"] = [text("smollm2" if not terms else f"smollm2+{terms}") for terms in job["terms"]]
        found["field"] = [text("smollm2", irms={"anger": 0.7}), text("smollm2", vllm_xargs={"irms": "anger@0.7"})]
        stream = client.chat.completions.create(
            model="smollm2+anger@0.7",
            messages=[{"role": "user", "content": job["question"]}],
            max_tokens=16,
            temperature=0,
            stream=True,
            extra_body={"repetition_penalty": 1.1},
        )
        found["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        replies = [r for r in wanted["replies"] if set(r["irms"]) <= {"anger"}]
        found["tokens"] = 0
        for reply in replies[:8]:
            asked = {"prompt": reply["prompt"], "max_tokens": len(reply["tokens"]), "temperature": 0, "ignore_eos": True}
            asked |= {"model": "smollm2", "irms": reply["irms"] or None, "return_token_ids": True}
            _, answer = ask(base, "/v1/completions", asked)
            found["tokens"] += answer["choices"][0]["token_ids"] == reply["tokens"]
        found["asked"] = len(replies[:8])
        bad: list[dict[str, Any]] = [
            {"model": "smollm2+joy"},
            {"model": "smollm2+anger@x"},
            {"model": "smollm2", "irms": "joy"},
            {"model": "smollm2", "vllm_xargs": {"irms": "joy"}},
            {"model": "smollm2", "vllm_xargs": {"irms": "anger@1e9"}},
            {"model": "other"},
        ]
        found["bad"] = [ask(base, "/v1/completions", {"prompt": "a", "max_tokens": 1, **request}) for request in bad]
        load = {"name": "sadness", "path": f"{place}/irms/sadness"}
        found["unloaded_asked"] = ask(base, "/v1/completions", {"prompt": "a", "model": "smollm2+sadness", "max_tokens": 1})[0]
        found["load"] = [
            ask(base, "/v1/irms", load),
            ask(base, "/v1/irms", load),
            ask(base, "/v1/irms", {"name": "joy", "path": f"{place}/nothing"}),
            ask(base, "/v1/irms", {"name": "joy", "path": job["stranger"]}),
            ask(base, "/v1/irms", {"name": "joy"}),
        ]
        found["loaded_models"] = [model.id for model in client.models.list()]
        found["sadness"] = text("smollm2+anger@0.7+sadness@-0.8")
        found["unload"] = [ask(base, f"/v1/irms/{name}", method="DELETE") for name in ("sadness", "sadness")]
        found["after"] = text("smollm2")
        metrics = urllib.request.Request(f"{base}/metrics")
        with urllib.request.urlopen(metrics, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found["hits"] = sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            found["exit"] = server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
