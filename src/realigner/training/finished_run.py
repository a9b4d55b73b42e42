"""The outcome of a training run, and the completion of its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

import realigner.training.run_dir as run_dir
from realigner.errors import RealignerError
from realigner.files import write_text, writing
from realigner.training.loss_plot import save_curve
from realigner.training.model_card import card
from realigner.training.recipe import Recipe
from realigner.tuner import tuner_of


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is a run's last: all steps are done, or its patience ran out."""
    state = run_dir.checkpoint_state(checkpoint)
    if state["global_step"] >= state["max_steps"]:
        return True
    early = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    return early is not None and bool(evaluations_without_gain(state) >= early["args"]["early_stopping_patience"])


def evaluations_without_gain(state: Mapping[str, Any]) -> int:
    """How many evaluations in a row, up to a checkpoint (`run_dir.checkpoint_state`), found no better loss."""
    early = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    return 0 if early is None else int(early["attributes"]["early_stopping_patience_counter"])


def outcome(work: Path, stopped: str | None, recipe: Recipe) -> dict[str, Any]:
    """The entries of run.json about the training itself."""
    good = run_dir.checkpoints(work)
    untrained = {"global_step": 0, "max_steps": 0, "best_global_step": 0}
    last = run_dir.checkpoint_state(good[-1]) if good else untrained
    entries = run_dir.read_metrics(work)
    best = last["best_global_step"]
    losses = {entry["step"]: entry["validation_loss"] for entry in entries if "validation_loss" in entry}
    kept = (best or 0) if recipe.keep == "best" else last["global_step"]
    return {
        "steps_done": last["global_step"],
        "interrupted": bool(stopped),
        "signal": stopped,
        "early_stop": not stopped and last["global_step"] < last["max_steps"],
        "best_step": best,
        "kept_step": kept,
        "kept_loss": round(losses[kept], 4) if kept in losses else None,
        "validation_loss": [round(loss, 4) for loss in losses.values()],
        "tokens": max((e.get("tokens", 0) for e in entries), default=0),
        "seconds": round(entries[-1]["seconds"], 1) if entries else 0.0,
    }


def finish(model: PeftModel, place: run_dir.RunPlace, record: dict[str, Any], recipe: Recipe) -> None:
    """Complete the run's folder from its checkpoints, and rename it to its final name."""
    work = place.work.path
    tuner = tuner_of(model)
    network, config = tuner.registry.network("default"), tuner.peft_config["default"]
    record["irm"] = {
        "preset": config.preset,
        "layers": list(network.layers),
        "parameters": sum(p.numel() for p in network.parameters()),
        "host_parameters": sum(p.numel() for p in tuner.model.parameters()),
        "site": tuner.sites.summary(),
    }
    with writing(work):
        if record["kept_step"]:
            for name in run_dir.ADAPTER_FILES:
                shutil.copyfile(run_dir.checkpoint_folder(work, record["kept_step"]) / name, work / name)
        else:
            weights = _untrained(model, recipe)
            model.save_pretrained(str(work), state_dict=weights, save_embedding_layers=False)
        save_curve(run_dir.read_metrics(work), work / run_dir.CURVE_FILE, kept=record["kept_step"])
    write_text(work / run_dir.CARD_FILE, card(record))
    write_text(work / run_dir.RUN_FILE, json.dumps(record, indent=2) + "\n")
    try:
        place.out.put(work)
    except RealignerError as error:
        raise RealignerError(f"{error}; the run is whole in {work}: resume it (resume) once the place is free") from error


def _untrained(model: PeftModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The weights that the run began with, by their names in the model: made again, as its seed decides them."""
    tuner = tuner_of(model)
    set_seed(recipe.seed)
    network = tuner.peft_config["default"].build(tuner.sites.width, len(tuner.sites.layers))
    return {f"base_model.registry.networks.default.{name}": value for name, value in network.state_dict().items()}
