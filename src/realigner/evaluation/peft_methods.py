"""LoRA, ShadowPEFT, IA3 and prefix tuning, as PEFT has them, trained on the rows as an IRM is."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    ShadowConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.shadow.layers import ShadowLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, set_seed

from realigner.errors import RealignerError
from realigner.evaluation.method_protocol import ADAPTER, Fitted, Job, Method, MethodRecord, closest, restored
from realigner.evaluation.prompting import system_prompts
from realigner.evaluation.row_training import train_on_rows
from realigner.files import read_object
from realigner.irm_config import CONFIG_FILE, WEIGHTS_FILE, file_tensors


@dataclass(frozen=True, kw_only=True)
class PeftMethod(Method):
    """A method of PEFT's."""

    @abstractmethod
    def peft_config(self, host: Any) -> PeftConfig:
        """How PEFT is to adapt a host."""

    def set_strength(self, model: PeftModel, value: float) -> None:
        """Have an adapted model act at a strength; 1 puts back the very numbers that were loaded."""
        raise NotImplementedError

    def start(self, model: PeftModel, job: Job) -> None:
        """Set what the training begins with, where that is not what PEFT begins with."""

    def learn(self, job: Job) -> dict[str, Any]:
        with restored(job.host):
            frozen = list(job.host.modules())
            set_seed(job.recipe.seed)
            model = self._adapted(job.host)
            try:
                self.start(model, job)
                facts = train_on_rows(model, job, frozen)
                with job.keeping() as aside:
                    model.save_pretrained(str(aside), save_embedding_layers=False)
            finally:
                _unload(model)
        return facts

    @contextmanager
    def attached(self, host: Any, tokenizer: Any, folder: Path, record: MethodRecord) -> Iterator[Fitted]:
        with restored(host):
            model = read_adapted(host, folder / ADAPTER)

            @contextmanager
            def scaled(value: float) -> Iterator[None]:
                self.set_strength(model, value)
                try:
                    yield
                finally:
                    self.set_strength(model, 1.0)

            try:
                adjustable = type(self).set_strength is not PeftMethod.set_strength
                yield Fitted(model, tokenizer, record.parameters, scaled=scaled if adjustable else None)
            finally:
                _unload(model)

    def parameters(self, config: PreTrainedConfig) -> int:
        with torch.device("meta"):
            model = self._adapted(AutoModelForCausalLM.from_config(config))
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def _adapted(self, host: Any) -> PeftModel:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's advice on speed and on names
                model = get_peft_model(host, self.peft_config(host))
        except (ValueError, AttributeError, KeyError) as error:
            raise RealignerError(f"{self.name}: PEFT cannot adapt {type(host).__name__} ({error})") from error
        assert isinstance(model, PeftModel)
        return model


def read_adapted(host: Any, folder: Path) -> PeftModel:
    """A host adapted by what is in a folder. Unlike PEFT's own reading, it takes safetensors alone, and all of the tensors.

    Raises:
        RealignerError: when a file is missing or damaged, or its tensors are not those of its config; the host is left bare.
    """
    given, path = file_tensors(folder), folder / CONFIG_FILE
    read_object(path)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise RealignerError(f"{path}: not a config of PEFT's ({error}); fit the method again") from None
    model = get_peft_model(host, config)
    assert isinstance(model, PeftModel)
    try:
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {name: list(value.shape) for name, value in own.items()} != given:
            raise RealignerError(f"{folder / WEIGHTS_FILE}: holds other tensors than its config asks for; fit the method again")
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE))
    except BaseException:
        _unload(model)
        raise
    return model.eval()


def _unload(model: PeftModel) -> None:
    if not model.active_peft_config.is_prompt_learning:  # which puts nothing into the host
        model.unload()


