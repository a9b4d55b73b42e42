"""The command that opens a page to play with: app."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Optional

from typer import Option

from realigner.cli import options as opt
from realigner.cli.serve_commands import named
from realigner.console import say, show
from realigner.errors import UsageError

_AUTH_ENV = "REALIGNER_AUTH"
_CONTEXT = 2048  # tokens


def app(
    irm: Annotated[
        Optional[list[str]],
        Option(
            "--irm",
            metavar="NAME=DIR",
            help="An IRM (a folder or a ready-made one's name), and its name; may be repeated.",
            show_default="all ready-made ones",
        ),
    ] = None,
    host: opt.HostOfIrm = None,
    explanation: Annotated[
        Optional[list[Path]],
        Option(metavar="DIR", help="Folder that realigner explain wrote for this host; may be repeated.", show_default=False),
    ] = None,
    endpoint: Annotated[
        Optional[str],
        Option(metavar="URL", help="Ask a server with OpenAI's API in place of a host loaded here.", show_default=False),
    ] = None,
    model: Annotated[
        Optional[str], Option(help="The host's name at the endpoint.", show_default="the one that it lists")
    ] = None,
    address: Annotated[str, Option(help="Address to listen on; any but this machine's own needs --auth.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 for a free one.", min=0, max=65535)] = 7860,
    auth: Annotated[
        Optional[str],
        Option(metavar="USER:PASSWORD", help=f"Require a login; or set {_AUTH_ENV}.", show_default=False),
    ] = None,
    max_prompt: Annotated[int, Option(help="Maximum characters per message.", min=1)] = 2000,
    max_tokens: Annotated[int, Option(help="Maximum tokens per reply.", min=1)] = 256,
    max_context: Annotated[int, Option(help="Maximum tokens per conversation.", min=1)] = _CONTEXT,
    max_users: Annotated[int, Option(help="Maximum replies generated at the same time.", min=1)] = 2,
    max_waiting: Annotated[int, Option(help="Maximum users waiting for a reply; others are told to try later.", min=1)] = 16,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
) -> None:
    """Open a page to chat with base and realigned side by side, move the strengths, and see what the IRMs add."""
    login = _login(auth or os.environ.get(_AUTH_ENV) or None)
    given: dict[str, Any] = {"host": host, "explanation": explanation, "trust_remote_code": trust_remote_code}
    given |= {"dtype": dtype != "auto", "device": device != "auto", "max_context": max_context != _CONTEXT}
    if endpoint is None and model is not None:
        raise UsageError("--model: names a model at an endpoint; give --endpoint too, or leave out --model")
    if endpoint is not None and (flag := next((name for name, value in given.items() if value), None)):
        raise UsageError(f"--{flag.replace('_', '-')}: is for a host loaded here; with --endpoint, name the host by --model")
    from realigner.app.chat_page import Listening, app_running, free_port
    from realigner.app.exchange import Limits, Talker

    listening = Listening(address, free_port(address, port), login, max_users, max_waiting)
    limits = Limits(max_prompt, max_tokens, max_context)
    explained = []
    talker: Talker
    if endpoint is not None:
        from realigner.app.endpoint_talker import EndpointTalker

        talker = EndpointTalker(endpoint, model, irm or [], limits)
    else:
        from realigner.app.runtime_talker import RuntimeTalker
        from realigner.explain.explanation import read_explanation
        from realigner.irm_sources import find_irm, ready_made
        from realigner.runtime import adapter_name, load

        irms = named(irm or []) or ready_made()
        if not irms:
            raise UsageError("app: no IRM is given and none is ready-made; give one (--irm DIR), or make one (realigner demo)")
        explained = [read_explanation(folder) for folder in explanation or []]
        say("realigner app: loading")
        folders = {adapter_name(name): find_irm(source) for name, source in irms.items()}
        if len(folders) < len(irms):
            raise UsageError(f"--irm: {', '.join(irms)} are too much alike; name them apart (NAME=DIR)")
        runtime = load(folders, host, dtype, device, trust_remote_code)
        talker = RuntimeTalker(runtime, limits, folders=folders)
    with app_running(talker, listening, explained) as url:
        show(f"Open {url}  (Ctrl-C ends it)")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("realigner app: closed")


def _login(given: str | None) -> tuple[str, str] | None:
    """The user and the password of ``--auth``; what they are stays out of the message."""
    if given is None:
        return None
    user, colon, password = given.partition(":")
    if not (user and colon and password):
        raise UsageError("--auth: give a user and a password, USER:PASSWORD")
    return user, password
