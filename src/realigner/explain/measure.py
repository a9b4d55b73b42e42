"""Residuals, gradients and deltas at every index of a host's residual stream, from one pass over a few rows.

The forward is that of training (teacher forcing, loss on the reply), so the gradient is the one that an IRM follows at the
start of its training.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from realigner.chat_format import IGNORED
from realigner.console import progress
from realigner.explain.example_batches import ExampleBatches
from realigner.explain.norm_gradient import GradientParts, norm_eps, norm_kind, split_gradient
from realigner.explain.roles import Stream, final_norm, find_stream
from realigner.explain.site_gradients import SiteGradients
from realigner.irm import IRM
from realigner.residuals import Residuals
from realigner.traces.summary import DeltaSums

TOKENS = ("first", "delimiter", "rest")  # kinds of token: massive activations live in the first two


def measure_host(
    host: nn.Module,
    rows: ExampleBatches,
    irms: Mapping[str, IRM],
    delimiters: frozenset[int] = frozenset(),
    quiet: bool = True,
) -> xr.Dataset:
    """Residuals, gradients and deltas at every index, over rows.

    An IRM reads h0, which is computed before any delta is added, so its deltas for given tokens do not depend on its effect.

    Args:
        host: the bare host; frozen, left as it was.
        rows: what it reads.
        irms: by name.
        delimiters: ids of the tokens counted as delimiters; see `delimiter_ids`.
        quiet: show no progress.

    Returns:
        Over ``neuron``: ``gradient_cosine`` (mean over pairs of layers), ``direct``, ``through_norm`` (RMS of the two parts of
        the gradient at the final norm, over targets). Over ``[layer, neuron]``: ``energy_share`` (of
        the sum of h^2), ``gradient`` (RMS), ``gradient_sign`` (|mean| / mean absolute value: 1 if it never changes sign). Over
        ``[kind, layer, neuron]``, kinds of token ``first``, ``delimiter``, ``rest``: ``residual`` (RMS), ``residual_mean``,
        ``residual_max``, ``residual_kurtosis`` (3 for Gaussian values). Over ``[irm, layer, neuron]``: ``delta`` (mean size:
        M), ``delta_mean``, ``cancelled`` (minus the projection of the running sum of deltas on the host's residual, as a share
        of it: 1 where the IRM takes the channel away, negative where it amplifies it). NaN in layers that an IRM does not
        add to.

    Raises:
        RealignerError: where no site can be proven, or nothing norms the stream before the head.
    """
    stream = find_stream(host)
    sites = stream.sites
    sums = _Sums(len(sites.layers), sites.width, list(irms))
    residuals, gradients, head = Residuals(sites), SiteGradients(sites), _Head(host, stream)
    device = next(host.parameters()).device
    marks = torch.tensor(sorted(delimiters), dtype=torch.long, device=device)
    with progress("measuring the host", len(rows.order), quiet) as task:
        for held in rows.batches:
            batch = {name: tensor.to(device) for name, tensor in held.items()}
            with torch.enable_grad(), residuals.watching(), gradients.watching(), head.watching():
                logits = host(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
                wanted = batch["shift_labels"] != IGNORED
                torch.autograd.backward(
                    torch.nn.functional.cross_entropy(logits[wanted].float(), batch["shift_labels"][wanted])
                )
            real = batch["attention_mask"].bool()
            kinds = torch.where(torch.isin(batch["input_ids"], marks), 1, 2)  # numbers in `TOKENS`
            kinds[:, 0] = 0
            kinds = kinds[real]
            with torch.no_grad():
                sums.add_states(torch.stack([residuals.layers[layer][real] for layer in range(sums.layers)], 1), kinds)
                sums.add_gradients(gradients.at_sites[real], head.parts(wanted))
                for name, irm in irms.items():
                    sums.add_deltas(name, irm, gradients.h0[real])
            task.advance(len(real))
    return sums.dataset()


def delimiter_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are punctuation or line breaks alone: where hosts keep massive activations, besides the first token."""
    words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    marks = set(string.punctuation + string.whitespace)
    return frozenset(token for token, word in enumerate(words) if word and word.strip(" ") and set(word) <= marks)


