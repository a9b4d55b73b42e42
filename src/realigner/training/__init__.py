"""Training: recipes, exact resume, guards, and the folder a run leaves. Names are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.training.recipe import Recipe as Recipe, make_recipe as make_recipe, read_recipe as read_recipe
    from realigner.training.run_dir import (
        read_metrics as read_metrics,
        read_run as read_run,
        refuse_run as refuse_run,
    )
    from realigner.training.training_run import Run as Run, train as train, train_recipe as train_recipe

_HOMES = {
    **dict.fromkeys(("Recipe", "make_recipe", "read_recipe"), "recipe"),
    **dict.fromkeys(("read_metrics", "read_run", "refuse_run"), "run_dir"),
    **dict.fromkeys(("Run", "train", "train_recipe"), "training_run"),
}

__all__ = [*_HOMES]

__getattr__ = lazily(__name__, _HOMES)
