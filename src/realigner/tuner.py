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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import PeftType, register_peft_method
from safetensors import SafetensorError, safe_open
from torch import nn

from realigner.bank import IRMBank, Strength, strength_tensors
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint, fingerprint
from realigner.hosts import folder_of
from realigner.injection import Injector, refuse_attached
from realigner.irm import IRMShape
from realigner.sites import find_layers, find_sites

PEFT_NAME = "irm"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
TEMPLATES = ("chat", "plain")
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
        host: the fingerprint of the host it belongs to (`fingerprints.Fingerprint`).
        site: what the probe found on that host (`sites.HostSites.summary`).

    Raises:
        UsageError: naming the field, for a bad value.

    Example:
        >>> IRMConfig(preset="compact", layers="0-3").rank is None
        True
    """

    layers_path: str | None = None
    tone: str | None = None
    template: str = "chat"
    host: dict[str, Any] | None = None
    site: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.task_type: Any = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        self.validate()
        if self.template not in TEMPLATES:
            raise UsageError(f"template: {self.template!r} is none of {', '.join(TEMPLATES)}")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; a converted host goes by its name, not by this machine's cache folder."""
        values: dict[str, Any] = super().to_dict()
        if self.host and self.host.get("name"):
            values["base_model_name_or_path"] = self.host["name"]
        return values

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
        if config.base_model_name_or_path:
            config.base_model_name_or_path = folder_of(config.base_model_name_or_path)
        return config


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Check an adapter's two files without a host and return its config's values.

    Raises:
        RealignerError: when a file is missing, truncated, pickled, or not an IRM's.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise RealignerError(f"{folder}: there is no such adapter folder")
    if not path.is_file():
        raise RealignerError(f"{folder}: not an adapter folder, it has no {CONFIG_FILE}")
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
    """The PEFT tuner: holds the bank of IRMs and the injector that hooks the host. The host itself is not changed.

    Two arguments more than the host's own, in calls and in ``generate``:

    - ``strength=``: for this call, anything that `strength` takes.
    - ``adapter_names=``: PEFT's, the IRM of each row of the batch: a name, ``"__base__"`` for none, or a tuple of names that
      are summed. With beams or several replies a prompt, give one for each prompt.
    """

    uses_shared_state = True
    prefix = "irm_"
    tuner_layer_cls = IRMBank
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

    def forward(self, *args: Any, strength: Strength | None = None, **kwargs: Any) -> Any:
        """The host's forward, at a strength if one is given."""
        with self._at(strength):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, strength: Strength | None = None, **kwargs: Any) -> Any:
        """The host's ``generate``, at a strength if one is given."""
        settings = kwargs.get("generation_config") or self.model.generation_config
        numbers = [kwargs.get(key) or getattr(settings, key, None) or 1 for key in ("num_beams", "num_return_sequences")]
        before, self.injector.repeats = self.injector.repeats, max(numbers)
        try:
            with self._at(strength):
                return self.model.generate(*args, **kwargs)
        finally:
            self.injector.repeats = before

    def _at(self, value: Strength | None) -> AbstractContextManager[None]:
        return nullcontext() if value is None else self.bank.scaled(strength_tensors(self.bank, value, None))

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
        first = "bank" not in self._modules
        if first:
            self.sites = find_sites(model, config.layers_path)
            self.fingerprint = fingerprint(model)
        _bind(config, self.fingerprint, self.sites.summary())
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            network = config.build(self.sites.width, len(self.sites.layers))
        if first:
            model.requires_grad_(False)
            self.bank = IRMBank()
            self.injector = Injector(self.sites, self.bank.active)
            self.injector.attach()
        if not config.inference_mode:
            self.injector.carry()
        device = _device(model)
        if not low_cpu_mem_usage and not any(p.is_meta for p in network.parameters()):
            network.to(device)
        self.bank.networks[adapter_name] = network
        self.bank.strengths[adapter_name] = torch.ones((), device=device)
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        else:
            network.requires_grad_(False)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise RealignerError("an IRM replaces no module of the host; use inject_adapter")

    # PEFT's own versions look for tuner layers inside the host; ours is beside it.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one IRM active, or several at once (their deltas are summed)."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.bank.networks:
                raise UsageError(f"adapter {name!r} is not loaded; loaded are {', '.join(self.bank.networks) or 'none'}")
        BaseTunerLayer.set_adapter(self.bank, names, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        BaseTunerLayer.enable_adapters(self.bank, enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one IRM."""
        if adapter_name not in self.peft_config:
            raise UsageError(f"adapter {adapter_name!r} is not loaded")
        if len(self.bank.networks) == 1:
            raise UsageError(f"adapter {adapter_name!r} is the only one; use model.unload() to get the bare host back")
        del self.peft_config[adapter_name]
        BaseTunerLayer.delete_adapter(self.bank, adapter_name)
        self.active_adapter = self.bank.names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the named IRMs trainable or not."""
        BaseTunerLayer.set_requires_grad(self.bank, adapter_names, requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.bank, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def _check_merge_allowed(self) -> None:
        raise RealignerError("an IRM depends on its input, so it cannot be merged into weights; keep it attached, or unload()")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused: see the module's docstring."""
        self._check_merge_allowed()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        self.injector.detach()
        host: nn.Module = self.model
        if getattr(host, "peft_config", None) is self.peft_config:
            del host.peft_config
        return host

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        if isinstance(adapter_names, str):
            raise UsageError("adapter_names: give a list with an entry for each row of the batch, or use set_adapter")
        with self.bank.by_row(adapter_names):
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
        place = f"bank.networks.{adapter_name}."
        return {key: value for key, value in state_dict.items() if place in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        _, found, rest = key.partition(f"bank.networks.{adapter_name}.")
        return _FILE_PREFIX + rest if found else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner = tuner_of(model)
        expected = tuner.bank.network(adapter_name).state_dict()
        given = {key.removeprefix(_FILE_PREFIX): value for key, value in state_dict.items()}
        where = f"adapter {adapter_name!r}"
        for key, tensor in expected.items():
            if key not in given:
                raise RealignerError(f"{where}: tensor {_FILE_PREFIX}{key} is missing from {WEIGHTS_FILE}")
            if given[key].shape != tensor.shape:
                raise RealignerError(
                    f"{where}: tensor {_FILE_PREFIX}{key} has shape {list(given[key].shape)}, not {list(tensor.shape)}"
                )
        for key in given:
            if key not in expected:
                raise RealignerError(f"{where}: {WEIGHTS_FILE} has a tensor {key!r} that this IRM does not have")
        return {f"base_model.bank.networks.{adapter_name}.{key}": value for key, value in given.items()}


register_peft_method(name=PEFT_NAME, config_cls=IRMConfig, model_cls=IRMModel)


@contextmanager
def strength(model: nn.Module, value: Strength, adapter: str | None = None) -> Iterator[None]:
    """Scale the deltas of the active IRMs (or of one) within a block: 0 is the bare host, 1 the IRM as trained.

    Keys cached before the block were made at another strength: start each generation inside it, and never change the
    strength within one.

    Args:
        model: a model with an IRM.
        value: a number of at most 1000 either way (negative values push the other way), one for each row of the batch, or a
            mapping from an IRM's name to either.
        adapter: the IRM to scale, active or not (setting one does not make it active); all active ones when None.

    Raises:
        UsageError: for a value out of range, or an adapter that is not loaded; in the forward, for a batch of another size.

    Example:
        >>> with strength(model, 0.5):  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> with strength(model, {"anger": 1.0, "sadness": [0, 0.5]}):  # doctest: +SKIP
        ...     model.generate(**two_rows)
    """
    bank = tuner_of(model).bank
    with bank.scaled(strength_tensors(bank, value, adapter)):
        yield


def tuner_of(model: nn.Module) -> IRMModel:
    """The IRM tuner of a model that `get_peft_model` or `PeftModel.from_pretrained` returned.

    Raises:
        UsageError: when the model carries no IRM.
    """
    tuner = getattr(model, "base_model", model)
    if not isinstance(tuner, IRMModel):
        raise UsageError(f"{type(model).__name__} has no IRM; attach one with peft.get_peft_model(host, IRMConfig(...))")
    return tuner


def template_of(model: nn.Module) -> str:
    """How prompts are put to a model: as its active IRM was trained; as the host's own template has it where there is none."""
    tuner = getattr(model, "base_model", model)
    if not isinstance(tuner, IRMModel) or not tuner.bank.names:
        return "chat"
    return str(tuner.peft_config[tuner.bank.names[0]].template)


def load_irm(host: nn.Module, folder: str | Path, adapter_name: str = "default", trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for a local folder, with every refusal a `RealignerError` of one line."""
    check_adapter(folder)
    model: PeftModel = PeftModel.from_pretrained(host, str(folder), adapter_name=adapter_name, is_trainable=trainable)
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


def _check_name(name: str) -> None:
    if not name or hasattr(nn.ModuleDict, name):
        raise UsageError(f"adapter name {name!r} cannot be used: it clashes with the names of PyTorch modules")
    # PEFT tells adapters apart by finding ".name." in tensor names, so a name must not be part of one.
    if (
        name in ("bank", "networks", "strengths", "trunk", "output", "weight", "bias", "base_model")
        or name.isdigit()
        or "." in name
    ):
        raise UsageError(f"adapter name {name!r} cannot be used: it clashes with the names of tensors")


def _device(host: nn.Module) -> torch.device:
    devices = [p.device for p in host.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")
