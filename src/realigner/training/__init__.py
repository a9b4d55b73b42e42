"""Training: recipes, exact resume, guards, and the folder a run leaves. Names are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.training.recipe import Recipe, make_recipe, read_recipe
    from realigner.training.run_dir import read_metrics, read_run, refuse_run, versions
    from realigner.training.training_run import Run, train, train_recipe

_HOMES = {
    **dict.fromkeys(("Recipe", "make_recipe", "read_recipe"), "recipe"),
    **dict.fromkeys(("read_metrics", "read_run", "refuse_run", "versions"), "run_dir"),
    **dict.fromkeys(("Run", "train", "train_recipe"), "training_run"),
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
