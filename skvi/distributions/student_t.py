r"""Multivariate Student-t.

.. math::
    \log t = \log\Gamma(\tfrac{\nu+D}{2}) - \log\Gamma(\tfrac{\nu}{2}) - \tfrac{D}{2}\log(\nu\pi)
        - \tfrac12 \log|\Sigma| - \tfrac{\nu+D}{2} \log(1 + \delta/\nu),\qquad
    \delta = (x-m)'\Sigma^{-1}(x-m)
"""

import math

import torch
from torch import Tensor

from skvi.distributions.special import log_gamma_ratio


def log_density(
    mahalanobis: Tensor, log_det_scale: Tensor, dof: Tensor, dim: Tensor | int
) -> Tensor:
    """Log density from the squared Mahalanobis distance and ``log|Sigma|``, elementwise."""
    half = dof / 2.0
    shift = dim / 2.0
    return (
        log_gamma_ratio(half, shift)
        - shift * (dof * math.pi).log()
        - 0.5 * log_det_scale
        - (half + shift) * torch.log1p(mahalanobis / dof)
    )
