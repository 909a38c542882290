"""Dirichlet distribution over the last dimension."""

import torch
from torch import Tensor


def log_normaliser(concentration: Tensor) -> Tensor:
    """``log B(a) = sum_k log Gamma(a_k) - log Gamma(sum_k a_k)``; (..., K) -> (...)."""
    return torch.lgamma(concentration).sum(-1) - torch.lgamma(concentration.sum(-1))


def mean(concentration: Tensor) -> Tensor:
    """``E[pi_k] = a_k / sum a``."""
    return concentration / concentration.sum(-1, keepdim=True)


def expected_log(concentration: Tensor) -> Tensor:
    """``E[log pi_k] = psi(a_k) - psi(sum a)``."""
    total = concentration.sum(-1, keepdim=True)
    return torch.digamma(concentration) - torch.digamma(total)


def entropy(concentration: Tensor) -> Tensor:
    """``H = log B(a) - sum_k (a_k - 1) E[log pi_k]``."""
    weighted = (concentration - 1.0) * expected_log(concentration)
    return log_normaliser(concentration) - weighted.sum(-1)


def kl(concentration: Tensor, concentration0: Tensor) -> Tensor:
    """``KL(Dir(a) || Dir(a0)) = log B(a0) - log B(a) + sum_k (a_k - a0_k) E[log pi_k]``."""
    difference = (concentration - concentration0) * expected_log(concentration)
    normalisers = log_normaliser(concentration0) - log_normaliser(concentration)
    return normalisers + difference.sum(-1)
