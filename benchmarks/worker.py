"""Run one environment's share of benchmarks/injection.py; started by it, inside the environment it measures.

One JSON object a line: requests on stdin, one answer each on stdout. An answer with the key "error" says in one line what
went wrong. Only this project's own settings import realigner: the peers' environments do not have it.

Every setting changes the output of every layer, at every position of the prompt and of every generated token. `check` proves
that before anything is timed: by comparison with plain hooks for a peer that adds constant vectors, by taking one decoding
step apart from its prompt for the networks (IRM, LoRA).
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Inputs = dict[str, torch.Tensor]
Generate = Callable[[Inputs, dict[str, Any]], Any]  # inputs and options of transformers' generate -> its output
CHECKED_TOKENS = 6


class UnfitError(Exception):
    """A setting that does not do what it would be timed for; the message says in what way."""


@dataclass
class Setting:
    """One way to intervene.

    Attributes:
        generate: what is timed.
        generate_off: the same machinery adding nothing; must give what the bare host gives.
        vectors: the constant vectors ``[layer, neuron]`` a peer adds; None for a network.
        model: what to call for one forward of a network; None for a peer that adds vectors.
        idle: it is to change nothing at all.
        added_bytes: size of the network that is read beside the host's weights.
    """

    generate: Generate
    generate_off: Generate
    vectors: torch.Tensor | None = None
    model: Any = None
    added_bytes: int = 0
    idle: bool = False


def twin(host: Any) -> Any:
    """Another host on the same weights: what a setting does to its modules leaves the bare host as it is."""
    shared = {id(tensor): tensor for tensor in (*host.parameters(), *host.buffers())}
    return copy.deepcopy(host, shared)


def random_vectors(host: Any) -> torch.Tensor:
    """One vector a layer, large enough to change the host's words."""
    config = host.config
    generator = torch.Generator().manual_seed(42)
    vectors = torch.randn(config.num_hidden_layers, config.hidden_size, generator=generator)
    return vectors.to(host.dtype)


def byte_count(module: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in module.parameters())


# Settings. Each is used as its own documentation does; imports are inside, as no environment has all of them.


def irm(host: Any, preset: str) -> Setting:
    """This project's IRM, with the network in the dtype PEFT gives it by default."""
    from peft import get_peft_model

    import realigner as ra

    model = get_peft_model(host, ra.IRMConfig(preset=preset, inference_mode=True)).eval()  # as from_pretrained loads one
    network = model.base_model.registry.network("default")
    if len(network.layers) != host.config.num_hidden_layers:
        raise UnfitError(f"the IRM is on {len(network.layers)} layers, not on all")
    with torch.no_grad():
        network.output.bias.normal_(generator=torch.Generator().manual_seed(42))  # fresh compact IRMs add next to nothing

    def off(inputs: Inputs, options: dict[str, Any]) -> Any:
        with ra.strength(model, 0.0):
            return model.generate(**inputs, **options)

    return Setting(_plain(model), off, model=model, added_bytes=byte_count(network))


def irm_idle(host: Any) -> Setting:
    """An IRM that is attached and switched off: what the hooks cost that find nothing to do."""
    model = irm(host, "compact").model

    def off(inputs: Inputs, options: dict[str, Any]) -> Any:
        with model.disable_adapter():
            return model.generate(**inputs, **options)

    return Setting(off, off, model=model, idle=True)


def lora(host: Any) -> Setting:
    """PEFT's LoRA of rank 8 on PEFT's default targets for Llama (q_proj and v_proj of every layer), not merged."""
    from peft import LoraConfig, get_peft_model
    from peft.helpers import rescale_adapter_scale

    before = byte_count(host)
    model = get_peft_model(host, LoraConfig(r=8, task_type="CAUSAL_LM")).eval()
    weights = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    if len(weights) != 2 * host.config.num_hidden_layers:
        raise UnfitError(f"LoRA was put on {len(weights)} projections, not on two of every layer")
    with torch.no_grad():
        for weight in weights:
            weight.normal_(generator=torch.Generator().manual_seed(42))

    def off(inputs: Inputs, options: dict[str, Any]) -> Any:
        with rescale_adapter_scale(model, 0.0):
            return model.generate(**inputs, **options)

    return Setting(_plain(model), off, model=model, added_bytes=byte_count(host) - before)


