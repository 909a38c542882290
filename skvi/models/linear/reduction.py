"""From rows to the few numbers that the likelihood depends on: done once, before the climb."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.runtime.blocks import Rows, block_rows, row_slices
from skvi.runtime.linalg import add_products

# Numbers in X up to which accuracy costs a few milliseconds only.
_SMALL = 1 << 15
# What ill-conditioned columns or small residuals may take from the products: four digits of
# sixteen.
_DIGITS_TO_LOSE = 1e-4
# Mean squares of columns between these have come from squares and products in range.
_SQUARES = (1e-200, 1e200)
# Rows and numbers for a point near the middle.
_SAMPLE_ROWS, _SAMPLE_FLOATS = 256, 1 << 16


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
    row_count : float, optional
        Number of rows, if the weights hold precisions as well and `total` is no number of rows.
    """

    total: float
    intercept: bool
    spectrum: Tensor
    basis: Tensor
    target: Tensor
    residual: Tensor
    centre_x: Tensor
    centre_y: Tensor
    row_count: float | None = None

    @property
    def n_rows(self) -> float:
        """How many rows there are; each says one thing about the noise, whatever its weight."""
        return self.total if self.row_count is None else self.row_count

    @property
    def n_observed(self) -> float:
        """Rows left for the noise once the flat intercept has taken its share."""
        return self.n_rows - float(self.intercept)


class Scatter(NamedTuple):
    """Second moments of the columns of X and y together, in the units of the rows.

    Attributes
    ----------
    total : float
        Sum of the weights, n.
    intercept : bool
        Whether the mean has been taken out.
    mean : Tensor of shape (D + M,)
        Weighted mean; zero without an intercept.
    raw : Tensor of shape (D + M,)
        Sums of squares before the mean was taken out.
    moments : Tensor of shape (D + M, D + M)
        Weighted products; only the lower triangle is filled.
    """

    total: float
    intercept: bool
    mean: Tensor
    raw: Tensor
    moments: Tensor

    @property
    def squares(self) -> Tensor:
        """Sums of squares about the mean, shape (D + M,)."""
        return self.moments.diagonal()


class Held(NamedTuple):
    """Few rows, as they are.

    Attributes
    ----------
    total, intercept, mean
        As in :class:`Scatter`.
    rows : Tensor of shape (N, D)
    outputs : Tensor of shape (N, M)
        X and y less their means, times the roots of the weights.
    squares : Tensor of shape (D + M,)
        Their sums of squares.
    """

    total: float
    intercept: bool
    mean: Tensor
    rows: Tensor
    outputs: Tensor
    squares: Tensor

    @property
    def raw(self) -> Tensor:
        """Sums of squares before the mean was taken out."""
        return self.squares + self.total * self.mean.square()


def is_safe(found: Scatter | Held) -> bool:
    """Whether nothing overflowed, vanished when squared, or cancelled by more than a bit."""
    squares, total = found.squares, found.total
    inside = (squares > _SQUARES[0] * total) & (squares < _SQUARES[1] * total)
    return bool((inside & (squares >= 0.5 * found.raw)).all())


def is_small(n_rows: int, n_features: int) -> bool:
    """Whether rows should be held as a whole: few numbers, or fewer rows than features."""
    return n_rows <= n_features or n_rows * n_features <= _SMALL


def reduce_rows(x: Rows, y: Rows, *, intercept: bool) -> Statistics:
    """Reduce weighted rows to :class:`Statistics`.

    By eigenvectors of the Gram matrix: one pass over blocks, or two where the first would lose
    digits; memory O(block + D^2). With fewer rows than features (memory O(N D), less than D^2) and
    for small problems by the singular value decomposition of the rows, whose error grows with the
    condition number, not with its square, or by eigenvectors of the small ``X X'`` if that is
    well conditioned.

    Parameters
    ----------
    x, y : Rows
        Features (N, D) and outputs (N, M) in fitted units; the weights are those of `x`.
    intercept : bool
    """
    one = torch.ones(x.n_features + y.n_features, dtype=torch.float64, device=x.device)
    found = collect(x, y, intercept=intercept)
    return reduce_to_units(found, x, y, shift=torch.zeros_like(one), scale=one)