@dataclass(frozen=True, kw_only=True)
class LoRA(PeftMethod):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) on ``q_proj`` and ``v_proj``; where a host has none, on PEFT's choice for it.

    Attributes:
        rank: of the updates; PEFT's alpha is the same, so that they are not scaled.
    """

    rank: int = 8

    def peft_config(self, host: Any) -> PeftConfig:
        names = {name.rpartition(".")[2] for name, _ in host.named_modules()}
        targets = ["q_proj", "v_proj"] if {"q_proj", "v_proj"} <= names else None
        return LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets, task_type="CAUSAL_LM")

    def set_strength(self, model: PeftModel, value: float) -> None:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", value)

    def sized(self, config: PreTrainedConfig, parameters: int) -> Method:
        return closest(parameters, lambda rank: replace(self, rank=rank), config)


@dataclass(frozen=True, kw_only=True)
class Shadow(PeftMethod):
    """ShadowPEFT, as PEFT 0.21 has it (its `ShadowConfig` cites the equations).

    Its auxiliary loss, which trains the shadow network to be used alone, is left out: the loss is that of all methods.

    Attributes:
        reduced: as small as its config allows with every block injected into: rank and update width of 1, one shadow layer with
            as few heads as keys and values have, an MLP of width 1. The shadow keeps the width of the host: with another it has
            an embedding table of its own, larger than all of the rest. On SmolLM2-135M that is 584,124 parameters.
    """

    reduced: bool = False

    def peft_config(self, host: Any) -> PeftConfig:
        if not self.reduced:
            return ShadowConfig(task_type="CAUSAL_LM")
        heads = getattr(host.config.get_text_config(decoder=True), "num_key_value_heads", None)
        fixed_width = getattr(host.config.get_text_config(decoder=True), "head_dim", None) is not None
        return ShadowConfig(
            task_type="CAUSAL_LM",
            r=1,
            update_hidden_size=1,
            shadow_num_attention_heads=heads if fixed_width else None,
            shadow_intermediate_size=1,
        )

    def set_strength(self, model: PeftModel, value: float) -> None:
        alpha = model.active_peft_config.shadow_alpha
        for module in model.modules():
            if isinstance(module, ShadowLayer):
                module.shadow_alpha["default"] = alpha * value

    def sized(self, config: PreTrainedConfig, parameters: int) -> Method:
        return min((self, replace(self, reduced=True)), key=lambda method: abs(method.parameters(config) - parameters))


@dataclass(frozen=True, kw_only=True)
class IA3(PeftMethod):
    """IA3 (Liu et al. 2022, arXiv 2205.05638) on PEFT's choice of modules: keys, values and MLP times a vector each.

    At strength s the vector l is ``1 + s * (l - 1)``.
    """

    def peft_config(self, host: Any) -> PeftConfig:
        return IA3Config(task_type="CAUSAL_LM")

    def set_strength(self, model: PeftModel, value: float) -> None:
        for module in model.modules():
            if isinstance(module, IA3Layer):
                vector = module.ia3_l["default"]
                fitted = vars(module).setdefault("_fitted", vector.detach().clone())
                vector.data = fitted.clone() if value == 1 else 1 + value * (fitted - 1)


@dataclass(frozen=True, kw_only=True)
class Prefix(PeftMethod):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190): keys and values of virtual tokens before the text, in every layer.

    They begin as those of the tone's system prompts, as its authors advise: PEFT's random ones cost a small host 6 nats.

    Attributes:
        tokens: how many virtual tokens.
    """

    tokens: int = 20

    def peft_config(self, host: Any) -> PeftConfig:
        return PrefixTuningConfig(num_virtual_tokens=self.tokens, task_type="CAUSAL_LM")

    def start(self, model: PeftModel, job: Job) -> None:
        text = " ".join(system_prompts(job.task.tone)) + " "
        text *= 1 + self.tokens // len(job.tokenizer(text)["input_ids"])
        try:
            initialize_kv_prefix_from_text(model, job.tokenizer, text=text, use_chat_template=False)
        except (ValueError, TypeError) as error:
            kind = type(job.host).__name__
            raise RealignerError(f"{self.name}: PEFT cannot read keys and values of {kind} ({error})") from error

    def sized(self, config: PreTrainedConfig, parameters: int) -> Method:
        return closest(parameters, lambda tokens: replace(self, tokens=tokens), config)
