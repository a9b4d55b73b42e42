"""A host whose residual stream is multiplied by a number, and that computes the same: an exact symmetry of pre-norm hosts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from realigner.explain.roles import find_stream


def scaled_host(host: Any, factor: float) -> Any:
    """A copy with everything that writes into the stream times `factor`, the head as it was, norms' epsilons times its square.

    Embeddings, writing matrices and their biases, and the norms of branches (Gemma 2's) are scaled; a tied head gets a copy of
    its own. What reads the stream reads it through norms, to which its size is nothing.
    """
    stream = find_stream(host)
    scaled = copy.deepcopy(host)
    head, embedding = scaled.get_output_embeddings(), scaled.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        scaled.config.tie_word_embeddings = False
    normed = {(role.layer, role.place) for role in stream.roles.values() if role.kind == "gain" and role.stays}
    readers = {name.rpartition(".")[0] for name, role in stream.roles.items() if role.kind == "gain" and not role.stays}
    done = set[int]()
    with torch.no_grad():
        for name, role in stream.roles.items():
            parameter = scaled.get_parameter(name)
            last = role.kind in ("gain", "shift") or (role.layer, role.place) not in normed  # before the stream
            if role.stays and last and id(parameter) not in done:
                done.add(id(parameter))
                parameter.copy_((parameter + role.offset) * factor - role.offset)
        for name, module in scaled.named_modules():
            if name in readers:
                for key in ("eps", "variance_epsilon", "epsilon"):
                    if isinstance(getattr(module, key, None), float):
                        setattr(module, key, getattr(module, key) * factor**2)
    return scaled