def steering_vectors(host: Any) -> Setting:
    """``with vector.apply(model)`` around the generation; it patches all tokens by default."""
    from steering_vectors import SteeringVector  # type: ignore[import-not-found]

    def adding(vectors: torch.Tensor) -> Generate:
        steering = SteeringVector(dict(enumerate(vectors)), "decoder_block")

        def generate(inputs: Inputs, options: dict[str, Any]) -> Any:
            with steering.apply(host):
                return host.generate(**inputs, **options)

        return generate

    vectors = random_vectors(host)
    return Setting(adding(vectors), adding(torch.zeros_like(vectors)), vectors)


def pyvene(host: Any) -> Setting:
    """An IntervenableModel with one AdditionIntervention a layer, its source a constant."""
    import pyvene as pv  # type: ignore[import-not-found]

    def adding(vectors: torch.Tensor) -> Generate:
        places = [
            pv.RepresentationConfig(
                layer=layer, component="block_output", intervention_type=pv.AdditionIntervention, source_representation=vector
            )
            for layer, vector in enumerate(vectors)
        ]
        model = pv.IntervenableModel(pv.IntervenableConfig(places), model=host)

        def generate(inputs: Inputs, options: dict[str, Any]) -> Any:
            # Without unit locations pyvene acts on whatever positions a forward has: the prompt's, then each new token's.
            # intervene_on_prompt=False would make it fill in a location, and leave the prompt out.
            return model.generate(inputs, unit_locations=None, intervene_on_prompt=True, **options)[1]

        return generate

    vectors = random_vectors(host)
    return Setting(adding(vectors), adding(torch.zeros_like(vectors)), vectors)


def nnsight(host: Any) -> Setting:
    """One generation trace; in it a loop over the decoding steps adds in place to each layer's output."""
    from nnsight import TransformersModel  # type: ignore[import-not-found]

    model = TransformersModel(host, tokenizer=AutoTokenizer.from_pretrained(host.name_or_path))

    def adding(vectors: torch.Tensor) -> Generate:
        def generate(inputs: Inputs, options: dict[str, Any]) -> Any:
            with model.generate(**inputs, **options) as tracer:
                for _ in tracer.iter[: options["max_new_tokens"]]:
                    for layer, vector in zip(model.model.layers, vectors, strict=True):
                        layer.output[:] += vector
                tokens = tracer.result.save()
            return tokens  # noqa: RET504 (nnsight runs the block elsewhere, so none may return from inside it)

        return generate

    vectors = random_vectors(host)
    return Setting(adding(vectors), adding(torch.zeros_like(vectors)), vectors)


SETTINGS: dict[str, Callable[[Any], Setting]] = {
    "irm-compact": lambda host: irm(host, "compact"),
    "irm-paper": lambda host: irm(host, "paper"),
    "irm-idle": irm_idle,
    "lora": lora,
    "steering-vectors": steering_vectors,
    "pyvene": pyvene,
    "nnsight": nnsight,
}


def _plain(model: Any) -> Generate:
    return lambda inputs, options: model.generate(**inputs, **options)


# Checks.


