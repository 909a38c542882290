r"""Gamma distribution, always (shape, rate).

.. math:: \log \mathrm{Gam}(x | a, b) = a \log b - \log\Gamma(a) + (a - 1) \log x - b x
"""

import torch
from torch import Tensor


def mean(shape: Tensor, rate: Tensor) -> Tensor:
    """``E[x] = a / b``."""
    return shape / rate


def expected_log(shape: Tensor, rate: Tensor) -> Tensor:
    """``E[log x] = psi(a) - log b``."""
    return torch.digamma(shape) - rate.log()


def expected_log_density(E_x: Tensor, E_log_x: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """``E log Gam(x | a, b)`` under any law of x with the given ``E[x]`` and ``E[log x]``."""
    return shape * rate.log() - torch.lgamma(shape) + (shape - 1.0) * E_log_x - rate * E_x


def entropy(shape: Tensor, rate: Tensor) -> Tensor:
    """``H[Gam(a, b)] = a - log b + log Gamma(a) + (1 - a) psi(a)``."""
    return shape - rate.log() + torch.lgamma(shape) + (1.0 - shape) * torch.digamma(shape)


def kl(shape: Tensor, rate: Tensor, shape0: Tensor, rate0: Tensor) -> Tensor:
    """``KL(Gam(a, b) || Gam(a0, b0))``, elementwise.

    Written in the differences ``a - a0`` and the ratio ``b0 / b`` so that it is exactly 0 at
    equality and does not subtract the large entropies of concentrated laws.
    """
    ratio = rate0 / rate
    return (
        (shape - shape0) * torch.digamma(shape)
        - (torch.lgamma(shape) - torch.lgamma(shape0))
        - shape0 * ratio.log()
        + shape * (ratio - 1.0)
    )