def provisional_mean(X: np.ndarray) -> np.ndarray:
    """Return a point (D,) near the middle of the rows: exact for a constant column."""
    n_rows = min(len(X), _SAMPLE_ROWS, max(16, _SAMPLE_FLOATS // X.shape[1]))
    sample = np.linspace(0, len(X) - 1, n_rows, dtype=np.intp)
    first = X[0].astype(np.float64)
    return first + (X[sample] - first).mean(axis=0)


def rank_tolerance(rows: Tensor) -> float:
    """Relative size below which numbers made from rows of D features, (..., D), are rounding."""
    return 8.0 * rows.shape[-1] * torch.finfo(rows.dtype).eps


def collect(x: Rows, y: Rows, *, intercept: bool) -> Scatter | Held:
    """Read the rows once, and keep what :func:`reduce_to_units` needs: products, or the rows."""
    return (_hold if is_small(x.n_rows, x.n_features) else _multiply)(x, y, intercept)


def reduce_to_units(
    found: Scatter | Held, x: Rows, y: Rows, *, shift: Tensor, scale: Tensor
) -> Statistics:
    """Return the statistics in the fitted units ``(z - shift) / scale`` of the rows z.

    Parameters
    ----------
    found : Scatter or Held
        From the rows `x` and `y`; used up. The rows are read once more if their products do not
        tell enough about them.
    shift, scale : Tensor of shape (D + M,)
        For features and outputs; powers of two as scales change no digit.
    """
    centre = (found.mean - shift) / scale
    if isinstance(found, Scatter):
        return _reduce_scatter(found, x, y, centre, scale)
    n_features = x.n_features
    return rotate(
        found.rows.div_(scale[:n_features]),
        found.outputs.div_(scale[n_features:]),
        total=found.total,
        intercept=found.intercept,
        centre_x=centre[:n_features],
        centre_y=centre[n_features:],
    )


def _multiply(x: Rows, y: Rows, intercept: bool) -> Scatter:
    """Form the products of all columns in one pass over blocks."""
    n_features, columns = x.n_features, x.n_features + y.n_features + 1
    height = min(block_rows(columns, x.device), x.n_rows)
    weight = x.weights(slice(0, x.n_rows))
    uniform = bool(weight.amin() == weight.amax())
    buffer = torch.empty(height, columns, dtype=torch.float64, device=x.device)
    products = torch.zeros(columns, columns, dtype=torch.float64, device=x.device)
    for rows in row_slices(x.n_rows, height):
        block = buffer[: rows.stop - rows.start]
        x.fill(rows, block[:, :n_features])
        y.fill(rows, block[:, n_features:-1])
        block[:, -1] = 1.0
        if not uniform:
            block *= weight[rows].sqrt()[:, None]
        add_products(products, block.T, block)
    if uniform:
        products *= weight[0]
    total = float(weight.sum())
    moments, raw = products[:-1, :-1], products.diagonal()[:-1].clone()
    mean = products[-1, :-1] / total if intercept else torch.zeros_like(raw)
    if intercept:
        moments.addr_(mean, mean, alpha=-total)
    return Scatter(total, intercept, mean, raw, moments)


def _reduce_scatter(
    scatter: Scatter, x: Rows, y: Rows, centre: Tensor, scale: Tensor
) -> Statistics:
    n_features, n_outputs = x.n_features, y.n_features
    scale_x, scale_y = scale[:n_features], scale[n_features:]
    mean_x, mean_y = scatter.mean[:n_features], scatter.mean[n_features:]
    moments = scatter.moments / scale / scale[:, None]

    def errors(coef: Tensor) -> tuple[Tensor, Tensor]:
        height = block_rows(2 * (n_features + n_outputs), x.device)
        slope = coef / scale_x[:, None] * scale_y  # in the units of the rows
        squares = torch.zeros(n_outputs, dtype=torch.float64, device=x.device)
        gradient = torch.zeros(n_features, n_outputs, dtype=torch.float64, device=x.device)
        for rows in row_slices(x.n_rows, height):
            # the mean is nearly zero, so that it may be taken out of the products
            x_block, weight = x[rows]
            error = (y[rows][0] - (mean_y - mean_x @ slope) - x_block @ slope) / scale_y
            weighted = error * weight[:, None]
            squares += (weighted * error).sum(0)
            gradient.addmm_(x_block.T, weighted)
            gradient -= torch.outer(mean_x, weighted.sum(0))
        return squares, gradient / scale_x[:, None]

    return from_gram(
        moments[:n_features, :n_features],
        moments[n_features:, :n_features].T,
        moments.diagonal()[n_features:],
        errors,
        total=scatter.total,
        intercept=scatter.intercept,
        centre_x=centre[:n_features],
        centre_y=centre[n_features:],
    )


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and vectors of a matrix whose lower triangle is filled."""
    spectrum, basis = torch.linalg.eigh(matrix)
    return spectrum.flip(0), basis.flip(1)


def from_gram(
    gram: Tensor,
    cross: Tensor,
    squares: Tensor,
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
        Z'Z; only the lower triangle is read.
    cross : Tensor of shape (D, M)
        Z'T.
    squares : Tensor of shape (M,)
        Diagonal of T'T.
    errors : callable
        Maps coefficients (D, M) to the squared length (M,) of ``T - Z coef`` and ``Z'`` of it.
        Called only where the products have lost digits.
    total, intercept, centre_x, centre_y
        As in :class:`Statistics`.
    """
    spectrum, basis = _eigh(gram)
    largest = spectrum[0]
    kept = spectrum > rank_tolerance(gram) * largest
    spectrum, basis = spectrum[kept], basis[:, kept]  # (R,), (D, R)
    coef = (basis.T @ cross) / spectrum[:, None]  # (R, M), along the principal axes
    residual = squares - (spectrum[:, None] * coef.square()).sum(0)

    # yy - m'h loses every digit when R^2 is near one, so the residuals are then formed row by row;
    # what they still correlate with X is one step of iterative refinement.
    at_stake = squares + largest * coef.square().sum(0)
    exact = bool((residual > _DIGITS_TO_LOSE * at_stake).all())
    if not exact or bool((spectrum < _DIGITS_TO_LOSE * largest).any()):
        squares, gradient = errors(basis @ coef)
        correction = (basis.T @ gradient) / spectrum[:, None]
        residual = squares - (spectrum[:, None] * correction.square()).sum(0)
        coef = coef + correction
    target = (spectrum.sqrt()[:, None] * coef).T
    residual = residual.clamp(min=0.0)
    return Statistics(
        total, intercept, spectrum, basis, target.contiguous(), residual, centre_x, centre_y
    )


def _hold(x: Rows, y: Rows, intercept: bool) -> Held:
    weight = x.weights(slice(0, x.n_rows))
    total = float(weight.sum())
    columns = []
    for part in (x, y):
        z = torch.empty(part.n_rows, part.n_features, dtype=torch.float64, device=x.device)
        part.fill(slice(0, part.n_rows), z)
        mean = (weight / total) @ z if intercept else torch.zeros_like(z[0])
        columns.append((mean, z.sub_(mean).mul_(weight.sqrt()[:, None])))
    (mean_x, rows), (mean_y, outputs) = columns
    squares = torch.cat([rows.square().sum(0), outputs.square().sum(0)])
    return Held(total, intercept, torch.cat([mean_x, mean_y]), rows, outputs, squares)


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
    wide = rows.shape[0] <= rows.shape[1] and rows.numel() > _SMALL
    axes = _axes_of_few_rows(rows, intercept) if wide else None
    spectrum, left, basis = _axes(rows) if axes is None else axes
    target = outputs.T @ left  # (M, R)
    residual = (outputs - left @ target.T).square().sum(0)
    return Statistics(total, intercept, spectrum, basis, target, residual, centre_x, centre_y)


def _axes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared singular values (R,), left (N, R) and right (D, R) singular vectors."""
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > rank_tolerance(rows) * singular[0]
    return singular[kept].square(), left[:, kept], right[kept].T.contiguous()


def _axes_of_few_rows(rows: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what :func:`_axes` does from eigenvectors of ``Z Z'``, if no digits are at stake.

    None unless the rows are well conditioned, but for the direction that centring took.
    """
    products = rows.new_zeros(len(rows), len(rows))
    add_products(products, rows, rows.T)
    spectrum, left = _eigh(products)
    rank = int((spectrum > _DIGITS_TO_LOSE * spectrum[0]).sum())
    zero = rank_tolerance(rows) * spectrum[0]
    if rank < len(spectrum) - int(centred) or bool((spectrum[rank:] > zero).any()):
        return None
    spectrum, left = spectrum[:rank], left[:, :rank]
    return spectrum, left, rows.T @ (left * spectrum.rsqrt())


def root_scale(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Root mean square of non-negative numbers of any magnitude in each group, shape (H,)."""
    largest = np.zeros(group.max() + 1)
    np.maximum.at(largest, group, values)
    unit = np.where(largest > 0.0, largest, 1.0)
    return unit * np.sqrt(np.bincount(group, (values / unit[group]) ** 2) / np.bincount(group))
