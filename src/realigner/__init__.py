"""realigner: injectable realignment models (IRMs) for frozen language models.

A small trainable network reads a host's first post-attention residual and adds a perturbation to the residual stream of
every chosen layer (Smith et al. 2024, arXiv 2407.03621). Train one, load it as a PEFT adapter, scale it, record it.

    import realigner as ra
    from peft import PeftModel

    host, tokenizer = ra.load_host("smollm2-135m-instruct")
    model = PeftModel.from_pretrained(host, "runs/anger-42")
    with ra.strength(model, 0.5):
        print(ra.answer(model, tokenizer, ["How do magnets work?"])[0])

Public names are imported when they are first used, so that ``import realigner`` and ``realigner --help`` are fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner import (
        analysis as analysis,
        census as census,
        data as data,
        evaluation as evaluation,
        explain as explain,
        generation as generation,
        hosts as hosts,
        report as report,
        serving as serving,
        sweep as sweep,
        traces as traces,
        training as training,
    )
    from realigner.data import Row as Row, authored as authored, read_rows as read_rows
    from realigner.errors import RealignerError as RealignerError, UsageError as UsageError
    from realigner.fingerprints import Fingerprint as Fingerprint, fingerprint as fingerprint, weights_hash as weights_hash
    from realigner.generation import answer as answer, stream as stream
    from realigner.hosts import load_host as load_host
    from realigner.irm import IRM as IRM, IRMShape as IRMShape
    from realigner.irm_config import IRMConfig as IRMConfig
    from realigner.locate import find_sites as find_sites
    from realigner.report import build_report as build_report
    from realigner.runtime import Runtime as Runtime, load as load
    from realigner.traces import (
        import_reference as import_reference,
        join_traces as join_traces,
        load_trace as load_trace,
        record as record,
        replay as replay,
        save_trace as save_trace,
    )
    from realigner.training import Recipe as Recipe, Run as Run, train as train
    from realigner.tuner import load_irm as load_irm, strength as strength, tuner_of as tuner_of, unload as unload

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("analysis", "data", "evaluation", "explain", "report", "serving", "sweep", "traces", "training"), ""),
    **dict.fromkeys(("census", "generation", "hosts"), ""),
    **dict.fromkeys(("IRM", "IRMShape"), "irm"),
    **dict.fromkeys(("Fingerprint", "fingerprint", "weights_hash"), "fingerprints"),
    **dict.fromkeys(("RealignerError", "UsageError"), "errors"),
    **dict.fromkeys(("Recipe", "Run", "train"), "training"),
    **dict.fromkeys(("Row", "authored", "read_rows"), "data"),
    **dict.fromkeys(("Runtime", "load"), "runtime"),
    **dict.fromkeys(("answer", "stream"), "generation"),
    **dict.fromkeys(("load_irm", "strength", "tuner_of", "unload"), "tuner"),
    **dict.fromkeys(("import_reference", "join_traces", "load_trace", "record", "replay", "save_trace"), "traces"),
    **{"IRMConfig": "irm_config", "build_report": "report", "find_sites": "locate", "load_host": "hosts"},
}

__all__ = [*_HOMES, "__version__"]

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)


class AfterImport(MetaPathFinder):
    """Import hook that calls ``then(module)`` once another package's module has executed, without importing it ourselves.

    The hook stays installed until the module has actually executed: some callers (transformers) only check that it exists.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], Any]) -> None:
        self.name, self.then, self.asking = name, then, False
        if name in sys.modules:
            then(sys.modules[name])
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            self.then(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def _guard_vllm(module: ModuleType) -> None:
    """Make TRL refuse a model with an IRM before it starts vLLM; it would fail at its first step, merging weights."""
    start = module.VLLMGeneration.__init__

    def check_and_start(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        import_module("realigner.tuner").refuse_vllm(model)
        start(self, model, *args, **kwargs)

    module.VLLMGeneration.__init__ = check_and_start


def _register_with_peft(_: ModuleType) -> None:
    """Without this ``PeftModel.from_pretrained`` of an IRM would raise KeyError until `realigner.tuner` is imported."""
    if not {"realigner.adapters", "realigner.irm_config"} & sys.modules.keys():  # else PEFT is imported by these, for the tuner
        import_module("realigner.tuner")


AfterImport("peft", _register_with_peft)
AfterImport("trl.generation.vllm_generation", _guard_vllm)