class _Head:
    """The final norm's input, its output and the gradient by that."""

    def __init__(self, host: nn.Module, stream: Stream) -> None:
        self.norm, name = final_norm(host, stream)
        weight, role = getattr(self.norm, "weight", None), stream.roles.get(f"{name}.weight")
        offset = role.offset if role is not None else 0.0
        gain = torch.ones(stream.sites.width) if weight is None else weight.detach().float() + offset
        self.gain, self.eps, self.kind = gain, norm_eps(self.norm), norm_kind(self.norm, stream.sites.width)
        self.h: torch.Tensor | None = None
        self.y: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        def keep(_: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.h = args[0].detach()
            output.retain_grad()
            self.y = output

        handle = self.norm.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def parts(self, wanted: torch.Tensor) -> GradientParts:
        """The parts of the gradient at targets ``[target, neuron]``."""
        assert self.h is not None
        assert self.y is not None
        assert self.y.grad is not None
        h, u = self.h[wanted].float(), self.y.grad[wanted].float()
        return split_gradient(h, u, self.gain.to(h.device), self.eps, self.kind)


class _Sums:
    """Running sums, in float64."""

    def __init__(self, layers: int, width: int, irms: list[str]) -> None:
        self.layers, self.width, self.irms = layers, width, irms
        states, cells = (len(TOKENS), layers, width), (layers, width)
        self.tokens = np.zeros(len(TOKENS))
        self.h, self.h2, self.h4, self.largest = (np.zeros(states) for _ in range(4))
        self.gradients = DeltaSums()
        self.products = np.zeros((width, layers, layers))
        self.targets = 0
        self.direct, self.through = np.zeros(width), np.zeros(width)
        self.deltas = {name: DeltaSums() for name in irms}  # in the IRM's own layers
        self.along = {name: np.zeros(cells) for name in irms}
        self.own = {name: list[int]() for name in irms}
        self.states: torch.Tensor | None = None

    def add_states(self, h: torch.Tensor, kinds: torch.Tensor) -> None:
        """``h [token, layer, neuron]`` and each token's kind."""
        self.states = h.double()
        for kind in range(len(TOKENS)):
            own = self.states[kinds == kind]
            if not len(own):
                continue
            self.tokens[kind] += len(own)
            self.h[kind] += _numpy(own.sum(0))
            self.h2[kind] += _numpy(own.square().sum(0))
            self.h4[kind] += _numpy(own.square().square().sum(0))
            self.largest[kind] = np.maximum(self.largest[kind], _numpy(own.abs().amax(0)))

    def add_gradients(self, g: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor]) -> None:
        """``g [token, layer, neuron]``, and the two parts at targets ``[target, neuron]``."""
        self.gradients.add(g)
        by_neuron = g.double().permute(2, 1, 0)
        self.products += _numpy(by_neuron @ by_neuron.transpose(1, 2))
        direct, through = parts
        self.targets += len(direct)
        self.direct += _numpy(direct.double().square().sum(0))
        self.through += _numpy(through.double().square().sum(0))

    def add_deltas(self, name: str, irm: IRM, h0: torch.Tensor) -> None:
        """What an IRM adds to these tokens ``[token, neuron]``."""
        assert self.states is not None
        self.own[name] = list(irm.layers)
        delta = irm(h0).double()
        self.deltas[name].add(delta)
        whole = torch.zeros(len(h0), self.layers, self.width, dtype=torch.float64, device=delta.device)
        whole[:, self.own[name]] = delta
        self.along[name] += _numpy((whole.cumsum(1) * self.states).sum(0))

    @np.errstate(divide="ignore", invalid="ignore")
    def dataset(self) -> xr.Dataset:
        n = self.tokens[:, None, None]
        mean, second = self.h / n, self.h2 / n
        fourth = self.h4 / n  # about zero, as the sums are: a channel's mean is what makes it one
        energy = self.h2.sum(0)
        norms = np.sqrt(np.einsum("nll->nl", self.products))
        cosines = self.products / (norms[:, :, None] * norms[:, None, :])
        pairs = ~np.eye(self.layers, dtype=bool)
        values: dict[str, Any] = {
            "residual": (("kind", "layer", "neuron"), np.sqrt(second)),
            "residual_mean": (("kind", "layer", "neuron"), mean),
            "residual_max": (("kind", "layer", "neuron"), np.where(n > 0, self.largest, np.nan)),
            "residual_kurtosis": (("kind", "layer", "neuron"), fourth / second**2),
            "energy_share": (("layer", "neuron"), energy / energy.sum(-1, keepdims=True)),
            "gradient": (("layer", "neuron"), np.sqrt(self.gradients.mean("sum_sq"))),
            "gradient_sign": (("layer", "neuron"), np.abs(self.gradients.mean("sum")) / self.gradients.mean()),
            "gradient_cosine": ("neuron", np.nanmean(cosines[:, pairs], axis=1) if self.layers > 1 else np.nan * self.direct),
            "direct": ("neuron", np.sqrt(self.direct / self.targets)),
            "through_norm": ("neuron", np.sqrt(self.through / self.targets)),
        }

        of_irms = np.full((3, len(self.irms), self.layers, self.width), np.nan)
        for at, name in enumerate(self.irms):
            own, sums = self.own[name], self.deltas[name]
            of_irms[:, at, own] = sums.mean(), sums.mean("sum"), -(self.along[name] / energy)[own]
        for name, each in zip(("delta", "delta_mean", "cancelled"), of_irms, strict=True):
            values[name] = ("irm", "layer", "neuron"), each
        coords = {"kind": list(TOKENS), "layer": np.arange(self.layers), "neuron": np.arange(self.width), "irm": self.irms}
        return xr.Dataset(values, coords, {"tokens": self.tokens.tolist(), "targets": self.targets})


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.cpu().numpy())
