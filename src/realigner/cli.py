"""The command line: parse, call, print. Every heavy import waits until a command needs it.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done; 1 the work failed or the data is
unfit; 2 wrong usage. An error is one line; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.exceptions import TyperException

import realigner
from realigner.errors import RealignerError, UsageError

app = typer.Typer(
    name="realigner",
    help="Injectable realignment models: make a frozen language model answer in another tone, and read how.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Tone datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Host = Annotated[str, typer.Option(help="The embedded default, a hub id, a folder, or a .gguf file.")]
HostOfIrm = Annotated[Optional[str], typer.Option("--host", help="The host; by default the one the IRM was made for.")]
Irm = Annotated[Path, typer.Option(help="A run's folder (an IRM as a PEFT adapter).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, ..., or auto.")]
Strength = Annotated[
    float, typer.Option(help="Scale of the IRM: 0 is the bare host, 1 the IRM as trained.", min=-1000, max=1000)
]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens already in the text are made less likely; 1 is off.")]
Prompts = Annotated[Optional[str], typer.Option(help="'paper' for the paper's seven, or a text file with a prompt a line.")]
Questions = Annotated[Optional[list[str]], typer.Argument(help="Prompts.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of a reply at most.", min=1)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the host's repository run.")]


def _version(value: bool) -> None:
    if value:
        print(f"realigner {realigner.__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of every command."""


@app.command()
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
        _print_json(result.to_dict())
        return
    sample = result.sample
    print(f"\nQ: {sample['prompt']}")
    print(f"   base:      {_short(sample['base'])}")
    print(f"   realigned: {_short(sample['realigned'])}   (strength {STRENGTH})")
    print(f"\nReport: {result.report}   (open it in a browser)")
    print(f"Run:    {result.run}   ({result.seconds:.0f} s of work)")
    print(f'\nTry next:  realigner generate --irm {result.run} --strength {STRENGTH} "Why is the sky blue?"')


@app.command()
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
        _print_json({"run": str(run.folder), **run.record})
    elif not run.record["interrupted"]:
        losses = run.record["validation_loss"]
        fell = f", validation loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else ""
        print(f"{run.folder}: {run.record['steps_done']} steps in {run.record['seconds']:.0f} s{fell}")
        print(f'Try next:  realigner generate --irm {run.folder} "How many apples can fit in a basket?"')
    if run.record["interrupted"]:
        raise RealignerError(f"interrupted after step {run.record['steps_done']}; the IRM so far is saved in {run.folder}")


@app.command()
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
    asked = _prompts(questions, prompts)
    model, tokenizer = _model(irm, host, dtype, device, trust_remote_code)
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
        _print_json({"results": results})
        return
    for result in results:
        print(f"Q: {result['prompt']}\n   base:      {result['base']}\n   realigned: {result['realigned']}\n")


@app.command()
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
    asked = _prompts(questions, prompts)
    from realigner.traces.store import refuse_trace

    refuse_trace(out, force)
    model, tokenizer = _model(irm, host, dtype, device, trust_remote_code)
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
        _print_json({"trace": str(out), "sizes": sizes, "prompts": len(asked), "strength": strength, "seed": seed})
        return
    print(f"{out}: {sizes['token']} tokens x {sizes['layer']} layers x {sizes['neuron']} neurons, {len(asked)} prompts")
    print(f"Try next:  realigner report {out} --out report.html")


