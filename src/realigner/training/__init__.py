"""Training: recipes, exact resume, guards, and the folder a run leaves. Names are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.training.recipe import Recipe, make_recipe, read_recipe
    from realigner.training.run_dir import read_metrics, read_run, refuse_run, versions
    from realigner.training.training_run import Run, train, train_recipe

_HOMES = {
    "Recipe": "recipe",
    "Run": "training_run",
    "make_recipe": "recipe",
    "read_metrics": "run_dir",
    "read_recipe": "recipe",
    "read_run": "run_dir",
    "refuse_run": "run_dir",
    "train": "training_run",
    "train_recipe": "training_run",
    "versions": "run_dir",
}

__all__ = [
    "Recipe",
    "Run",
    "make_recipe",
    "read_metrics",
    "read_recipe",
    "read_run",
    "refuse_run",
    "train",
    "train_recipe",
    "versions",
]

__getattr__ = lazily(__name__, _HOMES)
