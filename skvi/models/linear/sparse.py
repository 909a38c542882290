r"""Sparse rows: moments and statistics that never hold them densely.

With xbar the weighted mean, the scatter is that of the entries and a correction:

.. math:: (X - 1\bar x')'S(X - 1\bar x') = X'SX - n \bar x \bar x'

Nothing is lost by cancellation as long as no column is dense: by Cauchy-Schwarz a column whose
entries hold the share f of the weight has :math:`\bar x^2 \le f\, \overline{x^2}`. Other rows are
made dense block by block.
"""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from skvi.models.linear.reduction import Statistics, from_gram, reduce_rows
from skvi.runtime.blocks import Affine, Rows, power_of_two

# Entries per cell up to which sparse products beat dense blocks.
_DENSITY = 0.1
# Largest share of the weight in the entries of one column, so that centring costs one bit.
_FILLED = 0.5


class SparseRows(Rows):
    """Rows of a sparse matrix: like :class:`Rows`, made dense only for what is asked for.

    Parameters
    ----------
    X : scipy sparse matrix or array of shape (N, D) in CSR format
    affine : Affine
    device : torch.device
    weight : ndarray of shape (N,), optional
    """

    def __init__(
        self, X: Any, affine: Affine, device: torch.device, weight: np.ndarray | None = None
    ) -> None:
        super().__init__(np.empty((0, X.shape[1])), affine, device, weight)
        self.n_rows = X.shape[0]
        self.dtype = X.dtype
        self.entries = canonical(X)
        self.affine = affine
        self.weight = np.ones(self.n_rows) if weight is None else weight

    def __getitem__(self, rows: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the rows (B, D) of a slice or an index in fitted units, and their weights (B,)."""
        x = self.entries[rows].toarray().astype(np.float64)
        x -= self.affine.shift
        x /= self.affine.scale
        return torch.from_numpy(x).to(self.device), self.weights(rows)

    def weights(self, rows: slice | np.ndarray) -> Tensor:
        """Return the weights (B,) of the rows of a slice or an index."""
        weight = np.array(self.weight[rows], dtype=np.float64)
        return torch.from_numpy(weight).to(self.device)

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write the rows of a slice in fitted units to `out` (B, D)."""
        out.copy_(self[rows][0])


def canonical(X: Any) -> Any:
    """Return X with one entry a cell; X itself if it is so already."""
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X


def _scaled(X: Any, scale: np.ndarray) -> Any:
    """Divide the columns of X by powers of two, in float64; memory O(entries)."""
    data = X.data.astype(np.float64) / scale[X.indices]
    return sparse.csr_array((data, X.indices, X.indptr), shape=X.shape)


def _filled(X: Any, share: np.ndarray) -> np.ndarray:
    """Return the share of the weight that the entries of each column hold."""
    per_entry = np.repeat(share, np.diff(X.indptr))
    return np.bincount(X.indices, weights=per_entry, minlength=X.shape[1])


def sparse_moments(X: Any, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean and (biased) standard deviation of each column, in float64.

    The squares are summed about the mean, over entries and empty cells apart.

    Parameters
    ----------
    X : scipy sparse matrix or array of shape (N, D) in CSR format
        Finite.
    weight : ndarray of shape (N,)
        Positive, with a finite sum.
    """
    X = canonical(X)
    share = weight / weight.max()
    share = share / share.sum()
    low, high = (
        extreme.toarray().ravel().astype(np.float64) for extreme in (X.min(axis=0), X.max(axis=0))
    )
    unit = power_of_two(np.maximum(np.abs(low), np.abs(high)))
    scaled = _scaled(X, unit)
    mean = share @ scaled
    # what rounding leaves of a full column's 1 - 1 may outweigh a small spread far from zero
    full = np.bincount(X.indices, minlength=X.shape[1]) == X.shape[0]
    empty = np.where(full, 0.0, np.maximum(1.0 - _filled(scaled, share), 0.0))
    deviation = scaled.data - mean[scaled.indices]
    per_entry = np.repeat(share, np.diff(scaled.indptr))

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(scaled.indices, weights=per_entry * values, minlength=X.shape[1])

    first = total(deviation) - empty * mean
    second = total(np.square(deviation)) + empty * np.square(mean)
    std = unit * np.sqrt(np.maximum(second - np.square(first), 0.0))
    varies = high > low  # a constant column gets no spread from the rounding of its mean
    return np.where(varies, unit * (mean + first), low), np.where(varies, std, 0.0)


def reduce_sparse_rows(x: SparseRows, y: Rows, *, intercept: bool) -> Statistics:
    """Reduce weighted sparse rows to :class:`Statistics`.

    Memory O(entries + D^2) with more rows than features; with fewer O(N D), which the principal
    axes of the rows need by themselves.
    """
    X, device = x.entries, x.device
    share = x.weight / x.weight.max()
    share = share / share.sum()
    dense = X.nnz > _DENSITY * X.shape[0] * X.shape[1]
    if dense or X.shape[0] <= X.shape[1] or _filled(X, share).max() > _FILLED:
        return reduce_rows(x, y, intercept=intercept)

    def to_device(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=device)

    scaled = _scaled(X, x.affine.scale)
    outputs = y[slice(0, y.n_rows)][0].cpu().numpy()
    root = np.sqrt(x.weight)[:, None]
    total = float(x.weight.sum())
    mean = share @ scaled if intercept else np.zeros(X.shape[1])
    centre_y = share @ outputs if intercept else np.zeros(outputs.shape[1])
    outputs = root * (outputs - centre_y)  # (N, M)
    rows = scaled.multiply(root).tocsr()

    def project(values: np.ndarray) -> np.ndarray:
        return rows.T @ values - mean[:, None] * (root.T @ values)

    def errors(coef: Tensor) -> tuple[Tensor, Tensor]:
        slope = coef.cpu().numpy()  # (D, M)
        error = outputs - (rows @ slope - root * (mean @ slope))
        return to_device(np.square(error).sum(axis=0)), to_device(project(error))

    gram = (rows.T @ rows).toarray() - total * np.outer(mean, mean)
    return from_gram(
        to_device(gram),
        to_device(project(outputs)),
        to_device(np.square(outputs).sum(axis=0)),
        errors,
        total=total,
        intercept=intercept,
        centre_x=to_device(mean - x.affine.shift / x.affine.scale),
        centre_y=to_device(centre_y),
    )
