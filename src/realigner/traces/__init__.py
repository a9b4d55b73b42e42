"""Traces: what an IRM added, at which token, layer and neuron index, recorded while the model runs."""

from realigner.traces.layout import RunLabel, join_traces
from realigner.traces.recording import adapter_hash, record
from realigner.traces.reference_folder import import_reference
from realigner.traces.replaying import replay, replayed_texts
from realigner.traces.store import TraceWriter, load_trace, save_trace, texts_of, verify_trace

__all__ = [
    "RunLabel",
    "TraceWriter",
    "adapter_hash",
    "import_reference",
    "join_traces",
    "load_trace",
    "record",
    "replay",
    "replayed_texts",
    "save_trace",
    "texts_of",
    "verify_trace",
]
