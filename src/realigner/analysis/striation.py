"""Striation: are deltas large at the same neuron index in every layer?

Statistics of one map M ``[layer, neuron]`` come first, then the table over the runs of a trace. All are computed from the
layers' means and the inner products of the centred layers, ``G = A A^T`` (for W: of their ranks), because the sum of squares
between neurons is ``1^T G 1 / L`` and the one within layers is ``trace G``. So each relabelled
map costs one small matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis.per_run import RunTexts, each_run, layer_scale, leading_score, prompts_of, table_of, twins
from realigner.analysis.resampling import Relabelling, check_draws, prompt_weights, ranks
from realigner.analysis.tables import RunStatistic, tabulate
from realigner.errors import UsageError

WITHOUT = (0, 1, 10)  # leading indices left out
RANKED_RESAMPLES = 100  # of W's bootstrap: each needs the ranks of a whole map
TEST = "neuron labels permuted within each layer"
_AT_ONCE = 16  # resampled maps made together
_Statistics = dict[tuple[str, int], np.ndarray]  # by statistic, and how many indices are left out
_PAIRED = 2048  # texts times layers of a run up to which all their inner products are computed (32 MiB)
_OF_PRODUCTS = (
    *("icc", "eta_squared_neuron", "eta_squared_layer", "omega_squared_neuron", "omega_squared_layer"),
    *("omega_squared_difference", "svd_share"),
)
_TESTED = ("icc", "eta_squared_neuron", "omega_squared_neuron", "svd_share", "kendall_w")


class Shares(NamedTuple):
    """A share of variance that goes with the neuron index, and one that goes with the layer."""

    neuron: float
    layer: float


def icc(m: np.ndarray) -> float:
    """ICC(C,1) of M ``[layer, neuron]``, neurons as targets and layers as raters: (MS_n - MS_e) / (MS_n + (L-1) MS_e).

    0 without striation, 1 where every layer has the same profile. McGraw and Wong (1996), case 3, consistency, single rater.
    NaN with one layer, one neuron, or a constant map.

    Raises:
        UsageError: when M is no matrix, or has NaN or infinities.
    """
    return float(_of_map(m)["icc"])


def eta_squared(m: np.ndarray) -> Shares:
    """Eta squared of M ``[layer, neuron]``: SS_neuron / SS_total and SS_layer / SS_total.

    Without striation the neuron's is about 1/L: that is its noise floor. NaN and raises: as `icc`.
    """
    found = _of_map(m)
    return Shares(float(found["eta_squared_neuron"]), float(found["eta_squared_layer"]))


def omega_squared(m: np.ndarray) -> Shares:
    """Omega squared of M ``[layer, neuron]``: (SS - df MS_e) / (SS_total + MS_e), eta squared without its noise floor.

    NaN and raises: as `icc`.
    """
    found = _of_map(m)
    return Shares(float(found["omega_squared_neuron"]), float(found["omega_squared_layer"]))


def svd_share(m: np.ndarray) -> float:
    """The largest squared singular value of M ``[layer, neuron]``, each layer centred, over their sum.

    About (1 + sqrt(L/D))^2 / L without striation, where layers vary alike. NaN and raises: as `icc`.
    """
    return float(_of_map(m)["svd_share"])


def kendall_w(m: np.ndarray) -> float:
    """Kendall's coefficient of concordance of M ``[layer, neuron]``, layers as judges, corrected for ties.

    About 1/L without striation, 1 where every layer ranks the neurons alike. NaN and raises: as `icc`.
    """
    b = _centred(ranks(_matrix(m)))
    return float(_concordance(b @ b.T, b.shape[1]))


def striation(
    source: xr.Dataset | xr.DataArray, permutations: int = 1000, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Striation statistics of every run, with and without its leading indices.

    Args:
        source: a trace, or what `text_maps` made of it.
        permutations: relabellings that p-values are taken from.
        resamples: bootstrap resamples of prompts; at most 100 of them for W.
        seed: of all draws.

    Raises:
        UsageError: for a source that is neither, or fewer than one draw.

    Returns:
        A row per run, statistic and ``without`` (how many leading indices, by `leading_score`, are left out: 0, 1, 10), and
        rows ``run="all"``; columns as in `tabulate`. Statistics: ``icc``, ``eta_squared_neuron``, ``eta_squared_layer``,
        ``omega_squared_neuron``, ``omega_squared_layer``, ``omega_squared_difference`` (neuron less layer), ``svd_share`` and
        ``kendall_w`` (of the ranks in the whole map, also where indices are left out).

        ``p``: neuron labels permuted within each layer, the leading indices chosen anew in each draw; ``null``: the draws'
        mean. Layers' means do not change when labels are permuted, so the layer's statistics and the difference have no p and
        no null. Values are NaN with one layer, for a constant map, and where no two indices are left; intervals are NaN with
        one prompt.

    Example:
        >>> striation(trace).query("statistic == 'icc' and without == 0")  # doctest: +SKIP
    """
    check_draws(permutations, resamples)
    rng = np.random.default_rng(seed)
    layers = np.unique(source["layer"].values)
    relabelling = Relabelling(len(layers), source.sizes["neuron"], permutations, rng)
    prompts = prompts_of(source)
    weights = prompt_weights(len(prompts), resamples, rng)
    entries: list[RunStatistic] = []
    on_some = _OnSome(source, prompts, weights)
    for run in each_run(source):
        m, rows = run.mean(), np.searchsorted(layers, run.layers)
        leading = _leading(leading_score(m))
        nulls = _relabelled(m, rows, relabelling).statistics()
        draws = _resampled(run, weights[:, np.searchsorted(prompts, run.prompts)], leading).statistics()
        there = np.isin(prompts, run.prompts[run.counts > 0])
        for (statistic, without), (value,) in _Maps.of(m, leading).statistics().items():
            under_null = nulls[statistic, without] if statistic in _TESTED else np.full(permutations, np.nan)
            seen = np.isfinite(under_null)
            entries.append(
                RunStatistic(
                    run=run.run,
                    tone=run.tone,
                    seed=run.seed,
                    keys={"statistic": statistic, "without": without},
                    value=float(value),
                    draws=_padded(draws[statistic, without], len(weights)),
                    n=int(there.sum()),
                    bounds=(-1.0, 1.0),
                    null=float(under_null[seen].mean()) if seen.any() and np.isfinite(value) else float("nan"),
                    nulls=under_null,
                    joint=True,
                    test=TEST,
                    there=there,
                    over=partial(on_some.statistic, run.run, statistic, without),
                )
            )
    return tabulate(entries, twins(source), permutations, rng)


