"""Do measurements of the host predict the indices at which IRMs are largest? Rank correlations and a ridge regression.

No torch. Scores and measurements enter the regression as normal scores of their ranks (van der Waerden), so that no single
outlier dominates.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import ndtri
from scipy.stats import rankdata, spearmanr

from realigner.analysis.consensus import holm
from realigner.explain.explanation import Correlation, Regression

_STATES = {"residual": "rest", "residual_first": "first", "residual_delimiter": "delimiter"}
ABOUT = {
    "final_gain": "size of the final norm's gain",
    "head_norm": "norm of the head's column about its mean",
    "head_reach": "that norm times the gain: how far the index moves the logits apart",
    "embedding_norm": "norm of the embedding's column",
    "attention_gain": "gain of the norms before attention, over the layer's median (geometric mean over layers)",
    "mlp_gain": "gain of the norms before the MLPs, over the layer's median (geometric mean over layers)",
    "attention_write": "norm of the attention's output rows, over the layer's median (geometric mean over layers)",
    "mlp_write": "norm of the MLP's output rows, over the layer's median (geometric mean over layers)",
    "residual": "RMS of the residual, over the layer's median (geometric mean over layers)",
    "residual_first": "the same at the first token",
    "residual_delimiter": "the same at delimiters",
    "residual_max": "largest residual, over the layer's median (geometric mean over layers)",
    "residual_kurtosis": "kurtosis of the residual (mean over layers)",
    "energy_share": "share of the residual's energy (mean over layers)",
    "gradient": "RMS of the loss's gradient, over the layer's median (geometric mean over layers)",
    "gradient_sign": "how constant the gradient's sign is (mean over layers)",
    "gradient_cosine": "how alike the gradient is in all layers",
    "direct": "RMS of the gradient's direct part",
    "through_norm": "RMS of its part through the norm's scale",
}


def weight_table(weights: xr.Dataset) -> pd.DataFrame:
    """The columns of `measurement_table` that need no forward: measurements of the weights alone (of `weights_of`)."""
    columns = {"final_gain": np.abs(weights["final_gain"].values)}
    columns |= {name: weights[name].values for name in ("head_norm", "head_reach", "embedding_norm")}
    columns |= {name: _geometric(weights[name].values) for name in ("attention_gain", "mlp_gain")}
    columns |= {name: _geometric(_relative(weights[name].values)) for name in ("attention_write", "mlp_write")}
    return pd.DataFrame(columns, index=pd.RangeIndex(weights.sizes["neuron"], name="neuron")).dropna(axis=1)


def measurement_table(weights: xr.Dataset, states: xr.Dataset) -> pd.DataFrame:
    """All measurements of a host, one number for each index.

    Args:
        weights: from `weights_of`.
        states: from `measure_host`.

    Returns:
        Indexed by neuron, a column each of `ABOUT`. What is measured in every layer is put over its layer's median where
        layers differ in size, and averaged over layers (geometrically where it is a ratio). What a host does not have is
        left out.
    """
    layered = {name: states["residual"].sel(kind=kind).values for name, kind in _STATES.items()}
    layered |= {"residual_max": states["residual_max"].max("kind").values, "gradient": states["gradient"].values}
    known = weight_table(weights)
    columns = {
        **{str(name): known[name].to_numpy() for name in known},
        **{name: _geometric(_relative(values)) for name, values in layered.items()},
        "residual_kurtosis": np.nanmean(states["residual_kurtosis"].sel(kind="rest").values, axis=0),
        **{name: states[name].values.mean(axis=0) for name in ("energy_share", "gradient_sign")},
        **{name: states[name].values for name in ("gradient_cosine", "direct", "through_norm")},
    }
    there = {name: columns[name] for name in ABOUT if name in columns}
    return pd.DataFrame(there, index=pd.RangeIndex(len(columns["direct"]), name="neuron")).dropna(axis=1)


def _relative(values: np.ndarray) -> np.ndarray:
    """``[layer, neuron]`` over each layer's median."""
    median = np.median(values, axis=-1, keepdims=True)
    return np.asarray(values / np.where(median > 0, median, np.nan))


