"""Linear algebra on Cholesky factors. Batched over leading dimensions; float64 in, float64 out."""

import torch
from torch import Tensor


def log_det_from_chol(chol: Tensor) -> Tensor:
    """Return ``log|A|`` of ``A = L L'``; `chol` is L of shape (..., D, D), the result (...)."""
    return 2.0 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inv_chol(chol: Tensor) -> Tensor:
    """Return ``L^-1`` of a lower triangular L, shape (..., D, D), by forward substitution."""
    eye = torch.eye(chol.shape[-1], dtype=chol.dtype, device=chol.device).expand_as(chol)
    return torch.linalg.solve_triangular(chol, eye, upper=False)
