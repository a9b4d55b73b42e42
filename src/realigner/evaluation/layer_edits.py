"""Edits that read each layer's own residual, where an IRM reads the first: PSR and LoReFT.

At the site of every layer (`sites.Site`) the residual h of each token is read and a delta is added to it there, so that later
layers read a residual that was edited before. What is added depends on the token alone: caches, padding and batches change
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear, rms_norm
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, set_seed

from realigner.errors import RealignerError
from realigner.evaluation.method_protocol import (
    ADAPTER,
    EDITS_FILE,
    Fitted,
    Job,
    Method,
    MethodRecord,
    closest,
    restored,
)
from realigner.evaluation.row_training import train_on_rows
from realigner.files import writing
from realigner.locate import find_sites
from realigner.probe import first_hidden, first_tensor, replaced
from realigner.sites import INPUT, Site


class Edit(nn.Module, ABC):
    """What is added to the residual of one layer: ``h [..., neuron] -> delta [..., neuron]``, in float32."""

    @abstractmethod
    def forward(self, h: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it is, by the names that its tensors have in a file."""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load saved parameters and freeze them."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


class PSREdit(Edit):
    """``V^T relu(W h / rms(h) + b)``: directions V, each as strong as is read from the token's own activation.

    It begins at no effect (V = 0) with coefficients near 1.

    Args:
        rank: how many directions.
        width: of the residual.
    """

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(rank, width))
        self.readers = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.bias = nn.Parameter(torch.ones(rank))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        coefficients = torch.relu(linear(rms_norm(h, h.shape[-1:], eps=1e-6), self.readers, self.bias))
        delta: torch.Tensor = coefficients @ self.directions
        return delta

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"directions": self.directions, "readers": self.readers, "bias": self.bias}


class LoReFTEdit(Edit):
    """``R^T (W h + b - R h)``, the rows of R orthonormal (Wu et al. 2024, arXiv 2404.03592, equation 2).

    It starts with no effect (W = R, b = 0), whereas pyreft draws W at random, which with an edit in every layer starts far from
    the host.

    Args:
        rank: of R and W.
        width: of the residual.
    """

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.rotate = nn.Linear(width, rank, bias=False)
        nn.init.orthogonal_(self.rotate.weight)
        self.source = nn.Linear(width, rank)
        orthogonal(self.rotate)
        with torch.no_grad():
            self.source.weight.copy_(self.rotate.weight)
            self.source.bias.zero_()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rotation = self.rotate.weight
        # W h - R h as (W - R) h: of a residual of thousands, the difference of two products is mostly rounding.
        delta: torch.Tensor = linear(h, self.source.weight - rotation, self.source.bias) @ rotation
        return delta

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"rotation": self.rotate.weight, "source": self.source.weight, "bias": self.source.bias}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        remove_parametrizations(self.rotate, "weight")  # R itself was saved, and not what it is made of
        super().load(tensors)


EDITS: dict[str, Callable[[int, int], Edit]] = {"psr": PSREdit, "reft": LoReFTEdit}