def _padded(draws: np.ndarray, resamples: int) -> np.ndarray:
    """Not every resample can be drawn, or ranked: the rest is NaN."""
    return np.pad(draws, (0, resamples - len(draws)), constant_values=np.nan)


class _OnSome:
    """Statistics of runs over some of their prompts; their texts are read again."""

    def __init__(self, source: xr.Dataset | xr.DataArray, prompts: np.ndarray, weights: np.ndarray) -> None:
        self.source, self.prompts, self.weights = source, prompts, weights
        self.found: dict[tuple[str, bytes], tuple[_Statistics, _Statistics]] = {}

    def statistic(self, run: str, statistic: str, without: int, some: np.ndarray) -> tuple[float, np.ndarray]:
        """One of them, and its bootstrap draws.

        Args:
            some: which of all prompts ``[prompt]``.
        """
        key = run, some.tobytes()
        if key not in self.found:
            self.found[key] = self._of(run, self.prompts[some])
        values, draws = self.found[key]
        return float(values[statistic, without][0]), _padded(draws[statistic, without], len(self.weights))

    def _of(self, run: str, prompts: np.ndarray) -> tuple[_Statistics, _Statistics]:
        texts = table_of(self.source)
        numbers = np.flatnonzero((texts["run"] == run) & texts["prompt"].isin(prompts))
        (own,) = each_run(self.source.isel(text=numbers))
        m = own.mean()
        leading = _leading(leading_score(m))
        drawn = _resampled(own, self.weights[:, np.searchsorted(self.prompts, own.prompts)], leading)
        return _Maps.of(m, leading).statistics(), drawn.statistics()


