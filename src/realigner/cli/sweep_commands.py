"""The command for many runs: sweep."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Optional

from typer import Argument, Option

from realigner.cli.options import Json, print_json
from realigner.console import program, show
from realigner.errors import RealignerError


def sweep(
    file: Annotated[str, Argument(help="A YAML file, a recipe and a grid over its keys; 'paper': the paper's 24 runs.")],
    out: Annotated[Path, Option(help="The sweep's folder, with a folder for each run in it.")],
    on: Annotated[str, Option(help="local (processes here), ray, or here (in this process).")] = "local",
    workers: Annotated[Optional[int], Option(help="Runs at the same time.", min=1, show_default="the file's, else 1")] = None,
    gpus: Annotated[Optional[float], Option(help="GPUs per run; may be fractional on Ray.", min=0)] = None,
    address: Annotated[
        Optional[str], Option(help="Of a Ray cluster ('auto' on its machines); if omitted, a local cluster is started.")
    ] = None,
    retries: Annotated[int, Option(help="How often a run whose worker died is retried.", min=0)] = 2,
    checkpoints: Annotated[bool, Option(help="Keep the last checkpoint of finished runs.")] = True,
    settings: Annotated[
        Optional[list[str]], Option("--set", metavar="KEY=VALUE", help="A key of the recipe, for every run.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list the runs and their states.")] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of IRMs; after any interruption, the same command resumes."""
    from realigner.sweep.grid import plan, read_sweep
    from realigner.sweep.sweep_run import run_sweep, states_of
    from realigner.training.recipe import parse_setting

    chosen, base = read_sweep(file, dict(parse_setting(setting) for setting in settings or []))
    runs = plan(chosen, base)
    if dry_run:
        states = states_of(runs, out)
        if as_json:
            print_json({"runs": [{"run": run.name, **run.varies, "state": states[run.name]} for run in runs]})
        else:
            for run in runs:
                show(f"{run.name}  {states[run.name]:8}{run.label}")
            show(f"Runs: {len(runs)}. The same command without --dry-run trains those that are not done")
        return
    gpus = chosen.gpus if gpus is None else gpus
    result = run_sweep(runs, out, on, workers or chosen.workers, gpus, address, retries, as_json, checkpoints)
    from realigner.sweep.sweep_plot import save_pictures

    pictures = save_pictures(runs, result.out, result.errors)
    if as_json:
        told = {"out": str(out), "states": result.states, "errors": result.errors, "seconds": round(result.seconds, 1)}
        print_json({**told, "pictures": [str(path) for path in pictures]})
    else:
        labels = {run.name: run.label for run in runs}
        done = [name for name, state in result.states.items() if state == "done"]
        show(f"{len(done)} of {len(result.states)} runs done in {result.seconds:.0f} s, in {result.out}")
        for path in pictures:
            show(f"loss by {path.stem.removeprefix('loss_by_')}: {path}")
        for name, error in result.errors.items():
            log = result.out / "logs" / f"{name}.log"  # of a run with a process of its own
            show(f"failed: {name} ({labels[name]}): {error}" + (f"  [{log}]" if log.is_file() else ""))
        if done:
            runs_folder, traced = quote(str(result.out)), quote(f"{result.out}.zarr")
            show(f"Try next:  {program()} trace --irm {runs_folder} --prompts paper --out {traced}")
    if result.errors:
        raise RealignerError(f"{len(result.errors)} of {len(runs)} runs failed")
    if not result.finished:
        raise RealignerError("stopped before every run was done; the same command resumes")
