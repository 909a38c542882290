"""Cholesky factors, batched over leading dimensions, and Gram matrices; float64 in and out."""

import torch
from torch import Tensor


def log_det_from_chol(chol: Tensor) -> Tensor:
    """Return ``log|A|`` of ``A = L L'``; `chol` is L of shape (..., D, D), the result (...)."""
    return 2.0 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inv_chol(chol: Tensor) -> Tensor:
    """Return ``L^-1`` of a lower triangular L, shape (..., D, D), by forward substitution."""
    eye = torch.eye(chol.shape[-1], dtype=chol.dtype, device=chol.device).expand_as(chol)
    return torch.linalg.solve_triangular(chol, eye, upper=False)


def gram(z: Tensor) -> Tensor:
    """Return ``z'z`` of rows (B, D); NumPy computes half of the symmetric product, torch all."""
    if z.device.type != "cpu":
        return z.T @ z
    rows = z.numpy()
    return torch.from_numpy(rows.T @ rows)
