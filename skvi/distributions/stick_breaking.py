r"""Truncated stick-breaking: ``pi_k = v_k prod_{j<k} (1 - v_j)`` with independent Beta sticks.

The last stick is *not* fixed at one (nested truncation), so the weights sum to less than one; the
rest, ``prod_k (1 - v_k)``, belongs to the components beyond the truncation.

Parameters of every function are the Beta parameters ``a, b`` of the sticks, shape (..., K).
Source: Blei & Jordan (2006), Variational inference for Dirichlet process mixtures, section 3.
"""

import torch
from torch import Tensor

from skvi.distributions import dirichlet


def _as_dirichlet(a: Tensor, b: Tensor) -> Tensor:
    """Return the sticks' Betas as two-dimensional Dirichlets, shape (..., K, 2)."""
    return torch.stack([a, b], dim=-1)


def _exclusive_cumsum(x: Tensor) -> Tensor:
    """Sum of what comes before; not ``cumsum - x``, which an x far larger than the rest rounds."""
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1].cumsum(-1)], dim=-1)


def expected_log(a: Tensor, b: Tensor) -> Tensor:
    """``E[log pi_k] = E[log v_k] + sum_{j<k} E[log(1 - v_j)]``."""
    E_log_v, E_log_rest = dirichlet.expected_log(_as_dirichlet(a, b)).unbind(-1)
    return E_log_v + _exclusive_cumsum(E_log_rest)


def log_mean(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log E[pi_k]``, shape (..., K), and ``log E[prod_k (1 - v_k)]``, shape (...)."""
    log_total = (a + b).log()
    log_rest = b.log() - log_total
    return a.log() - log_total + _exclusive_cumsum(log_rest), log_rest.sum(-1)


def kl(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    """``sum_k KL(Beta(a_k, b_k) || Beta(a0_k, b0_k))``."""
    return dirichlet.kl(_as_dirichlet(a, b), _as_dirichlet(a0, b0)).sum(-1)