def read_edits(path: Path, kind: str, layers: int, width: int) -> list[Edit]:
    """The edits in a file, one for each layer of a host.

    Raises:
        RealignerError: when it cannot be read, or has other tensors than such edits of one rank.
    """
    if not path.is_file():
        raise RealignerError(f"{path.parent}: no {path.name}; fit the method again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RealignerError(f"{path}: truncated or damaged ({error}); fit the method again") from None
    rank = len(tensors.get("0.bias", ()))
    with torch.random.fork_rng(devices=[]):
        edits = [EDITS[kind](rank, width) for _ in range(layers)]
    expected = {f"{layer}.{name}": value.shape for layer, edit in enumerate(edits) for name, value in edit.tensors().items()}
    if not rank or expected != {name: value.shape for name, value in tensors.items()}:
        raise RealignerError(f"{path}: holds other tensors than {kind} edits of {layers} layers of width {width}; fit it again")
    if bad := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        raise RealignerError(f"{path}: {bad[0]} has values that are not finite numbers; fit the method again")
    for layer, edit in enumerate(edits):
        edit.load({name: tensors[f"{layer}.{name}"] for name in edit.tensors()})
    return edits


class EditedHost(nn.Module):
    """A host with an edit at every layer's site; called, generates and is trained as the host is, in one thread at a time.

    Args:
        host: bare; its modules and weights stay as they are. `detach` takes the hooks off.
        edits: one for each layer.

    Attributes:
        strength: what deltas are multiplied by; 0 is the bare host to the bit.
    """

    def __init__(self, host: Any, edits: list[Edit]) -> None:
        super().__init__()
        self.host = host
        self.edits = nn.ModuleList(edits).to(next(host.parameters()).device)
        self.strength = 1.0
        self._handles: list[RemovableHandle] = []
        host.requires_grad_(False)
        sites = find_sites(host)
        for site, layer, edit in zip(sites.sites, sites.layers, edits, strict=True):
            self._handles += _attach(self, site, layer, edit)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def config(self) -> Any:
        return self.host.config

    @property
    def generation_config(self) -> Any:
        return self.host.generation_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.host(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The host's."""
        return self.host.generate(*args, **kwargs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The edits, as in their file."""
        named = {
            f"{layer}.{name}": value
            for layer, edit in enumerate(self.edits)
            for name, value in cast(Edit, edit).tensors().items()
        }
        return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}


def _attach(model: EditedHost, site: Site, layer: nn.Module, edit: Edit) -> list[RemovableHandle]:
    """Hooks that keep what a layer's residual is the sum of, and add the delta to its last term (as `injection` does)."""
    terms: dict[str, torch.Tensor] = {}

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = first_hidden(args, kwargs)
        assert hidden is not None  # the probe refuses layers that are given none
        terms[INPUT] = hidden

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                terms[name] = tensor

        return hook

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        if model.strength == 0:
            return None
        branch = first_tensor(output)
        assert branch is not None  # the probe read it
        x = terms[INPUT]
        h = site.residual(lambda name: (branch if name == site.branch else terms[name]).view_as(x))
        delta = edit(h.float()) * (model.strength / site.scale)
        return replaced(output, branch + delta.to(branch.dtype).reshape(branch.shape))

    # The terms stay until the next forward: a checkpointed layer is computed again without its own hooks.
    handles = [layer.register_forward_pre_hook(begin, with_kwargs=True)]
    for name, _ in site.base:
        if name != INPUT:
            handles.append(layer.get_submodule(name).register_forward_hook(keep(name)))
    return [*handles, layer.get_submodule(site.branch).register_forward_hook(add)]


@dataclass(frozen=True, kw_only=True)
class LayerEdits(Method):
    """An edit in every layer, trained on the rows.

    Attributes:
        edit: of which kind (`EDITS`).
        rank: directions in each layer.
    """

    edit: str
    rank: int

    def learn(self, job: Job) -> dict[str, Any]:
        sites = find_sites(job.host)
        with restored(job.host):
            frozen = list(job.host.modules())
            set_seed(job.recipe.seed)
            model = EditedHost(job.host, [EDITS[self.edit](self.rank, sites.width) for _ in sites.layers])
            try:
                facts = train_on_rows(model, job, frozen)
                with job.keeping() as aside, writing(aside):
                    save_file(model.tensors(), aside / EDITS_FILE)
            finally:
                model.detach()
        return facts

    @contextmanager
    def attached(self, host: Any, tokenizer: Any, folder: Path, record: MethodRecord) -> Iterator[Fitted]:
        sites = find_sites(host)
        edits = read_edits(folder / ADAPTER / EDITS_FILE, self.edit, len(sites.layers), sites.width)
        with restored(host):
            model = EditedHost(host, edits).eval().requires_grad_(False)

            @contextmanager
            def scaled(value: float) -> Iterator[None]:
                before, model.strength = model.strength, value
                try:
                    yield
                finally:
                    model.strength = before

            try:
                yield Fitted(model, tokenizer, record.parameters, scaled=scaled)
            finally:
                model.detach()

    def parameters(self, config: PreTrainedConfig) -> int:
        text = config.get_text_config(decoder=True)
        return int(text.num_hidden_layers * self.rank * (2 * text.hidden_size + 1))

    @property
    def recipe_keys(self) -> Mapping[str, Any]:
        # torch's `orthogonal` keeps signs of 1 among its weights, and rounds them towards 0: decayed they are no longer 1.
        return {"weight_decay": 0.0} if self.edit == "reft" else {}

    def sized(self, config: PreTrainedConfig, parameters: int) -> Method:
        return closest(parameters, lambda rank: replace(self, rank=rank), config)
