"""The folder of an unfinished run: what it contains, and whether the run may be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import realigner.training.run_dir as run_dir
from realigner.errors import RealignerError
from realigner.files import discard, disk_fault, write_text
from realigner.training.recipe import Recipe, read_recipe, to_yaml


@contextmanager
def unfinished_run(place: run_dir.RunPlace, record: dict[str, Any], recipe: Recipe, resume: bool) -> Iterator[None]:
    """The folder of an unfinished run: made anew, or found to be this very run and cut back to its last checkpoint.

    On an error before the first checkpoint nothing is left behind; Ctrl-C and a full disk become a line with what is saved.
    """
    work = place.work.path
    if resume and work.exists():
        check_same(work, record, recipe)
        good = run_dir.checkpoints(work)
        for checkpoint in good:
            run_dir.verify(checkpoint)
        step = run_dir.checkpoint_step(good[-1]) if good else -1
        run_dir.cut_back(work, step)
        if good and [entry["step"] for entry in run_dir.read_metrics(work)][-1:] != [step]:
            raise RealignerError(
                f"{work / run_dir.METRICS_FILE}: has no step {step}, of which there is a checkpoint; train anew (force)"
            )
    else:
        with place.work.folder() as aside:
            write_account(aside, record, recipe)
    try:
        yield
    except BaseException as error:
        good, replies = run_dir.checkpoints(work), run_dir.teacher_replies(work) > 0
        if not good and not replies:
            discard(work, run_dir.RUN)
        if isinstance(error, KeyboardInterrupt):
            kept = "the teacher's replies are saved, to go on from (resume)" if replies else "nothing was saved"
            if good:
                kept = f"step {run_dir.checkpoint_step(good[-1])} is saved, to resume from (resume)"
            raise RealignerError(f"interrupted; {kept}") from None
        cause = error.__cause__ if isinstance(error, RealignerError) else error
        if cause is not None and (why := disk_fault(cause)):
            said = str(error) if isinstance(error, RealignerError) else f"{work}: cannot be written ({why})"
            last = f"the last good checkpoint is {good[-1].name}, to resume from when there is room (resume)" if good else ""
            raise RealignerError(f"{said}; {last or 'nothing was saved'}") from cause
        raise


def check_same(work: Path, record: dict[str, Any], recipe: Recipe) -> None:
    """Raise unless an unfinished run is the one that is asked for."""
    before = run_dir.read_run(work)
    if difference := recipe.difference(read_recipe(work / run_dir.RECIPE_FILE)):
        raise RealignerError(f"{work}: cannot be resumed as another run: {difference} (or discard it: force)")
    data, tokens = before.get("data", {}), record["data"].get("tokens_sha256")
    for what, was, now in (
        ("the data", data.get("sha256"), record["data"]["sha256"]),
        (
            "the text that the chat template makes of the rows",
            data.get("tokens_sha256", tokens),  # older runs do not say, nor one whose teacher still replies
            tokens or data.get("tokens_sha256"),
        ),
        ("the host's weights", before.get("host", {}).get("sha256"), record["host"]["sha256"]),
        ("the number of processes", before.get("processes"), record["processes"]),
    ):
        if was != now:
            shown = f" ({now} now, {was} before)" if what.startswith("the number") else ""
            raise RealignerError(
                f"{work}: {what} changed since it was begun{shown}; resume it as it was, or discard it (force)"
            )


def write_account(folder: Path, record: dict[str, Any], recipe: Recipe) -> None:
    """Write run.json and recipe.yaml; run.json first, so that a recipe with a searched rate always has the search beside it."""
    head = "# Every key of this run. It is repeated by:  realigner train --recipe FOLDER --out OTHER\n"
    write_text(folder / run_dir.RUN_FILE, json.dumps(record, indent=2) + "\n")
    write_text(folder / run_dir.RECIPE_FILE, head + to_yaml(recipe))
