"""Weighted first and second moments of columns, safe at any offset and scale."""

from collections.abc import Iterator

import numpy as np

from skvi.runtime.blocks import power_of_two, row_slices

_BLOCK_FLOATS = 1 << 18


def weighted_moments(X: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean and (biased) standard deviation of each column, in float64.

    Three passes over row blocks: range, mean, spread. Every sum is taken over numbers of order
    one, so that neither 1e150 overflows nor 1e-150 vanishes when squared, and an offset of 1e8
    costs no digits of the spread.

    Parameters
    ----------
    X : ndarray of shape (N, D)
        Finite; any float dtype.
    weight : ndarray of shape (N,)
        Non-negative, with a positive finite sum.

    Returns
    -------
    mean, std : ndarray of shape (D,)
    """
    weight = weight / weight.max()
    total = weight.sum()

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in row_slices(X.shape[0], max(64, _BLOCK_FLOATS // max(1, X.shape[1]))):
            yield X[rows].astype(np.float64), weight[rows]

    def sum_over_blocks(column_sums: Iterator[np.ndarray]) -> np.ndarray:
        result = np.zeros(X.shape[1])
        for sums in column_sums:
            result += sums
        return result

    largest = np.zeros(X.shape[1])
    first = X[0].astype(np.float64)
    constant = np.ones(X.shape[1], dtype=bool)
    for x, _ in blocks():
        np.maximum(largest, np.abs(x).max(axis=0), out=largest)
        constant &= (x == first).all(axis=0)
    unit = power_of_two(largest)
    mean = unit * sum_over_blocks(w @ (x / unit) for x, w in blocks()) / total
    # Rounding of the mean must not give a constant column a spread of its own.
    mean = np.where(constant, first, mean)

    spread = np.zeros(X.shape[1])
    for x, _ in blocks():
        np.maximum(spread, np.abs(x - mean).max(axis=0), out=spread)
    unit = power_of_two(spread)
    variance = sum_over_blocks(w @ ((x - mean) / unit) ** 2 for x, w in blocks()) / total
    return mean, unit * np.sqrt(variance)
