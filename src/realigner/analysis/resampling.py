"""Null distributions (relabelled neurons, permuted tokens, flipped signs) and bootstrap intervals over prompts.

A p-value is ``(1 + number of draws at least as extreme) / (1 + draws)``, ties broken at random (seeded), so that on null data
it is uniform whatever the statistic; between methods, whose values are often shares, ties count as extreme. docs/statistics.md
has the proofs by simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from scipy import fft
from scipy.special import factorial, ndtri, stdtrit

from realigner.errors import UsageError

Side = Literal["greater", "less", "both"]
Ties = Literal["random", "extreme"]
LEVEL = 0.95  # of every interval
ALPHA = 0.05  # a difference is significant when its p, adjusted for the number of tests, is below
MIN_PROMPTS = 5  # fewer cannot give a p below 0.05 by flipping signs: 2^-4 at best
_CIRCULAR = 256  # from so many neurons on, relabellings are drawn from a subgroup that is much cheaper
_TIE = 1e-9  # relative; sums in another order differ by less


def check_draws(permutations: int, resamples: int) -> None:
    """Raise `UsageError` unless both numbers of draws are positive."""
    if permutations < 1 or resamples < 1:
        raise UsageError(
            f"analysis: permutations={permutations}, resamples={resamples}: give 1 or more of each (1000 is usual)"
        )


def p_value(value: float, draws: np.ndarray, rng: np.random.Generator, side: Side = "greater", ties: Ties = "random") -> float:
    """The permutation p-value of `value` among `draws` under the null; NaN when the value is.

    With few distinct values, p is too large if ties count as extreme, and too small if they do not; broken at random, it is
    uniform over data. But then one random number may decide, so a p-value that is read by itself should count them.

    Args:
        ties: ``random``, or ``extreme``: draws that equal the value count as more extreme.
    """
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(draws):
        return float("nan")
    if side == "both":
        value, draws = abs(value), np.abs(draws)
    elif side == "less":
        value, draws = -value, -draws
    tolerance = _TIE * max(abs(value), float(np.abs(draws).max()))
    beyond, tied = int((draws > value + tolerance).sum()), int((np.abs(draws - value) <= tolerance).sum())
    return float((1 + beyond + (tied if ties == "extreme" else rng.integers(tied + 1))) / (1 + len(draws)))


def interval(value: float, draws: np.ndarray, n: int, bounds: tuple[float, float] = (-np.inf, np.inf)) -> tuple[float, float]:
    """A 95% interval from bootstrap draws; NaN where there is nothing to resample.

    Percentiles of the draws, recentred from the draws' mean to the value and widened by sqrt(n/(n-1)) t(n-1) / z (Hesterberg
    2015): a resample contains repeats, so its map is noisier than the original and the draws are biased; and with few prompts
    they spread too little. docs/statistics.md reports the coverage of this interval and the lower one of plain percentiles.

    Args:
        draws: ``[resample]``.
        n: how many prompts, or tones, were resampled.
        bounds: what the statistic cannot exceed.
    """
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(draws) < 2 or n < 2:
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    wider = np.sqrt(n / (n - 1)) * stdtrit(n - 1, 1 - tail) / ndtri(1 - tail)
    low, high = value + wider * (np.quantile(draws, [tail, 1 - tail]) - draws.mean())
    return float(max(low, bounds[0])), float(min(high, bounds[1]))


def change_per_target(difference: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """A difference of losses per target, paired by row, and its 95% interval over rows.

    Args:
        difference: summed loss of each row minus that of its counterpart ``[row]``.
        counts: number of targets of each row.
        weights: from `prompt_weights`, of rows.
    """
    change = float(difference.sum() / counts.sum())
    return change, *interval(change, (weights @ difference) / (weights @ counts), len(counts))


def prompt_weights(prompts: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Counts of each prompt in each bootstrap resample ``[resample, prompt]``; all NaN with a single prompt."""
    if prompts < 2:
        return np.full((resamples, prompts), np.nan)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(float)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over prompts of every resample; prompts whose value is NaN do not count.

    Args:
        values: ``[prompt, ...]``.
        weights: ``[resample, prompt]``.

    Returns:
        ``[resample, ...]``; NaN where no prompt is left.
    """
    flat = values.reshape(len(values), -1)
    there = np.isfinite(flat)
    total, weight = weights @ np.where(there, flat, 0.0), weights @ there
    mean: np.ndarray = total / np.where(weight > 0, weight, np.nan)
    shaped: np.ndarray = mean.reshape(len(weights), *values.shape[1:])
    return shaped


def mean_over_first(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is not NaN; NaN where there is nothing."""
    return np.asarray(weighted_mean(values, np.ones((1, len(values))))[0])


