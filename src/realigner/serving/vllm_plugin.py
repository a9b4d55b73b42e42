"""The plugin for vLLM (entry point ``vllm.general_plugins``): `register` is called in each of the engine's processes.

    REALIGNER_IRMS=anger=runs/anger-42,sadness=runs/sadness-42 vllm serve HOST

vLLM goes on, bare, when a plugin cannot be imported, and does not when one raises as it is called. So this file imports next to
nothing, and `register` raises. What it needs of the engine it looks for there: a release that lacks it is not served.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realigner.serving.vllm_irms import ServedIRMs

TESTED = "0.32"  # the release of vLLM that this was written against and is tested with
SLOTS = "REALIGNER_SLOTS"  # how many IRMs may be loaded at a time
ADMIN = "REALIGNER_ADMIN"  # 1: load and unload them over HTTP
_WRAPPED = "_realigner_wrapped"


def register() -> None:
    """Connect the engine with the IRMs that ``REALIGNER_IRMS`` names; with none, requests that ask for one are refused.

    Raises:
        RealignerError: in one line, for IRMs that cannot be served or an engine that is not known.
    """
    from realigner.serving.vllm_irms import VARIABLE, ServedIRMs

    served = ServedIRMs.of_text(os.environ.get(VARIABLE, ""))
    _watch_requests(served)
    if not served.irms:
        return
    _put_into_models(served)
    _fill_steps()
    _salt_graphs(served)
    _open_http(served)


def spare_slots(irms: int) -> int:
    """How many slots are kept free for IRMs that are loaded later: ``REALIGNER_SLOTS`` less those there are.

    Raises:
        UsageError: when it is not a number, or fewer than there are IRMs.
    """
    from realigner.errors import UsageError

    text = os.environ.get(SLOTS) or str(irms + (4 if os.environ.get(ADMIN) == "1" else 0))
    if not text.isdecimal() or not irms <= int(text) <= 256:
        raise UsageError(f"{SLOTS}: {text[:40]!r} is not a number from {irms}, the IRMs that there are, to 256")
    return int(text) - irms


# --- reaching the engine ----------------------------------------------------------------------------------------------------


def _of_engine(module: str, name: str, *parameters: str) -> tuple[Any, Any]:
    """A class or module of the engine's, and what it calls `name` there; checked to take these parameters.

    Raises:
        RealignerError: when the engine has no such thing: another release.
    """
    from realigner.errors import RealignerError

    path, _, attribute = name.rpartition(".")
    try:
        owner: Any = import_module(f"vllm.{module}")
        for part in filter(None, path.split(".")):
            owner = getattr(owner, part)
        found = getattr(owner, attribute)
        missing = [p for p in parameters if p not in inspect.signature(inspect.unwrap(found)).parameters]
        if missing:
            raise AttributeError(f"it takes no {missing[0]}")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        release = getattr(sys.modules.get("vllm"), "__version__", "here")
        raise RealignerError(
            f"vLLM {release} is not known to realigner (vllm.{module}: {name}: {error}); install vLLM {TESTED}, or take "
            "realigner out of its environment"
        ) from error
    return owner, found


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Put a function around one of the engine's, once: ``wrapper(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    original = getattr(original, _WRAPPED, original)  # of a register before

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _WRAPPED, original)
    setattr(owner, name, wrapped)


def _watch_requests(served: ServedIRMs) -> None:
    """Every request, offline or over HTTP, becomes one for the engine in `process_inputs`: names are read and salted there."""
    from realigner.errors import UsageError
    from realigner.serving.mixes import Mix
    from realigner.serving.vllm_irms import EVERYWHERE

    owner, _ = _of_engine("v1.engine.input_processor", "InputProcessor.process_inputs", "request_id", "prompt", "params")
    _of_engine("v1.engine", "EngineCoreRequest.cache_salt")
    _of_engine("sampling_params", "SamplingParams.extra_args")
    _, refusal = _of_engine("exceptions", "VLLMValidationError")  # over HTTP a 400

    def process(original: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        field = extra.get("irms")
        try:
            if extra.get("where") not in (None, "all"):
                raise UsageError(EVERYWHERE)
            mix = Mix() if field is None else served.mix(field)
        except UsageError as error:
            raise refusal(str(error), parameter="irms") from None
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if field is not None:
            rest = {key: value for key, value in extra.items() if key != "irms"}
            own = {"irms": mix.acting} if mix.acting else {}
            request.sampling_params.extra_args = {**rest, **own} or None
            request.cache_salt = served.salt(mix, request.cache_salt)
        return request

    _wrap(owner, "process_inputs", process)


def _put_into_models(served: ServedIRMs) -> None:
    owner, _ = _of_engine("model_executor.model_loader", "BaseModelLoader.load_model", "vllm_config", "model_config")
    spare = spare_slots(len(served.irms))

    def load(original: Any, self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        from realigner.serving.vllm_runner import put_into

        model = original(self, vllm_config, model_config, *args, **kwargs)
        drafting = getattr(vllm_config.speculative_config, "draft_model_config", None)
        if model_config is vllm_config.model_config and model_config is not drafting:  # a draft model knows no IRM
            put_into(model, vllm_config, served.irms, spare)
        return model

    _wrap(owner, "load_model", load)


def _fill_steps() -> None:
    """V1's steps; workers' calls for IRMs; and the check that ends a start, whichever runner it is."""
    module = "v1.worker.gpu_model_runner"
    runner, _ = _of_engine(module, "GPUModelRunner._prepare_inputs", "scheduler_output", "num_scheduled_tokens")
    _of_engine(module, "GPUModelRunner._dummy_run", "num_tokens")
    _of_engine("v1.worker.gpu_input_batch", "CachedRequestState.__init__", "sampling_params")
    wrapper, _ = _of_engine("v1.worker.worker_base", "WorkerWrapperBase.initialize_from_config")

    def prepare(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        from realigner.serving.vllm_runner import fill_step

        prepared = original(self, scheduler_output, num_scheduled_tokens)
        fill_step(self, num_scheduled_tokens)
        return prepared

    _wrap(runner, "_prepare_inputs", prepare)
    in_place = runner._prepare_inputs

    def warm_up(self: Any) -> Any:
        from realigner.serving.vllm_runner import check_connected

        times = self.worker.compile_or_warm_up_model()
        check_connected(self.worker, getattr(type(self.worker.model_runner), "_prepare_inputs", None) is in_place)
        return times

    def load_irm(self: Any, name: str, folder: str) -> str | None:
        from realigner.serving import vllm_runner

        return vllm_runner.load_irm(self.worker, name, folder)

    def unload_irm(self: Any, name: str) -> str | None:
        from realigner.serving import vllm_runner

        return vllm_runner.unload_irm(self.worker, name)

    wrapper.compile_or_warm_up_model, wrapper.load_irm, wrapper.unload_irm = warm_up, load_irm, unload_irm


def _salt_graphs(served: ServedIRMs) -> None:
    """Compiled graphs are kept on disk by the engine's config, which knows nothing of plugins."""
    owner, _ = _of_engine("config", "VllmConfig.compute_hash")
    salt = hashlib.sha256(Path(__file__).with_name("vllm_model.py").read_bytes())
    for name, irm in served.irms.items():
        salt.update(f"{name} {irm.shape} {irm.sites} {irm.hidden_size}".encode())
    salt.update(str(spare_slots(len(served.irms))).encode())

    def compute_hash(original: Any, self: Any, *args: Any, **kwargs: Any) -> str:
        digest = hashlib.sha256((original(self, *args, **kwargs) + salt.hexdigest()).encode())
        return digest.hexdigest()[:16]

    _wrap(owner, "compute_hash", compute_hash)


def _open_http(served: ServedIRMs) -> None:
    """The server's application, where it is made (and only there: workers need none of it)."""
    from realigner import AfterImport

    def then(_: Any) -> None:
        from realigner.serving.vllm_api import IRMMiddleware, add_admin

        owner, _ = _of_engine("entrypoints.launchers.app", "init_entrypoints_middleware", "args", "app")

        def middleware(original: Any, args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
            app.add_middleware(IRMMiddleware, served=served, hosts=served_names(args))  # behind the check of keys
            if os.environ.get(ADMIN) == "1":
                add_admin(app, served, args)
            original(args, app, *rest, **kwargs)

        _wrap(owner, "init_entrypoints_middleware", middleware)

    AfterImport("vllm.entrypoints.launchers.app", then)


def served_names(args: Any) -> list[str]:
    """The names by which a server's host goes."""
    names = args.served_model_name
    return [names] if isinstance(names, str) else list(names or [args.model])
