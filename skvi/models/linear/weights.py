r"""The weights given their precisions: what :math:`q(w | \beta) = N(m, V/\beta)` puts in the bound.

.. math:: V = (G + A)^{-1}, \quad m = V h, \quad G = Q \Lambda Q', \quad h = Q \Lambda^{1/2} t
"""

from typing import NamedTuple

import torch
from torch import Tensor

from skvi.models.linear.reduction import Statistics, rank_tolerance
from skvi.runtime.linalg import inv_chol, log_det_from_chol

# Cholesky factors keep eight digits of the identity below this.
EXTREME = 1e8


class Weights(NamedTuple):
    r"""What bound and updates need of :math:`q(w | \beta)`, per output and group of features.

    Attributes
    ----------
    squares : Tensor of shape (M,)
        Sum of squared residuals at the mean m.
    norm : Tensor of shape (M, H)
        ``||m_g||^2``.
    relevance : Tensor of shape (M, H)
        ``p_g - alpha_g tr V_gg``: how many weights of the group the rows determine. Adds up to
        ``tr VG``.
    log_det : Tensor of shape (M,)
        ``log|I + A^-1/2 G A^-1/2| = -log|V| - log|A|``.
    relevance_slope, norm_slope : Tensor of shape (M, H)
        Minus the derivatives of `relevance` and `norm` by their own ``log alpha_g``; in a group
        of several features without the terms that two of its features share.
    """

    squares: Tensor
    norm: Tensor
    relevance: Tensor
    log_det: Tensor
    relevance_slope: Tensor
    norm_slope: Tensor


class Factor(NamedTuple):
    r"""V and m in a form that gives squared lengths without cancellation.

    .. math::
        V_m = o_m^2\, \mathrm{diag}(i_m) (I - U_m U_m' + U_m \mathrm{diag}(g_m) U_m')
            \mathrm{diag}(i_m), \qquad U_m'U_m = I

    Attributes
    ----------
    mean : Tensor of shape (M, D)
    outer : Tensor of shape (M,)
    inner : Tensor of shape (M or 1, D)
    basis : Tensor of shape (M or 1, D, R)
    gain : Tensor of shape (M, R)
    rounding : Tensor of shape (M or 1,)
        Relative length that a row inside the span of the basis seems to have outside of it.
    """

    mean: Tensor
    outer: Tensor
    inner: Tensor
    basis: Tensor
    gain: Tensor
    rounding: Tensor


def solve(statistics: Statistics, alpha: Tensor, group: Tensor | None = None) -> Weights:
    """Return the weights given precisions `alpha` of shape (M, 1), (M, D), or (M, H).

    In the last case `group`, shape (D,), says which precision each feature has.
    """
    n_features, rank = statistics.basis.shape
    if alpha.shape[1] == 1:
        return _solve_shared(statistics, alpha)
    if group is not None:
        return _add_up(solve(statistics, alpha[:, group]), group, alpha)
    if rank < n_features:
        return _solve_few_rows(statistics, alpha)
    return _solve_cholesky(statistics, alpha)


def _add_up(own: Weights, group: Tensor, alpha: Tensor) -> Weights:
    """Sum what belongs to single features over their groups."""

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(alpha).index_add(1, group, values)

    return own._replace(
        norm=total(own.norm),
        relevance=total(own.relevance),
        relevance_slope=total(own.relevance_slope),
        norm_slope=total(own.norm_slope),
    )


def least_squares(statistics: Statistics) -> Weights:
    """Return the weights under a flat prior: alpha is 0, and `log_det` is ``log|G|``.

    The rows must have full column rank.
    """
    n_features = statistics.basis.shape[0]
    norm = (statistics.target / statistics.spectrum.sqrt()).square().sum(-1, keepdim=True)
    zero = torch.zeros_like(norm)
    return Weights(
        squares=statistics.residual,
        norm=norm,
        relevance=torch.full_like(norm, n_features),
        log_det=statistics.spectrum.log().sum().expand(len(norm)),
        relevance_slope=zero,
        norm_slope=zero,
    )


