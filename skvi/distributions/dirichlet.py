"""Dirichlet distribution over the last dimension."""

import torch
from torch import Tensor

from skvi.distributions.special import log_gamma_divergence


def mean(concentration: Tensor) -> Tensor:
    """``E[pi_k] = a_k / sum a``."""
    return concentration / concentration.sum(-1, keepdim=True)


def expected_log(concentration: Tensor) -> Tensor:
    """``E[log pi_k] = psi(a_k) - psi(sum a)``."""
    total = concentration.sum(-1, keepdim=True)
    return torch.digamma(concentration) - torch.digamma(total)


def kl(concentration: Tensor, concentration0: Tensor) -> Tensor:
    """``KL(Dir(a) || Dir(a0)) = sum_k D(a0_k, a_k) - D(sum a0, sum a)``; (..., K) -> (...).

    D is the Bregman divergence of log Gamma, so that nothing large is subtracted.
    """
    # one call for all of them, with the total as one more element
    total, total0 = concentration.sum(-1, keepdim=True), concentration0.sum(-1, keepdim=True)
    divergence = log_gamma_divergence(
        torch.cat([concentration0, total0], dim=-1), torch.cat([concentration, total], dim=-1)
    )
    return divergence[..., :-1].sum(-1) - divergence[..., -1]
