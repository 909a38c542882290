"""Weighted first and second moments of columns, safe at any offset and scale."""

from collections.abc import Iterator

import numpy as np

from skvi.runtime.blocks import Densified, power_of_two, row_slices

_BLOCK_FLOATS = 1 << 17
_SAMPLE_ROWS, _SAMPLE_FLOATS = 1024, 1 << 20
_MAX_REPEATS = 4
# Columns that only rows of so little weight have, relative to the others, get weights of their own.
_LITTLE = 1e-150


def weighted_moments(
    X: np.ndarray | Densified, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean and (biased) standard deviation of each column, in float64.

    One pass over row blocks for the range and, as a rule, one for both moments. Sums are taken
    over deviations from a provisional mean in units of the range, so that neither 1e150 overflows
    nor 1e-150 vanishes when squared, and an offset of 1e8 costs no digits of the spread. Where
    the provisional mean turns out to be far off, the second pass is repeated about the better one.

    Parameters
    ----------
    X : ndarray or Densified of shape (N, D)
        Finite or NaN; any float dtype. NaN are left out; each column has another value.
    weight : ndarray of shape (N,)
        Non-negative, with a positive finite sum.

    Returns
    -------
    mean, std : ndarray of shape (D,)
    """
    rows_per_block = max(64, _BLOCK_FLOATS // max(1, X.shape[1]))

    def blocks() -> Iterator[slice]:
        return row_slices(X.shape[0], rows_per_block)

    low = np.min([X[rows].min(axis=0) for rows in blocks()], axis=0).astype(np.float64)
    some_missing, uneven = bool(np.isnan(low).any()), False
    if some_missing:
        low = np.fmin.reduce([np.fmin.reduce(X[rows]) for rows in blocks()]).astype(np.float64)
        each = ((weight[rows, None] * ~np.isnan(X[rows])).max(axis=0) for rows in blocks())
        largest = np.max(list(each), axis=0)  # (D,), of the rows that have a column
        uneven = bool((largest < _LITTLE * weight.max()).any())
    if not uneven:
        weight = weight / weight.max()
        weight = weight / weight.sum()
    high = np.fmax.reduce([np.fmax.reduce(X[rows]) for rows in blocks()]).astype(np.float64)
    unit = power_of_two(0.5 * high - 0.5 * low)
    spread = high > low  # a constant column gets no spread from the rounding of its mean

    n_sample = min(X.shape[0], _SAMPLE_ROWS, max(64, _SAMPLE_FLOATS // max(1, X.shape[1])))
    sample = np.linspace(0, X.shape[0] - 1, n_sample, dtype=np.intp)
    mean = low + unit * np.nan_to_num((X[sample].astype(np.float64) - low) / unit).mean(axis=0)
    for _ in range(_MAX_REPEATS):
        first, second, share = np.zeros(X.shape[1]), np.zeros(X.shape[1]), np.zeros(X.shape[1])
        for rows in blocks():
            deviation = X[rows] - mean
            deviation /= unit
            if some_missing:
                missing = np.isnan(deviation)
                deviation[missing] = 0.0
                if uneven:
                    part = np.where(missing, 0.0, weight[rows, None]) / largest
                    share += part.sum(axis=0)
                    first += (part * deviation).sum(axis=0)
                    second += (part * np.square(deviation)).sum(axis=0)
                    continue
                share += weight[rows] @ ~missing
            first += weight[rows] @ deviation
            np.square(deviation, out=deviation)
            second += weight[rows] @ deviation
        if some_missing:
            first, second = first / share, second / share
        mean = np.where(spread, mean + unit * first, low)
        # first^2 / second is the share of the sum of squares that the shift explains: below a
        # half, taking it out costs less than a digit.
        if (np.square(first) <= 0.5 * second).all():
            break
    std = unit * np.sqrt(np.maximum(second - np.square(first), 0.0))
    return mean, np.where(spread, std, 0.0)


def weighted_quantiles(
    x: np.ndarray, weight: np.ndarray, levels: tuple[float, ...]
) -> tuple[float, ...]:
    """Return the smallest values that have at least these shares of the weight at or below them.

    Parameters
    ----------
    x, weight : ndarray of shape (N,)
        Finite values; weights are positive.
    levels : tuple of float
        In (0, 1).
    """
    order = np.argsort(x)
    cumulative = np.cumsum(weight[order] / weight.max())
    # A little less, so that rounding in the sum does not move the median of four equal weights.
    targets = np.array(levels) * cumulative[-1] * (1.0 - 1e-12)
    return tuple(float(value) for value in x[order[np.searchsorted(cumulative, targets)]])
