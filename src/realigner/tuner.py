"""The IRM as a PEFT method, with the API that users know from PEFT.

`get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `disable_adapter`, `set_adapter`, `delete_adapter`,
`unload`, Trainer and TRL work with an `IRMConfig` as with a `LoraConfig`. The one difference: an IRM depends on its input, so
it cannot be merged into weights, and merging raises an error that says so.

Loading is strict: a different host, a host whose site the probe now finds elsewhere, a missing, extra or misshapen tensor, and
a truncated or pickled file are each refused with a one-line error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import AuxiliaryTrainingWrapper, register_peft_method, set_additional_trainable_modules
from torch import nn

from realigner.adapter_files import check_tensors
from realigner.adapters import AdapterRegistry
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint, fingerprint
from realigner.injection import Injector, attached_injectors, refuse_attached
from realigner.irm import EDITIONS
from realigner.irm_config import FILE_PREFIX, PEFT_NAME, WEIGHTS_FILE, IRMConfig, adapter_folder, check_adapter
from realigner.locate import find_sites
from realigner.residuals import delta_scale, delta_scales, residual_sizes
from realigner.settings import Generation, Settings, Strength, Where, generate_setting, part_of


class IRMModel(BaseTuner):
    """The PEFT tuner: holds the IRMs and the injector that hooks the host. The host itself is not changed.

    Calls and ``generate`` take three arguments in addition to the host's own; they apply to that call only:

    - ``strength=``: anything that `strength` takes.
    - ``where=``: the tokens that the IRMs act on (see `strength`); only in ``generate``.
    - ``adapter_names=``: PEFT's argument, the IRM for each row of the batch: a name, ``"__base__"`` for none, or a tuple of
      names whose deltas are summed. With beam search or several replies per prompt, give one entry per prompt.

    Calls may run in several threads at once: each has its own settings, and a generation keeps the settings it began with.
    ``set_adapter`` and ``disable_adapter`` change the model for all calls that begin afterwards.
    """

    uses_shared_state = True
    prefix = "irm_"
    tuner_layer_cls = AdapterRegistry
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        if isinstance(model, PeftModel) and not isinstance(model.base_model, IRMModel):
            model = model.get_base_model()  # a host with LoRA: attach beside it, to the same host
        refuse_attached(model)
        others = model.__dict__.pop("peft_config", None)  # else PEFT would file our config under LoRA's
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        finally:
            if others is not None:
                model.peft_config = others

    def forward(self, *args: Any, strength: Strength | None = None, where: Where | None = None, **kwargs: Any) -> Any:
        """Run the host's forward, with this call's strength and tokens if they are given."""
        if strength is None and where is None:
            return self._run(self.model, None, args, kwargs)
        return self._run(self.model, self.registry.settings(self.settings, strength, where), args, kwargs)

    def generate(self, *args: Any, strength: Strength | None = None, where: Where | None = None, **kwargs: Any) -> Any:
        """Run the host's ``generate``, with this call's strength and tokens if they are given."""
        counts = ("num_beams", "num_return_sequences")
        repeats = max(generate_setting(name, args, kwargs, self.model.generation_config) or 1 for name in counts)
        settings = replace(self.current(strength, where), generation=self._generation(repeats, args, kwargs))
        guided = generate_setting("guidance_scale", args, kwargs, self.model.generation_config) not in (None, 1)
        if guided and settings.by_token:
            raise UsageError("where and strengths for each token: not with guidance_scale, which reads a second text")
        return self._run(self.model.generate, settings, args, kwargs)

    def _generation(self, repeats: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Generation:
        """What a call of ``generate`` with these arguments begins with."""
        own, mask = [kwargs.get(key) for key in ("inputs_embeds", "input_ids", "inputs")], kwargs.get("attention_mask")
        inputs = (*own, *args)
        if self.model.config.is_encoder_decoder:  # what it is given is the encoder's
            inputs, mask = (kwargs.get("decoder_inputs_embeds"), self._decoder_input_ids(args, kwargs)), None
        given = next((value.shape[1] for value in inputs if isinstance(value, torch.Tensor)), 1)  # without one: the BOS token
        prompt = given
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            prompt = max(given, mask.shape[1])  # of a text whose beginning is in a cache, the new tokens alone may be given
        return Generation(prompt, repeats, seen=prompt - given)

    def _decoder_input_ids(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the decoder of an encoder-decoder begins with: a start token is put before what lacks one."""
        ids = kwargs.get("decoder_input_ids")
        own = self.model.generation_config
        start, bos = (generate_setting(name, args, kwargs, own) for name in ("decoder_start_token_id", "bos_token_id"))
        start = bos if start is None else start
        if not isinstance(ids, torch.Tensor) or start is None:
            return ids
        first = torch.as_tensor(start, device=ids.device)
        return self.model._prepare_decoder_input_ids_for_generation(len(ids), "", {"decoder_input_ids": ids}, first)[0]

    def current(
        self,
        strength: Strength | None = None,
        where: Where | None = None,
        rows: Sequence[str | tuple[str, ...]] | None = None,
    ) -> Settings:
        """This thread's settings with the given changes and the active IRMs pinned: a later `set_adapter` has no effect."""
        if rows is not None:
            self._check_rows()
        settings = self.registry.settings(self.settings, strength, where, rows)
        return settings if settings.irms is not None else replace(settings, irms=self.registry.enabled())

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        strength: Strength | None = None,
        adapter_names: Sequence[str | tuple[str, ...]] | None = None,
        where: Where | list[Where] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The host's ``generate_batch`` (continuous batching), with settings for each request.

        Args:
            inputs: the prompts as tokens.
            generation_config, continuous_batching_config: as in transformers.
            strength: a number, or a list with one for each request; or a mapping from IRM to either.
            adapter_names: the IRMs of each request, as in `generate`.
            where: the tokens that the IRMs act on: one value for all requests, or a list with one for each.
            options: keyword arguments of transformers' ``add_request``: ``max_new_tokens``, ``eos_token_id``, ...; ``warmup``,
                ``progress_bar`` and ``persistent_manager`` are accepted but ignored.

        Returns:
            Request id -> transformers' ``GenerationOutput``, in the order of `inputs`.
        """
        from realigner.batching import BatchManager  # brings transformers' continuous batching

        for unused in ("warmup", "progress_bar", "persistent_manager"):
            options.pop(unused, None)
        if not inputs:
            return {}
        each = {"strength": strength, "irms": None if adapter_names is None else list(adapter_names), "where": where}
        count = len(inputs)
        chosen = [{key: part_of(value, n, count, key, "requests") for key, value in each.items()} for n in range(count)]
        longest = max(len(prompt) for prompt in inputs), int(options.get("max_new_tokens") or 0)
        done: dict[str, Any] = {}
        with BatchManager(self, generation_config, continuous_batching_config, (*longest, count)) as batch:
            requests = [batch.add_request(prompt, **own, **options) for prompt, own in zip(inputs, chosen, strict=True)]
            while len(done) < batch.replies * len(requests):
                output = batch.next()
                if output.is_finished():
                    done[output.request_id] = output
        order = [[*(f"{name}__child#{n}" for n in range(batch.replies - 1)), name] for name in requests]
        return {name: done[name] for names in order for name in names}

    @property
    def settings(self) -> Settings:
        """The settings that this thread's next call will use."""
        return self.injector.threads.state.settings

    def _run(self, call: Any, settings: Settings | None, args: Any, kwargs: Any) -> Any:
        """Make a call, and refuse its result when no IRM had a part in it though some were to."""
        if self.awaits_weights:  # a config of a file without its weights: the IRM stays as it was initialised
            self._attach()
        if lora := [name for name, module in self.injector.replaced_modules() if isinstance(module, BaseTunerLayer)]:
            raise RealignerError(
                f"{lora[0]}: another adapter (LoRA?) was put around it after the IRM, which would not read what that adds; put "
                "it on the host before the IRM"
            )
        state = self.injector.threads.state
        state.began = False
        enabled = self.registry.enabled()  # before and after: another thread may switch the IRMs off or on meanwhile
        with nullcontext() if settings is None else self.injector.threads.using(settings):
            try:
                result = call(*args, **kwargs)
            except BaseException:
                state.running = None  # Ctrl-C skips the hook that ends a forward
                raise
            if not state.began and enabled and self.registry.active(state.settings):
                raise RealignerError(
                    f"{type(self.model).__name__}: the IRM was never run; this model's forward does not call its decoder as a "
                    "module (was it replaced, or compiled before the IRM was attached?)"
                )
        return result

    @torch.inference_mode(False)  # tensors made in that mode could not be trained
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an IRM under a name: prove the host's sites, check that the config is for this host, build the network.

        The hooks of an IRM that is loaded from a file are registered only once its weights are loaded, so that a failed load
        leaves the host bare.
        """
        config = self.peft_config[adapter_name]
        if clash := name_clash(adapter_name):
            raise UsageError(f"adapter name {adapter_name!r} cannot be used: {clash}")
        first = "registry" not in self._modules
        _refuse_shared_copies(model, adapter_name, config, self.peft_config.keys() - {adapter_name})
        if first:
            self.sites = find_sites(model, config.layers_path)
            self.fingerprint = fingerprint(model, self.sites.layers)
        is_new = config.host is None and config.file_tensors is None  # else its scales are saved with it, or it has none
        _bind(config, self.fingerprint, self.sites.summary())
        size = self.sites.width, len(self.sites.layers)
        if is_new:
            config.edition = config.edition or EDITIONS[-1]
        if is_new and config.preset == "compact":
            if config.input_scale is None:
                config.input_scale = self.residual_sizes[0] or 1.0
            if config.delta_scale is None:
                scale = delta_scale if config.edition == 1 else delta_scales
                config.delta_scale = scale(self.residual_sizes, config.resolved_layers(len(self.residual_sizes)))
        if config.file_tensors is not None:
            with torch.device("meta"):
                expected = _named_as_in_file(config.build(*size)) | _beside(model, config.modules_to_save or ())
            own = {key: s for key, s in config.file_tensors.items() if key.startswith(FILE_PREFIX) or key in expected}
            check_tensors(_file_of(adapter_name), expected, own)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            network = config.build(*size)
        if first:
            default = Settings()
            self.registry = AdapterRegistry(default)
            self.injector = Injector(self.sites, self.registry.active, default)
            self.injector.freeze(model)
            self.awaits_weights = True
        device = _device(model)
        if not low_cpu_mem_usage and not any(p.is_meta for p in network.parameters()):
            network.to(device)
        self.registry.add(adapter_name, network, device)
        active = adapter_name in self.active_adapters
        if active:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        else:
            network.requires_grad_(False)
        with self._forgotten_on_error(adapter_name):
            set_additional_trainable_modules(model, config, BaseTuner.get_model_config(self), adapter_name, active)
            if config.file_tensors is None:
                self._attach()

    @cached_property
    def residual_sizes(self) -> list[float]:
        """`residuals.residual_sizes` of the host, measured when it is first asked for."""
        bare = nullcontext() if "injector" not in vars(self) else self.injector.threads.using(Settings(irms=()))
        with bare:
            return residual_sizes(self.model, self.sites)

    def _attach(self) -> None:
        """Register the hooks, unless they are."""
        if self.awaits_weights:
            self.injector.attach()
            self.awaits_weights = False

    @contextmanager
    def _forgotten_on_error(self, adapter_name: str) -> Iterator[None]:
        """Leave nothing of an IRM on the host when the block does not end well."""
        try:
            yield
        except BaseException:
            if len(self.registry.networks) == 1:
                self._unload_and_optionally_merge(merge=False)
                self.injector.detach()  # `unload` knows it by its hooks, which may not be there yet
            else:
                self.delete_adapter(adapter_name)
            raise

    def train(self, mode: bool = True) -> IRMModel:
        """Set the mode of the IRMs. The frozen host stays in evaluation mode: its dropout would act on the deltas too.

        In the host, only trained modules follow the mode (`modules_to_save`, LoRA), and the ``training`` flags of the decoder
        and its layers (gradient checkpointing needs them), unless these would switch on dropout (`random_in_training`).
        """
        super().train(mode)
        self.model.eval()
        for module in self.model.modules():
            trained = isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer))
            if mode and trained and any(parameter.requires_grad for parameter in module.parameters()):
                module.train()
        for module in (self.sites.decoder, *self.sites.layers):
            module.training = mode and not self.sites.random_in_training
        if mode:
            self.injector.follow_checkpointing()
            if getattr(self.model, "_require_grads_hooks", None):  # of use to reentrant checkpointing only; GIT fails with it
                self.model.disable_input_require_grads()
        return self

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The host's method, looked up when called: PEFT wants the attribute even if the host (a classifier) has none."""
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise RealignerError("an IRM replaces no module of the host; use inject_adapter")

    # PEFT's own versions look for tuner layers inside the host; ours is beside it.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one IRM active, or several at once (their deltas are summed)."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.registry.check_loaded("adapter", name)
        wrappers = self._own_wrappers()
        for path, wrapper in wrappers:
            if len(own := _with_copies(wrapper, names)) > 1:
                raise UsageError(f"adapter: {' and '.join(own)} each have a trained copy of {path}, and one can act at a time")
        for _, wrapper in wrappers:
            wrapper.set_adapter(_with_copies(wrapper, names), inference_mode=inference_mode)
        BaseTunerLayer.set_adapter(self.registry, names, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        BaseTunerLayer.enable_adapters(self.registry, enabled)
        for _, wrapper in self._own_wrappers():
            wrapper.enable_adapters(enabled)

    def _own_wrappers(self) -> list[tuple[str, Any]]:
        """The host's modules of which our IRMs have trained copies, by name; others' (LoRA's) are not ours to switch."""
        return [(path, wrapper) for path, wrapper in _wrappers(self.model) if _with_copies(wrapper, self.registry.networks)]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one IRM from the host."""
        if adapter_name not in self.peft_config:
            raise UsageError(f"adapter {adapter_name!r} is not loaded")
        if len(self.registry.networks) == 1:
            raise UsageError(f"adapter {adapter_name!r} is the only one; use model.unload() to get the bare host back")
        del self.peft_config[adapter_name]
        del self.injector.threads.default.strengths[adapter_name]
        BaseTunerLayer.delete_adapter(self.registry, adapter_name)
        self.active_adapter = self.registry.names
        _drop_copies(self.model, [adapter_name])
        for _, wrapper in self._own_wrappers():
            if (own := _with_copies(wrapper, self.registry.names)) != wrapper.active_adapters:
                wrapper.set_adapter(own)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the named IRMs trainable or not."""
        BaseTunerLayer.set_requires_grad(self.registry, adapter_names, requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.registry, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def _check_merge_allowed(self) -> None:
        raise RealignerError(
            "an IRM depends on its input, so it cannot be merged into weights; keep it attached, or unload(). A trainer that "
            "sends merged weights to an engine cannot train one: let transformers generate (in TRL: use_vllm=False)"
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused: see the module's docstring."""
        self._check_merge_allowed()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        host: nn.Module = self.model
        unload(host)
        _drop_copies(host, self.peft_config)  # of IRMs whose hooks were not on it yet, too
        return host

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        self._check_rows()
        with self.injector.threads.using(self.registry.settings(self.settings, rows=adapter_names)):
            yield

    def _check_rows(self) -> None:
        """Raise UsageError where rows cannot differ in their IRMs."""
        if self._own_wrappers():
            found = "trained copies of the host's modules (modules_to_save) act in every row"
            raise UsageError(f"adapter_names: {found}; use set_adapter or disable_adapter")

    # Files: tensors go by irm.<network's own name>; loading is strict.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # Ours alone: the host may hold LoRA layers, which are another file's.
        place = f"registry.networks.{adapter_name}."
        return {key: value for key, value in state_dict.items() if place in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        _, found, rest = key.partition(f"registry.networks.{adapter_name}.")
        return FILE_PREFIX + rest if found else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner = tuner_of(model)
        config = tuner.peft_config[adapter_name]
        first_load = config.file_tensors is not None  # it was added for this file: nothing of it stays
        with tuner._forgotten_on_error(adapter_name) if first_load else nullcontext():
            checked = tuner._checked(adapter_name, state_dict, model)
            tuner._attach()
        config.file_tensors = None
        return checked

    def _checked(self, adapter_name: str, state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """A file's tensors by their names in the model; refused if they are not those of this IRM."""
        saved = f".modules_to_save.{adapter_name}."
        beside = {key: value for key, value in state_dict.items() if saved in key}
        # PEFT adds the embeddings where the vocabulary was resized; they are the host's, and it has them.
        copies = {key for key in state_dict if (key.startswith("base_model.") and "embed" in key) or ".lm_head." in key}
        own = {key: state_dict[key] for key in sorted(state_dict.keys() - beside.keys() - copies)}
        check_tensors(_file_of(adapter_name), _named_as_in_file(self.registry.network(adapter_name)), own)
        wrapped = {key: value for key, value in model.state_dict().items() if saved in key}
        check_tensors(_file_of(adapter_name), wrapped, beside)
        place = f"base_model.registry.networks.{adapter_name}."
        return beside | {place + key.removeprefix(FILE_PREFIX): value for key, value in own.items()}


register_peft_method(name=PEFT_NAME, config_cls=IRMConfig, model_cls=IRMModel)


@contextmanager
def strength(model: nn.Module, value: Strength = 1.0, adapter: str | None = None, where: Where | None = None) -> Iterator[None]:
    """Context manager that scales IRM deltas in the calls made inside it: 0 is the bare host, 1 the IRM as trained.

    It applies to its own thread and to threads started inside it (such as a streamer's), not to others; a generation keeps the
    settings it began with. In coroutines, which share a thread, and in thread pools, pass ``strength=`` to the call instead.

    Cached keys and values keep the strength under which they were computed. Continuing from a cache under other settings is
    therefore equivalent to one forward with per-token strengths: for each token, the strength in effect when it was read.

    Args:
        model: a model with an IRM, wrapped (DataParallel, DDP, compiled) or not.
        value: a number from -1000 to 1000 (negative values push the other way), one for each row of the batch
            ``[row]``, one for each token ``[row, position]`` (in ``generate`` counted from the prompt's first token; the last
            column applies to all later tokens), or a mapping from an IRM's name to any of these.
        adapter: the IRM to scale, active or not (scaling does not make it active); None: all loaded IRMs.
        where: the tokens that IRMs act on when generating: ``"all"``, ``"prompt"``, ``"reply"``, or N for the first N tokens of
            the reply. A delta at a token changes what is predicted after it: the reply's first token is predicted at the
            prompt's last.

    Raises:
        UsageError: for a value out of range or an adapter that is not loaded; from the forward, if the batch size differs.

    Example:
        >>> with strength(model, 0.5):  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> with strength(model, {"anger": 1.0, "sadness": [0, 0.5]}):  # doctest: +SKIP
        ...     model.generate(**two_rows)
    """
    tuner = tuner_of(model)
    with torch.inference_mode(False):  # tensors made in that mode could not take part in training
        settings = tuner.registry.settings(tuner.settings, value, where, adapter=adapter)
    with tuner.injector.threads.using(settings):
        yield


def tuner_of(model: nn.Module) -> IRMModel:
    """The IRM tuner of a model that `get_peft_model` or `PeftModel.from_pretrained` returned, whatever wraps it.

    Raises:
        UsageError: when the model carries no IRM.
    """
    tuner = find_tuner(model)
    if tuner is None:
        raise UsageError(f"{type(model).__name__} has no IRM; attach one with peft.get_peft_model(host, IRMConfig(...))")
    return tuner


def find_tuner(model: Any) -> IRMModel | None:
    """`tuner_of`, or None when the model carries no IRM."""
    while not isinstance(model, (IRMModel, PeftModel)):
        # DataParallel and DDP keep the model in `module`, torch.compile in `_orig_mod`.
        inner = next((m for key in ("module", "_orig_mod") if isinstance(m := getattr(model, key, None), nn.Module)), None)
        if inner is None:
            return None
        model = inner
    tuner = model.base_model if isinstance(model, PeftModel) else model
    return tuner if isinstance(tuner, IRMModel) else None


def refuse_vllm(model: nn.Module) -> None:
    """Raise if a model that TRL is about to start vLLM for carries an IRM: vLLM would be sent merged weights.

    Raises:
        RealignerError: saying what to do.
    """
    if find_tuner(model) is not None:
        raise RealignerError(
            "TRL sends merged weights to vLLM, and an IRM cannot be merged (it depends on its input); let transformers "
            "generate: use_vllm=False"
        )


def load_irm(host: nn.Module, folder: str | Path, adapter_name: str = "default", trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for a local folder, with every failure raised as a one-line `RealignerError`.

    If loading fails or is interrupted (Ctrl-C), the host is left as it was.
    """
    check_adapter(folder)
    refuse_attached(host)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that will be gone
            model: PeftModel = PeftModel.from_pretrained(
                host, str(adapter_folder(folder)), adapter_name=adapter_name, is_trainable=trainable
            )
    except BaseException:
        unload(host)
        raise
    return model


def unload(host: nn.Module) -> None:
    """Remove all IRMs from a host, even if the PEFT model around it is gone.

    The host is then as it was before, in evaluation mode if an IRM was trained on it.

    Args:
        host: what the IRMs were attached to; one without IRMs stays as it is.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> host = tiny_host("llama")
        >>> _ = PeftModel(host, IRMConfig())
        >>> unload(host)
        >>> _ = PeftModel(host, IRMConfig())  # which would be refused
    """
    names = {name for name, config in vars(host).get("peft_config", {}).items() if isinstance(config, IRMConfig)}
    if names:
        del host.peft_config
    for injector in attached_injectors(host):
        injector.detach()
        for module in (injector.sites.decoder, *injector.sites.layers):
            module.training = host.training  # which `IRMModel.train` sets apart
        names |= injector.threads.default.strengths.keys()
    _drop_copies(host, names)


def _wrappers(host: nn.Module) -> list[tuple[str, Any]]:
    """A host's modules that stand in a wrapper with their trained copies (`modules_to_save`), by name."""
    return [(name, module) for name, module in host.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _with_copies(wrapper: Any, names: Iterable[str]) -> list[str]:
    """Those of some IRMs that have a trained copy in a wrapper."""
    return [name for name in names if name in wrapper._adapters]


def _drop_copies(host: nn.Module, names: Iterable[str]) -> None:
    """Remove IRMs' trained copies of a host's modules; a module that is left without copies takes its place again."""
    for path, wrapper in _wrappers(host):
        for name in _with_copies(wrapper, names):
            wrapper.delete_adapter(name, new_active_adapters=[other for other in wrapper.active_adapters if other != name])
            if not wrapper._adapters:
                host.set_submodule(path, wrapper.original_module)


def _refuse_shared_copies(host: nn.Module, name: str, config: IRMConfig, irms: Iterable[str]) -> None:
    """Raise UsageError where an IRM and another adapter (LoRA, say) would have one name, or one module, for trained copies.

    Args:
        host: to which the IRM is to be added.
        name, config: of the IRM.
        irms: those that are on the host.
    """
    for path, wrapper in _wrappers(host):
        others = wrapper._adapters - set(irms)
        if name in others:
            raise UsageError(
                f"adapter name {name!r} cannot be used: the host's other adapter has a trained copy of {path} under it; "
                "choose another (adapter_name)"
            )
        if others and path.endswith(tuple(config.modules_to_save or ())):
            raise UsageError(
                f"modules_to_save: the host's other adapter {min(others)!r} has a trained copy of {path}, and one can act at a "
                "time; leave it out"
            )


def _file_of(adapter_name: str) -> str:
    return f"adapter {adapter_name!r}: {WEIGHTS_FILE}"


def _named_as_in_file(network: nn.Module) -> dict[str, torch.Tensor]:
    return {FILE_PREFIX + key: value for key, value in network.state_dict().items()}


def _beside(host: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights of a host's modules that are saved beside an IRM (`modules_to_save`), named as in the file."""
    found: dict[str, torch.Tensor] = {}
    for name, module in host.named_modules(remove_duplicate=False):
        inside = {"original_module", "modules_to_save"} & set(name.split("."))  # of the wrapper of another IRM
        if not inside and name.endswith(tuple(names)):
            plain = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            found |= {f"base_model.model.{name}.{key}": value for key, value in plain.state_dict().items()}
    return found


def _bind(config: IRMConfig, host: Fingerprint, site: dict[str, Any]) -> None:
    """Tie a config to the host it is attached to, or refuse: it was made for another one."""
    if config.host is not None:
        made_for = Fingerprint.from_dict(config.host)
        difference = made_for.difference(host)
        if difference:
            raise RealignerError(f"this IRM was made for {made_for.name or 'another host'}; on this host {difference}")
    if config.site is not None and not _same_site(config.site, site):
        raise RealignerError(f"this IRM was made for the site {config.site}; the probe now finds {site}")
    config.host = host.to_dict()
    config.site = site


def _same_site(saved: Any, found: Any) -> bool:
    """Equal, but for numbers that the probe fitted (in another precision they come out a little different) and for names that
    depend on the class (text-only, multimodal) or on `torch.compile`: the fingerprint has told that the layers are the same."""
    if isinstance(saved, dict) and isinstance(found, dict):
        return saved.keys() == found.keys() and all(_same_site(saved[key], found[key]) for key in saved if key != "layers")
    if isinstance(saved, list) or isinstance(found, list):  # a value for each layer, where one does not do for all
        one = found if isinstance(saved, list) else saved
        saved = saved if isinstance(saved, list) else [one] * len(found)
        found = found if isinstance(found, list) else [one] * len(saved)
        return len(saved) == len(found) and all(_same_site(*pair) for pair in zip(saved, found, strict=True))
    if isinstance(saved, str) and isinstance(found, str):
        return saved.replace("_orig_mod.", "") == found.replace("_orig_mod.", "")
    if isinstance(saved, float) and isinstance(found, float):
        return abs(saved - found) <= 0.02 * abs(found)
    return bool(saved == found)


def name_clash(name: str) -> str | None:
    """Why `name` cannot be an IRM's name; None if it can."""
    if not name or hasattr(nn.ModuleDict, name):
        return "it clashes with the names of PyTorch modules"
    # PEFT tells adapters apart by finding ".name." in tensor names, so a name must not be part of one.
    if name in ("registry", "networks", "trunk", "output", "weight", "bias", "base_model") or name.isdigit() or "." in name:
        return "it clashes with the names of tensors"
    return None


def _device(host: nn.Module) -> torch.device:
    devices = [p.device for p in host.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")
