r"""Gamma distribution, always (shape, rate).

.. math:: \log \mathrm{Gam}(x | a, b) = a \log b - \log\Gamma(a) + (a - 1) \log x - b x
"""

import torch
from torch import Tensor

from skvi.distributions.special import log_gamma_divergence, log_ratio, ratio_divergence


def mean(shape: Tensor, rate: Tensor) -> Tensor:
    """``E[x] = a / b``."""
    return shape / rate


def expected_log(shape: Tensor, rate: Tensor) -> Tensor:
    """``E[log x] = psi(a) - log b``."""
    return torch.digamma(shape) - rate.log()


def log_normaliser(shape: Tensor, rate: Tensor) -> Tensor:
    """``log Gamma(a) - a log b``: the log integral of ``x^(a - 1) exp(-b x)``."""
    return torch.lgamma(shape) - shape * rate.log()


def entropy(shape: Tensor, rate: Tensor) -> Tensor:
    """``H[Gam(a, b)] = a - log b + log Gamma(a) + (1 - a) psi(a)``."""
    return shape - rate.log() + torch.lgamma(shape) + (1.0 - shape) * torch.digamma(shape)


def kl(shape: Tensor, rate: Tensor, shape0: Tensor, rate0: Tensor) -> Tensor:
    r"""``KL(Gam(a, b) || Gam(a0, b0))``, elementwise.

    .. math::
        D_{\log\Gamma}(a_0, a) + a (r - 1 - \log r) + (a - a_0) \log r, \qquad r = b_0 / b

    Exactly 0 at equality, and right for concentrated laws, whose log densities are large.
    """
    _, log = log_ratio(rate0, rate)
    return (
        log_gamma_divergence(shape0, shape)
        + shape * ratio_divergence(rate0, rate)
        + (shape - shape0) * log
    )
