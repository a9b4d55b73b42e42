"""Constant vectors: one for each layer, added to the residual stream at the IRM's sites at every token.

Each is an ordinary IRM whose network reads nothing: all of its weights are 0 but the output's bias. So it is saved, loaded,
scaled and served as an IRM is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, set_seed

from realigner.chat_format import IGNORED, ChatFormat
from realigner.console import progress
from realigner.errors import RealignerError
from realigner.evaluation.irm_methods import irm_attached
from realigner.evaluation.method_protocol import Fitted, Job, Method, MethodRecord, restored
from realigner.evaluation.row_training import train_on_rows
from realigner.irm_config import IRMConfig
from realigner.locate import find_sites
from realigner.prompts import Message
from realigner.residuals import Residuals
from realigner.training.batches import Collator, to_last_label
from realigner.tuner import strength, tuner_of

STRENGTHS = (0.025, 0.05, 0.1, 0.2, 0.4)  # of mean differences that are tried
_ROWS = 8  # in a batch of forwards


def constant_irm(host: nn.Module, vectors: torch.Tensor | None = None, tone: str | None = None) -> PeftModel:
    """A host with an IRM that adds a constant vector in each layer.

    Args:
        host: bare.
        vectors: ``[layer, neuron]``; zeros when None.
        tone: what the IRM's config calls it.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> host = tiny_host("llama")
        >>> model = constant_irm(host, torch.ones(3, 32))
        >>> tuner_of(model).registry.network("default")(torch.randn(1, 1, 32)).unique()
        tensor([1.])
        >>> _ = model.unload()
    """
    shape: dict[str, Any] = {"widths": [1], "rank": 0, "output_std": 0.0, "input_scale": 1.0, "delta_scale": 1.0}
    model = cast(PeftModel, get_peft_model(host, IRMConfig(tone=tone, **shape)))
    network = tuner_of(model).registry.network("default").requires_grad_(False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        if vectors is not None:
            network.output.bias.copy_(vectors.flatten())
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class ConstantMethod(Method):
    """A method that adds constant vectors."""

    @abstractmethod
    def find(self, job: Job) -> tuple[torch.Tensor, dict[str, Any]]:
        """The vectors ``[layer, neuron]``, and entries of the record; the host is left bare."""

    def learn(self, job: Job) -> dict[str, Any]:
        with restored(job.host):
            set_seed(job.recipe.seed)
            vectors, facts = self.find(job)
            model = constant_irm(job.host, vectors, job.task.tone)
            try:
                with job.keeping() as aside:
                    model.save_pretrained(str(aside), save_embedding_layers=False)
            finally:
                model.unload()
        return {**facts, "norms": [round(float(norm), 5) for norm in vectors.norm(dim=1)]}

    @contextmanager
    def attached(self, host: Any, tokenizer: Any, folder: Path, record: MethodRecord) -> Iterator[Fitted]:
        with irm_attached(host, tokenizer, folder, record.parameters) as fitted:
            yield fitted


@dataclass(frozen=True, kw_only=True)
class TrainedVectors(ConstantMethod):
    """A vector for each layer, trained on the rows.

    Attributes:
        shared: one vector for all layers.
    """

    shared: bool = False

    def find(self, job: Job) -> tuple[torch.Tensor, dict[str, Any]]:
        frozen = list(job.host.modules())
        model = constant_irm(job.host)
        try:
            network = tuner_of(model).registry.network("default")
            output, layers = network.output, len(network.layers)
            if self.shared:
                parametrize.register_parametrization(output, "bias", _Repeated(layers))
                cast(Any, output).parametrizations.bias.original.requires_grad_(True)
            else:
                output.bias.requires_grad_(True)
            facts = train_on_rows(model, job, frozen)
            return output.bias.detach().cpu().view(layers, -1), facts
        finally:
            model.unload()

    def parameters(self, config: PreTrainedConfig) -> int:
        text = config.get_text_config(decoder=True)
        return int(text.hidden_size * (1 if self.shared else text.num_hidden_layers))


class _Repeated(nn.Module):
    """A vector ``[neuron]`` as the same one for each layer ``[layer * neuron]``."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self._layers = layers

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.repeat(self._layers)

    def right_inverse(self, bias: torch.Tensor) -> torch.Tensor:
        return bias.view(self._layers, -1)[0].clone()


@dataclass(frozen=True, kw_only=True)
class MeanDelta(ConstantMethod):
    """The mean of a trained IRM's own deltas over all tokens of ``task.train``: what is left of it without its input."""

    def find(self, job: Job) -> tuple[torch.Tensor, dict[str, Any]]:
        return mean_deltas(job), {}


@dataclass(frozen=True, kw_only=True)
class RandomVectors(ConstantMethod):
    """Random directions, each layer's as long as the mean of a trained IRM's deltas there: a control of the same size."""

    def find(self, job: Job) -> tuple[torch.Tensor, dict[str, Any]]:
        mean = mean_deltas(job)
        drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(job.recipe.seed))
        return drawn * (mean.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)), {}


