r"""The mean of a sigmoid under a normal law, exact to rounding for any mean and variance.

.. math::
    E[\sigma(a)] = L(\mu) + \Phi(\mu / s) - L(-\mu), \qquad a \sim N(\mu, s^2), \qquad
    L(\mu) = \int_{a < 0} \sigma(a)\, N(a | \mu, s^2)\, da = \sum_{k=1}^\infty (-1)^{k+1} b_k,

.. math::
    b_k = \int_{a < 0} e^{k a} N(a | \mu, s^2)\, da
        = e^{k\mu + k^2 s^2 / 2}\, \Phi\!\left(-\frac{\mu + k s^2}{s}\right)

The :math:`b_k` are the moments of a positive measure on [0, 1], so that the alternating sum of n
terms can be weighted such that its relative error is below :math:`2 (3 + \sqrt 8)^{-n}`: Cohen,
Rodriguez Villegas and Zagier (2000), Convergence acceleration of alternating series, algorithm 1.
No nodes have to be placed, and small probabilities keep their relative accuracy.
"""

import math

import torch
from torch import Tensor

# 2 (3 + sqrt 8)^-22 is 3e-17.
_N_TERMS = 22
# A standard deviation below this one adds less than rounding.
_SMALLEST_STD = 1e-30


def _weights_of_the_sum() -> list[float]:
    """Return the weights of the terms, signs included."""
    d = (3.0 + math.sqrt(8.0)) ** _N_TERMS
    d = (d + 1.0 / d) / 2.0
    b, c, weights = -1.0, -d, []
    for k in range(_N_TERMS):
        c = b - c
        weights.append(c / d)
        b *= (k + _N_TERMS) * (k - _N_TERMS) / ((k + 0.5) * (k + 1.0))
    return weights


_WEIGHTS = _weights_of_the_sum()


def log_mean_sigmoid(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log E[sigmoid(a)]`` and ``log E[sigmoid(-a)]`` of ``a ~ N(mean, variance)``.

    Elementwise, float64.
    """
    std = variance.sqrt().clamp(min=_SMALLEST_STD)
    below, above = _log_lower_part(mean, std), _log_lower_part(-mean, std)

    def log_sum(lower: Tensor, upper: Tensor, centre: Tensor) -> Tensor:
        # Over a > 0 the sigmoid is at least 1/2, so that the difference loses no digits.
        mass = torch.special.log_ndtr(centre / std)
        share = (upper - mass).exp().nan_to_num(nan=0.5).clamp(max=0.5)
        return torch.logaddexp(lower, mass + torch.log1p(-share))

    return log_sum(below, above, mean), log_sum(above, below, -mean)


def _log_lower_part(mean: Tensor, std: Tensor) -> Tensor:
    """``log L(mean)``."""
    k = torch.arange(1, _N_TERMS + 1, dtype=mean.dtype, device=mean.device)
    mean, std = mean[..., None], std[..., None]
    step = k * std.square()
    z = (mean + step) / std
    # log Phi(-z) is as large as the exponent before it where z > 0: there both are joined.
    joined = torch.log(0.5 * torch.special.erfcx(z.clamp(min=0.0) / math.sqrt(2.0)))
    joined = joined - 0.5 * (mean / std).square()
    apart = k * (torch.minimum(mean, -step) + 0.5 * step)
    apart = apart + torch.special.log_ndtr(-z.clamp(max=0.0))
    log_b = torch.where(z > 0.0, joined, apart)  # (..., K)
    largest = log_b[..., :1]
    largest = torch.where(largest.isfinite(), largest, 0.0)
    weights = torch.tensor(_WEIGHTS, dtype=mean.dtype, device=mean.device)
    total = ((log_b - largest).exp() * weights).sum(-1)
    return largest[..., 0] + total.log()
