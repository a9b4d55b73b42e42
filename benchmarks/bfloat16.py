"""bfloat16 at the speed of float32, on CPUs without instructions for it.

There PyTorch's own products in bfloat16 are loops, some 60 times as slow as in float32 (AMD EPYC of 2021: 0.6 and 38 GFLOPS).
They sum in float32 and round once; so do these, by way of PyTorch's products in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_KEPT: dict[int, tuple[Tensor, int, Tensor]] = {}  # by address: a weight, its version, and the same in float32


def keep_in_float32(model: nn.Module) -> None:
    """Convert a model's frozen weights to float32 once, not in every product: twice the memory of the model in addition."""
    for weight in model.parameters():
        if weight.dtype == torch.bfloat16 and not weight.requires_grad:
            _KEPT[weight.data_ptr()] = weight, weight._version, weight.float()


@cache  # which keeps the library: without it PyTorch takes its own kernels again
def multiply_in_float32() -> Any:
    """Have this process compute products of bfloat16 tensors on the CPU in float32, and round them.

    Matrix products, of gradients too, are replaced in PyTorch's dispatcher; attention in `torch.nn.functional`.
    """
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        for name in ("mm", "bmm", "addmm", "baddbmm"):
            library.impl(name, partial(_product, getattr(torch, name)), "CPU")
    functional.scaled_dot_product_attention = partial(_attention, functional.scaled_dot_product_attention)
    return library


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.bfloat16:
        return value
    kept = _KEPT.get(value.data_ptr())  # whoever has a kept weight's address is a view of it: transposed, expanded
    if kept is not None and kept[0]._version == kept[1]:
        return kept[2].as_strided(value.shape, value.stride())
    return value.float()


def _product(product: Callable[..., Tensor], *factors: Tensor, **options: Any) -> Tensor:
    # With `out` it is another operator, which is not replaced.
    left, right = factors[-2:]
    wide = [_widened(factor) for factor in factors]
    out = left.new_empty(*left.shape[:-1], right.shape[-1], dtype=wide[-1].dtype)
    return product(*wide, **options, out=out).to(left.dtype)


def _attention(attention: Callable[..., Tensor], query: Tensor, *others: Any, **options: Any) -> Tensor:
    wide = {name: _widened(value) for name, value in options.items()}
    return attention(_widened(query), *map(_widened, others), **wide).to(query.dtype)
