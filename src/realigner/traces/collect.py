"""Record traces of several runs: trained IRMs and their untrained twins answer the same prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import xarray as xr
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from realigner.console import progress
from realigner.dialogues import Asked, play, questions_in, readable, written
from realigner.errors import RealignerError, UsageError
from realigner.generation import answer
from realigner.irm import IRMShape
from realigner.irm_config import CONFIG_FILE, IRMConfig, check_adapter
from realigner.prompts import PAPER_PROMPTS, Answer, Prompt
from realigner.traces.layout import UNTRAINED, RunLabel
from realigner.traces.recording import Keep, record
from realigner.traces.store import RawType, TraceWriter, load_trace
from realigner.training.run_dir import read_run
from realigner.tuner import load_irm, strength, tuner_of

_ADAPTER = "default"


@dataclass(frozen=True)
class Source:
    """An IRM to trace.

    Attributes:
        label: the label of its texts, which includes the strength at which it runs.
        folder: of the trained IRM.
        twin: trace the network of `folder`'s config with the seed's initial weights, not the trained ones.
    """

    label: RunLabel
    folder: Path
    twin: bool = False


def find_runs(places: Sequence[str | Path]) -> list[Path]:
    """The folders of IRMs: the folder of a run or an adapter itself; for a sweep's folder, those of all its runs.

    Raises:
        RealignerError: naming the first place that is neither.
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


def sources_of(folders: Sequence[Path], baselines: bool = True, strength: float = 1.0) -> list[Source]:
    """All IRMs, and an untrained twin for each seed and network shape for which no untrained run is given.

    A run is named ``tone-seed``; runs that would share a name get their folder's name appended.

    Args:
        folders: from `find_runs`.
        baselines: make untrained twins.
        strength: of every source.
    """
    trained: list[Source] = []
    bare: dict[tuple[int, str], Source] = {}
    for folder in folders:
        config, run = check_adapter(folder), read_run(folder)
        seed = seed_of(run)
        baseline = run.get("steps_done") == 0
        tone = UNTRAINED if baseline else _tone_of(folder, config, run)
        shape = tuple(str(config.get(field.name)) for field in fields(IRMShape))
        network = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
        source = Source(RunLabel("", tone, seed, strength, str(folder), network=network), folder)
        if baseline:
            bare[seed, network] = source
        else:
            trained.append(source)
            twin = Source(replace(source.label, tone=UNTRAINED), folder, twin=True)
            bare.setdefault((seed, network), twin)
    untrained = [source for source in bare.values() if baselines or not source.twin]
    sources = [*trained, *untrained]
    plain = [f"{source.label.tone}-{source.label.seed}" for source in sources]
    names: list[str] = []
    for source, name in zip(sources, plain, strict=True):
        name = name if plain.count(name) == 1 else f"{name}-{source.folder.resolve().name}"
        names.append(name if name not in names else f"{name}-{1 + len(names)}")
    return [replace(source, label=replace(source.label, run=name)) for name, source in zip(names, sources, strict=True)]


def seed_of(run: Mapping[str, Any]) -> int:
    """The seed that a run's record names; the recipes' default where there is none (a ready-made IRM, an adapter alone)."""
    return int(run.get("seed", 42))


