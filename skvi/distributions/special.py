"""Special functions arranged so that nearly equal arguments keep their digits."""

import math

import torch
from torch import Tensor

from skvi.runtime.device import asks_freely

# From here on the asymptotic series of log Gamma and psi are exact to rounding.
_LARGE = 20.0


def log_ratio(x0: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x0 / x - 1`` and ``log(x0 / x)`` of positive numbers, near and far from equality."""
    excess = (x0 - x) / x
    near = excess.abs() < 0.5
    return excess, torch.where(near, torch.log1p(excess.clamp(-0.5, 0.5)), x0.log() - x.log())


def ratio_divergence(x0: Tensor, x: Tensor) -> Tensor:
    """``r - 1 - log r`` of ``r = x0 / x``: not negative, and zero at equality without rounding."""
    excess, log = log_ratio(x0, x)
    e = excess.clamp(-0.01, 0.01)
    # (e - log(1 + e)) / e^2 = 1/2 - e/3 + e^2/4 - ... to e^7
    series = 1 / 8 - e / 9
    for n in range(7, 1, -1):
        series = 1 / n - e * series
    return torch.where(excess.abs() < 0.01, excess.square() * series, excess - log)


def log_gamma_divergence(x0: Tensor, x: Tensor) -> Tensor:
    r"""Bregman divergence of log Gamma: ``log Gamma(x0) - log Gamma(x) - psi(x) (x0 - x)``.

    Not negative. For large arguments by Stirling's series, in which the large terms are

    .. math::
        x [(1 + e) \log(1 + e) - e] + \tfrac12 (e - \log(1 + e)), \qquad e = x_0 / x - 1

    and cancel no more; the direct form would return the rounding of :math:`x \log x`.
    """
    direct = torch.lgamma(x0) - torch.lgamma(x) - torch.digamma(x) * (x0 - x)
    x0, x = torch.broadcast_tensors(x0, x)
    both_large = torch.minimum(x0, x) > _LARGE
    # The series is fifty small operations.
    if asks_freely(x.device) and not both_large.any():
        return direct
    # Where it is not selected the series still needs arguments that it can stand.
    y0, y = x0.clamp_min(_LARGE), x.clamp_min(_LARGE)
    excess, log = log_ratio(y0, y)
    divergence = ratio_divergence(y0, y)
    series = (
        y * (excess * log - divergence)
        + 0.5 * divergence
        + _stirling_rest(y0) - _stirling_rest(y)
        + (y0 - y) * _digamma_rest(y)
    )  # fmt: skip
    return torch.where(both_large, series, direct)


def log_gamma_excess(x: Tensor) -> Tensor:
    """``log Gamma(x) - (x log x - x)`` for x of any size."""
    y = x.clamp_min(_LARGE)
    series = _stirling_rest(y) - 0.5 * y.log() + 0.5 * math.log(2.0 * math.pi)
    direct = torch.lgamma(x) - (torch.xlogy(x, x) - x)
    return torch.where(x > _LARGE, series, direct)


def log_gamma_ratio(x: Tensor, step: Tensor | float) -> Tensor:
    """``log Gamma(x + step) - log Gamma(x)`` for x of any size."""
    return log_gamma_divergence(x + step, x) + step * torch.digamma(x)


def _stirling_rest(x: Tensor) -> Tensor:
    """``log Gamma(x) - [(x - 1/2) log x - x + 1/2 log 2 pi]``; Abramowitz & Stegun 6.1.41."""
    y = x.square().reciprocal()
    return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x


def _digamma_rest(x: Tensor) -> Tensor:
    """``log x - 1 / (2 x) - psi(x)``; Abramowitz & Stegun 6.3.18."""
    y = x.square().reciprocal()
    return y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))
