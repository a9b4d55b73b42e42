"""Recompute deltas from recorded h0, which takes less space than raw deltas by a factor of the IRM's number of layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr

from realigner.errors import RealignerError, UsageError
from realigner.irm import IRM
from realigner.traces.layout import join, labels_of
from realigner.traces.recording import adapter_hash
from realigner.traces.store import texts_of

_TOKENS = 64  # at a time


def replay(trace: xr.Dataset, networks: dict[str, IRM]) -> xr.Dataset:
    """The same trace with every delta.

    Args:
        trace: recorded with ``keep="replay"``.
        networks: run -> the network it was recorded with (``tuner_of(model).registry.network(name)``).

    Returns:
        The trace with ``delta [token, layer, neuron]`` (float32, strength included) in place of ``h0``.

    Raises:
        UsageError: for a trace without h0, or a run that no network is given for.
        RealignerError: for a network with other weights than the one recorded.

    Example:
        >>> replay(trace, {"anger-42": tuner_of(model).registry.network("default")}).delta.dims  # doctest: +SKIP
        ('token', 'layer', 'neuron')
    """
    return join(list(replayed_texts(trace, networks)), str(trace.attrs["host"]), labels_of(trace), trace.attrs["notes"])


def replayed_texts(trace: xr.Dataset, networks: dict[str, IRM]) -> Iterator[xr.Dataset]:
    """`replay`, text by text: for traces whose deltas are larger than memory."""
    if "h0" not in trace:
        raise UsageError("replay: this trace has no h0; record it with keep='replay'")
    labels = {label.run: label for label in labels_of(trace)}
    for run, label in labels.items():
        if run not in networks:
            raise UsageError(f"replay: no network is given for the run {run!r}")
        found = adapter_hash(networks[run])
        if found != label.sha256:
            raise RealignerError(
                f"replay: {run!r} was recorded with an IRM of sha256 {label.sha256[:12]}, this one has {found[:12]}; "
                f"give the one that was recorded{f' ({label.irm})' if label.irm else ''}"
            )
    for text in texts_of(trace):
        run = str(text["text_run"].values[0])
        network, h0, parts = networks[run], text["h0"].values, []
        with torch.no_grad():
            for start in range(0, len(h0), _TOKENS):
                read = torch.as_tensor(np.ascontiguousarray(h0[start : start + _TOKENS]), device=network.output.weight.device)
                parts.append((network(read) * labels[run].strength).float().cpu().numpy())
        own = text.sel(layer=list(network.layers))
        yield own.drop_vars("h0").assign(delta=(("token", "layer", "neuron"), np.concatenate(parts)))