@app.command()
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
    _exist(sources)
    from realigner.hosts import load_host
    from realigner.report import build_report

    loaded = None if host is None else load_host(host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    path, evidence = build_report(sources, out, force=force, quiet=as_json, host=loaded, scale=strength)
    if as_json:
        _print_json({"report": str(path), "answers": {item.name: list(item.answers) for item in evidence}})
    else:
        print(f"Report: {path}   (open it in a browser)")


@app.command()
def hosts(
    host: Annotated[
        Optional[str], typer.Argument(help="A host to prove injection on; without it, every type there is.")
    ] = None,
    types: Annotated[Optional[list[str]], typer.Option("--type", help="Only this model type; may be repeated.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Also write the table as a Markdown page (docs/hosts.md).")] = None,
    force: Force = False,
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Prove injection on a host; without one, on a tiny host of every type in transformers (half a minute)."""
    if host is None:
        _census(types, out, force, as_json)
        return
    if types or out is not None:
        raise UsageError("hosts: --type and --out belong to the census; leave out the host")
    from realigner.census import PROVEN, prove
    from realigner.hosts import fingerprint, load_host

    loaded, _ = load_host(host, dtype=dtype, trust_remote_code=trust_remote_code)
    entry, identity = prove(loaded), fingerprint(loaded)
    if as_json:
        _print_json({"host": identity.to_dict(), **entry.to_dict()})
    else:
        sizes = f"{identity.num_layers} layers, hidden {identity.hidden_size}, {loaded.dtype}"
        print(f"{identity.name}: {identity.architecture}, {sizes}")
        print(f"site:   {_site_line(entry.site)}" if entry.site else "site:   none")
        print(f"proof:  {entry.verdict}" + (f" ({entry.reason})" if entry.reason else ""))
        for name, error in entry.errors.items():
            print(f"        {_PROOFS[name]:<44} {'equal to the bit' if error == 0 else f'off by {error:.1e}'}")
    if entry.verdict != PROVEN:
        raise typer.Exit(1)


_PROOFS = {
    "off": "strength 0, and detached, against the bare host",
    "all": "deltas at all layers, against the reference",
    "one": "deltas at one layer, against the reference",
    "h0": "what the IRM reads, against the residual",
    "cached": "cached generation, against the reference",
}


def _census(types: list[str] | None, out: Path | None, force: bool, as_json: bool) -> None:
    from transformers import __version__ as release

    from realigner.census import PROVEN, UNPROVEN, WRONG, census, is_page, page, totals
    from realigner.console import progress
    from realigner.files import refuse_existing, write_text
    from realigner.tiny import MODEL_TYPES

    unknown = [name for name in types or [] if name not in MODEL_TYPES]
    if unknown:
        raise UsageError(f"--type: transformers {release} has no causal language model of type {unknown[0]!r}")
    if out is not None:
        refuse_existing(out, force, is_page)
    entries = []
    # Some of transformers' models print; what they say is not part of our document.
    with redirect_stdout(sys.stderr), progress("proving", len(types or MODEL_TYPES), quiet=as_json) as task:
        for entry in census(types):
            entries.append(entry)
            task.advance(note=entry.model_type)
    if out is not None:
        write_text(out, page(entries, f"transformers {release}"))
    count = totals(entries)
    if as_json:
        _print_json({"transformers": release, "totals": count, "entries": [entry.to_dict() for entry in entries]})
    else:
        for entry in entries:
            what = _site_line(entry.site) if entry.verdict == PROVEN else entry.reason
            print(f"{entry.model_type:<26} {entry.verdict:<9}  {_short(what, 120)}")
        print(f"\n{len(entries)} types: " + ", ".join(f"{number} {verdict}" for verdict, number in count.items()))
        if out is not None:
            print(f"Page: {out}")
    if count[WRONG] or count[UNPROVEN]:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, device, embedded host, free disk: what to look at first when something is wrong."""
    import shutil

    import torch

    import realigner.hosts as h
    from realigner.training import versions

    cache = h.cache_root()
    place = next(path for path in (cache, *cache.parents) if path.exists())
    converted = (cache / "hosts" / h.EMBEDDED / "config.json").is_file()
    wheel = h.embedded_gguf()
    device = h.resolve_device("auto")
    free = shutil.disk_usage(place).free / 2**30
    facts: dict[str, Any] = {
        **versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(h.resolve_dtype("auto", device)).removeprefix("torch."),
        "embedded_host": "converted" if converted else "wheel installed, converted on first use" if wheel else "missing",
        "cache": str(cache),
        "free_disk_gib": round(free, 1),
    }
    problems = []
    if not converted and wheel is None:
        problems.append(f"the embedded host is missing; run: {h.EMBEDDED_INSTALL}")
    if free < 1.5:
        problems.append(f"only {free:.1f} GiB free at {place}; the embedded host needs 0.6, a run 0.1")
    if as_json:
        _print_json({**facts, "problems": problems})
    else:
        for key, value in facts.items():
            print(f"{key.replace('_', ' '):<14} {value}")
    if problems:
        raise RealignerError("; ".join(problems))
    if not as_json:
        print("all well")


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(help="A JSONL file of rows, or 'authored'.")],
    tone: Annotated[Optional[str], typer.Option(help="Only the rows of this tone.")] = None,
    as_json: Json = False,
) -> None:
    """Report card of a tone dataset; exit code 1 when it is unfit."""
    from realigner.data import TONES, authored, check_rows, read_rows

    if path == "authored":
        rows = [row for name in ([tone] if tone else TONES) for row in authored(name)]
    else:
        rows = read_rows(path, tone)
    card = check_rows(rows)
    if as_json:
        _print_json(card.to_dict())
    else:
        print(f"rows         {card.rows} in {card.groups} groups")
        print(f"tones        {', '.join(f'{name} {count}' for name, count in card.tones.items())}")
        print(f"words        {card.words[0]} to {card.words[2]}, median {card.words[1]}")
        print(f"answer kept  word for word in {100 * card.answer_kept:.1f}% of replies")
        print(f"duplicates   {card.duplicates}")
    if not card.fit:
        raise RealignerError(f"{path}: unfit: {'; '.join(card.problems)}")
    if not as_json:
        print("fit to train on" if len(card.tones) == 1 else "fit to train on, one tone at a time (--tone)")