@dataclass(frozen=True, kw_only=True)
class MeanDifference(ConstantMethod):
    """Difference in means: the residual over the toned replies' tokens less that over the bare host's own replies.

    Both answer the questions of ``task.train`` and are read at the IRM's sites, layer by layer. The vectors of all layers are
    multiplied by one number, that of `STRENGTHS` whose replies to ``task.tune`` have the highest score. (The package
    steering-vectors takes the same difference; it needs transformers 4 and cannot be installed beside ours.)
    """

    def find(self, job: Job) -> tuple[torch.Tensor, dict[str, Any]]:
        assert job.given.score is not None  # needed
        toned = [row.conversation for row in job.task.train]
        asked, length = [conversation[:-1] for conversation in toned], job.given.reply_tokens
        with progress("the bare host's replies", len(asked)) as bar:
            said = Fitted(job.host, job.tokenizer).generate(asked, length, bar.advance)
        own = [
            [*before, {"role": "assistant", "content": reply}]
            for before, reply in zip(asked, said, strict=True)
            if reply.strip()
        ]
        if not own:
            raise RealignerError(f"{self.name}: the bare host replied to no question; there is nothing to compare with")
        vectors = mean_residuals(job, toned) - mean_residuals(job, own)

        rows, scores = list(job.task.tune), dict[float, float]()
        prompts = [row.conversation[:-1] for row in rows]
        model = constant_irm(job.host, vectors)
        try:
            with progress("trying strengths", len(STRENGTHS) * len(rows)) as bar:
                for value in STRENGTHS:
                    with strength(model, value):
                        replies = Fitted(model, job.tokenizer).generate(prompts, length, bar.advance)
                    scores[value] = float(job.given.score(rows, replies, ""))
        finally:
            model.unload()
        best = max(scores, key=lambda value: scores[value])
        return best * vectors, {"strength": best, "scores": {f"{value:g}": score for value, score in scores.items()}}


def mean_deltas(job: Job) -> torch.Tensor:
    """The mean delta ``[layer, neuron]`` of the IRM that is given, over all tokens of ``task.train``: prompts and replies.

    Raises:
        RealignerError: when it acts on some layers only.
    """
    assert job.given.irm is not None  # needed
    with irm_attached(job.host, job.tokenizer, job.given.irm, 0) as fitted, torch.no_grad():
        tuner = tuner_of(fitted.model)
        layers, every = tuner.registry.network("default").layers, len(tuner.sites.layers)
        if len(layers) != every:
            raise RealignerError(f"{job.given.irm}: its IRM acts on {len(layers)} of {every} layers; give one of all layers")
        total, tokens = torch.zeros(every, tuner.sites.width, dtype=torch.float64), 0
        found: list[torch.Tensor] = []
        tuner.injector.observers.append(lambda active, h0, delta: found.append(delta))
        for inputs in _batches(job, [row.conversation for row in job.task.train]):
            mask = inputs["attention_mask"].bool()
            fitted.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            total += found.pop()[mask].double().sum(dim=0).cpu()
            tokens += int(mask.sum())
    return (total / tokens).float()


def mean_residuals(job: Job, conversations: Sequence[Sequence[Message]]) -> torch.Tensor:
    """The mean residual at each site ``[layer, neuron]`` of the bare host, over the tokens of the last replies."""
    sites = find_sites(job.host)
    total, tokens = torch.zeros(len(sites.layers), sites.width, dtype=torch.float64), 0
    with Residuals(sites).watching() as residuals, torch.no_grad():
        for inputs in _batches(job, conversations):
            mask = inputs["labels"] != IGNORED
            job.host(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            for layer in range(len(sites.layers)):
                total[layer] += residuals.layers[layer][mask].double().sum(dim=0).cpu()
            tokens += int(mask.sum())
    return (total / tokens).float()


def _batches(job: Job, conversations: Sequence[Sequence[Message]]) -> Iterator[dict[str, torch.Tensor]]:
    """Conversations as batches on the host's device, cut as in training."""
    chat_format = ChatFormat(job.tokenizer, job.recipe.template)
    device = next(job.host.parameters()).device
    examples = [to_last_label(example) for messages in conversations for example in chat_format.examples(messages, "reply")]
    cut = [{key: values[: job.recipe.max_length] for key, values in example.items()} for example in examples]
    rows = [{**example, "row": number} for number, example in enumerate(sorted(cut, key=lambda item: len(item["input_ids"])))]
    collate = Collator(getattr(job.tokenizer, "pad_token_id", None) or 0)
    for start in range(0, len(rows), _ROWS):
        yield {key: values.to(device) for key, values in collate(rows[start : start + _ROWS]).items()}
