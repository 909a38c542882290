r"""The Polya-Gamma laws PG(1, c), exponential tilts of one another.

.. math::
    \mathrm{PG}(\omega | 1, c) = \cosh(c / 2)\, e^{-c^2 \omega / 2}\, \mathrm{PG}(\omega | 1, 0)

Source: Polson, Scott and Windle (2013), arXiv:1205.0310, equations 5 to 7.
"""

import torch
from torch import Tensor

# Below this tilt the first two terms of the series are exact to rounding.
_SMALL = 1e-3


def mean(tilt: Tensor) -> Tensor:
    """``E[omega] = tanh(c / 2) / (2 c)``, elementwise for ``c >= 0``; 1/4 at zero."""
    safe = tilt.clamp(min=_SMALL)
    series = 0.25 - tilt.square() / 48.0 * (1.0 - tilt.square() / 10.0)
    return torch.where(tilt < _SMALL, series, torch.tanh(0.5 * safe) / (2.0 * safe))


def kl(tilt: Tensor) -> Tensor:
    r"""``KL(PG(1, c) || PG(1, 0)) = log cosh(c / 2) - (c / 4) tanh(c / 2)``, elementwise."""
    half = 0.5 * tilt
    # log cosh x = x + log((1 + e^-2x) / 2) = x + log(1 - (1 - e^-2x) / 2)
    log_cosh = half + torch.log1p(0.5 * torch.expm1(-tilt))
    direct = log_cosh - 0.5 * half * torch.tanh(half)
    # Both terms are half^2 / 2 up to fourth order.
    series = half**4 * (1.0 / 12.0 - half.square() * 2.0 / 45.0)
    return torch.where(tilt < 1e-2, series, direct)
