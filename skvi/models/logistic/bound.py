r"""The local bound of a label, given the mean and the variance of its log odds.

.. math::
    \log \sigma(t a) \ge \tfrac12 (t a - \xi) + \log\sigma(\xi)
        - \tfrac12 \omega (a^2 - \xi^2), \qquad \omega = \frac{\tanh(\xi / 2)}{2 \xi}

Source: Jaakkola and Jordan (2000), equation 8. Under :math:`q` with :math:`E[a] = \mu` and
:math:`\mathrm{Var}[a] = v` the best :math:`\xi` is :math:`\sqrt{\mu^2 + v}`, and the last term
vanishes.
"""

import torch
from torch import Tensor

from skvi.distributions import polya_gamma

_TINY = 1e-300


def best_tilt(mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``xi = sqrt(E[a^2])``, elementwise."""
    return torch.hypot(mean, variance.sqrt())


def local_bound(sign: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``1/2 (t mu - xi) - log(1 + exp(-xi))`` of signs t at the best xi, elementwise.

    For confident and right rows ``t mu`` and ``xi`` are nearly equal: their difference is taken
    as ``-v / (xi + |mu|)``.
    """
    tilt = best_tilt(mean, variance)
    total = tilt + mean.abs()
    right = -variance / total.clamp(min=_TINY)
    excess = torch.where(sign * mean >= 0.0, right, -total)
    return 0.5 * excess - torch.log1p((-tilt).exp())


def local_divergence(mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``KL(q(omega) || PG(1, 0))`` of the best q(omega), elementwise."""
    return polya_gamma.kl(best_tilt(mean, variance))
