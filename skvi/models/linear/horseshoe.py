r"""The horseshoe: half-Cauchy scales of single weights and of all together.

.. math::
    w_j | \cdot \sim N(0, (\beta \lambda_j \gamma u_j)^{-1}), \quad
    \lambda_j | a_j \sim \mathrm{Gam}(\tfrac12, a_j), \quad
    a_j \sim \mathrm{Gam}(\tfrac12, 1), \quad
    \gamma | \xi \sim \mathrm{Gam}(\tfrac12, \xi), \quad
    \xi \sim \mathrm{Gam}(\tfrac12, \tau_0^{-2})

so that :math:`\lambda_j^{-1/2}` is half-Cauchy of scale one and :math:`\gamma^{-1/2}` of scale
:math:`\tau_0`. Source: Carvalho, Polson and Scott (2010); the auxiliary a and xi: Makalic and
Schmidt (2016), arXiv:1508.03884, here with precisions for variances. The posterior factorises
over lambda, a, gamma and xi, all gamma laws: given :math:`E\lambda` and :math:`E\gamma` the others
are known, so these two name it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from skvi.distributions import gamma

_LOG_GAMMA_HALF = 0.5 * math.log(math.pi)
# Updates of the scales between two of the weights: they cost nothing beside these.
_INNER = 20


class HorseshoePrior(NamedTuple):
    """Hyper-parameters, in fitted units.

    Attributes
    ----------
    global_scale : float
        tau0, without a unit.
    unit : Tensor of shape (D,)
        u, the squared spread of each feature, in units of x to the power 2.
    """

    global_scale: float
    unit: Tensor


def _global_shape(prior: HorseshoePrior) -> float:
    return 0.5 * (len(prior.unit) + 1.0)


def _random_rate_kl(shape: Tensor, mean: Tensor, mean_rate: Tensor, E_log_rate: Tensor) -> Tensor:
    """``E KL(q || Gam(1/2, r))`` of ``q = Gam(shape, shape / mean)`` under a random rate r."""
    rate = shape / mean
    E_log = gamma.expected_log(shape, rate)
    log_prior = 0.5 * (E_log_rate - E_log) - _LOG_GAMMA_HALF - mean_rate * mean
    return -gamma.entropy(shape, rate) - log_prior


def divergence(prior: HorseshoePrior, alpha: Tensor, scale: Tensor) -> Tensor:
    """Return what the scales add to KL(q || p), shape (M,), beyond known precisions `alpha`.

    Parameters
    ----------
    prior : HorseshoePrior
    alpha : Tensor of shape (M, D)
        ``E[lambda] E[gamma] u``.
    scale : Tensor of shape (M,)
        ``E[gamma]``.
    """
    local = alpha / (scale[:, None] * prior.unit)
    one, half = torch.ones_like(local), torch.full_like(local, 0.5)
    rate_a = 1.0 + local
    kl = _random_rate_kl(one, local, 1.0 / rate_a, gamma.expected_log(one, rate_a))
    kl = kl + gamma.kl(one, rate_a, half, one)
    # log E - E log of lambda_j, which has the shape 1
    kl = (kl - 0.5 * torch.digamma(one)).sum(-1)

    shape = torch.full_like(scale, _global_shape(prior))
    one, half = torch.ones_like(scale), torch.full_like(scale, 0.5)
    rate0 = torch.full_like(scale, prior.global_scale**-2)
    rate_xi = rate0 + scale
    kl = kl + _random_rate_kl(shape, scale, 1.0 / rate_xi, gamma.expected_log(one, rate_xi))
    kl = kl + gamma.kl(one, rate_xi, half, rate0)
    return kl + 0.5 * len(prior.unit) * (shape.log() - torch.digamma(shape))


def update(
    prior: HorseshoePrior, alpha: Tensor, scale: Tensor, second_moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Return better `alpha` (M, D) and `scale` (M,), given ``E[beta w_j^2]`` (M, D).

    Rounds of coordinate ascent over lambda, a, gamma and xi, each of which raises the bound.
    """
    size = second_moment * prior.unit
    local = alpha / (scale[:, None] * prior.unit)
    for _ in range(_INNER):
        local = 1.0 / (1.0 / (1.0 + local) + 0.5 * scale[:, None] * size)
        E_xi = 1.0 / (prior.global_scale**-2 + scale)
        scale = _global_shape(prior) / (E_xi + 0.5 * (local * size).sum(-1))
    return local * scale[:, None] * prior.unit, scale
