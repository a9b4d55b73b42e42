"""Record the deltas of prompt and generated tokens as a labelled `xarray.Dataset`.

The deltas are taken where they are computed (once per forward, in `injection.Injector.fill`), so recording changes
nothing of what the model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from realigner.errors import RealignerError, UsageError
from realigner.hosts import HostInfo
from realigner.injection import ActiveIRM
from realigner.tuner import tuner_of


@dataclass
class _Chunk:
    """What one forward showed: token ids and positions ``[token]``, prompt numbers, and each IRM's delta."""

    prompt: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    is_generated: np.ndarray
    deltas: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [token, layer, neuron]


@contextmanager
def record(model: nn.Module, tokenizer: Any = None) -> Iterator[xr.Dataset]:
    """Record what the active IRMs add within a block; the dataset is filled when the block ends.

    Each call of ``model.generate`` or of the model itself adds its rows as new prompts. Padding is left out, as are
    a reply's end token and what a batch puts after it; the last token of a reply is never read by the host and has no delta.

    Args:
        model: a model with an IRM.
        tokenizer: gives each token its text; by default that of `load_host`, if the host came from there.

    Yields:
        A dataset with the variable ``delta [run, token, layer, neuron]`` (float32, strength included) and the coordinates
        ``run`` (adapter name), ``layer``, ``neuron``, and along ``token``: ``prompt``, ``position`` (0 is the first real
        token), ``is_generated``, ``token_id``, ``text``. Empty until the block ends.

    Raises:
        UsageError: for a model without an IRM.
        RealignerError: for beam search or assisted decoding, where a row of the batch is not one text.

    Example:
        >>> with record(model) as trace:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> trace.delta.dims  # doctest: +SKIP
        ('run', 'token', 'layer', 'neuron')
    """
    tuner = tuner_of(model)
    info = getattr(tuner.model, "realigner", None)
    if tokenizer is None and isinstance(info, HostInfo):
        tokenizer = info.tokenizer
    recorder = _Recorder()
    trace = xr.Dataset()
    host = tuner.model
    handle = host.register_forward_pre_hook(recorder.begin, with_kwargs=True)
    own_generate = vars(host).get("generate")
    host.generate = recorder.around(host.generate, host.generation_config)
    tuner.injector.observers.append(recorder.observe)
    try:
        yield trace
    finally:
        tuner.injector.observers.remove(recorder.observe)
        handle.remove()
        del host.generate
        if own_generate is not None:
            host.generate = own_generate
    recorder.fill(trace, tokenizer)
    trace.attrs.update(host=tuner.fingerprint.name, strength=recorder.strengths, source="realigner.record")


