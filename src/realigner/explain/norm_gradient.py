"""The gradient that reaches the residual stream through the final norm, and its two parts.

For ``y = g * h / r`` (RMSNorm, ``r^2 = mean h^2 + eps``) and ``u = dL/dy``, which for a plain head is ``W_U^T (p - t)``:

``dL/dh_i = g_i u_i / r  -  h_i (sum_j u_j y_j) / (d r^2)``

The first is direct: the index moves the logits. The second goes through the norm's scale: growing h_i shrinks all of y. For a
plain head ``sum_j u_j y_j = E_p[z] - z_t``. Where g_i is almost 0 only the second is left, and it grows with h_i. LayerNorm
(``y = g * c / s + b``, ``c = h - mean h``) has it with c and s, and a third part, the mean of the direct one, which its own
centring takes away from every index alike: it is counted with the second.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

Norm = Literal["rms", "layer"]


class GradientParts(NamedTuple):
    """dL/dh as a sum ``[..., neuron]``: what acts on the logits directly, and what acts through the norm's scale."""

    direct: torch.Tensor
    through_norm: torch.Tensor


def split_gradient(h: torch.Tensor, u: torch.Tensor, gain: torch.Tensor, eps: float, norm: Norm = "rms") -> GradientParts:
    """The two parts of ``dL/dh``.

    Args:
        h: the residual that the final norm reads ``[..., neuron]``.
        u: the gradient of the loss with respect to the norm's output, of the same shape.
        gain: what the norm multiplies by ``[neuron]`` (Gemma's: 1 + its weight).
        eps: the norm's.
        norm: ``"rms"`` or ``"layer"``.

    Example:
        >>> h = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
        >>> y = h / h.square().mean(-1, keepdim=True).sqrt()
        >>> parts = split_gradient(h.detach(), torch.tensor([[1.0, 0.0]]), torch.ones(2), 0.0)
        >>> bool(torch.allclose(sum(parts), torch.autograd.grad(y[0, 0], h)[0]))
        True
    """
    centred = h - h.mean(-1, keepdim=True) if norm == "layer" else h
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    direct = gain * u / scale
    along = (gain * u * centred).mean(-1, keepdim=True) / scale
    through = -centred * along / scale.square()
    if norm == "layer":
        through = through - direct.mean(-1, keepdim=True)
    return GradientParts(direct, through)


def norm_eps(norm: nn.Module) -> float:
    """A norm's epsilon, under any of the names that it goes by."""
    for name in ("eps", "variance_epsilon", "epsilon", "norm_eps"):
        if isinstance(getattr(norm, name, None), float):
            return float(getattr(norm, name))
    return 0.0


def norm_kind(norm: nn.Module, width: int) -> Norm:
    """Whether a norm over `width` neurons takes the mean away: then adding 3 to all of its input changes nothing."""
    like = next(norm.parameters(), torch.empty(0))
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    with torch.no_grad():
        first, second = norm(x), norm(x + 3)
    return "layer" if (first - second).abs().max() < 0.1 * first.abs().max() else "rms"
