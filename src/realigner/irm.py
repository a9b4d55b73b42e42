"""The injectable realignment model itself: a network from h0 to the deltas of every chosen layer.

The network is independent of any host: it maps a residual vector ``h0 [..., neuron]`` to perturbations
``delta [..., layer, neuron]``, position by position. Where h0 is read and where deltas are added is defined in `sites` and
`injection`.

Source: Smith et al. 2024, "The Mysterious Case of Neuron 1512", arXiv 2407.03621, section 3 and its public code.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from realigner.errors import UsageError

PRESETS = ("compact", "paper")
EDITIONS = (1, 2)  # of the compact preset; the last is the newest
LayerChoice = str | Sequence[int] | range
_MOST_LAYERS = 100_000  # of a host: what a text of layers may name
_MOST_WIDTHS = 100  # hidden layers of an IRM


def _round_to_8(value: float) -> int:
    return max(8, round(value / 8) * 8)


def _compact_1(hidden_size: int) -> tuple[tuple[int, ...], int]:
    # Two narrow hidden layers and a rank of h/9. At h=4096 and 32 layers: 71M parameters, 1.1% of a 7B host;
    # at h=576 and 30 layers (SmolLM2-135M): 1.4M, 1.0%.
    width = _round_to_8(hidden_size * 4 / 9)
    return (width, width), _round_to_8(hidden_size / 9)


def _compact_2(hidden_size: int) -> tuple[tuple[int, ...], int]:
    # One hidden layer and a rank of h/29. At h=4096 and 32 layers: 24M parameters, 0.3% of a 7B host;
    # at h=576 and 30 layers: 458,420, as many as LoRA of rank 8 on the queries and values.
    return (_round_to_8(hidden_size * 5 / 18),), max(4, round(hidden_size * 5 / 144))


def _paper(hidden_size: int) -> tuple[tuple[int, ...], int]:
    return (3 * hidden_size,) * 4, 0


def parse_layers(layers: LayerChoice, num_layers: int | None = None, field: str = "layers") -> tuple[int, ...] | None:
    """Turn any way of naming layers into sorted, distinct indices.

    Args:
        layers: ``"all"``, a ``range``, a sequence of ints, or a string such as ``"0-3,7"`` (ends included).
        num_layers: the host's number of layers; None when it is not known yet.
        field: the name to use in error messages.

    Returns:
        The indices, or None for ``"all"`` when `num_layers` is not known.

    Raises:
        UsageError: naming `field`, for anything that is not a set of existing layers.

    Example:
        >>> parse_layers("0-2,5", num_layers=8)
        (0, 1, 2, 5)
    """
    if isinstance(layers, str):
        if layers.strip() == "all":
            return None if num_layers is None else tuple(range(num_layers))
        indices = _parse_layer_text(layers, field)
    elif isinstance(layers, Sequence):
        indices = list(cast("Sequence[int]", layers))
    else:
        raise UsageError(f"{field}: {reprlib.repr(layers)} is not 'all', a list of layer numbers or a range")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise UsageError(f"{field}: {reprlib.repr(index)} is not a layer number (an int)")
        if index < 0 or (num_layers is not None and index >= num_layers):
            top = "" if num_layers is None else f"; this host has layers 0 to {num_layers - 1}"
            raise UsageError(f"{field}: there is no layer {index}{top}")
    if not indices:
        raise UsageError(f"{field}: no layer chosen; give 'all' or at least one layer number")
    if len(set(indices)) != len(indices):
        raise UsageError(f"{field}: a layer is named twice in {list(indices)}")
    return tuple(sorted(indices))


def _parse_layer_text(text: str, field: str) -> list[int]:
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first]
        if not all(n.isascii() and n.isdecimal() and len(n) < 6 for n in numbers) or int(numbers[-1]) < int(first):
            raise UsageError(f"{field}: cannot read {part.strip()[:40]!r} in {text[:60]!r}; write 'all', '0-31' or '0,5,7-9'")
        indices.extend(range(int(first), int(numbers[-1]) + 1))
        if len(indices) > _MOST_LAYERS:
            raise UsageError(f"{field}: more than {_MOST_LAYERS} layers in {text[:60]!r}")
    return indices


@dataclass
class IRMShape:
    """What network to build; every field left at None takes the preset's value.

    Attributes:
        preset: ``"compact"`` (factorised output, near-zero start) or ``"paper"`` (the shape and default initialisation of
            the paper's public code: ``Linear(h, 3h) ReLU [Linear(3h, 3h) ReLU] x3 Linear(3h, h*L)``).
        layers: layers that receive a delta: ``"all"``, a list, a range or a string such as ``"0-31"``.
        widths: widths of the hidden layers.
        rank: width of the factorised output; 0 for one dense output layer.
        output_std: standard deviation of the last layer's initial weights (its bias then starts at 0); None with the
            paper's preset keeps PyTorch's default initialisation.
        input_norm: scale each h0 to a root mean square of 1 before the first layer (no parameters). Hosts differ a
            thousandfold in the size of h0 (0.14 in SmolLM2), and one learning rate should do for all.
        input_scale: divisor applied to h0 before anything else. None: with the compact preset, h0's root mean square on the
            host (the median over tokens), measured when the IRM is created; with the paper's preset, 1.
        delta_scale: factor applied to deltas: one number, or one for each chosen layer. None: with the compact preset,
            measured on the host (see `residuals.delta_scales`), so that one learning rate fits hosts and layers whose residuals
            differ in size; with the paper's preset, 1.
        masked: neuron indices whose delta is forced to zero in every layer, during training and inference.
        dropout: dropout probability on the trunk's outputs during training; recipes have their own default.
        edition: version of the compact preset. 2: one hidden layer with SiLU, deltas scaled layer by layer. 1 (the preset
            until November 2026): two hidden layers with ReLU, three times the parameters, one scale for all layers. None:
            the newest; in an adapter file, 1.

    Raises:
        UsageError: naming the field, for a value no network can be built from.

    Example:
        >>> IRMShape(preset="compact", layers=[0, 5], rank=16).parameter_count(hidden_size=64, num_layers=8)
        3488
    """

    preset: str = "compact"
    layers: LayerChoice = "all"
    widths: Sequence[int] | None = None
    rank: int | None = None
    output_std: float | None = None
    input_norm: bool | None = None
    input_scale: float | None = None
    delta_scale: float | Sequence[float] | None = None
    masked: Sequence[int] | None = None
    dropout: float = 0.0
    edition: int | None = None

    def validate(self) -> None:
        """Check every field on its own; raises UsageError naming the first bad one."""
        if self.preset not in PRESETS:
            raise UsageError(f"preset: unknown preset {reprlib.repr(self.preset)}; choose one of {', '.join(PRESETS)}")
        parse_layers(self.layers)
        if isinstance(self.layers, range):
            self.layers = list(self.layers)
        if self.widths is not None:
            if not isinstance(self.widths, (list, tuple)) or not self.widths:
                raise UsageError(f"widths: {reprlib.repr(self.widths)} is not a non-empty list of layer widths")
            if len(self.widths) > _MOST_WIDTHS:
                raise UsageError(f"widths: {len(self.widths)} hidden layers; an IRM has {_MOST_WIDTHS} at most")
            for width in self.widths:
                _check_int("widths", width, at_least=1)
            self.widths = list(self.widths)
        if self.rank is not None:
            _check_int("rank", self.rank, at_least=0)
        std = self.output_std
        if std is not None and (isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < 1e3):
            raise UsageError(f"output_std: {reprlib.repr(std)} is not a number of 0 or more")
        dropout = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise UsageError(f"dropout: {reprlib.repr(dropout)} is not a number from 0 to below 1")
        if self.input_norm not in (None, True, False):
            raise UsageError(f"input_norm: {reprlib.repr(self.input_norm)} is not true or false")
        by_layer = isinstance(self.delta_scale, (list, tuple))
        deltas = self.delta_scale if isinstance(self.delta_scale, (list, tuple)) else [self.delta_scale]
        for name, scales in (("input_scale", [self.input_scale]), ("delta_scale", deltas)):
            for scale in scales:
                wrong = isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e9
                if wrong and (scale is not None or (by_layer and name == "delta_scale")):
                    raise UsageError(f"{name}: {reprlib.repr(scale)} is not a number above 0")
        if by_layer:
            self.delta_scale = list(deltas)  # type: ignore[arg-type]
        if self.edition not in (None, *EDITIONS) or isinstance(self.edition, bool):
            raise UsageError(f"edition: {reprlib.repr(self.edition)} is not one of {', '.join(map(str, EDITIONS))}")
        if self.masked is not None:
            if not isinstance(self.masked, (list, tuple)):
                raise UsageError(f"masked: {reprlib.repr(self.masked)} is not a list of neuron indices")
            for index in self.masked:
                _check_int("masked", index, at_least=0)
            self.masked = sorted(set(self.masked)) or None

    def resolved_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that receive a delta on a host of this depth.

        Raises:
            UsageError: for a layer that such a host does not have.
        """
        layers = parse_layers(self.layers, num_layers)
        assert layers is not None  # num_layers is known here
        return layers

    def resolved_widths(self, hidden_size: int) -> tuple[tuple[int, ...], int]:
        """The widths of the hidden layers, and the rank, on a host of this residual width."""
        if self.preset == "paper":
            widths, rank = _paper(hidden_size)
        else:
            widths, rank = (_compact_1 if self.edition == 1 else _compact_2)(hidden_size)
        return tuple(widths if self.widths is None else self.widths), rank if self.rank is None else self.rank

    def build(self, hidden_size: int, num_layers: int) -> IRM:
        """Build the network for a host of this residual width and depth (weights drawn from torch's global seed)."""
        self.validate()
        layers = self.resolved_layers(num_layers)
        widths, rank = self.resolved_widths(hidden_size)
        newest = self.preset == "compact" and self.edition != 1
        std = 1e-3 if self.preset == "compact" else None
        if self.masked and max(self.masked) >= hidden_size:
            raise UsageError(f"masked: there is no index {max(self.masked)}; this host has 0 to {hidden_size - 1}")
        scales = self.delta_scale
        if isinstance(scales, (list, tuple)) and len(scales) != len(layers):
            raise UsageError(f"delta_scale: {len(scales)} given for {len(layers)} layers; give one number, or one for each")
        return IRM(
            hidden_size,
            layers,
            widths=widths,
            rank=rank,
            output_std=std if self.output_std is None else self.output_std,
            input_norm=self.preset == "compact" if self.input_norm is None else self.input_norm,
            input_scale=1.0 if self.input_scale is None else self.input_scale,
            delta_scale=1.0 if scales is None else scales,
            masked=self.masked or (),
            activation=nn.SiLU if newest else nn.ReLU,
            dropout=self.dropout,
        )

    def parameter_count(self, hidden_size: int, num_layers: int) -> int:
        """Number of parameters of the network that `build` creates, without creating it."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build(hidden_size, num_layers).parameters())


def _check_int(field: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UsageError(f"{field}: {reprlib.repr(value)} is not a whole number of {at_least} or more")


class IRM(nn.Module):
    """The trainable network: ``h0 [..., neuron] -> delta [..., layer, neuron]``, each position on its own.

    Only the chosen layers are computed and stored. The layer axis is the outer one, so that one layer's delta is a contiguous
    block. (In the paper's code it is the innermost: this permutes the last layer's rows, so initial weights have the same
    distribution.)

    Args:
        hidden_size: width of the host's residual stream.
        layers: sorted layer indices that receive a delta.
        widths: hidden widths of the trunk, each followed by the activation.
        rank: 0 for a dense output, else the width of a linear bottleneck before it.
        output_std: initial standard deviation of the output weights; None keeps PyTorch's default.
        input_norm: scale h0 to a root mean square of 1, token by token.
        input_scale: what h0 is divided by first.
        delta_scale: what the output is multiplied by: a number, or one for each of the layers.
        masked: neuron indices at which every delta is 0.
        activation: called to create the activation module after each hidden layer.
        dropout: dropout probability on the trunk's outputs during training.

    Attributes:
        training_dtype: dtype of the matrix products during training; None: the weights' own dtype, in which everything else
            is always computed. Not saved.

    Example:
        >>> irm = IRM(hidden_size=8, layers=(0, 3), widths=(16,), rank=4, output_std=1e-3)
        >>> irm(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 2, 8])
    """

    masked: torch.Tensor | None
    layer_scales: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        widths: Sequence[int],
        rank: int,
        output_std: float | None,
        input_norm: bool = False,
        input_scale: float = 1.0,
        delta_scale: float | Sequence[float] = 1.0,
        masked: Sequence[int] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.layers = tuple(layers)
        self.input_norm = input_norm
        self.input_scale, self.delta_scale = input_scale, delta_scale
        by_layer = None if isinstance(delta_scale, (int, float)) else torch.tensor(delta_scale)[:, None]
        self.register_buffer("layer_scales", by_layer, persistent=False)
        self.register_buffer("masked", torch.tensor(list(masked)) if masked else None, persistent=False)
        self.training_dtype: torch.dtype | None = None
        trunk: list[nn.Module] = []
        width = hidden_size
        for next_width in widths:
            trunk += [nn.Linear(width, next_width), activation()]
            width = next_width
        if rank:
            trunk.append(nn.Linear(width, rank))
            width = rank
        if dropout:
            trunk.append(nn.Dropout(dropout))
        self.trunk = nn.Sequential(*trunk)
        self.output = nn.Linear(width, len(self.layers) * hidden_size)
        if output_std is not None:
            nn.init.normal_(self.output.weight, std=output_std)
            nn.init.zeros_(self.output.bias)

    def forward(self, h0: torch.Tensor) -> torch.Tensor:
        """Deltas of all chosen layers for residuals ``h0 [..., neuron]``, computed in the network's own dtype."""
        if self.training_dtype is None or not self.training:
            return self._deltas(h0)
        with torch.autocast(h0.device.type, dtype=self.training_dtype):
            return self._deltas(h0)

    def _deltas(self, h0: torch.Tensor) -> torch.Tensor:
        h0 = h0.to(self.output.weight.dtype)
        if self.input_scale != 1.0:
            h0 = h0 / self.input_scale
        if self.input_norm:
            h0 = torch.nn.functional.rms_norm(h0, (self.hidden_size,), eps=1e-6)
        flat: torch.Tensor = self.output(self.trunk(h0))
        delta = flat.view(*flat.shape[:-1], len(self.layers), self.hidden_size)
        if self.layer_scales is not None:
            delta = delta * self.layer_scales.to(delta.dtype)
        elif isinstance(self.delta_scale, (int, float)) and self.delta_scale != 1.0:
            delta = delta * self.delta_scale
        return delta if self.masked is None else delta.index_fill(-1, self.masked, 0.0)
