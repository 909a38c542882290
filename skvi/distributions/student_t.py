r"""Multivariate Student-t.

.. math::
    \log t = \log\Gamma(\tfrac{\nu+D}{2}) - \log\Gamma(\tfrac{\nu}{2}) - \tfrac{D}{2}\log(\nu\pi)
        - \tfrac12 \log|\Sigma| - \tfrac{\nu+D}{2} \log(1 + \delta/\nu),\qquad
    \delta = (x-m)'\Sigma^{-1}(x-m)
"""

import math

import torch
from torch import Tensor


def log_density(mahalanobis: Tensor, log_det_scale: Tensor, dof: Tensor, dim: int) -> Tensor:
    """Log density from the squared Mahalanobis distance and ``log|Sigma|``, elementwise.

    Large degrees of freedom are handled: the ratio of gamma functions is taken in its
    asymptotic form beyond 1e7, where the difference of two ``lgamma`` has lost its digits.
    """
    half = dof / 2.0
    shift = dim / 2.0
    exact = torch.lgamma(half + shift) - torch.lgamma(half)
    # log Gamma(z + a) - log Gamma(z) = a log z + a (a - 1) / (2 z) + O(z^-2)
    asymptotic = shift * half.log() + shift * (shift - 1.0) / (2.0 * half)
    log_gamma_ratio = torch.where(dof > 1e7, asymptotic, exact)
    return (
        log_gamma_ratio
        - shift * (dof * math.pi).log()
        - 0.5 * log_det_scale
        - (half + shift) * torch.log1p(mahalanobis / dof)
    )