@dataclass
class _Maps:
    """Sufficient statistics of many maps, which share their leading indices or have their own.

    Attributes:
        neurons: columns of the whole maps.
        products: of the centred layers ``[map, layer, layer]``.
        mean: the layers' means ``[map, layer]``.
        leading: centred values at the leading indices, the first one first ``[map, layer, index]``.
        ranked: the same of the layers' ranks, of the first maps or of all.
        ranked_leading: and at the leading indices.
    """

    neurons: int
    products: np.ndarray
    mean: np.ndarray
    leading: np.ndarray
    ranked: np.ndarray
    ranked_leading: np.ndarray

    @classmethod
    def of(cls, m: np.ndarray, leading: np.ndarray) -> _Maps:
        """Of one map ``[layer, neuron]``."""
        a, b = _centred(m), _centred(ranks(m))
        parts = (a @ a.T, m.mean(axis=1), a[:, leading], b @ b.T, b[:, leading])
        return cls(m.shape[1], *(part[None] for part in parts))

    def statistics(self) -> _Statistics:
        """``(statistic, without) -> [map]``."""
        found: _Statistics = {}
        for without in WITHOUT:
            left = _left(self.products, self.mean, self.leading[..., :without], self.neurons)
            values = _from_products(*left, self.neurons - without)
            products, _ = _left(self.ranked, self.mean[: len(self.ranked)], self.ranked_leading[..., :without], self.neurons)
            values["kendall_w"] = _concordance(products, self.neurons - without)
            found |= {(name, without): value for name, value in values.items()}
        return found


def _relabelled(m: np.ndarray, rows: np.ndarray, relabelling: Relabelling) -> _Maps:
    """Every relabelled map, each with its own leading indices."""
    a, b = _centred(m), _centred(ranks(m))
    leading = _leading(relabelling.sums((m / layer_scale(m)).astype(np.float32), rows))
    return _Maps(
        neurons=m.shape[1],
        products=relabelling.products(a, rows),
        mean=np.broadcast_to(m.mean(axis=1), (relabelling.draws, len(m))),
        leading=relabelling.take(a, rows, leading),
        ranked=relabelling.products(b, rows),
        ranked_leading=relabelling.take(b, rows, leading),
    )


def _resampled(run: RunTexts, weights: np.ndarray, leading: np.ndarray) -> _Maps:
    """The map of every bootstrap resample ``[resample, text]``; none with one prompt, or where there is nothing to measure."""
    if not np.isfinite(weights).all() or not np.isfinite(run.sums).all() or not len(run.layers):
        return _Maps(0, np.empty((0, 1, 1)), np.empty((0, 1)), *(np.empty((0, 1, 1)) for _ in range(3)))
    a = np.stack([_centred(own.astype(float)) for own in run.sums])
    shares = weights / np.maximum(1.0, weights @ run.counts)[:, None]
    ranked = [_centred(ranks(drawn)) for drawn in _combined(a, shares[:RANKED_RESAMPLES])]
    return _Maps(
        neurons=a.shape[2],
        products=_products_of(a, shares),
        mean=shares @ run.sums.mean(axis=2, dtype=float),
        leading=np.tensordot(shares, a[..., leading], 1),
        ranked=np.stack([b @ b.T for b in ranked]),
        ranked_leading=np.stack([b[:, leading] for b in ranked]),
    )


def _combined(a: np.ndarray, shares: np.ndarray) -> Iterator[np.ndarray]:
    """Weighted sums of texts' layers: of ``[text, layer, neuron]`` and ``[resample, text]``, one by one ``[layer, neuron]``."""
    for start in range(0, len(shares), _AT_ONCE):
        yield from (shares[start : start + _AT_ONCE] @ a.reshape(len(a), -1)).reshape(-1, *a.shape[1:])


