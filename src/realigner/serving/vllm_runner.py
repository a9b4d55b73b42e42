"""Where the engine's workers meet the IRMs: they are put into its model when it is loaded, and told each step's strengths.

vLLM has two model runners. V2 (GPUs) asks a model for its `ModelState`, which sees requests come and prepares each step's
inputs: an official place. V1 (CPUs, and what V2 does not do yet) has none, so its `_prepare_inputs` is wrapped: by then the
requests of the step are in its batch and in order. Either way one thing is asked at the end of a start (`check_connected`): a
step with strengths must give other numbers than one without. An engine in which it does not, does not start.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realigner.adapter_files import StoredIRM, read_irm
from realigner.checkpoint_fingerprint import difference
from realigner.errors import RealignerError
from realigner.fingerprints import Fingerprint
from realigner.serving.vllm_model import IRMSlots, attach

FIELD = "irms"  # of a request's extra_args
_PROBE = 1000.0  # a strength that shows in every precision


# --- when the model is loaded -----------------------------------------------------------------------------------------------


def put_into(model: Any, vllm_config: Any, irms: Mapping[str, StoredIRM], spare: int) -> None:
    """Attach IRMs to a model that the engine has just loaded.

    Raises:
        RealignerError: when an IRM is not of this host, or the engine is set up in a way that would make it act wrongly.
    """
    refuse_setup(vllm_config)
    for name, irm in irms.items():
        check_host(name, irm, vllm_config)
    config = vllm_config.model_config
    device = torch.device(vllm_config.device_config.device)
    with torch.no_grad():
        slots = IRMSlots(irms, spare, vllm_config.scheduler_config.max_num_batched_tokens, config.dtype, device)
        with _contexts(vllm_config):
            attach(model, slots)
    model.get_model_state_cls = lambda: state_class(vllm_config, model)


@contextmanager
def _contexts(vllm_config: Any) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    with set_current_vllm_config(vllm_config), set_forward_context(None, vllm_config):
        yield


def refuse_setup(vllm_config: Any) -> None:
    """Raise RealignerError, naming the flag, where tokens of a step are split in a way that strengths would not follow."""
    parallel = vllm_config.parallel_config
    for flag, value, why in (
        ("pipeline_parallel_size", parallel.pipeline_parallel_size > 1, "later stages do not see what IRMs read at layer 0"),
        ("prefill_context_parallel_size", getattr(parallel, "prefill_context_parallel_size", 1) > 1, "a prompt is split"),
        ("enable_dbo", getattr(parallel, "enable_dbo", False), "a step is split in two"),
        ("ubatch_size", getattr(parallel, "ubatch_size", 0) > 1, "a step is split"),
    ):
        if value:
            raise RealignerError(f"vLLM's {flag} is not supported with IRMs yet ({why}); leave it off, use tensor parallelism")


def check_host(name: str, irm: StoredIRM, vllm_config: Any) -> None:
    """Raise RealignerError unless the engine's checkpoint is the host that an IRM was made for."""
    config = vllm_config.model_config
    made_for = Fingerprint.from_dict(irm.values["host"])
    text = config.hf_text_config
    sizes = int(text.hidden_size), int(text.num_hidden_layers)
    why = difference(made_for, checkpoint_folder(vllm_config), *sizes, str(text.model_type))
    if why:
        raise RealignerError(f"irm {name!r} was made for {made_for.name or 'another host'}; of {config.model} {why}")


def checkpoint_folder(vllm_config: Any) -> Path:
    """Where the checkpoint lies that the engine has loaded."""
    config = vllm_config.model_config
    if (folder := Path(config.model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.model, revision=config.revision, cache_dir=vllm_config.load_config.download_dir,
                                      local_files_only=True))  # fmt: skip
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise RealignerError(f"{config.model}: its files are not found, to compare them with the IRM's host [{why}]") from None


# --- each step --------------------------------------------------------------------------------------------------------------


def slots_of(runner: Any) -> IRMSlots | None:
    """The IRMs in a model runner's model."""
    get_model = getattr(runner, "get_model", None)
    found = getattr(get_model() if get_model is not None else runner.model, "irms", None)
    return found if isinstance(found, IRMSlots) else None


def mix_of_request(sampling_params: Any) -> Mapping[str, float]:
    """IRM -> strength of a request, as `vllm_requests` wrote them."""
    extra = None if sampling_params is None else sampling_params.extra_args
    found = {} if extra is None else extra.get(FIELD) or {}
    if not isinstance(found, Mapping):
        raise RealignerError(f"{FIELD}: {found!r:.80} came past the engine's front end; this release of vLLM is not served")
    return found


def fill_step(runner: Any, num_scheduled_tokens: np.ndarray[Any, Any]) -> None:
    """V1: set the strengths of a step from the requests in the runner's batch, in its order."""
    irms = slots_of(runner)
    if irms is None:
        return
    rows = [_row(irms, runner.requests[request]) for request in runner.input_batch.req_ids]
    irms.fill(np.repeat(np.stack(rows), num_scheduled_tokens, axis=0))


