"""The IRM as a PEFT method, so that everything people know from PEFT works on it.

`get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `disable_adapter`, `set_adapter`, `delete_adapter`,
`unload`, Trainer and TRL take an `IRMConfig` as they take a `LoraConfig`. What differs, and says so when asked for:
an IRM depends on its input, so it cannot be merged into weights.

On load nothing is forgiven: another host, a host whose site the probe now finds elsewhere, a missing, extra or misshapen
tensor, a truncated or pickled file are each refused with one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import AuxiliaryTrainingWrapper, PeftType, register_peft_method, set_additional_trainable_modules
from safetensors import SafetensorError, safe_open
from torch import nn

from realigner.adapters import AdapterRegistry
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint, fingerprint
from realigner.hosts import folder_of
from realigner.injection import Injector, refuse_attached
from realigner.irm import IRMShape
from realigner.locate import find_layers, find_sites
from realigner.settings import Generation, Settings, Strength, Where, check_strength

PEFT_NAME = "irm"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
TEMPLATES = ("chat", "plain")
_HOW_TO_LOAD = """

## How to load

PEFT knows injectable realignment models once realigner is imported (`pip install realigner`):

```python
import realigner
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
_FILE_PREFIX = "irm."  # tensors in the file are named irm.trunk.0.weight, ..., whatever host and adapter name


def _register_peft_type() -> PeftType:
    # PEFT admits only the methods of its own enum; this adds ours as a member like any other.
    name = PEFT_NAME.upper()
    if name not in PeftType._member_map_:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


_PEFT_TYPE = _register_peft_type()


@dataclass
class IRMConfig(PeftConfig, IRMShape):
    """Everything about an IRM but its weights: the network's shape, the host it is for, and where it is injected.

    Give `preset`, `layers` and, if wanted, `widths`, `rank`, `output_std` (see `IRMShape`). The rest is filled in when the
    IRM is attached to a host and saved with it.

    Attributes:
        layers_path: where the host's decoder layers are, for a host on which the probe cannot tell.
        tone: the tone it was trained for, if any.
        template: how prompts are put to it: ``"chat"``, the host's own way, or ``"plain"``, the paper's.
        strength: at which it is best used (1: as trained); `runtime.load` goes by it, an IRM attached by PEFT acts at 1.
        host: the fingerprint of the host it belongs to (`fingerprints.Fingerprint`).
        site: what the probe found on that host (`sites.HostSites.summary`).
        modules_to_save: PEFT's: modules of the host (a head, say) of which a copy is trained and saved beside the IRM.

    Raises:
        UsageError: naming the field, for a bad value.

    Example:
        >>> IRMConfig(preset="compact", layers="0-3").rank is None
        True
    """

    layers_path: str | None = None
    tone: str | None = None
    template: str = "chat"
    strength: float = 1.0
    host: dict[str, Any] | None = None
    site: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        self.task_type: Any = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        if self.base_model_name_or_path:
            self.base_model_name_or_path: str | None = folder_of(self.base_model_name_or_path)
        self.validate()
        if self.template not in TEMPLATES:
            raise UsageError(f"template: {self.template!r} is not one of {', '.join(TEMPLATES)}")
        if check_strength(self.strength).dim():
            raise UsageError(f"strength: {self.strength!r} is not a number")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; a converted host goes by its name, not by this machine's cache folder."""
        values: dict[str, Any] = super().to_dict()
        if self.host and self.host.get("name"):
            values["base_model_name_or_path"] = self.host["name"]
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, and into PEFT's model card what it does not know: that realigner must be imported."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        if card.is_file() and "import realigner" not in (text := card.read_text(encoding="utf-8")):
            card.write_text(text.rstrip() + _HOW_TO_LOAD, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> IRMConfig:
        """Read an adapter's config; in a local folder the weights file is checked too, before anything is built.

        Raises:
            RealignerError: naming the file and what is wrong with it.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            check_adapter(folder)
        config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        assert isinstance(config, IRMConfig)
        return config


def adapter_folder(folder: str | Path) -> Path:
    """The folder that holds the adapter: itself, or its only subfolder that does (PEFT saves a named adapter into one).

    Raises:
        RealignerError: when there is none, or several, naming them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RealignerError(f"{folder}: there is no such adapter folder")
    if (folder / CONFIG_FILE).is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if len(inside) > 1:
        raise RealignerError(f"{folder}: holds several adapters; give one of {', '.join(map(str, inside))}")
    if not inside:
        raise RealignerError(f"{folder}: not an adapter folder, it has no {CONFIG_FILE}")
    return inside[0]


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Check an adapter's two files without a host and return its config's values.

    Raises:
        RealignerError: when a file is missing, truncated, pickled, or not an IRM's.
    """
    folder = adapter_folder(folder)
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RealignerError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict) or values.get("peft_type") != PEFT_NAME.upper():
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise RealignerError(f"{path}: not an IRM (peft_type is {found!r})")
    unknown = sorted(set(values) - {f.name for f in fields(IRMConfig)})
    if unknown:
        raise RealignerError(f"{path}: unknown key {unknown[0]!r}; the adapter may come from a newer realigner")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = (folder / _PICKLE_FILE).exists()
        why = f"{_PICKLE_FILE} is a pickle and is not read" if pickled else "its weights are missing"
        raise RealignerError(f"{folder}: no {WEIGHTS_FILE}; {why}")
    try:
        with safe_open(str(weights), framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise RealignerError(f"{weights}: truncated or damaged ({error})") from None
    return values


class IRMModel(BaseTuner):
    """The PEFT tuner: holds the IRMs and the injector that hooks the host. The host itself is not changed.

    Three arguments more than the host's own, in calls and in ``generate``; they hold for that call alone:

    - ``strength=``: anything that `strength` takes.
    - ``where=``: the tokens that the IRMs act on, as `strength` has it (in ``generate``).
    - ``adapter_names=``: PEFT's, the IRM of each row of the batch: a name, ``"__base__"`` for none, or a tuple of names that
      are summed. With beams or several replies a prompt, give one for each prompt.

    Calls may run in several threads at once: each has its own settings, and a generation keeps those it began with.
    ``set_adapter`` and ``disable_adapter`` change the model for all calls that begin afterwards.
    """

    uses_shared_state = True
    prefix = "irm_"
    tuner_layer_cls = AdapterRegistry
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        if isinstance(model, PeftModel) and not isinstance(model.base_model, IRMModel):
            model = model.get_base_model()  # a host with LoRA: attach beside it, to the same host
        refuse_attached(find_layers(model, config.layers_path)[0])
        others = model.__dict__.pop("peft_config", None)  # else PEFT would file our config under LoRA's
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        finally:
            if others is not None:
                model.peft_config = others

    def forward(self, *args: Any, strength: Strength | None = None, where: Where | None = None, **kwargs: Any) -> Any:
        """The host's forward, with settings of its own if any are given."""
        if strength is None and where is None:
            return self._run(self.model, None, args, kwargs)
        return self._run(self.model, self.registry.settings(self.settings, strength, where), args, kwargs)

    def generate(self, *args: Any, strength: Strength | None = None, where: Where | None = None, **kwargs: Any) -> Any:
        """The host's ``generate``, with settings of its own if any are given."""
        config = kwargs.get("generation_config") or self.model.generation_config
        repeats = [kwargs.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences")]
        inputs = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), *args)
        prompt = next((value.shape[1] for value in inputs if isinstance(value, torch.Tensor)), 0)
        settings = self.registry.settings(self.settings, strength, where)
        settings = replace(settings, irms=self.registry.enabled(), generation=Generation(prompt, max(repeats)))
        return self._run(self.model.generate, settings, args, kwargs)

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
            generation_config, continuous_batching_config: transformers'.
            strength: a number, or a list with one for each request; or a mapping from IRM to either.
            adapter_names: the IRMs of each request, as in `generate`.
            where: of all requests, or a list with one for each.
            options: of transformers' ``add_request``: ``max_new_tokens``, ``eos_token_id``, ...; its ``warmup``,
                ``progress_bar`` and ``persistent_manager`` are of no effect.

        Returns:
            Request id -> transformers' ``GenerationOutput``, in the order of `inputs`.
        """
        from realigner.batching import (
            BatchManager,
            of_request,
        )  # imports transformers' continuous batching: for those who use it

        for unused in ("warmup", "progress_bar", "persistent_manager"):
            options.pop(unused, None)
        if not inputs:
            return {}
        each = {"strength": strength, "irms": None if adapter_names is None else list(adapter_names), "where": where}
        count = len(inputs)
        chosen = [{key: of_request(value, n, count, key) for key, value in each.items()} for n in range(count)]
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
        """What this thread's next call goes by."""
        return self.injector.threads.state.settings

    def _run(self, call: Any, settings: Settings | None, args: Any, kwargs: Any) -> Any:
        """Make a call, and refuse its result when no IRM had a part in it though some were to."""
        state = self.injector.threads.state
        state.began = False
        with nullcontext() if settings is None else self.injector.threads.using(settings):
            result = call(*args, **kwargs)
            if not state.began and self.registry.active(state.settings):
                raise RealignerError(
                    f"{type(self.model).__name__}: the IRM was never run; this model's forward does not call its decoder as a "
                    "module (was it replaced, or compiled before the IRM was attached?)"
                )
        return result

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an IRM under a name: prove the host's sites, check that the config is for this host, build the network."""
        config = self.peft_config[adapter_name]
        _check_name(adapter_name)
        first = "registry" not in self._modules
        if first:
            self.sites = find_sites(model, config.layers_path)
            self.fingerprint = fingerprint(model)
        _bind(config, self.fingerprint, self.sites.summary())
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            network = config.build(self.sites.width, len(self.sites.layers))
        if first:
            model.requires_grad_(False)
            self.injector = Injector(self.sites, lambda settings: self.registry.active(settings))
            self.registry = AdapterRegistry(self.injector.threads.default)
            self.injector.attach()
        if not config.inference_mode:
            self.injector.carry()
        device = _device(model)
        if not low_cpu_mem_usage and not any(p.is_meta for p in network.parameters()):
            network.to(device)
        self.registry.add(adapter_name, network, device)
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        else:
            network.requires_grad_(False)
        active = adapter_name in self.active_adapters
        set_additional_trainable_modules(model, config, BaseTuner.get_model_config(self), adapter_name, active)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The host's; one that cannot generate (a classifier) has none, and PEFT asks for it all the same."""
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise RealignerError("an IRM replaces no module of the host; use inject_adapter")

    # PEFT's own versions look for tuner layers inside the host; ours is beside it.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one IRM active, or several at once (their deltas are summed)."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.registry.networks:
                raise UsageError(f"adapter {name!r} is not loaded; loaded are {', '.join(self.registry.networks) or 'none'}")
        BaseTunerLayer.set_adapter(self.registry, names, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        BaseTunerLayer.enable_adapters(self.registry, enabled)
        for _, wrapper in self._modules_to_save():
            wrapper.enable_adapters(enabled)

    def _modules_to_save(self) -> list[tuple[str, Any]]:
        """The host's modules that stand in a wrapper with their trained copies, by name."""
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one IRM."""
        if adapter_name not in self.peft_config:
            raise UsageError(f"adapter {adapter_name!r} is not loaded")
        if len(self.registry.networks) == 1:
            raise UsageError(f"adapter {adapter_name!r} is the only one; use model.unload() to get the bare host back")
        del self.peft_config[adapter_name]
        del self.injector.threads.default.strengths[adapter_name]
        BaseTunerLayer.delete_adapter(self.registry, adapter_name)
        self.active_adapter = self.registry.names

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
        self.injector.detach()
        host: nn.Module = self.model
        for name, wrapper in self._modules_to_save():
            host.set_submodule(name, wrapper.original_module)
        if getattr(host, "peft_config", None) is self.peft_config:
            del host.peft_config
        return host

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        with self.injector.threads.using(self.registry.settings(self.settings, rows=adapter_names)):
            yield

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
        return _FILE_PREFIX + rest if found else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner = tuner_of(model)
        expected = tuner.registry.network(adapter_name).state_dict()
        beside = {key: value for key, value in state_dict.items() if f".modules_to_save.{adapter_name}." in key}
        # PEFT adds the embeddings where the vocabulary was resized; they are the host's, and it has them.
        copies = {key for key in state_dict if (key.startswith("base_model.") and "embed" in key) or ".lm_head." in key}
        own = state_dict.keys() - beside.keys() - copies
        given = {key.removeprefix(_FILE_PREFIX): state_dict[key] for key in sorted(own)}
        where = f"adapter {adapter_name!r}"
        for key, tensor in expected.items():
            if key not in given:
                raise RealignerError(f"{where}: tensor {_FILE_PREFIX}{key} is missing from {WEIGHTS_FILE}")
            if given[key].shape != tensor.shape:
                raise RealignerError(
                    f"{where}: tensor {_FILE_PREFIX}{key} has shape {list(given[key].shape)}, not {list(tensor.shape)}"
                )
            if not bool(torch.isfinite(given[key]).all()):
                raise RealignerError(f"{where}: tensor {_FILE_PREFIX}{key} of {WEIGHTS_FILE} has values that are not finite")
        for key in given:
            if key not in expected:
                raise RealignerError(f"{where}: {WEIGHTS_FILE} has a tensor {key!r} that this IRM does not have")
        return beside | {f"base_model.registry.networks.{adapter_name}.{key}": value for key, value in given.items()}


register_peft_method(name=PEFT_NAME, config_cls=IRMConfig, model_cls=IRMModel)


@contextmanager
def strength(model: nn.Module, value: Strength = 1.0, adapter: str | None = None, where: Where | None = None) -> Iterator[None]:
    """Scale the deltas of IRMs in the calls of a block: 0 is the bare host, 1 the IRM as trained.

    The block holds for the thread it is in and for threads begun inside it (a streamer's), not for others; a generation keeps
    the settings it began with. In coroutines, which share a thread, and in pools give ``strength=`` to the call instead.

    A token's keys and values stay in a cache as they were made. So a text whose cache goes on under other settings is
    the text of one forward with a strength for each token: those of the time when each was read.

    Args:
        model: a model with an IRM, wrapped (DataParallel, DDP, compiled) or not.
        value: a number of at most 1000 either way (negative values push the other way), one for each row of the batch
            ``[row]``, one for each token ``[row, position]`` (in ``generate`` counted from the prompt's first token; the last
            column holds for the rest), or a mapping from an IRM's name to any of these.
        adapter: the IRM to scale, active or not (setting one does not make it active); every loaded one when None.
        where: the tokens that IRMs act on when generating: ``"all"``, ``"prompt"``, ``"reply"``, or a number of tokens from the
            reply's beginning. A delta at a token changes what is predicted after it: the reply's first token is predicted at
            the prompt's last.

    Raises:
        UsageError: for a value out of range, or an adapter that is not loaded; in the forward, for a batch of another size.

    Example:
        >>> with strength(model, 0.5):  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> with strength(model, {"anger": 1.0, "sadness": [0, 0.5]}):  # doctest: +SKIP
        ...     model.generate(**two_rows)
    """
    tuner = tuner_of(model)
    with tuner.injector.threads.using(tuner.registry.settings(tuner.settings, value, where, adapter=adapter)):
        yield


def tuner_of(model: nn.Module) -> IRMModel:
    """The IRM tuner of a model that `get_peft_model` or `PeftModel.from_pretrained` returned, whatever wraps it.

    Raises:
        UsageError: when the model carries no IRM.
    """
    tuner = _tuner(model)
    if tuner is None:
        raise UsageError(f"{type(model).__name__} has no IRM; attach one with peft.get_peft_model(host, IRMConfig(...))")
    return tuner


def _tuner(model: Any) -> IRMModel | None:
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
    if _tuner(model) is not None:
        raise RealignerError(
            "TRL sends merged weights to vLLM, and an IRM cannot be merged (it depends on its input); let transformers "
            "generate: use_vllm=False"
        )


def template_of(model: nn.Module) -> str:
    """How prompts are put to a model: as its active IRM was trained; as the host's own template has it where there is none."""
    tuner = _tuner(model)
    return "chat" if tuner is None or not tuner.registry.names else str(tuner.peft_config[tuner.registry.names[0]].template)


def load_irm(host: nn.Module, folder: str | Path, adapter_name: str = "default", trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for a local folder, with every refusal a `RealignerError` of one line."""
    check_adapter(folder)
    model: PeftModel = PeftModel.from_pretrained(
        host, str(adapter_folder(folder)), adapter_name=adapter_name, is_trainable=trainable
    )
    return model


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
    """Equal, but for numbers that the probe fitted (in another precision they come out a little different)."""
    if isinstance(saved, dict) and isinstance(found, dict):
        # Where the layers are depends on the class (text-only, multimodal); that they are the same the fingerprint tells.
        return saved.keys() == found.keys() and all(_same_site(saved[key], found[key]) for key in saved if key != "layers")
    if isinstance(saved, list) and isinstance(found, list):
        return len(saved) == len(found) and all(_same_site(*pair) for pair in zip(saved, found, strict=True))
    if isinstance(saved, float) and isinstance(found, float):
        return abs(saved - found) <= 0.02 * abs(found)
    return bool(saved == found)


def _check_name(name: str) -> None:
    if not name or hasattr(nn.ModuleDict, name):
        raise UsageError(f"adapter name {name!r} cannot be used: it clashes with the names of PyTorch modules")
    # PEFT tells adapters apart by finding ".name." in tensor names, so a name must not be part of one.
    if name in ("registry", "networks", "trunk", "output", "weight", "bias", "base_model") or name.isdigit() or "." in name:
        raise UsageError(f"adapter name {name!r} cannot be used: it clashes with the names of tensors")


def _device(host: nn.Module) -> torch.device:
    devices = [p.device for p in host.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")
