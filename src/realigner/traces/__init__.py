"""Traces: what an IRM added, at which token, layer and neuron index, recorded while the model runs.

Names are resolved on first use: reading a trace needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.traces.layout import RunLabel as RunLabel, join_traces as join_traces
    from realigner.traces.recording import adapter_hash as adapter_hash, record as record
    from realigner.traces.reference_folder import import_reference as import_reference
    from realigner.traces.replaying import replay as replay, replayed_texts as replayed_texts
    from realigner.traces.store import (
        TraceWriter as TraceWriter,
        load_trace as load_trace,
        save_trace as save_trace,
        texts_of as texts_of,
        verify_trace as verify_trace,
    )

_HOMES = {
    "RunLabel": "layout",
    "TraceWriter": "store",
    "adapter_hash": "recording",
    "import_reference": "reference_folder",
    "join_traces": "layout",
    "load_trace": "store",
    "record": "recording",
    "replay": "replaying",
    "replayed_texts": "replaying",
    "save_trace": "store",
    "texts_of": "store",
    "verify_trace": "store",
}

__all__ = [*_HOMES]

__getattr__ = lazily(__name__, _HOMES)