class _Recorder:
    """Follows the rows of the running batch from call to call."""

    def __init__(self) -> None:
        self.chunks: list[_Chunk] = []
        self.layers: dict[str, tuple[int, ...]] = {}
        self.strengths: dict[str, float] = {}
        self.prompts = 0  # prompts begun before the current batch
        self.width = 0  # tokens seen of the current batch
        self.prompt_width: int | None = None  # padded width of the prompts inside generate; None outside
        self.mask: torch.Tensor | None = None
        self.rows = 0
        self.ends: list[int] = []  # end tokens of the running generate
        self.finished = torch.zeros(0, dtype=torch.bool)

    def around(self, generate: Any, defaults: Any) -> Any:
        """`generate`, telling prompt from generated tokens and refusing what scatters a text over rows."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            settings = kwargs.get("generation_config") or defaults

            def setting(name: str) -> Any:
                return kwargs[name] if name in kwargs else getattr(settings, name, None)

            for name in ("num_beams", "num_return_sequences"):
                if (setting(name) or 1) > 1:
                    raise RealignerError(f"record: {name}={setting(name)} is not supported; a recorded row must be one text")
            if kwargs.get("past_key_values") is not None:
                raise RealignerError("record: generate with past_key_values is not supported; give the whole text")
            if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
                raise RealignerError("record: assisted decoding is not supported; rejected tokens would be recorded")
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            if ids is None:
                raise RealignerError("record: generate was called without input_ids")
            self._start(ids.shape[0])
            self.prompt_width = ids.shape[1]
            ends = setting("eos_token_id")
            self.ends = [ends] if isinstance(ends, int) else list(ends or [])
            try:
                return generate(*args, **kwargs)
            finally:
                self.prompt_width = None

        return watched

    def begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise RealignerError("record: the host was called without input_ids")
        if self.prompt_width is None:  # a plain call: every row is a new prompt
            self._start(ids.shape[0])
        start, stop = self.width, self.width + ids.shape[1]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.mask = torch.nn.functional.pad(mask.bool(), (0, max(0, stop - mask.shape[1])), value=True)
        elif self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, max(0, stop - self.mask.shape[1])), value=True)
        real = torch.ones(ids.shape[0], stop, dtype=torch.bool) if self.mask is None else self.mask[:, :stop].cpu()
        new = real[:, start:] & ~self._after_end(ids.cpu(), start)
        rows, columns = new.nonzero(as_tuple=True)
        position = (real.long().cumsum(1) - 1)[rows, start + columns]
        generated = (start + columns) >= (self.prompt_width if self.prompt_width is not None else stop)
        self._rows, self._columns = rows, columns
        self.chunks.append(
            _Chunk(
                prompt=(rows + self.prompts - self.rows).numpy().astype(np.int32),
                position=position.numpy().astype(np.int32),
                token_id=ids.cpu()[rows, columns].numpy().astype(np.int64),
                is_generated=generated.numpy(),
            )
        )
        self.width = stop

    def _after_end(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Where a row's reply is over ``[row, position]``: its end token and the padding the batch goes on with."""
        if self.prompt_width is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        generated = torch.arange(start, start + ids.shape[1]) >= self.prompt_width
        ended = (torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype)) & generated).cumsum(1) > 0
        ended |= self.finished[:, None]
        self.finished = ended[:, -1]
        return ended

    def observe(self, active: ActiveIRM, delta: torch.Tensor) -> None:
        name, strength = active.name, float(active.strength)
        if self.strengths.setdefault(name, strength) != strength:
            raise UsageError(f"record: the strength of {name!r} changed within the block; record each strength apart")
        if not self.chunks:
            raise RealignerError("record: the decoder was called directly; call the model or its generate")
        self.layers[name] = active.irm.layers
        if name not in self.chunks[-1].deltas:  # a recomputed (checkpointed) layer 0 reports twice
            kept = delta.detach()[self._rows.to(delta.device), self._columns.to(delta.device)]
            self.chunks[-1].deltas[name] = kept.float().cpu().numpy()

    def _start(self, rows: int) -> None:
        self.rows = rows
        self.prompts += rows
        self.width = 0
        self.mask = None
        self.finished = torch.zeros(rows, dtype=torch.bool)

    def fill(self, trace: xr.Dataset, tokenizer: Any) -> None:
        """Put everything into the dataset, tokens of one prompt together."""
        chunks = [chunk for chunk in self.chunks if chunk.deltas]
        if not chunks:
            return
        names = list(dict.fromkeys(name for chunk in chunks for name in chunk.deltas))
        join = {
            key: np.concatenate([getattr(c, key) for c in chunks]) for key in ("prompt", "position", "token_id", "is_generated")
        }
        order = np.lexsort((join["position"], join["prompt"]))
        arrays = []
        for name in names:
            if any(name not in chunk.deltas for chunk in chunks):
                raise UsageError(f"record: adapter {name!r} was active for a part of the block only; record each setting apart")
            delta = np.concatenate([chunk.deltas[name] for chunk in chunks])[order]
            places = {"run": [name], "layer": list(self.layers[name])}
            arrays.append(xr.DataArray(delta[None], dims=("run", "token", "layer", "neuron"), coords=places))
        trace["delta"] = xr.concat(arrays, dim="run", join="outer") if len(arrays) > 1 else arrays[0]
        trace.coords["neuron"] = np.arange(trace.sizes["neuron"], dtype=np.int32)
        for key, values in join.items():
            trace.coords[key] = ("token", values[order])
        if tokenizer is not None:
            texts = [tokenizer.decode([int(token)]) for token in join["token_id"][order]]
            trace.coords["text"] = ("token", np.array(texts, dtype=object))
