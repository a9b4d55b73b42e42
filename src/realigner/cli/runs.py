"""Commands on IRMs: demo, train, generate, trace, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from realigner.cli.options import (
    Device,
    Dtype,
    Force,
    Host,
    HostOfIrm,
    Irm,
    Json,
    MaxNewTokens,
    Penalty,
    Prompts,
    Questions,
    Seed,
    Strength,
    Trust,
    attached,
    print_json,
    prompts_from,
    refuse_missing,
    short,
)
from realigner.errors import RealignerError, UsageError


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the traces and the report.")] = Path("demo"),
    tone: Annotated[str, typer.Option(help="anger, sadness or neutral.")] = "anger",
    seed: Seed = 42,
    steps: Annotated[Optional[int], typer.Option(help="Training steps.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The whole job on the embedded host: train, answer the paper's prompts, trace, report (about 7 minutes on 2 cores)."""
    from realigner.demo import STRENGTH, run_demo

    result = run_demo(out, tone=tone, seed=seed, steps=steps, force=force)
    if as_json:
        print_json(result.to_dict())
        return
    sample = result.sample
    print(f"\nQ: {sample['prompt']}")
    print(f"   base:      {short(sample['base'])}")
    print(f"   realigned: {short(sample['realigned'])}   (strength {STRENGTH})")
    print(f"\nReport: {result.report}   (open it in a browser)")
    print(f"Run:    {result.run}   ({result.seconds:.0f} s of work)")
    print(f'\nTry next:  realigner generate --irm {result.run} --strength {STRENGTH} "Why is the sky blue?"')


def train(
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    data: Annotated[
        str, typer.Option(help="A JSONL file of rows, or 'authored' for the set that comes with realigner.")
    ] = "authored",
    tone: Annotated[Optional[str], typer.Option(help="Which tone's rows; needed where the data has several.")] = None,
    host: Host = "smollm2-135m-instruct",
    preset: Annotated[str, typer.Option(help="compact or paper.")] = "compact",
    layers: Annotated[str, typer.Option(help="'all', '0-31', '0,5,7-9'.")] = "all",
    rank: Annotated[Optional[int], typer.Option(help="Width of the factorised output; 0 for a dense one.")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Rows a step.")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Peak learning rate.")] = None,
    max_length: Annotated[Optional[int], typer.Option(help="Tokens of a row at most.")] = None,
    seed: Seed = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train one IRM on a frozen host."""
    from realigner.irm import IRMShape, parse_layers

    IRMShape(preset=preset, layers=layers, rank=rank).validate()  # before anything slow
    from realigner.data import authored, read_rows

    if data == "authored" and tone is None:
        raise UsageError("train: --tone is needed with the authored data: anger, sadness or neutral")
    rows = authored(tone or "") if data == "authored" else read_rows(data, tone)
    import realigner.training as training
    from realigner.hosts import load_host
    from realigner.tuner import IRMConfig

    training.refuse_run(out, force)
    recipe = training.make_recipe(steps=steps, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length)
    loaded, tokenizer = load_host(host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    parse_layers(layers, int(loaded.config.get_text_config().num_hidden_layers), "--layers")
    config = IRMConfig(preset=preset, layers=layers, rank=rank)
    run = training.train(loaded, tokenizer, rows, out, config, recipe, seed=seed, force=force)
    if as_json:
        print_json({"run": str(run.folder), **run.record})
    elif not run.record["interrupted"]:
        losses = run.record["validation_loss"]
        fell = f", validation loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else ""
        print(f"{run.folder}: {run.record['steps_done']} steps in {run.record['seconds']:.0f} s{fell}")
        print(f'Try next:  realigner generate --irm {run.folder} "How many apples can fit in a basket?"')
    if run.record["interrupted"]:
        raise RealignerError(f"interrupted after step {run.record['steps_done']}; the IRM so far is saved in {run.folder}")


def generate(
    irm: Irm,
    questions: Questions = None,
    prompts: Prompts = None,
    strength: Strength = 1.0,
    host: HostOfIrm = None,
    max_new_tokens: MaxNewTokens = 80,
    temperature: Annotated[float, typer.Option(help="0 for greedy replies, else the temperature of sampling.")] = 0.0,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with the bare host and with the IRM, side by side."""
    asked = prompts_from(questions, prompts)
    model, tokenizer = attached(irm, host, dtype, device, trust_remote_code)
    from realigner.console import progress
    from realigner.generation import answer
    from realigner.tuner import strength as at_strength

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options["repetition_penalty"] = repetition_penalty
    with progress("answering", 2 * len(asked), quiet=as_json) as task:
        with model.disable_adapter():
            base = answer(model, tokenizer, asked, **options, done=task.advance)
        with at_strength(model, strength):
            realigned = answer(model, tokenizer, asked, **options, done=task.advance)
    results = [
        {"prompt": p, "base": b, "realigned": r, "strength": strength, "seed": seed}
        for p, b, r in zip(asked, base, realigned, strict=True)
    ]
    if as_json:
        print_json({"results": results})
        return
    for result in results:
        print(f"Q: {result['prompt']}\n   base:      {result['base']}\n   realigned: {result['realigned']}\n")


def trace(
    irm: Irm,
    out: Annotated[Path, typer.Option(help="The zarr folder to write.")],
    questions: Questions = None,
    prompts: Prompts = None,
    strength: Strength = 1.0,
    host: HostOfIrm = None,
    max_new_tokens: MaxNewTokens = 80,
    seed: Seed = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Record what an IRM adds, token by token, layer by layer, while it answers prompts."""
    asked = prompts_from(questions, prompts)
    from realigner.traces.store import refuse_trace

    refuse_trace(out, force)
    model, tokenizer = attached(irm, host, dtype, device, trust_remote_code)
    from realigner.console import progress
    from realigner.generation import answer
    from realigner.traces import record, save_trace
    from realigner.tuner import strength as at_strength

    bar = progress("recording", len(asked), quiet=as_json)
    with bar as task, at_strength(model, strength), record(model, tokenizer) as recorded:
        answer(model, tokenizer, asked, max_new_tokens=max_new_tokens, seed=seed, done=task.advance)
    recorded = recorded.assign_coords(run=[irm.resolve().name])
    save_trace(recorded, out, force)
    sizes = {str(key): int(value) for key, value in recorded.sizes.items()}
    if as_json:
        print_json({"trace": str(out), "sizes": sizes, "prompts": len(asked), "strength": strength, "seed": seed})
        return
    print(f"{out}: {sizes['token']} tokens x {sizes['layer']} layers x {sizes['neuron']} neurons, {len(asked)} prompts")
    print(f"Try next:  realigner report {out} --out report.html")


def report(
    sources: Annotated[list[Path], typer.Argument(help="Run folders (prompts are answered now) and zarr traces.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")],
    strength: Strength = 1.0,
    host: HostOfIrm = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page over runs and traces."""
    refuse_missing(sources)
    from realigner.hosts import load_host
    from realigner.report import build_report

    loaded = None if host is None else load_host(host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    path, evidence = build_report(sources, out, force=force, quiet=as_json, host=loaded, scale=strength)
    if as_json:
        print_json({"report": str(path), "answers": {item.name: list(item.answers) for item in evidence}})
    else:
        print(f"Report: {path}   (open it in a browser)")
