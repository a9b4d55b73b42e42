"""What ``generate --endpoint`` does: ask a server, print its replies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from realigner.cli import options as opt
from realigner.console import progress, show
from realigner.data.endpoint import Endpoint
from realigner.dialogues import Asked, Dialogue, all_replies, questions_in, readable, written
from realigner.errors import UsageError


def print_replies(
    asked: Sequence[Asked], url: str, model: str | None, system: str | None, as_json: bool, **settings: Any
) -> None:
    """Ask an OpenAI-compatible server and print what it replies.

    Args:
        asked: prompts and dialogues.
        url: the server's, such as ``http://127.0.0.1:8000/v1``.
        model: its name there.
        system: a system prompt.
        as_json: print one JSON document.
        settings: of `data.endpoint.Endpoint`.

    Raises:
        UsageError: without a model.
        RealignerError: when the server does not answer, or refuses a prompt.
    """
    if model is None:
        raise UsageError("--endpoint: name the model too (--model); a server lists its models at URL/models")
    server = Endpoint(url, model, **settings)
    with progress("answering", sum(map(questions_in, asked)), quiet=as_json) as task:
        replies = all_replies(asked, partial(server.answers, system=system, done=task.advance))
    pairs = list(zip(asked, replies, strict=True))
    if as_json:
        results = [
            {"prompt": written(prompt)} | opt.of_prompt(prompt, {"reply": said, "ended": [reply.ended for reply in said]})
            for prompt, said in pairs
        ]
        opt.print_json({"model": model, "results": results})
        return
    for prompt, said in pairs:
        questions = prompt.questions if isinstance(prompt, Dialogue) else (readable(prompt).replace("\n", "\n   "),)
        for question, reply in zip(questions, said, strict=True):
            show(f"Q: {question}\n   {opt.shown(reply)}\n")
    opt.say_cut((reply.ended for _, said in pairs for reply in said), settings["max_tokens"])