def _products_of(a: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Inner products of the layers of every `_combined` ``[resample, layer, layer]``.

    They are sums over pairs of texts of the products between their layers, which are computed once where they are few.
    """
    texts, layers, neurons = a.shape
    if texts * layers > _PAIRED:
        return np.stack([drawn @ drawn.T for drawn in _combined(a, shares)])
    rows = a.reshape(texts * layers, neurons)
    between = (rows @ rows.T).reshape(texts, -1)
    found = []
    for start in range(0, len(shares), _AT_ONCE):
        own = shares[start : start + _AT_ONCE]
        halved = (own @ between).reshape(-1, layers, texts, layers)
        found.append(np.einsum("bltm,bt->blm", halved, own))
    return np.concatenate(found)


def _matrix(m: np.ndarray) -> np.ndarray:
    m = np.asarray(m, dtype=float)
    if m.ndim != 2 or not m.size:
        raise UsageError(f"striation: a map is [layer, neuron], not of shape {m.shape}; choose one run")
    if not np.isfinite(m).all():
        raise UsageError("striation: the map has NaN or infinities; leave out the layers that the run does not have")
    return m


def _of_map(m: np.ndarray) -> dict[str, np.ndarray]:
    a = _centred(_matrix(m))
    return _from_products(a @ a.T, np.asarray(m, dtype=float).mean(axis=1), a.shape[1])


def _centred(m: np.ndarray) -> np.ndarray:
    """Each layer less its mean; a constant layer becomes exactly 0."""
    difference = m - m[:, :1]
    return np.asarray(difference - difference.mean(axis=1, keepdims=True))


def _leading(score: np.ndarray) -> np.ndarray:
    """The indices with the largest scores, largest first, along the last axis; no more than there are."""
    count = min(max(WITHOUT), score.shape[-1])
    some = np.argpartition(-score, count - 1, axis=-1)[..., :count]
    return np.take_along_axis(some, np.argsort(-np.take_along_axis(score, some, axis=-1), axis=-1), axis=-1)


def _left(products: np.ndarray, mean: np.ndarray, left_out: np.ndarray, neurons: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner products and means of layers without some columns, the layers centred again.

    Args:
        products: of the whole centred layers ``[..., layer, layer]``.
        mean: the layers' means ``[..., layer]``.
        left_out: centred values in the columns to leave out ``[..., layer, column]``.
        neurons: columns of the whole.
    """
    left = max(1, neurons - left_out.shape[-1])
    # A centred layer sums to 0, so without the columns its mean over the rest is -sum(left out) / left  [..., layer].
    shift = -left_out.sum(axis=-1) / left
    # Sum over the rest = whole sum less the columns' part; centring again takes left * shift_l * shift_m off  [..., L, L].
    products = products - left_out @ left_out.swapaxes(-1, -2) - left * shift[..., :, None] * shift[..., None, :]
    return products, mean + shift


def _from_products(products: np.ndarray, mean: np.ndarray, neurons: int) -> dict[str, np.ndarray]:
    """Statistics from the centred layers' inner products ``[..., layer, layer]`` and the layers' means ``[..., layer]``."""
    layers, n = products.shape[-1], neurons
    if layers < 2 or n < 2:
        return {name: np.full(products.shape[:-2], np.nan) for name in _OF_PRODUCTS}
    # Two-way ANOVA without replication, all [...]: with G = products, SS_total = SS_neuron + SS_layer + SS_error.
    within = np.trace(products, axis1=-2, axis2=-1)  # SS_neuron + SS_error: every layer's sum of squares about its mean
    between = products.sum(axis=(-2, -1)) / layers  # SS_neuron = 1^T G 1 / L: L times that of the neurons' means
    of_layers = n * mean.var(axis=-1) * layers  # SS_layer
    total = within + of_layers
    error = np.maximum(within - between, 0.0) / ((n - 1) * (layers - 1))  # MS_error; the difference may round below 0
    target = between / (n - 1)  # MS_neuron
    largest = np.linalg.eigvalsh(products)[..., -1]  # the largest squared singular value of the centred map
    omega_neuron = _ratio(between - (n - 1) * error, total + error)
    omega_layer = _ratio(of_layers - (layers - 1) * error, total + error)
    uneven = within > 0  # no variance within any layer: there is nothing that could line up
    return {
        "icc": _ratio(target - error, target + (layers - 1) * error),
        "eta_squared_neuron": np.where(uneven, _ratio(between, total), np.nan),
        "eta_squared_layer": np.where(uneven, _ratio(of_layers, total), np.nan),
        "omega_squared_neuron": np.where(uneven, omega_neuron, np.nan),
        "omega_squared_layer": np.where(uneven, omega_layer, np.nan),
        "omega_squared_difference": np.where(uneven, omega_neuron - omega_layer, np.nan),
        "svd_share": _ratio(largest, within),
    }


def _concordance(products: np.ndarray, neurons: int) -> np.ndarray:
    """W from the inner products of the layers' centred ranks: S / (L * SS within layers), which is corrected for ties."""
    layers = products.shape[-1]
    if layers < 2 or neurons < 2:
        return np.full(products.shape[:-2], np.nan)
    return _ratio(products.sum(axis=(-2, -1)) / layers, np.trace(products, axis1=-2, axis2=-1))


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(over, under, out=np.full(np.shape(under), np.nan), where=np.asarray(under) > 0))
