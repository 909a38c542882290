"""Normal distribution with diagonal covariance; the last dimension holds the features."""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


def log_density(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """``log N(x | mean, exp(log_var))`` per element."""
    return -0.5 * (LOG_2PI + log_var + (x - mean).square() * (-log_var).exp())


def entropy(log_var: Tensor) -> Tensor:
    """``1/2 sum_d (1 + log 2 pi + log var_d)``; (..., D) -> (...)."""
    return 0.5 * (1.0 + LOG_2PI + log_var).sum(-1)


def kl_standard(mean: Tensor, log_var: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_var)) || N(0, 1))`` per dimension.

    ``expm1(v) - v`` replaces ``exp(v) - 1 - v``, which cancels near equality.
    """
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var)
