"""From rows to the few numbers that the likelihood depends on: done once, before the climb."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.runtime.blocks import Rows, block_rows, row_slices
from skvi.runtime.linalg import gram

# Numbers in X up to which accuracy costs a few milliseconds only.
_SMALL = 1 << 15


class Statistics(NamedTuple):
    r"""Rows rotated to their principal axes, about their weighted mean if there is an intercept.

    With :math:`Z = S^{1/2}(X - 1\bar x')` and :math:`T = S^{1/2}(Y - 1\bar y')`:
    :math:`Z'Z = Q \Lambda Q'` and :math:`Z'T = Q \Lambda^{1/2} t'`.

    Attributes
    ----------
    total : float
        Sum of the weights, n.
    intercept : bool
        Whether the means below are taken out (and a flat intercept integrated).
    spectrum : Tensor of shape (R,)
        The positive eigenvalues Lambda, largest first.
    basis : Tensor of shape (D, R)
        Q, orthonormal columns.
    target : Tensor of shape (M, R)
        t: the outputs along the principal axes.
    residual : Tensor of shape (M,)
        Squared length of T outside the span of Z: the residual sum of squares of least squares.
    centre_x : Tensor of shape (D,)
    centre_y : Tensor of shape (M,)
        Weighted means in fitted units; zero without an intercept.
    """

    total: float
    intercept: bool
    spectrum: Tensor
    basis: Tensor
    target: Tensor
    residual: Tensor
    centre_x: Tensor
    centre_y: Tensor

    @property
    def n_observed(self) -> float:
        """Rows left for the noise once the flat intercept has taken its share."""
        return self.total - float(self.intercept)


def reduce_rows(x: Rows, y: Rows, *, intercept: bool) -> Statistics:
    """Reduce weighted rows to :class:`Statistics`.

    By eigenvectors of the Gram matrix: two passes over blocks, memory O(block + D^2). With fewer
    rows than features (memory O(N D), less than D^2) and for small problems by the singular value
    decomposition of the rows, whose error grows with the condition number, not with its square.

    Parameters
    ----------
    x, y : Rows
        Features (N, D) and outputs (N, M) in fitted units; the weights are those of `x`.
    intercept : bool
    """
    small = x.n_rows <= x.n_features or x.n_rows * x.n_features <= _SMALL
    return _by_svd(x, y, intercept) if small else _by_gram(x, y, intercept)


def rank_tolerance(rows: Tensor) -> float:
    """Relative size below which numbers made from rows of D features, (..., D), are rounding."""
    return 8.0 * rows.shape[-1] * torch.finfo(rows.dtype).eps


def _by_gram(x: Rows, y: Rows, intercept: bool) -> Statistics:
    n_features, n_outputs = x.n_features, y.n_features
    columns = n_features + n_outputs + 1
    blocks = list(row_slices(x.n_rows, block_rows(2 * columns, x.device)))

    moments = torch.zeros(columns, columns, dtype=torch.float64, device=x.device)
    for rows in blocks:
        x_block, weight = x[rows]
        ones = torch.ones_like(weight)[:, None]
        z = torch.cat([x_block, y[rows][0], ones], dim=1) * weight.sqrt()[:, None]
        moments += gram(z)
    total = float(moments[-1, -1])
    # The fixed shift of the rows is their mean up to rounding; this takes out the rest.
    centre = moments[-1, :-1] / total if intercept else torch.zeros_like(moments[-1, :-1])
    moments = moments[:-1, :-1] - total * torch.outer(centre, centre)
    centre_x, centre_y = centre[:n_features], centre[n_features:]

    def errors(coef: Tensor) -> tuple[Tensor, Tensor]:
        squares = torch.zeros(n_outputs, dtype=torch.float64, device=x.device)
        gradient = torch.zeros(n_features, n_outputs, dtype=torch.float64, device=x.device)
        for rows in blocks:
            # the centre is nearly zero, so that it may be taken out of the products
            x_block, weight = x[rows]
            error = y[rows][0] - (centre_y - centre_x @ coef) - x_block @ coef
            weighted = error * weight[:, None]
            squares += (weighted * error).sum(0)
            gradient.addmm_(x_block.T, weighted)
            gradient -= torch.outer(centre_x, weighted.sum(0))
        return squares, gradient

    return from_gram(
        moments[:n_features, :n_features],
        moments[:n_features, n_features:],
        errors,
        total=total,
        intercept=intercept,
        centre_x=centre_x,
        centre_y=centre_y,
    )


def from_gram(
    gram: Tensor,
    cross: Tensor,
    errors: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    total: float,
    intercept: bool,
    centre_x: Tensor,
    centre_y: Tensor,
) -> Statistics:
    """Turn the scatter of the rows to its principal axes, and refine what it says about y.

    Parameters
    ----------
    gram : Tensor of shape (D, D)
        Z'Z.
    cross : Tensor of shape (D, M)
        Z'T.
    errors : callable
        Maps coefficients (D, M) to the squared length (M,) of ``T - Z coef`` and ``Z'`` of it.
    total, intercept, centre_x, centre_y
        As in :class:`Statistics`.
    """
    spectrum, basis = torch.linalg.eigh(gram)
    spectrum, basis = spectrum.flip(0), basis.flip(1)
    kept = spectrum > rank_tolerance(gram) * spectrum[0]
    spectrum, basis = spectrum[kept], basis[:, kept]  # (R,), (D, R)
    least_squares = (basis.T @ cross) / spectrum[:, None]  # (R, M)

    # yy - m'h loses every digit when R^2 is near one, so the residuals are formed row by row;
    # what they still correlate with X is one step of iterative refinement.
    squares, gradient = errors(basis @ least_squares)
    correction = (basis.T @ gradient) / spectrum[:, None]
    explained = (spectrum[:, None] * correction.square()).sum(0)
    target = (spectrum.sqrt()[:, None] * (least_squares + correction)).T
    residual = (squares - explained).clamp(min=0.0)
    return Statistics(
        total, intercept, spectrum, basis, target.contiguous(), residual, centre_x, centre_y
    )


def _by_svd(x: Rows, y: Rows, intercept: bool) -> Statistics:
    everything = slice(0, x.n_rows)
    x_all, weight = x[everything]
    y_all, _ = y[everything]
    total = float(weight.sum())
    share = weight / total if intercept else torch.zeros_like(weight)
    centre_x, centre_y = share @ x_all, share @ y_all
    root = weight.sqrt()[:, None]
    return rotate(
        root * (x_all - centre_x),
        root * (y_all - centre_y),
        total=total,
        intercept=intercept,
        centre_x=centre_x,
        centre_y=centre_y,
    )


def rotate(
    rows: Tensor,
    outputs: Tensor,
    *,
    total: float,
    intercept: bool,
    centre_x: Tensor,
    centre_y: Tensor,
) -> Statistics:
    """Turn centred, root-weighted `rows` (N, D) and `outputs` (N, M) to their principal axes."""
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > rank_tolerance(rows) * singular[0]
    left = left[:, kept]  # (N, R)
    target = outputs.T @ left  # (M, R)
    residual = (outputs - left @ target.T).square().sum(0)
    basis = right[kept].T.contiguous()
    return Statistics(
        total, intercept, singular[kept].square(), basis, target, residual, centre_x, centre_y
    )


def root_scale(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Root mean square of non-negative numbers of any magnitude in each group, shape (H,)."""
    largest = np.zeros(group.max() + 1)
    np.maximum.at(largest, group, values)
    unit = np.where(largest > 0.0, largest, 1.0)
    return unit * np.sqrt(np.bincount(group, (values / unit[group]) ** 2) / np.bincount(group))