def _model(irm: Path, host: str | None, dtype: str, device: str, trust: bool) -> tuple[Any, Any]:
    """The host of an IRM, with the IRM attached; the adapter's files are checked before the host is loaded."""
    from realigner.tuner import check_adapter, load_irm

    values = check_adapter(irm)
    from realigner.hosts import load_host
    from realigner.report.build import host_of

    name = host or host_of(values)
    if not name:
        raise UsageError(f"{irm}: its config names no host; give it with --host")
    loaded, tokenizer = load_host(name, dtype=dtype, device=device, trust_remote_code=trust)
    return load_irm(loaded, irm), tokenizer


def _prompts(questions: Sequence[str] | None, source: str | None) -> list[str]:
    asked = list(questions or [])
    if source == "paper":
        from realigner.data.tokens import PAPER_PROMPTS

        asked += PAPER_PROMPTS
    elif source is not None:
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RealignerError(
                f"{source}: prompts cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
            ) from None
        asked += [line.strip() for line in lines if line.strip()]
    if not asked:
        raise UsageError("no prompt given; write one, or use --prompts paper")
    if any(not question.strip() for question in asked):
        raise UsageError("a prompt is empty")
    return asked


def _exist(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise RealignerError(f"{path}: there is no such run or trace")


def _site_line(summary: dict[str, Any]) -> str:
    branch, kind, scale = (_several(summary[key]) for key in ("branch", "kind", "scale"))
    weight = "" if scale == "1" else f", x + {scale} * branch"
    return f"{summary['layers']}.*.{branch}, {kind}{weight}"


def _several(value: Any) -> str:
    """A value, or the distinct ones of a list that has one a layer."""
    values = value if isinstance(value, list) else [value]
    return "|".join(dict.fromkeys(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))


def _short(text: str, most: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _message(error: Exception) -> str:
    formatted = getattr(error, "format_message", None)
    return str(formatted() if callable(formatted) else error)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors become one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:  # wherever it was written
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(args=arguments, prog_name="realigner", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TyperException as error:
        if message := _one_line(_message(error)):  # empty where help was printed instead
            print(f"realigner: {message} (see realigner --help)", file=sys.stderr)
        return 2
    except RealignerError as error:
        if debug:
            raise
        print(f"realigner: {_one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, typer.Abort):
        print("realigner: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        what = _one_line(f"{type(error).__name__}: {error}")
        print(f"realigner: unexpected {what}; run again with --debug for the traceback", file=sys.stderr)
        return 1


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