def greedy(tokens: int) -> dict[str, Any]:
    """The options of a generation of exactly so many tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


def logits_of(generate: Generate, inputs: Inputs) -> torch.Tensor:
    """``[step, row, word]`` of a short generation."""
    steps: list[torch.Tensor] = []

    def note(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        steps.append(logits.nan_to_num(neginf=0.0).clone())  # the end token is at -inf, so that none ends early
        return logits

    # Not by a hook on the output head: pyvene removes every forward hook of the model, also those of others.
    generate(inputs, greedy(CHECKED_TOKENS) | {"logits_processor": [note]})
    return torch.stack(steps)


def reference(host: Any, vectors: torch.Tensor, prompt: bool, steps: bool) -> Generate:
    """The constant vectors added by plain hooks, at the prompt's positions, at the generated tokens', or at both."""

    def generate(inputs: Inputs, options: dict[str, Any]) -> Any:
        def hook(vector: torch.Tensor) -> Any:
            def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
                return output + vector if (prompt if output.shape[1] > 1 else steps) else output

            return add

        handles = [layer.register_forward_hook(hook(vector)) for layer, vector in zip(host.model.layers, vectors, strict=True)]
        try:
            return host.generate(**inputs, **options)
        finally:
            for handle in handles:
                handle.remove()

    return generate


def check(bare: Any, setting: Setting, inputs: Inputs) -> None:
    """Raise UnfitError unless the setting intervenes everywhere when on, and nowhere when off."""
    plain = logits_of(_plain(bare), inputs)
    if not torch.equal(logits_of(setting.generate_off, inputs), plain):
        raise UnfitError("adding nothing, it does not give the bare host's logits")
    if setting.idle:
        return
    found = logits_of(setting.generate, inputs)
    if setting.vectors is not None:
        check_places(bare, setting.vectors, inputs, found)
        return
    if torch.equal(found[0], plain[0]):
        raise UnfitError("it changes nothing on the prompt")
    check_step(bare, setting.model, inputs)


def check_places(bare: Any, vectors: torch.Tensor, inputs: Inputs, found: torch.Tensor) -> None:
    """Raise UnfitError unless the logits found are those of the vectors added everywhere, saying where else they were."""

    def is_as(prompt: bool, steps: bool) -> bool:
        # To the bit: one sum of two tensors rounds one way. A tolerance of 5% let the last layers be left out.
        return torch.equal(found, logits_of(reference(bare, vectors, prompt, steps), inputs))

    if is_as(prompt=True, steps=True):
        return
    if is_as(prompt=True, steps=False):
        raise UnfitError("it intervenes on the prompt only, not on generated tokens")
    if is_as(prompt=False, steps=True):
        raise UnfitError("it intervenes on generated tokens only, not on the prompt")
    raise UnfitError("its logits are not those of the same vectors added by plain hooks to every layer at every position")


@torch.no_grad()
def check_step(bare: Any, model: Any, inputs: Inputs) -> None:
    """Raise UnfitError if a decoding step is as the bare host's, after a prompt that the bare host read for both."""
    read = bare(**inputs, use_cache=True)
    token = read.logits[:, -1:].argmax(-1)

    def step(stepping: Any) -> torch.Tensor:
        logits: torch.Tensor = stepping(input_ids=token, past_key_values=copy.deepcopy(read.past_key_values)).logits
        return logits

    if torch.equal(step(model), step(bare)):
        raise UnfitError("it changes nothing at a decoding step")


# The protocol.


class Worker:
    """The bare host and the settings of one environment."""

    def load(self, folder: str, prompt: list[int], dtype: str, threads: int) -> dict[str, Any]:
        """Load the bare host."""
        torch.set_num_threads(threads)
        self.bare = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        self.prompt = prompt
        self.settings: dict[str, Setting] = {}
        return {"python": platform.python_version(), "threads": torch.get_num_threads(), "host_bytes": byte_count(self.bare)}

    def check(self, setting: str, package: str) -> dict[str, Any]:
        """Make a setting ready and prove that it does what it is to be timed for."""
        made = SETTINGS[setting](twin(self.bare))
        check(self.bare, made, self.inputs(batch=2))
        self.settings[setting] = made
        return {"versions": {name: version(name) for name in ("torch", "transformers", package)}, "bytes": made.added_bytes}

    def time(self, setting: str, batch: int, tokens: int) -> dict[str, Any]:
        """Seconds per token of one generation."""
        generate = _plain(self.bare) if setting == "bare" else self.settings[setting].generate
        inputs = self.inputs(batch)
        start = time.perf_counter()
        generate(inputs, greedy(tokens))
        return {"seconds": (time.perf_counter() - start) / tokens}

    def inputs(self, batch: int) -> Inputs:
        ids = torch.tensor([self.prompt] * batch)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages print when they are imported; stdout is for answers
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except UnfitError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a peer can raise anything, and the driver goes on without it
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
