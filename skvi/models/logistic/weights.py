r"""q(w, b) given the Polya-Gamma variables and the precisions: a weighted regression.

.. math::
    V = (A + Z'\Omega Z)^{-1}, \qquad m = V Z' \tfrac12 S t, \qquad
    \Omega = \mathrm{diag}(s_i E[\omega_i])

Z is the design, with a column of ones for the intercept, A its prior precisions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from skvi.distributions import polya_gamma
from skvi.models.linear.weights import EXTREME, Factor
from skvi.runtime.blocks import Rows, block_rows, row_slices
from skvi.runtime.linalg import add_products, inv_chol, log_det_from_chol

_EPS = torch.finfo(torch.float64).eps


class Design(NamedTuple):
    """Rows and labels in fitted units.

    Attributes
    ----------
    rows : Rows
        N rows, with the sample weights s; as a rule of D features, but see `n_features`.
    weight : Tensor of shape (N,)
        s, those of `rows`.
    sign : Tensor of shape (N, M)
        t: one for the class that a binary model is about, else minus one.
    n_features : int
        D: weights of the model. More than the columns of `rows` where these are coordinates of
        the rows in their own span, which a precision that all weights share allows.
    intercept : bool
        Whether a column of ones follows.
    """

    rows: Rows
    weight: Tensor
    sign: Tensor
    n_features: int
    intercept: bool

    @property
    def n_columns(self) -> int:
        """C: columns of the design."""
        return self.rows.n_features + self.intercept

    @property
    def is_wide(self) -> bool:
        """Whether the design has more columns than rows."""
        return self.n_columns > self.rows.n_rows

    def blocks(self, floats_per_row: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield ``(rows, z, weight)`` with z of shape (B, C)."""
        size = block_rows(2 * self.n_columns + floats_per_row, self.rows.device)
        for rows in row_slices(self.rows.n_rows, size):
            x, weight = self.rows[rows]
            yield rows, add_ones(x) if self.intercept else x, weight


class Weights(NamedTuple):
    r"""q(w, b) of each binary model, and what the bound needs of it.

    Attributes
    ----------
    mean : Tensor of shape (M, C)
    relevance : Tensor of shape (M, C)
        ``1 - a_j V_jj``, of prior precisions a.
    log_det : Tensor of shape (M,)
        ``log|I + A^-1/2 Z' Omega Z A^-1/2|``.
    odds_mean, odds_variance : Tensor of shape (N, M)
        Mean and variance of the log odds of the rows.
    """

    mean: Tensor
    relevance: Tensor
    log_det: Tensor
    odds_mean: Tensor
    odds_variance: Tensor


def add_ones(x: Tensor) -> Tensor:
    """Append the column of the intercept to rows (B, D)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def solve(design: Design, tilt: Tensor, precision: Tensor) -> Weights:
    """Return q(w, b) given the tilts of the rows (N, M) and the columns' precisions (M, C)."""
    omega = polya_gamma.mean(tilt)
    solver = _solve_wide if design.is_wide else _solve_tall
    return solver(design, omega, precision)


def _solve_tall(design: Design, omega: Tensor, precision: Tensor) -> Weights:
    """Cholesky of ``I + A^-1/2 G A^-1/2``: two passes over blocks, O(N C^2) a model."""
    n_models, n_columns = precision.shape
    G = precision.new_zeros(n_models, n_columns, n_columns)  # the lower triangle
    cross = torch.zeros_like(precision)
    for rows, z, weight in design.blocks():
        cross += 0.5 * (weight[:, None] * design.sign[rows]).T @ z
        for m in range(n_models):
            rooted = z * (weight * omega[rows, m]).sqrt()[:, None]
            add_products(G[m], rooted.T, rooted)
    root = precision.rsqrt()
    scaled = root[:, :, None] * G * root[:, None, :]
    scaled.diagonal(dim1=-2, dim2=-1).add_(1.0)
    chol, failed = torch.linalg.cholesky_ex(scaled)
    right = root * cross
    if bool(failed.any()) or bool((scaled.diagonal(dim1=-2, dim2=-1) > EXTREME).any()):
        singular, basis = _decompose(_roots(design, omega), root)
        gain = 1.0 / (1.0 + singular.square())  # (M, R)
        mean = root * _apply(basis, gain, right)
        relevance = (basis.square() * (1.0 - gain)[:, None, :]).sum(-1)
        log_det = torch.log1p(singular.square()).sum(-1)
        half = root[:, :, None] * basis * gain.sqrt()[:, None, :]  # (M, C, R)
    else:
        mean = root * torch.cholesky_solve(right[:, :, None], chol)[:, :, 0]
        inverse = inv_chol(chol)
        relevance = 1.0 - inverse.square().sum(-2)
        log_det = log_det_from_chol(chol)
        half = root[:, :, None] * inverse.mT
    odds_mean, odds_variance = torch.empty_like(omega), torch.empty_like(omega)
    for rows, z, _ in design.blocks(2 * half[:, 0].numel()):
        odds_mean[rows] = z @ mean.T
        odds_variance[rows] = (z @ half).square().sum(-1).T
    return Weights(mean, relevance.clamp(0.0, 1.0), log_det, odds_mean, odds_variance)