def mean_of_some(values: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of values ``[prompt]`` over some prompts, and its bootstrap draws."""
    kept = np.where(prompts, values, np.nan)
    return float(mean_over_first(kept)), weighted_mean(kept, weights)


def sign_flips(prompts: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Signs ``[draw, prompt]``: if there are few, all combinations except the one without a flip; else random ones."""
    if 2**prompts <= draws:
        numbers = np.arange(1, 2**prompts)[:, None]
        return np.asarray(np.where(numbers >> np.arange(prompts) & 1, -1.0, 1.0))
    return np.asarray(rng.choice([-1.0, 1.0], size=(draws, prompts)))


def sign_flip_p(values: np.ndarray, draws: int, rng: np.random.Generator, side: Side = "both", ties: Ties = "random") -> float:
    """Whether per-prompt values ``[prompt]`` lie to one side of 0. Null: each is as likely as its negative.

    NaN values do not count. The result is NaN with fewer than 5 prompts (too few to show a difference), and if all are 0.
    """
    values = values[np.isfinite(values)]
    if len(values) < MIN_PROMPTS or not values.any():
        return float("nan")
    return p_value(float(values.mean()), sign_flips(len(values), draws, rng) @ values / len(values), rng, side, ties)


def exchange_p(differences: list[np.ndarray], weights: np.ndarray, draws: int, rng: np.random.Generator) -> float:
    """Whether runs differ from the controls that some of them share, by prompt (two-sided).

    Null: a control and its runs are exchangeable within every prompt. Flipping signs would not be valid: the mean of several
    runs minus one control is not symmetric if values are skewed. With a single run the two tests are the same.

    Args:
        differences: of every control, its runs' differences from it ``[run, prompt]``; a prompt that any lacks does not count.
        weights: of the runs in the mean, in the order of `differences`.

    Returns:
        p; NaN with fewer than 5 prompts, and where all differences are exactly 0.
    """
    kept = np.isfinite(np.concatenate(differences)).all(axis=0)
    differences = [own[:, kept] for own in differences]
    count = int(kept.sum())
    if count < MIN_PROMPTS or not any(own.any() for own in differences):
        return float("nan")
    total, drawn, start = 0.0, np.zeros(draws), 0
    for own in differences:
        weight = weights[start : start + len(own)]
        start += len(own)
        shares = np.concatenate([[-weight.sum()], weight])  # the control first
        values = np.concatenate([np.zeros((1, count)), own])
        dealt = rng.permuted(np.tile(np.arange(len(values)), (draws, count, 1)), axis=-1)
        total += float((shares @ values).sum())
        drawn += (values[dealt, np.arange(count)[:, None]] @ shares).sum(axis=1)
    return p_value(total, drawn, rng, "both")


def exchange_least(weights: list[np.ndarray], prompts: int) -> float:
    """The smallest p that `exchange_p` can give: how likely one deal is to be the most extreme one, by luck.

    Runs of equal weight may be dealt in any order. With one run per control, the opposite deal is as extreme.

    Args:
        weights: of every control, its runs' weights in the mean.
    """
    alike = 1.0
    for own in weights:
        _, counts = np.unique(np.round(np.append(own, -own.sum()), 12), return_counts=True)
        alike *= float(np.prod(factorial(counts)) / factorial(len(own) + 1))
    return float(alike**prompts) * (2 if all(len(own) == 1 for own in weights) else 1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, 1 for the smallest; ties get their mean rank."""
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, axis=-1)
    place = np.broadcast_to(np.arange(1.0, values.shape[-1] + 1), values.shape)
    begins = np.ones(values.shape, dtype=bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    if not begins.all():
        ends = np.ones(values.shape, dtype=bool)
        ends[..., :-1] = begins[..., 1:]
        first = np.maximum.accumulate(np.where(begins, place, 0), axis=-1)
        last = np.minimum.accumulate(np.where(ends, place, np.inf)[..., ::-1], axis=-1)[..., ::-1]
        place = (first + last) / 2
    result = np.empty(values.shape)
    np.put_along_axis(result, order, place, axis=-1)
    return result


class Relabelling:
    """Random relabellings of the neurons, drawn separately for each row of a matrix ``[row, neuron]``.

    From 256 neurons on a draw shifts each row circularly, after all rows were put into one random order: the shifts of that
    order are a subgroup of all relabellings, so the p-value is as exact as with all of them, at a thirtieth of the cost. With
    fewer neurons each draw is a random permutation of each row.

    Args:
        rows: number of rows of the largest matrix. For a smaller one, say which rows it has; equal row numbers get the same
            relabelling.
        neurons: number of columns.
    """

    def __init__(self, rows: int, neurons: int, draws: int, rng: np.random.Generator) -> None:
        self.neurons, self.draws = neurons, draws
        self.circular = neurons >= _CIRCULAR
        if self.circular:
            self.order = rng.permutation(neurons)
            self.shifts = rng.integers(neurons, size=(draws, rows))
        else:
            unmoved = np.broadcast_to(np.arange(neurons, dtype=np.int16), (draws, rows, neurons))
            self.places = rng.permuted(unmoved, axis=2)

    def each(self, matrix: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Every draw's relabelled matrix ``[row, neuron]``. It is overwritten by the next one."""
        drawn = np.empty_like(matrix)
        if self.circular:
            twice = np.tile(matrix[:, self.order], 2)
            for shifts in self.shifts[:, rows].tolist():
                for row, shift in enumerate(shifts):
                    drawn[row] = twice[row, shift : shift + self.neurons]
                yield drawn
        else:
            for places in self.places:
                drawn[...] = np.take_along_axis(matrix, places[rows].astype(np.intp), axis=1)
                yield drawn

    def sums(self, matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Column sums of every draw's matrix ``[draw, neuron]``."""
        result = np.zeros((self.draws, self.neurons), dtype=matrix.dtype)
        for total, drawn in zip(result, self.each(matrix, rows), strict=True):
            drawn.sum(axis=0, out=total)
        return result

    def products(self, matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The rows' inner products in every draw ``[draw, row, row]``.

        With shifts these are the rows' circular cross-correlations at the difference of two shifts: one transform a pair.
        """
        # Relabelling permutes a row's values, so the diagonal (each row's sum of squares) is the same in every draw.
        own = np.square(matrix).sum(axis=1)
        result = np.zeros((self.draws, len(matrix), len(matrix)))
        result[:, np.arange(len(matrix)), np.arange(len(matrix))] = own
        if not self.circular:
            for products, drawn in zip(result, self.each(matrix, rows), strict=True):
                products[...] = drawn @ drawn.T
            return result
        spectrum, shifts = fft.rfft(matrix[:, self.order], axis=1), self.shifts[:, rows]  # [row, frequency], [draw, row]
        for row in range(len(matrix) - 1):
            # Convolution theorem: correlation[k, lag] = sum_n row[n] * later_k[n + lag], with all later rows at once.
            correlation = fft.irfft(spectrum[row].conj() * spectrum[row + 1 :], n=self.neurons, axis=1)
            # Two rows shifted by s and t line up as unshifted ones at lag t - s  [draw, later row].
            lag = (shifts[:, row + 1 :] - shifts[:, row : row + 1]) % self.neurons
            between = correlation[np.arange(len(correlation)), lag]
            result[:, row, row + 1 :] = between
            result[:, row + 1 :, row] = between
        return result

    def take(self, matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Values at given columns of every draw's matrix.

        Args:
            matrix: ``[row, neuron]``.
            rows: which rows those are.
            columns: ``[draw, column]``.

        Returns:
            ``[draw, row, column]``.
        """
        number = np.arange(len(matrix))[:, None]
        if self.circular:
            return np.asarray(matrix[number, self.order[(columns[:, None] + self.shifts[:, rows, None]) % self.neurons]])
        draw = np.arange(self.draws)[:, None, None]
        return np.asarray(matrix[number, self.places[draw, rows[:, None], columns[:, None]]])
