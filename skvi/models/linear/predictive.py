r"""What the posterior says about new rows.

For a row x with :math:`\delta = x - \bar x`:

.. math::
    \mu = \bar y + \delta'm, \qquad k = 1/n + \delta'V\delta, \qquad
    y | x \sim \mathrm{St}(2a, \mu, \tfrac ba (1 + k))

where 1/n is there only with an intercept. Source: Drugowitsch (2013), arXiv:1310.5438, the
predictive density of the linear model, with the intercept's share. Everything is in fitted units.

With Student-t noise of :math:`\nu` degrees of freedom, a new row has a precision
:math:`u \sim \mathrm{Gam}(\nu/2, \nu/2)` of its own, and the 1 of :math:`1 + k` becomes 1/u: see
:mod:`skvi.distributions.scale_mixture`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from skvi.distributions import gamma, scale_mixture, student_t
from skvi.distributions.normal import LOG_2PI
from skvi.models.linear.climb import Prior, State, noise_shape
from skvi.models.linear.reduction import Statistics
from skvi.models.linear.weights import Factor, draw, factorise, lengths


class Posterior(NamedTuple):
    """q(w, b, beta), ready to predict from.

    Attributes
    ----------
    factor : Factor
        m and V.
    noise_shape : Tensor of shape ()
    noise_rate : Tensor of shape (M,)
        q(beta) = Gam(noise_shape, noise_rate).
    centre_x : Tensor of shape (D,)
    centre_y : Tensor of shape (M,)
    intercept_variance : Tensor of shape ()
        1/n, or 0 without an intercept; n is the sum of the rows' precisions if they have some.
    noise_dof : Tensor of shape (), optional
        Degrees of freedom of Student-t noise; None for Gaussian noise.
    """

    factor: Factor
    noise_shape: Tensor
    noise_rate: Tensor
    centre_x: Tensor
    centre_y: Tensor
    intercept_variance: Tensor
    noise_dof: Tensor | None = None


def make_posterior(
    statistics: Statistics, prior: Prior, state: State, noise_dof: float | None = None
) -> Posterior:
    """Collect what predictions need from the end of a climb."""
    shared = 1.0 / statistics.total if statistics.intercept else 0.0
    alpha = state.alpha if prior.group is None else state.alpha[:, prior.group]
    return Posterior(
        factor=factorise(statistics, alpha),
        noise_shape=torch.full_like(state.noise_rate[0], noise_shape(statistics, prior)),
        noise_rate=state.noise_rate,
        centre_x=statistics.centre_x,
        centre_y=statistics.centre_y,
        intercept_variance=torch.full_like(state.noise_rate[0], shared),
        noise_dof=None if noise_dof is None else torch.full_like(state.noise_rate[0], noise_dof),
    )


def floats_per_row(posterior: Posterior) -> int:
    """Workspace of one row in the functions below."""
    n_copies, n_features, rank = posterior.factor.basis.shape
    return 2 * n_copies * (n_features + rank) + posterior.factor.gain.numel()


def mean(posterior: Posterior, x: Tensor) -> Tensor:
    """Return the predictive means mu (B, M) of rows x (B, D)."""
    return posterior.centre_y + (x - posterior.centre_x) @ posterior.factor.mean.T


def leverage(posterior: Posterior, x: Tensor) -> Tensor:
    """Return k (B, M): the variance of the line at x, in units of the noise variance."""
    seen, unseen = lengths(posterior.factor, x - posterior.centre_x)
    squares = seen.square().sum(-1) + unseen.square().sum(-1)  # (M, B)
    return posterior.intercept_variance + (posterior.factor.outer[:, None].square() * squares).T


def expected_square(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """Return ``e = E_q[beta (y - x'w - b)^2] = E[beta] (y - mu)^2 + k``, shape (B, M)."""
    E_noise = gamma.mean(posterior.noise_shape, posterior.noise_rate)
    error = (y - mean(posterior, x)) * E_noise.sqrt()
    return error.square() + leverage(posterior, x)


def local_bound(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """Return the bound on ``E_q[log p(y | x, w, b, beta)]`` (B, M) of rows x and outputs y (B, M).

    ``1/2 (E log beta - log 2 pi - e)``, exact, with Gaussian noise; with Student-t noise and the
    best q(u) of each row the log density of that law at the square e, see
    :mod:`skvi.models.linear.robust`.
    """
    E_log_noise = gamma.expected_log(posterior.noise_shape, posterior.noise_rate)
    square = expected_square(posterior, x, y)
    if posterior.noise_dof is not None:
        return student_t.log_density(square, -E_log_noise, posterior.noise_dof, 1)
    return 0.5 * (E_log_noise - LOG_2PI - square)


def row_precision(posterior: Posterior, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return shape () and rate (B, M) of q(u), the best one of each row; Student-t noise only.

    ``Gam((nu + 1) / 2, (nu + e) / 2)``
    """
    assert posterior.noise_dof is not None
    dof = posterior.noise_dof
    return 0.5 * (dof + 1.0), 0.5 * (dof + expected_square(posterior, x, y))


def precision_divergence(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """Return ``KL(q(u) || p(u))`` of each row (B, M)."""
    assert posterior.noise_dof is not None
    shape, rate = row_precision(posterior, x, y)
    half = 0.5 * posterior.noise_dof
    return gamma.kl(shape, rate, half, half)


def precision_entropy(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """Return the entropy of q(u) of each row (B, M)."""
    return gamma.entropy(*row_precision(posterior, x, y))


def scale(posterior: Posterior, x: Tensor) -> Tensor:
    """Return the scales (B, M) of the predictive Student-t, ``sqrt(b / a (1 + k))``."""
    ratio = posterior.noise_rate / posterior.noise_shape
    return (ratio * (1.0 + leverage(posterior, x))).sqrt()


def log_predictive(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """Return the log predictive density (B, M).

    A Student-t with ``2 a`` degrees of freedom, or a mixture of those.
    """
    if posterior.noise_dof is not None:
        width = (posterior.noise_rate / posterior.noise_shape).sqrt()
        error = (y - mean(posterior, x)) / width
        return -width.log() + scale_mixture.log_density(
            error.square(),
            leverage(posterior, x),
            dof=2.0 * float(posterior.noise_shape),
            noise_dof=float(posterior.noise_dof),
        )
    width = scale(posterior, x)
    error = (y - mean(posterior, x)) / width
    dof = 2.0 * posterior.noise_shape
    return student_t.log_density(error.square(), 2.0 * width.log(), dof, 1)


def half_width(posterior: Posterior, x: Tensor, level: float) -> Tensor:
    """Return how far the central interval of probability `level` reaches from mu, (B, M)."""
    dof = 2.0 * float(posterior.noise_shape)
    if posterior.noise_dof is None:
        return float(stdtrit(dof, 0.5 + 0.5 * level)) * scale(posterior, x)
    reach = scale_mixture.half_width(
        level, leverage(posterior, x), dof=dof, noise_dof=float(posterior.noise_dof)
    )
    return (posterior.noise_rate / posterior.noise_shape).sqrt() * reach


def noise_variance(posterior: Posterior) -> Tensor:
    """Return ``E[1 / beta] = b / (a - 1)``, shape (M,); infinite if a <= 1."""
    excess = (posterior.noise_shape - 1.0).clamp(min=0.0)
    return posterior.noise_rate / excess


def variance(posterior: Posterior, x: Tensor) -> Tensor:
    """Return the predictive variances (B, M)."""
    return noise_variance(posterior) * (_spread_of_noise(posterior) + leverage(posterior, x))


def _spread_of_noise(posterior: Posterior) -> Tensor | float:
    """``E[1 / u] = nu / (nu - 2)``, infinite if nu <= 2; 1 with Gaussian noise."""
    if posterior.noise_dof is None:
        return 1.0
    return posterior.noise_dof / (posterior.noise_dof - 2.0).clamp(min=0.0)


def covariance(posterior: Posterior, x: Tensor) -> Tensor:
    """Return the joint predictive covariances (M, B, B) of new responses at the rows x."""
    seen, unseen = lengths(posterior.factor, x - posterior.centre_x)
    outer = posterior.factor.outer.square()[:, None, None]
    cov = outer * (seen @ seen.mT + unseen @ unseen.mT) + posterior.intercept_variance
    cov.diagonal(dim1=-2, dim2=-1).add_(_spread_of_noise(posterior))
    return noise_variance(posterior)[:, None, None] * cov


class Lines(NamedTuple):
    """Joint draws of everything that the rows share.

    Attributes
    ----------
    noise_scale : Tensor of shape (S, M)
        ``beta^-1/2``.
    coef : Tensor of shape (S, M, D)
    centre : Tensor of shape (S, M)
        Height of the line at ``centre_x``.
    """

    noise_scale: Tensor
    coef: Tensor
    centre: Tensor


def draw_lines(posterior: Posterior, n_draws: int, rng: np.random.Generator) -> Lines:
    """Draw beta, then w and b given beta, from the exact joint posterior."""
    n_outputs, n_features = posterior.factor.mean.shape
    like = posterior.noise_rate

    def to_device(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device)

    unit_gamma = rng.standard_gamma(float(posterior.noise_shape), size=(n_draws, n_outputs))
    noise_scale = (posterior.noise_rate / to_device(unit_gamma)).sqrt()
    w = draw(posterior.factor, to_device(rng.standard_normal((n_draws, n_outputs, n_features))))
    b = to_device(rng.standard_normal((n_draws, n_outputs))) * math.sqrt(
        float(posterior.intercept_variance)
    )
    return Lines(
        noise_scale,
        posterior.factor.mean + noise_scale[:, :, None] * w,
        posterior.centre_y + noise_scale * b,
    )


def draw_responses(
    posterior: Posterior,
    lines: Lines,
    x: Tensor,
    rng: np.random.Generator,
    mixing: np.random.Generator,
) -> Tensor:
    """Return responses (B, M, S) at rows x (B, D), one for each of the drawn lines.

    The precisions of heavy tails come from a generator of their own, `mixing`, so that what a row
    gets does not depend on how rows are cut into blocks.
    """
    height = torch.einsum("bd,smd->bms", x - posterior.centre_x, lines.coef) + lines.centre.T
    noise = torch.as_tensor(rng.standard_normal(height.shape), dtype=x.dtype, device=x.device)
    if posterior.noise_dof is not None:
        half = 0.5 * float(posterior.noise_dof)
        precision = mixing.standard_gamma(half, size=height.shape) / half
        noise = noise / torch.as_tensor(precision, dtype=x.dtype, device=x.device).sqrt()
    return height + noise * lines.noise_scale.T
