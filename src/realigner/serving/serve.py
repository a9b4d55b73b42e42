"""``realigner serve``: a host and its IRMs behind OpenAI's API, on this machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from realigner.console import say, signals_to
from realigner.errors import RealignerError
from realigner.gguf_cache import quiet_transformers
from realigner.hosts import EMBEDDED, host_name, load_host
from realigner.irm_config import check_adapter
from realigner.irm_sources import find_irm
from realigner.runtime import load_host_of
from realigner.serving.addresses import check_address, check_keys
from realigner.serving.engine import Engine, Limits
from realigner.serving.keys_and_limits import PatientProtocol
from realigner.serving.loaded_irms import LoadedIRMs
from realigner.serving.metrics import Metrics
from realigner.serving.mixes import check_name
from realigner.serving.routes import application

_CONNECTIONS = 1000  # at once


def serve(
    irms: Mapping[str, Path],
    host: str | None = None,
    host_name_served: str | None = None,
    address: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    no_key: bool = False,
    admin_key: str | None = None,
    limits: Limits | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    ready: Any = None,
) -> None:
    """Serve a host with IRMs until SIGTERM or Ctrl-C; then finish the replies that are under way. A second one ends at once.

    Args:
        irms: name -> folder, a ready-made IRM's name, or a hub id.
        host: by default the one that the first IRM was made for; without IRMs, the embedded one.
        host_name_served: the model's name; by default the host's, of a folder its last part.
        address, port: where; port 0 for a free one.
        keys: one of them must come with each request.
        no_key: serve others than this machine without keys.
        admin_key: with which IRMs may be loaded and unloaded while it serves.
        limits: what is taken on.
        dtype, device, trust_remote_code: see `hosts.load_host`.
        ready: called with the server's URL and its models' names when it answers.

    Raises:
        UsageError: for an address that others can reach without a key, or names that cannot be served.
        RealignerError: when the port is taken, an IRM is damaged or for another host, or the host cannot be served.
    """
    check_address(address, keys, no_key)
    for name in irms:
        check_name(name)
    check_keys([*keys, *([] if admin_key is None else [admin_key])])
    with _bound(address, port) as listening:
        loaded_irms, tokenizer, found = _loaded(irms, host, dtype, device, trust_remote_code)
        name = host_name_served or found
        metrics = Metrics()
        engine = Engine(loaded_irms, tokenizer, limits or Limits(), metrics.first_token.observe)
        engine.prove()
        try:
            asyncio.run(_serve(engine, name, metrics, list(keys), admin_key, listening, ready))
        finally:
            engine.close()


async def _serve(
    engine: Engine, name: str, metrics: Metrics, keys: list[str], admin_key: str | None, listening: socket.socket, ready: Any
) -> None:
    engine.open(asyncio.get_running_loop())
    app = application(engine, name, metrics, keys, admin_key)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=30,
    )
    address, port = listening.getsockname()[:2]
    url = f"http://[{address}]:{port}/v1" if ":" in address else f"http://{address}:{port}/v1"
    server = _Server(config, lambda: ready and ready(url, [name, *(f"{name}+{irm}" for irm in engine.loaded_irms.strengths)]))
    await server.serve(sockets=[listening])
    if server.force_exit:
        raise RealignerError("stopped at once by a second signal; replies that were under way are cut")


class _Server(uvicorn.Server):
    """uvicorn's, which exits with 0 when it was told to stop and has finished, and at once when it is told twice."""

    def __init__(self, config: uvicorn.Config, ready: Any) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        self._loop = asyncio.get_running_loop()
        with signals_to(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit:
            self._loop.call_soon_threadsafe(self._abort)
        else:
            busy = "finishing the replies that are under way (again to stop at once)"
            say(f"realigner serve: {busy if self.server_state.tasks else 'stopping'}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # which uvicorn takes for a reason to leave the application as it is
            await self.lifespan.shutdown()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


@contextmanager
def _bound(address: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, taken before the long work and listening after it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            said = f"{address}:{port}: cannot be served on ({why}); choose another port, or stop what is there"
            raise RealignerError(said) from None
        yield listening


def _loaded(
    irms: Mapping[str, Path], host: str | None, dtype: str, device: str, trust_remote_code: bool
) -> tuple[LoadedIRMs, Any, str]:
    """The loaded_irms with its IRMs, the tokenizer, and the name by which the host is served unless another is given."""
    folders = {name: find_irm(source) for name, source in irms.items()}
    for folder in folders.values():
        check_adapter(folder)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    first = next(iter(folders.values()), None)
    base, tokenizer = load_host(host or EMBEDDED, **options) if first is None else load_host_of(first, host, **options)
    with quiet_transformers():
        loaded_irms = LoadedIRMs(base)
        for name, folder in folders.items():
            loaded_irms.put(name, loaded_irms.read(folder))
    named = host_name(base)
    return loaded_irms, tokenizer, Path(named).name if Path(named).is_absolute() else named or type(base).__name__
