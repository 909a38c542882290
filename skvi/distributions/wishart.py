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

from skvi.distributions.special import log_gamma_divergence, log_ratio, ratio_divergence
from skvi.runtime.linalg import log_det_from_chol


def _multivariate_digamma(x: Tensor, dim: int) -> Tensor:
    """``d/dx log Gamma_D(x) = sum_{d=0}^{D-1} psi(x - d/2)``."""
    offsets = torch.arange(dim, dtype=x.dtype, device=x.device) / 2.0
    return torch.digamma(x[..., None] - offsets).sum(-1)


def log_normaliser(dof: Tensor, scale_inv_chol: Tensor) -> Tensor:
    """Return ``log Z`` of the module docstring."""
    dim = scale_inv_chol.shape[-1]
    # log Gamma_D(x) = D (D - 1) / 4 log pi + sum_{d<D} log Gamma(x - d / 2)
    offsets = torch.arange(dim, dtype=dof.dtype, device=dof.device) / 2.0
    log_gamma = torch.lgamma(dof[..., None] / 2.0 - offsets).sum(-1)
    log_gamma = log_gamma + 0.25 * dim * (dim - 1) * math.log(math.pi)
    half = 0.5 * dof
    return half * (dim * math.log(2.0) - log_det_from_chol(scale_inv_chol)) + log_gamma


def expected_log_det(dof: Tensor, scale_inv_chol: Tensor) -> Tensor:
    """``E[log|Lambda|] = sum_{d<D} psi((nu - d)/2) + D log 2 + log|W|``."""
    dim = scale_inv_chol.shape[-1]
    digammas = _multivariate_digamma(dof / 2.0, dim)
    return digammas + dim * math.log(2.0) - log_det_from_chol(scale_inv_chol)


def kl(dof: Tensor, scale_inv_chol: Tensor, dof0: Tensor, scale_inv_chol0: Tensor) -> Tensor:
    r"""Return ``KL(W(W, nu) || W(W0, nu0))``.

    .. math::
        \sum_{d<D} D_{\log\Gamma}(\tfrac{\nu_0 - d}{2}, \tfrac{\nu - d}{2})
        + \tfrac{\nu}{2} (\mathrm{tr} R R' - D - \log|R R'|)
        + \tfrac{\nu - \nu_0}{2} \log|R R'|, \qquad R = L^{-1} L_0

    with the diagonal of R taken relative to one, so that nearly equal laws keep their digits.
    """
    dim = scale_inv_chol.shape[-1]
    offsets = torch.arange(dim, dtype=dof.dtype, device=dof.device) / 2.0
    half, half0 = dof[..., None] / 2.0 - offsets, dof0[..., None] / 2.0 - offsets  # (..., D)
    ratio = torch.linalg.solve_triangular(
        scale_inv_chol, scale_inv_chol0.expand_as(scale_inv_chol), upper=False
    )
    below = ratio.tril(-1).square().sum((-2, -1))
    diagonal, diagonal0 = (c.diagonal(dim1=-2, dim2=-1) for c in (scale_inv_chol, scale_inv_chol0))
    excess, log = log_ratio(diagonal0, diagonal)  # R_dd - 1 and log R_dd
    # R_dd^2 - 1 - 2 log R_dd = (R_dd - 1)^2 + 2 (R_dd - 1 - log R_dd)
    on_diagonal = (excess.square() + 2.0 * ratio_divergence(diagonal0, diagonal)).sum(-1)
    return (
        log_gamma_divergence(half0, half).sum(-1)
        + 0.5 * dof * (below + on_diagonal)
        + (dof - dof0) * log.sum(-1)
    )