def _geometric(values: np.ndarray) -> np.ndarray:
    """The geometric mean over layers that have the thing; NaN where none does."""
    there = values[~np.isnan(values).all(axis=1)]
    if not len(there):
        return np.full(values.shape[1], np.nan)
    return np.asarray(np.exp(np.log(np.maximum(there, 1e-12)).mean(axis=0)))


def gain_for_median_reach(measured: pd.DataFrame, index: int) -> float | str:
    """The size of the final norm's gain that gives an index the median reach; ``"median"`` if no gain does."""
    if "head_reach" not in measured or not measured["head_norm"].iloc[index] > 0:
        return "median"
    return float(measured["head_reach"].median() / measured["head_norm"].iloc[index])


def index_of_median_reach(measured: pd.DataFrame, index: int) -> int | None:
    """The index whose reach is the median's, where the head's column at `index` is the same for every token; else None."""
    if "head_reach" not in measured or measured["head_norm"].iloc[index] > 0:
        return None
    reach = measured["head_reach"]
    return int((reach - reach.median()).abs().to_numpy().argmin())


def correlations(measured: pd.DataFrame, scores: Mapping[str, np.ndarray]) -> list[Correlation]:
    """Spearman's rank correlation of each measurement with each score.

    Args:
        measured: from `measurement_table`.
        scores: name -> `leading_score` ``[neuron]``.

    Returns:
        Intervals are Fisher's z with Bonett and Wright's variance (1 + rho^2/2) / (n - 3); ``p_holm`` is over the
        measurements of one score.
    """
    found = []
    for name, score in scores.items():
        rhos, ps = np.array([spearmanr(measured[measurement], score) for measurement in measured], dtype=float).T
        error = np.sqrt((1 + rhos**2 / 2) / max(1, len(score) - 3))
        z = np.arctanh(np.clip(rhos, -0.999999, 0.999999))
        columns = (rhos, np.tanh(z - 1.96 * error), np.tanh(z + 1.96 * error), ps, holm(ps))
        for measurement, *values in zip(map(str, measured), *(column.tolist() for column in columns), strict=True):
            numbers = dict(zip(("rho", "low", "high", "p", "p_holm"), values, strict=True))
            found.append(Correlation(scores=name, measurement=measurement, n=len(score), **numbers))
    return found


def cross_validated_r2(
    measured: pd.DataFrame,
    score: np.ndarray,
    folds: int = 10,
    permutations: int = 200,
    resamples: int = 1000,
    seed: int = 0,
) -> Regression:
    """Cross-validated R^2 of a ridge regression of a score's ranks on all measurements.

    Args:
        measured: from `measurement_table`.
        score: ``[neuron]``.
        folds: over indices, shuffled.
        permutations: of the score over indices: the null.
        resamples: of indices, for the interval.
        seed: of all draws.

    Returns:
        ``r2`` is 1 - squared error over the variance, of held-out indices: at most 1, negative if worse than the mean;
        ``null`` is its mean under permutation.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict

    rng = np.random.default_rng(seed)
    x = np.column_stack([_normal(measured[name].to_numpy()) for name in measured])
    ridge = RidgeCV(alphas=np.logspace(-1, 4, 11), alpha_per_target=True)
    y = _normal(score)
    targets = np.column_stack([y, *(rng.permutation(y) for _ in range(permutations))])
    cut = KFold(min(folds, len(y)), shuffle=True, random_state=seed)
    errors = (targets - cross_val_predict(ridge, x, targets, cv=cut)) ** 2
    spread = (y - y.mean()) ** 2
    own = errors[:, 0]
    r2, *nulls = 1 - errors.sum(axis=0) / spread.sum()
    picked = rng.integers(len(y), size=(resamples, len(y)))
    low, high = np.quantile(1 - own[picked].sum(axis=1) / spread[picked].sum(axis=1), [0.025, 0.975])
    p = (1 + sum(bool(null >= r2) for null in nulls)) / (1 + permutations)
    return Regression(r2=float(r2), low=float(low), high=float(high), null=float(np.mean(nulls)), p=p, n=len(y))


def _normal(values: np.ndarray) -> np.ndarray:
    return np.asarray(ndtri(rankdata(values) / (len(values) + 1)))
