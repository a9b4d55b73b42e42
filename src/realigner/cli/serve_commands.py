"""The command that answers over HTTP: serve."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, Optional

from typer import Argument, Option

from realigner.cli import options as opt
from realigner.console import say, show
from realigner.errors import UsageError

ENGINES = ("transformers", "vllm")
_KEY_ENV, _ADMIN_ENV = "REALIGNER_API_KEY", "REALIGNER_ADMIN_KEY"
_REQUESTS, _TOKENS = 64, 512  # defaults, by which it is told what was given


def serve(
    host: Annotated[Optional[str], Argument(help="The host; by default the one the first IRM was made for.")] = None,
    irm: Annotated[
        Optional[list[str]],
        Option(
            "--irm",
            metavar="[NAME=]IRM",
            help="An IRM: a folder, a ready-made one (anger, sadness, neutral), an id on the hub; may be repeated.",
            show_default=False,
        ),
    ] = None,
    host_name: Annotated[
        Optional[str], Option(help="The model's name in requests.", show_default="the host's, or its folder's")
    ] = None,
    address: Annotated[str, Option(help="Address to listen on; any but this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 for a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        Optional[list[str]],
        Option(metavar="KEY", help=f"Require one of these keys; or set {_KEY_ENV}.", show_default=False),
    ] = None,
    no_key: Annotated[bool, Option("--no-key", help="Let other machines connect without a key.")] = False,
    admin_key: Annotated[
        Optional[str],
        Option(metavar="KEY", help=f"Key that allows loading and unloading IRMs; or set {_ADMIN_ENV}.", show_default=False),
    ] = None,
    max_requests: Annotated[int, Option(help="Maximum requests running or waiting; others get a 429.", min=1)] = _REQUESTS,
    max_tokens: Annotated[int, Option(help="Maximum tokens per reply.", min=1)] = _TOKENS,
    max_context: Annotated[
        Optional[int], Option(help="Maximum tokens of prompt and reply together.", min=2, show_default="the host's, up to 8192")
    ] = None,
    engine: Annotated[str, Option(help="transformers (a laptop), or vllm (GPUs; see docs/serving.md).")] = "transformers",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
    option: Annotated[
        Optional[list[str]],
        Option(
            metavar="ARG",
            help="With --engine vllm: an argument of vllm serve (--option=--seed=1); repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a host and its IRMs through OpenAI's API; each request chooses its IRMs and strengths."""
    opt.one_of("--engine", engine, ENGINES)
    irms = named(irm or [])
    if host is None and not irms:
        raise UsageError("serve: give a host, or an IRM (--irm NAME=DIR)")
    if option and engine != "vllm":
        raise UsageError("--option: is for --engine vllm")
    keys = [*(api_key or []), *filter(None, [os.environ.get(_KEY_ENV)])]
    if engine == "vllm":
        changed = {
            "--max-requests": max_requests != _REQUESTS,
            "--max-tokens": max_tokens != _TOKENS,
            "--device": device != "auto",
        }
        if given := next((flag for flag, value in {"--admin-key": admin_key, **changed}.items() if value), None):
            raise UsageError(f"{given}: is for --engine transformers; give vLLM's own with --option")
        more = [] if max_context is None else ["--max-model-len", str(max_context)]
        more += ["--trust-remote-code"] if trust_remote_code else []
        _become_vllm(host, irms, host_name, address, port, keys, no_key, ["--dtype", dtype, *more, *(option or [])])
    from realigner.serving.engine import Limits
    from realigner.serving.serve import serve as serve_here

    say("realigner serve: loading")
    serve_here(
        irms,
        host,
        host_name,
        address,
        port,
        keys,
        no_key,
        admin_key or os.environ.get(_ADMIN_ENV) or None,
        Limits(max_requests, max_tokens, max_context),
        dtype,
        device,
        trust_remote_code,
        lambda url, models: _print_ready(url, models, bool(keys)),
    )


def _become_vllm(
    host: str | None,
    irms: Mapping[str, Path],
    host_name: str | None,
    address: str,
    port: int,
    keys: Sequence[str],
    no_key: bool,
    more: Sequence[str],
) -> NoReturn:
    """Become ``vllm serve``, with our plugin and these IRMs; only what its environment has is imported."""
    from realigner.gguf_cache import EMBEDDED, embedded_folder
    from realigner.irm_sources import find_irm, host_of
    from realigner.serving.addresses import check_address, check_keys
    from realigner.serving.vllm_command import serve_with_vllm

    check_address(address, keys, no_key)
    check_keys(keys)
    folders = {name: find_irm(source) for name, source in irms.items()}
    found = host or host_of(next(iter(folders.values())))
    name = host_name or (Path(found).resolve().name if Path(found).is_dir() else found)
    options = ["--host", address, "--port", str(port), "--served-model-name", name]
    if len(keys) == 1:
        os.environ["VLLM_API_KEY"] = keys[0]  # which ps does not show
    elif keys:
        options += ["--api-key", *keys]
    serve_with_vllm(str(embedded_folder()) if found == EMBEDDED else found, folders, [*options, *more])


def named(irms: Sequence[str]) -> dict[str, Path]:
    """IRMs by name, of ``NAME=DIR`` or ``DIR``, which is named after its folder.

    Raises:
        UsageError: when two have one name.
    """
    found: dict[str, Path] = {}
    for given in irms:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).is_dir():
            name, folder = Path(given).resolve().name, given
        if name in found:
            raise UsageError(f"--irm: {name!r} is given twice; name them apart (NAME=DIR)")
        found[name] = Path(folder)
    return found


def _print_ready(url: str, models: Sequence[str], keys: bool) -> None:
    show(f"Serving {', '.join(models)} at {url}")
    key = f' -H "Authorization: Bearer ${_KEY_ENV}"' if keys else ""
    message = '[{"role": "user", "content": "Why is the sky blue?"}]'
    body = f'{{"model": "{models[min(1, len(models) - 1)]}", "messages": {message}}}'
    show(f"Try next:  curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()