def _row(irms: IRMSlots, state: Any) -> np.ndarray[Any, Any]:
    """A request's strengths, kept with the engine's own record of it for as long as that lives."""
    kept = getattr(state, "irm_row", None)
    if kept is None or kept[0] != irms.version:
        kept = state.irm_row = (irms.version, irms.row(mix_of_request(state.sampling_params)))
    row: np.ndarray[Any, Any] = kept[1]
    return row


class StepState:
    """V2: mixed into the model's `ModelState`. Requests' strengths lie in a table ``[request's place, slot]`` on the device."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        self.irms: IRMSlots = model.irms
        self.irms.connected = True
        self.irm_table = torch.zeros(vllm_config.scheduler_config.max_num_seqs, self.irms.get_buffer("strengths").shape[1]).to(
            device
        )
        self.irm_places: dict[str, int] = {}
        self.irm_acting: set[str] = set()

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note a request's strengths; one that was preempted comes again, at another place perhaps."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        row = self.irms.row(mix_of_request(new_req_data.sampling_params))
        self.irm_table[req_index] = torch.from_numpy(row)
        self.irm_places[new_req_data.req_id] = req_index
        (self.irm_acting.add if row.any() else self.irm_acting.discard)(new_req_data.req_id)

    def remove_request(self, req_id: str) -> None:
        """Forget a request."""
        super().remove_request(req_id)  # type: ignore[misc]
        self.irm_acting.discard(req_id)
        if (place := self.irm_places.pop(req_id, None)) is not None:
            self.irm_table[place] = 0.0

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Set the strengths of a step's tokens: each token's request by where the requests begin, then its row of the table."""
        inputs = super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]
        if self.irm_acting.isdisjoint(input_batch.req_ids):  # bare requests alone, or a dummy run's
            self.irms.clear()
            return inputs
        tokens, requests = input_batch.num_tokens, input_batch.num_reqs
        strengths = self.irms.get_buffer("strengths")
        starts = input_batch.query_start_loc[1 : requests + 1]
        places = torch.arange(tokens, device=strengths.device, dtype=starts.dtype)
        of_token = torch.searchsorted(starts.contiguous(), places, right=True).clamp(max=requests - 1)
        strengths[:tokens] = self.irm_table[input_batch.idx_mapping[:requests].long()[of_token]]
        self.irms.clear(tokens)
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
        """Strengths of 0, for warming up and for capturing CUDA graphs."""
        self.irms.clear()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]


def state_class(vllm_config: Any, model: Any) -> type:
    """V2: the `ModelState` that the model would have without IRMs, with theirs."""
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    own = vars(model).pop("get_model_state_cls", None)
    try:
        base = resolve_model_state_cls(vllm_config, model)
    finally:
        if own is not None:
            model.get_model_state_cls = own
    return type(f"IRM{base.__name__}", (StepState, base), {"__module__": __name__})


# --- the end of a start -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def check_connected(worker: Any, fill_is_in_place: bool) -> None:
    """Refuse to start an engine whose steps the IRMs do not reach, rather than serve bare replies.

    Args:
        worker: an engine's worker whose model is loaded, warmed up, and captured.
        fill_is_in_place: whether V1's runner calls `fill_step`.

    Raises:
        RealignerError: saying what is missing.
    """
    runner = worker.model_runner
    irms = slots_of(runner)
    if irms is None:
        raise RealignerError("vLLM loaded its model past the IRMs (by a load_format of its own?); use load_format=auto")
    if not (irms.connected or fill_is_in_place):
        raise RealignerError(f"vLLM's {type(runner).__name__} is not known to realigner; use the release that its docs name")
    if not irms.names or not bool(irms.get_buffer("output").any()):
        return
    outputs = []
    for strength in (0.0, _PROBE):
        with _all_at(irms, strength):
            outputs.append(runner._dummy_run(4)[0])
    if all(output is not None for output in outputs) and torch.equal(*(output[:4].clone() for output in outputs)):
        raise RealignerError("vLLM's step does not run the IRMs (an old compiled graph?); delete ~/.cache/vllm, or report it")


@contextmanager
def _all_at(irms: IRMSlots, strength: float) -> Any:
    """All tokens of dummy runs at a strength."""
    strengths = irms.get_buffer("strengths")
    irms.clear = lambda tokens=0: None  # type: ignore[method-assign]  # a dummy run clears
    try:
        strengths[:] = strength
        yield
    finally:
        del irms.clear  # the class's own is back
        strengths[:] = 0.0


# --- calls to all workers ---------------------------------------------------------------------------------------------------


def load_irm(worker: Any, name: str, folder: str) -> str | None:
    """Load an IRM into a worker's free slot; returns what is wrong, or None."""
    try:
        irms, irm = slots_of(worker.model_runner), read_irm(folder)
        assert irms is not None  # the engine started with some
        check_host(name, irm, worker.vllm_config)
        with torch.inference_mode():
            irms.load(name, irm)
    except RealignerError as error:  # the engine goes on
        return str(error)
    return None


def unload_irm(worker: Any, name: str) -> str | None:
    """Free an IRM's slot in a worker; returns what is wrong, or None."""
    try:
        irms = slots_of(worker.model_runner)
        assert irms is not None
        with torch.inference_mode():
            irms.unload(name)
    except RealignerError as error:
        return str(error)
    return None