def _solve_wide(design: Design, omega: Tensor, precision: Tensor) -> Weights:
    """Fewer rows than columns: Cholesky of ``I + B B'`` (Woodbury), O(C N^2) a model."""
    z, weight = _whole(design)
    root, size = precision.rsqrt(), (weight[:, None] * omega).T  # (M, C), (M, N)
    B = size.sqrt()[:, :, None] * z * root[:, None, :]  # (M, N, C)
    right = 0.5 * weight * design.sign.T / size.sqrt()  # (M, N)
    scaled = B @ B.mT
    scaled.diagonal(dim1=-2, dim2=-1).add_(1.0)
    chol, failed = torch.linalg.cholesky_ex(scaled)
    if bool(failed.any()) or bool((scaled.diagonal(dim1=-2, dim2=-1) > EXTREME).any()):
        left, singular, basis = torch.linalg.svd(B, full_matrices=False)
        gain = 1.0 / (1.0 + singular.square())  # (M, N)
        along = (right[:, None, :] @ left)[:, 0]
        mean = root * ((along * singular * gain)[:, None, :] @ basis)[:, 0]
        relevance = (basis.square() * (1.0 - gain)[:, :, None]).sum(-2)
        log_det = torch.log1p(singular.square()).sum(-1)
        leverage = (left.square() * (1.0 - gain)[:, None, :]).sum(-1)
    else:
        inverse = inv_chol(chol)
        mean = root * (torch.cholesky_solve(right[:, :, None], chol).mT @ B)[:, 0]
        relevance = (inverse @ B).square().sum(-2)
        log_det = log_det_from_chol(chol)
        leverage = (1.0 - inverse.square().sum(-2)).clamp(min=0.0)
    return Weights(
        mean, relevance.clamp(0.0, 1.0), log_det, z @ mean.T, (leverage / size).T.contiguous()
    )


def factorise(
    design: Design, tilt: Tensor, precision: Tensor, mean: Tensor, basis: Tensor | None
) -> Factor:
    """Return q(w, b) as a :class:`Factor` over the weights and the intercept.

    Parameters
    ----------
    design : Design
    tilt : Tensor of shape (N, M)
        Those that q(w, b) was solved for.
    precision, mean : Tensor of shape (M, C)
    basis : Tensor of shape (D, R), optional
        Orthonormal directions of the columns of `design`, where these are not the features.
    """
    omega = polya_gamma.mean(tilt)
    if design.is_wide:
        z, weight = _whole(design)
        roots = (weight[:, None] * omega).T.sqrt()[:, :, None] * z
    else:
        roots = _roots(design, omega)
    root = precision.rsqrt()
    singular, axes = _decompose(roots, root)
    tolerance = 8.0 * axes.shape[-2] * _EPS
    if basis is not None:
        turn = torch.block_diag(basis, basis.new_ones(1, 1)) if design.intercept else basis
        axes, mean = turn @ axes, mean @ turn.T
        # the features' columns of root are equal
        root = torch.cat([root[:, :1].expand(-1, basis.shape[0]), root[:, basis.shape[1] :]], dim=1)
    seen = singular > tolerance * singular[:, :1]
    smallest = torch.where(seen, singular, torch.inf).amin(-1)
    return Factor(
        mean=mean,
        outer=torch.ones_like(mean[:, 0]),
        inner=root,
        basis=axes.contiguous(),
        gain=1.0 / (1.0 + singular.square()),
        rounding=tolerance * singular[:, 0] / smallest,
    )


def _whole(design: Design) -> tuple[Tensor, Tensor]:
    """Return the design (N, C) and the weights (N,) of few rows."""
    x, weight = design.rows[slice(0, design.rows.n_rows)]
    return (add_ones(x) if design.intercept else x), weight


def _roots(design: Design, omega: Tensor) -> Tensor:
    """Return matrices (M, C, C) with ``roots' roots = Z' Omega Z``, by blocks."""
    roots = []
    for m in range(omega.shape[1]):
        root = omega.new_zeros(0, design.n_columns)
        for rows, z, weight in design.blocks():
            block = z * (weight * omega[rows, m]).sqrt()[:, None]
            root = torch.linalg.qr(torch.cat([root, block]), mode="r").R
        roots.append(root)
    return torch.stack(roots)


def _decompose(roots: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values (M, R) and right vectors (M, C, R) of ``roots A^-1/2``."""
    _, singular, right = torch.linalg.svd(roots * root[:, None, :], full_matrices=False)
    return singular, right.mT


def _apply(basis: Tensor, gain: Tensor, vector: Tensor) -> Tensor:
    """Multiply ``U diag(g) U'`` with a vector, (M, C)."""
    along = (vector[:, None, :] @ basis)[:, 0] * gain
    return (basis @ along[:, :, None])[:, :, 0]
