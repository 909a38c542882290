r"""Wishart distribution, parametrised by its degrees of freedom and a factor of its inverse scale.

.. math::
    \log W(\Lambda | W, \nu) = -\log Z + \frac{\nu - D - 1}{2} \log|\Lambda|
        - \frac12 \mathrm{tr}(W^{-1} \Lambda), \qquad
    \log Z = \frac{\nu D}{2} \log 2 + \frac{\nu}{2} \log|W| + \log \Gamma_D(\nu / 2)

``scale_inv_chol`` is the lower L with ``W^-1 = L L'``, shape (..., D, D); ``dof`` has shape (...).
Source: Bishop (2006), Pattern Recognition and Machine Learning, appendix B.
"""

import math

import torch
from torch import Tensor

from skvi.runtime.linalg import log_det_from_chol


def _multivariate_digamma(x: Tensor, dim: int) -> Tensor:
    """``d/dx log Gamma_D(x) = sum_{d=0}^{D-1} psi(x - d/2)``."""
    offsets = torch.arange(dim, dtype=x.dtype, device=x.device) / 2.0
    return torch.digamma(x[..., None] - offsets).sum(-1)


def log_normaliser(dof: Tensor, scale_inv_chol: Tensor) -> Tensor:
    """Return ``log Z``."""
    dim = scale_inv_chol.shape[-1]
    return (
        0.5 * dof * (dim * math.log(2.0) - log_det_from_chol(scale_inv_chol))
        + torch.mvlgamma(dof / 2.0, dim)
    )  # fmt: skip


def expected_log_det(dof: Tensor, scale_inv_chol: Tensor) -> Tensor:
    """``E[log|Lambda|] = sum_{d<D} psi((nu - d)/2) + D log 2 + log|W|``."""
    dim = scale_inv_chol.shape[-1]
    digammas = _multivariate_digamma(dof / 2.0, dim)
    return digammas + dim * math.log(2.0) - log_det_from_chol(scale_inv_chol)


def entropy(dof: Tensor, scale_inv_chol: Tensor) -> Tensor:
    """``H = log Z - (nu - D - 1)/2 E[log|Lambda|] + nu D / 2``."""
    dim = scale_inv_chol.shape[-1]
    return (
        log_normaliser(dof, scale_inv_chol)
        - 0.5 * (dof - dim - 1.0) * expected_log_det(dof, scale_inv_chol)
        + 0.5 * dof * dim
    )


def kl(dof: Tensor, scale_inv_chol: Tensor, dof0: Tensor, scale_inv_chol0: Tensor) -> Tensor:
    r"""Return ``KL(W(W, nu) || W(W0, nu0))``.

    .. math::
        \frac{\nu - \nu_0}{2} \psi_D(\nu/2) - \log\frac{\Gamma_D(\nu/2)}{\Gamma_D(\nu_0/2)}
        + \frac{\nu_0}{2} \log\frac{|W_0|}{|W|} + \frac{\nu}{2} (\mathrm{tr}(W_0^{-1} W) - D)
    """
    dim = scale_inv_chol.shape[-1]
    half, half0 = dof / 2.0, dof0 / 2.0
    # tr(W0^-1 W) = ||L^-1 L0||_F^2
    ratio = torch.linalg.solve_triangular(
        scale_inv_chol, scale_inv_chol0.expand_as(scale_inv_chol), upper=False
    )
    trace = ratio.square().sum((-2, -1))
    log_det_ratio = log_det_from_chol(scale_inv_chol) - log_det_from_chol(scale_inv_chol0)
    return (
        (half - half0) * _multivariate_digamma(half, dim)
        - (torch.mvlgamma(half, dim) - torch.mvlgamma(half0, dim))
        + half0 * log_det_ratio
        + half * (trace - dim)
    )