def _solve_shared(statistics: Statistics, alpha: Tensor) -> Weights:
    """One precision: everything is diagonal in the principal axes, O(R) an output."""
    spectrum, target = statistics.spectrum, statistics.target
    shrink = spectrum / (spectrum + alpha)  # (M, R)
    keep = alpha / (spectrum + alpha)  # (M, R)
    mean_squared = (target * spectrum.sqrt() / (spectrum + alpha)).square()
    return Weights(
        squares=statistics.residual + (target * keep).square().sum(-1),
        norm=mean_squared.sum(-1, keepdim=True),
        relevance=shrink.sum(-1, keepdim=True),
        log_det=torch.log1p(spectrum / alpha).sum(-1),
        relevance_slope=(shrink * keep).sum(-1, keepdim=True),
        norm_slope=2.0 * (mean_squared * keep).sum(-1, keepdim=True),
    )


def _is_extreme(scaled: Tensor, failed: Tensor) -> bool:
    """Whether the rows outweigh the prior so far that ``I + ...`` has lost the I to rounding."""
    return bool(failed.any()) or bool((scaled.diagonal(dim1=-2, dim2=-1) > EXTREME).any())


def _own_precisions(squares: Tensor, mean: Tensor, relevance: Tensor, log_det: Tensor) -> Weights:
    norm = mean.square()
    relevance = relevance.clamp(0.0, 1.0)
    keep = 1.0 - relevance
    return Weights(squares, norm, relevance, log_det, relevance * keep, 2.0 * norm * keep)


def _solve_cholesky(statistics: Statistics, alpha: Tensor) -> Weights:
    """Own precisions, full rank: Cholesky of ``I + A^-1/2 G A^-1/2``, O(D^3) an output."""
    rows = statistics.spectrum.sqrt()[:, None] * statistics.basis.T  # (R, D), G = rows' rows
    root = alpha.rsqrt()  # (M, D)
    scaled = root[:, :, None] * (rows.T @ rows) * root[:, None, :]
    scaled.diagonal(dim1=-2, dim2=-1).add_(1.0)
    chol, failed = torch.linalg.cholesky_ex(scaled)
    if _is_extreme(scaled, failed):
        return _solve_svd(statistics, alpha)
    right = root * (statistics.target @ rows)  # (M, D)
    mean = root * torch.cholesky_solve(right[:, :, None], chol)[:, :, 0]
    keep = inv_chol(chol).square().sum(-2)  # (M, D): diagonal of the inverse
    error = statistics.target - mean @ rows.T  # (M, R)
    squares = statistics.residual + error.square().sum(-1)
    return _own_precisions(squares, mean, 1.0 - keep, log_det_from_chol(chol))


def _solve_few_rows(statistics: Statistics, alpha: Tensor) -> Weights:
    """Own precisions, R < D: Cholesky of ``I + X A^-1 X'`` (Woodbury), O(D R^2) an output."""
    root = alpha.rsqrt()  # (M, D)
    rows = statistics.spectrum.sqrt()[:, None] * statistics.basis.T * root[:, None, :]  # (M, R, D)
    scaled = rows @ rows.mT
    scaled.diagonal(dim1=-2, dim2=-1).add_(1.0)
    chol, failed = torch.linalg.cholesky_ex(scaled)
    if _is_extreme(scaled, failed):
        return _solve_svd(statistics, alpha)
    error = torch.cholesky_solve(statistics.target[:, :, None], chol)[:, :, 0]  # (M, R)
    mean = root * (error[:, None, :] @ rows)[:, 0]
    relevance = torch.linalg.solve_triangular(chol, rows, upper=False).square().sum(-2)
    squares = statistics.residual + error.square().sum(-1)
    return _own_precisions(squares, mean, relevance, log_det_from_chol(chol))


