"""Answer prompts with trained IRMs and their untrained twins, recording what each adds: what analyses and reports read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import xarray as xr
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from realigner.console import progress
from realigner.data.tokens import PAPER_PROMPTS
from realigner.errors import RealignerError, UsageError
from realigner.generation import answer
from realigner.irm import IRMShape
from realigner.traces.layout import UNTRAINED, RunLabel
from realigner.traces.recording import Keep, record
from realigner.traces.store import RawType, TraceWriter, load_trace
from realigner.training.folder import read_run
from realigner.tuner import CONFIG_FILE, IRMConfig, check_adapter, load_irm, strength, tuner_of

_ADAPTER = "default"


@dataclass(frozen=True)
class Source:
    """An IRM to be traced: a trained one in its folder, or the untrained twin of one."""

    label: RunLabel
    folder: Path
    twin: bool = False  # the network of `folder`'s config, with the seed's initial weights


def find_runs(places: Sequence[str | Path]) -> list[Path]:
    """The folders of IRMs among `places`: a run's or an adapter's folder is itself, a sweep's folder is all its runs.

    Raises:
        RealignerError: naming a place that is neither.
    """
    found: list[Path] = []
    for place in map(Path, places):
        inside = sorted(path.parent for path in place.glob(f"*/{CONFIG_FILE}") if not path.parent.name.endswith(".unfinished"))
        if (place / CONFIG_FILE).is_file():
            found.append(place)
        elif inside:
            found += inside
        else:
            why = "there is no such folder" if not place.exists() else "neither a run's folder nor a sweep's"
            raise RealignerError(f"{place}: {why}")
    return list(dict.fromkeys(found))


def sources_of(folders: Sequence[Path], baselines: bool = True, scale: float = 1.0) -> list[Source]:
    """What to trace: every IRM, and for each seed and shape of network its untrained twin, unless one is given.

    A run is named tone-seed; where two would have one name, by its folder too.
    """
    trained: list[Source] = []
    shapes: dict[tuple[Any, ...], Source] = {}
    for folder in folders:
        config, run = check_adapter(folder), read_run(folder)
        seed = int(run.get("seed", 42))
        baseline = run.get("steps_done") == 0
        tone = UNTRAINED if baseline else str(run.get("tone") or config.get("tone") or folder.name)
        source = Source(RunLabel("", tone, seed, scale, str(folder)), folder)
        shape = (seed, *(str(config.get(field.name)) for field in fields(IRMShape)))
        if baseline:
            shapes[shape] = source
        else:
            trained.append(source)
            twin = Source(RunLabel("", UNTRAINED, seed, scale, str(folder)), folder, twin=True)
            shapes.setdefault(shape, twin)
    untrained = [source for source in shapes.values() if baselines or not source.twin]
    return _named([*trained, *untrained])


def _named(sources: Sequence[Source]) -> list[Source]:
    plain = [f"{source.label.tone}-{source.label.seed}" for source in sources]
    names: list[str] = []
    for source, name in zip(sources, plain, strict=True):
        name = name if plain.count(name) == 1 else f"{name}-{source.folder.resolve().name}"
        names.append(name if name not in names else f"{name}-{names.count(name) + len(names)}")
    return [
        Source(RunLabel(name, s.label.tone, s.label.seed, s.label.strength, s.label.irm), s.folder, s.twin)
        for name, s in zip(names, sources, strict=True)
    ]


def trace_runs(
    sources: Sequence[Source],
    out: str | Path,
    host: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str] = PAPER_PROMPTS,
    keep: Keep = "summary",
    dtype: RawType = "auto",
    max_new_tokens: int = 80,
    seed: int = 42,
    repetition_penalty: float = 1.1,
    force: bool = False,
    quiet: bool = False,
) -> xr.Dataset:
    """Answer the prompts with the bare host and with each IRM, and write what each adds to a store.

    Replies are greedy. The host is left as it was. Each batch of prompts is on disk when it is answered; should the process
    die, ``OUT.unfinished`` holds what was finished.

    Args:
        sources: see `sources_of`; each at the strength of its label.
        out: the zarr folder.
        host, tokenizer: the host that the IRMs were made for.
        prompts: the paper's seven by default.
        keep: see `record`.
        dtype: of raw deltas.
        max_new_tokens, repetition_penalty: of each reply.
        seed: noted with the replies (greedy ones do not depend on it).
        force: replace a trace that is there.
        quiet: show no progress.

    Raises:
        RealignerError: when the place is taken or cannot be written, or an IRM was made for another host.
        UsageError: when there is nothing to trace, or IRMs put prompts in different templates (trace them apart).
    """
    if not sources:
        raise UsageError("trace: no IRM is given")
    configs = [IRMConfig.from_pretrained(str(source.folder)) for source in sources]
    templates = {str(config.template) for config in configs}
    if len(templates) > 1:
        raise UsageError(
            f"trace: these IRMs were trained with different templates ({', '.join(sorted(templates))}); trace them apart"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "repetition_penalty": repetition_penalty}
    depth = host.config.get_text_config(decoder=True).num_hidden_layers
    layers = sorted({layer for config in configs for layer in config.resolved_layers(depth)})
    notes: dict[str, Any] = {"settings": {"temperature": 0.0, **options}, "prompts": list(prompts)}
    writer = TraceWriter(out, "", layers, dtype, force, notes)
    with progress("answering", (len(sources) + 1) * len(prompts), quiet) as task:
        for source, config in zip(sources, configs, strict=True):
            model = _attached(host, source, config)
            writer.host = tuner_of(model).fingerprint.name
            try:
                if "base" not in writer.notes:
                    with model.disable_adapter():
                        writer.notes["base"] = answer(model, tokenizer, prompts, **options, done=task.advance)
                recording = record(model, tokenizer, keep, writer, {_ADAPTER: source.label}, prompts)
                with strength(model, source.label.strength), recording:
                    answer(model, tokenizer, prompts, **options, done=task.advance)
            finally:
                model.unload()
    return load_trace(writer.close())


def _attached(host: PreTrainedModel, source: Source, config: IRMConfig) -> PeftModel:
    if not source.twin:
        return load_irm(host, source.folder, _ADAPTER)
    fresh = IRMConfig(
        preset=config.preset,
        layers=config.layers,
        widths=config.widths,
        rank=config.rank,
        output_std=config.output_std,
        input_norm=config.input_norm,
        masked=config.masked,
        layers_path=config.layers_path,
        template=config.template,
        inference_mode=True,
    )
    set_seed(source.label.seed)
    return PeftModel(host, fresh, adapter_name=_ADAPTER)
