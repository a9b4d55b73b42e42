"""Traces: what an IRM added, at which token, layer and neuron index, recorded while the model runs."""

from realigner.traces.recording import record
from realigner.traces.store import load_trace, save_trace

__all__ = ["load_trace", "record", "save_trace"]