def _svd(statistics: Statistics, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``X A^-1/2``: outputs along its left vectors, singular values, right vectors."""
    rows = statistics.spectrum.sqrt()[:, None] * statistics.basis.T  # (R, D)
    left, singular, right = torch.linalg.svd(rows * alpha.rsqrt()[:, None, :], full_matrices=False)
    return (statistics.target[:, None, :] @ left)[:, 0], singular, right


def _solve_svd(statistics: Statistics, alpha: Tensor) -> Weights:
    """Own precisions by the decomposition that cannot fail, ten times slower than the others."""
    target, singular, right = _svd(statistics, alpha)
    gain = 1.0 / (1.0 + singular.square())  # (M, R)
    mean = alpha.rsqrt() * ((target * singular * gain)[:, None, :] @ right)[:, 0]
    relevance = (right.square() * (1.0 - gain)[:, :, None]).sum(-2)
    squares = statistics.residual + (target * gain).square().sum(-1)
    return _own_precisions(squares, mean, relevance, torch.log1p(singular.square()).sum(-1))


def factorise(statistics: Statistics, alpha: Tensor) -> Factor:
    """Return V and m given precisions `alpha` of shape (M, 1) or (M, D).

    Zeros of shape (M, 1) stand for the flat prior, which needs full column rank.
    """
    if alpha.shape[1] == 1:
        spectrum, basis = statistics.spectrum, statistics.basis
        mean = (statistics.target * spectrum.sqrt() / (spectrum + alpha)) @ basis.T
        scale = torch.where(alpha > 0.0, alpha, 1.0)
        return Factor(
            mean=mean,
            outer=scale[:, 0].rsqrt(),
            inner=basis.new_ones(1, basis.shape[0]),
            basis=basis[None],
            gain=scale / (spectrum + alpha),
            rounding=_span_rounding(statistics, spectrum.sqrt()[None]),
        )
    target, singular, right = _svd(statistics, alpha)
    gain = 1.0 / (1.0 + singular.square())
    root = alpha.rsqrt()
    return Factor(
        mean=root * ((target * singular * gain)[:, None, :] @ right)[:, 0],
        outer=torch.ones_like(alpha[:, 0]),
        inner=root,
        basis=right.mT.contiguous(),
        gain=gain,
        rounding=_span_rounding(statistics, singular),
    )


def _span_rounding(statistics: Statistics, singular: Tensor) -> Tensor:
    """Error of the span of singular vectors: the rank's tolerance times the condition number."""
    tolerance = rank_tolerance(statistics.basis.T)
    if singular.shape[1] == 0:
        return singular.new_full(singular.shape[:1], tolerance)
    return tolerance * singular[:, 0] / singular[:, -1]


def variances(factor: Factor) -> Tensor:
    """Return the diagonal of V, shape (M, D)."""
    squares = factor.basis.square()  # (M or 1, D, R)
    seen = (squares @ factor.gain[:, :, None])[..., 0]
    unseen = (1.0 - squares.sum(-1)).clamp(min=0.0) if _has_null_space(factor) else 0.0
    return (factor.outer[:, None] * factor.inner).square() * (seen + unseen)


def covariance(factor: Factor) -> Tensor:
    """Return V, shape (M, D, D)."""
    basis = factor.basis
    V = (basis * factor.gain[:, None, :]) @ basis.mT
    if _has_null_space(factor):
        eye = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
        V = V + (eye - basis @ basis.mT)
    root = factor.outer[:, None] * factor.inner  # (M, D)
    return root[:, :, None] * V * root[:, None, :]


def lengths(factor: Factor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y (M, B, R) and Y0 (M or 1, B, D) with ``delta V delta' = o^2 (Y Y' + Y0 Y0')``.

    `deviation` holds the rows delta, shape (B, D). Y0 is empty where no direction is unseen; what
    is left of a row in unseen directions by rounding alone is set to zero, because a weak prior
    may multiply it by any number.
    """
    z = deviation * factor.inner[:, None, :]  # (M or 1, B, D)
    seen = z @ factor.basis  # (M or 1, B, R)
    if not _has_null_space(factor):
        return seen * factor.gain.sqrt()[:, None, :], z[..., :0]
    unseen = z - seen @ factor.basis.mT
    rounding = factor.rounding[:, None] * torch.linalg.vector_norm(z, dim=-1)
    is_rounding = torch.linalg.vector_norm(unseen, dim=-1) <= rounding  # (M or 1, B)
    unseen = unseen.masked_fill(is_rounding[..., None], 0.0)
    return seen * factor.gain.sqrt()[:, None, :], unseen


def draw(factor: Factor, noise: Tensor) -> Tensor:
    """Turn standard normal `noise` of shape (S, M, D) into draws of N(0, V)."""
    z = noise.transpose(0, 1)  # (M, S, D)
    seen = z @ factor.basis  # (M, S, R)
    z = z + (seen * (factor.gain.sqrt() - 1.0)[:, None, :]) @ factor.basis.mT
    root = factor.outer[:, None] * factor.inner
    return (root[:, None, :] * z).transpose(0, 1)


def _has_null_space(factor: Factor) -> bool:
    n_features, rank = factor.basis.shape[-2:]
    return rank < n_features