def _tone_of(folder: Path, config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What a run was trained for; the folder's name where an instruction alone says it, which is too long for a name."""
    recipe = run.get("recipe") or {}
    if recipe.get("instruct") and not recipe.get("tone") and recipe.get("data") is None:
        return folder.name
    return str(run.get("tone") or config.get("tone") or folder.name)


def trace_runs(
    sources: Sequence[Source],
    out: str | Path,
    host: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Asked] = PAPER_PROMPTS,
    keep: Keep = "summary",
    dtype: RawType = "auto",
    max_new_tokens: int = 80,
    seed: int = 42,
    repetition_penalty: float = 1.1,
    force: bool = False,
    quiet: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Answer the prompts with the bare host and with each IRM, and write the deltas of each to a store.

    Replies are greedy. The host is left unchanged. Each batch of prompts is on disk as soon as it is answered; if the process
    dies, ``OUT.unfinished`` holds the finished ones.

    Args:
        sources: see `sources_of`; each at the strength of its label.
        out: the zarr folder.
        host, tokenizer: the base model that the IRMs were made for.
        prompts: questions, conversations and dialogues (`dialogues.read_prompts`); the paper's seven by default. Each run
            answers all questions of a dialogue itself, at its strength; the last one is recorded, with everything before it in
            the prompt.
        keep: see `record`.
        dtype: of raw deltas.
        max_new_tokens, repetition_penalty: of each reply.
        seed: stored with the replies (greedy ones do not depend on it).
        force: replace an existing trace, and discard an unfinished one.
        quiet: show no progress.
        chat_template_kwargs: variables of the chat template, over those of the IRMs.

    Raises:
        RealignerError: if `out` or ``OUT.unfinished`` exists or cannot be written, or an IRM was made for another host.
        UsageError: if there is nothing to trace, or the IRMs use different prompt templates.
    """
    if not sources:
        raise UsageError("trace: no IRM is given")
    configs = [IRMConfig.from_pretrained(str(source.folder)) for source in sources]
    templates = {f"{config.template} {config.chat_template_kwargs or ''}".strip() for config in configs}
    if len(templates) > 1:
        raise UsageError(
            f"trace: these IRMs were trained with different templates ({', '.join(sorted(templates))}); trace them apart"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "repetition_penalty": repetition_penalty}
    if chat_template_kwargs is not None:
        options["chat_template_kwargs"] = dict(chat_template_kwargs)
    depth = host.config.get_text_config(decoder=True).num_hidden_layers
    layers = sorted({layer for config in configs for layer in config.resolved_layers(depth)})
    notes: dict[str, Any] = {"settings": {"temperature": 0.0, **options}, "prompts": [written(prompt) for prompt in prompts]}
    replies = (len(sources) + 1) * sum(map(questions_in, prompts))
    with (
        TraceWriter(out, "", layers, dtype, force, notes) as writer,
        progress("answering", replies, quiet) as task,
    ):
        for source, config in zip(sources, configs, strict=True):
            if source.twin:
                shape: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(IRMShape)}
                shape |= {key: shape[key] or 1.0 for key in ("input_scale", "delta_scale")}  # earlier files have no scales
                shape |= {"template": config.template, "chat_template_kwargs": config.chat_template_kwargs}
                fresh = IRMConfig(**shape, layers_path=config.layers_path, inference_mode=True)
                set_seed(source.label.seed)
                model = PeftModel(host, fresh, adapter_name=_ADAPTER).eval()
            else:
                model = load_irm(host, source.folder, _ADAPTER)
            writer.host = tuner_of(model).fingerprint.name

            def ask(conversations: Sequence[Prompt], model: PeftModel = model) -> list[Answer]:
                return answer(model, tokenizer, conversations, **options, done=task.advance)

            try:
                if "base" not in writer.notes:
                    with model.disable_adapter():
                        bare = play(prompts, ask)
                        writer.notes["base"] = ask(bare)
                        if bare != list(prompts):
                            writer.notes["base_questions"] = [readable(asked) for asked in bare]
                with strength(model, source.label.strength):
                    conversations = play(prompts, ask)
                    how: dict[str, Any] = {"questions": conversations, "chat_template_kwargs": chat_template_kwargs}
                    with record(model, tokenizer, keep, writer, {_ADAPTER: source.label}, **how):
                        ask(conversations)
            finally:
                model.unload()
    return load_trace(out)


def trace_for_report(
    places: Sequence[str | Path],
    out: str | Path,
    host: PreTrainedModel,
    tokenizer: Any,
    strength: float = 1.0,
    **options: Any,
) -> Path:
    """Trace runs and their untrained twins with every delta kept, as `realigner.report.build_report` reads them.

    Args:
        places: folders of runs, adapters or sweeps.
        out: the zarr folder to write.
        host, tokenizer: the base model that the IRMs were made for.
        strength: of every IRM.
        options: of `trace_runs`: ``prompts``, ``max_new_tokens``, ``force``, ``quiet``, ...

    Returns:
        The trace's folder.

    Raises:
        RealignerError, UsageError: as `find_runs` and `trace_runs`.

    Example:
        >>> trace = trace_for_report(["runs/anger-42"], "anger.zarr", host, tokenizer)  # doctest: +SKIP
        >>> build_report([trace], "report.html")  # doctest: +SKIP
    """
    trace_runs(sources_of(find_runs(places), strength=strength), out, host, tokenizer, keep="raw", **options)
    return Path(out)
