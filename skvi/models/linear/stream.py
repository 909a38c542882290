r"""Rows that come in blocks: counts, means and a root of the scatter, merged exactly.

.. math::
    n = n_1 + n_2, \quad d = \bar z_2 - \bar z_1, \quad
    C = C_1 + C_2 + \tfrac{n_1 n_2}{n}\, d d'

for the columns z of X and y together. Source: Chan, Golub and LeVeque (1983), Algorithms for
computing the sample variance, equation 2.1, for several columns. What is kept is not C but a
matrix Z with :math:`Z'Z = C`, so that the error grows with the condition number of the rows and
not with its square, and a residual sum of squares keeps its digits when R^2 is near one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from skvi.models.linear.reduction import Statistics, rank_tolerance, rotate
from skvi.runtime.blocks import Affine, Rows, block_rows, row_slices


class Summary(NamedTuple):
    """What rows of X and y leave behind, in the units of the data: memory O((D + M)^2).

    Attributes
    ----------
    total : float
        Sum of the weights, n.
    origin : Tensor of shape (D + M,)
        A point near the rows; means are kept as differences from it.
    mean : Tensor of shape (D + M,)
        Weighted mean less `origin`; both are zero without an intercept.
    root : Tensor of shape (K, D + M)
        Z, with K <= D + M rows or as many as were seen.
    """

    total: float
    origin: Tensor
    mean: Tensor
    root: Tensor


def summarise(x: Rows, y: Rows, origin: Tensor, *, intercept: bool) -> Summary:
    """Summarise rows whose `origin` (zero without an intercept) has been taken out already."""
    columns = x.n_features + y.n_features
    # blocks of at least the root's height, so that merging costs no more than the rows
    height = max(block_rows(4 * columns, x.device), 2 * columns)
    summary = None
    for rows in row_slices(x.n_rows, height):
        x_block, weight = x[rows]
        z = torch.cat([x_block, y[rows][0]], dim=1)
        total = float(weight.sum())
        mean = (weight / total) @ z if intercept else torch.zeros_like(origin)
        block = Summary(total, origin, mean, (z - mean) * weight.sqrt()[:, None])
        block = block._replace(root=_compress(block.root))
        summary = block if summary is None else merge(summary, block)
    assert summary is not None
    return summary


def merge(first: Summary, second: Summary) -> Summary:
    """Return the summary of all rows; without an intercept both means are zero and stay so."""
    total = first.total + second.total
    share = second.total / total
    gap = (second.origin - first.origin) + (second.mean - first.mean)
    step = (first.total * share) ** 0.5 * gap
    root = torch.cat([first.root, second.root, step[None]])
    return Summary(total, first.origin, first.mean + share * gap, _compress(root))


def _compress(root: Tensor) -> Tensor:
    """Return a matrix with the same ``Z'Z`` and no more rows than columns."""
    if root.shape[0] <= root.shape[1]:
        return root
    # Powers of two change no digit and keep every sum of squares in range.
    unit = torch.ldexp(torch.ones_like(root[0]), torch.frexp(root.abs().amax(0)).exponent)
    return torch.linalg.qr(root / unit, mode="r").R * unit


def spread(summary: Summary) -> Tensor:
    """Return the (biased) standard deviation of each column, without an intercept its size."""
    largest = summary.root.abs().amax(0)
    unit = torch.where(largest > 0.0, largest, 1.0)
    return unit * (torch.linalg.vector_norm(summary.root / unit, dim=0) / summary.total**0.5)


def reduce_summary(summary: Summary, x: Affine, y: Affine, *, intercept: bool) -> Statistics:
    """Return the statistics of the summarised rows in the fitted units `x` and `y`."""

    def tensor(first: object, second: object) -> Tensor:
        parts = [torch.as_tensor(part, device=summary.mean.device) for part in (first, second)]
        return torch.cat(parts)

    n_features = len(x.scale)
    shift, scale = tensor(x.shift, y.shift), tensor(x.scale, y.scale)
    centre = ((summary.origin - shift) + summary.mean) / scale
    root = summary.root / scale
    return rotate(
        root[:, :n_features],
        root[:, n_features:],
        total=summary.total,
        intercept=intercept,
        centre_x=centre[:n_features],
        centre_y=centre[n_features:],
    )


def restore_summary(statistics: Statistics, x: Affine, y: Affine) -> Summary:
    """Return a summary whose statistics in the fitted units `x` and `y` are `statistics`.

    Outputs have nothing in common here but X: what they share outside its span does not matter.
    A column of X that the decomposition has left with rounding alone is zero: a constant column
    must not get a spread, which might become its unit.
    """

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values, device=statistics.basis.device)

    scale_x, scale_y = tensor(x.scale), tensor(y.scale)
    rows = statistics.spectrum.sqrt()[:, None] * statistics.basis.T  # (R, D)
    length = torch.linalg.vector_norm(rows, dim=0)
    largest = torch.linalg.vector_norm(rows)
    rows = rows.masked_fill(length <= rank_tolerance(rows) * largest, 0.0)
    outputs = torch.cat([statistics.target.T, statistics.residual.sqrt().diag()])  # (R + M, M)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, len(scale_y)))  # (R + M, D)
    return Summary(
        total=statistics.total,
        origin=torch.cat([tensor(x.shift), tensor(y.shift)]),
        mean=torch.cat([statistics.centre_x * scale_x, statistics.centre_y * scale_y]),
        root=torch.cat([rows * scale_x, outputs * scale_y], dim=1),
    )
