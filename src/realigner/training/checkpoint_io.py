"""What a checkpoint remembers besides the IRM, as safetensors with JSON in its header, never as a pickle.

Dicts, lists, numbers, strings, None and tensors, nested in any way: the optimiser's state, the schedule's, and the state of
every source of random numbers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from realigner.errors import RealignerError

_TENSOR = "__tensor__"
_NUMBERED = "__numbered__"  # a dict whose keys are whole numbers


def save_tree(path: Path, tree: Any) -> None:
    """Write a nested structure of dicts, lists, plain values and tensors."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_pack(tree, tensors))
    save_file(tensors or {"none": torch.zeros(1)}, path, metadata={"tree": structure})


def load_tree(path: Path) -> Any:
    """Load what `save_tree` wrote, bit for bit (tuples come back as lists).

    Raises:
        RealignerError: for a file that is missing, truncated or not written by `save_tree`.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:

            def restored(value: dict[str, Any]) -> Any:  # called from the innermost dict outwards
                if set(value) == {_TENSOR}:
                    return handle.get_tensor(value[_TENSOR])
                return {int(key): item for key, item in value[_NUMBERED].items()} if set(value) == {_NUMBERED} else value

            return json.loads((handle.metadata() or {})["tree"], object_hook=restored)
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise RealignerError(f"{path}: truncated or damaged ({why}); take an earlier checkpoint") from None


def random_states() -> dict[str, Any]:
    """Python's, numpy's and torch's random states, that of the GPU or other accelerator in use included."""
    states: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    states["numpy"] = [keys.tolist(), int(place), int(has_gauss), float(gauss)]  # type: ignore[union-attr]
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        states["accelerator"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `random_states` returned."""
    kind, numbers, gauss = states["python"]
    random.setstate((kind, tuple(numbers), gauss))
    np.random.set_state(("MT19937", np.array(states["numpy"][0], dtype=np.uint32), *states["numpy"][1:]))
    torch.set_rng_state(states["cpu"])
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and "accelerator" in states:
        torch.get_device_module(device).set_rng_state(states["accelerator"])


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        packed = {str(key): _pack(item, tensors) for key, item in value.items()}
        return {_NUMBERED: packed} if value and all(type(key) is int for key in value) else packed
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
