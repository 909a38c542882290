"""Cholesky factors, batched over leading dimensions, and symmetric products; float64 in and out."""

import torch
from torch import Tensor

# Columns of a panel of a symmetric product: what the registers of a matrix product hold.
_PANEL = 24


def log_det_from_chol(chol: Tensor) -> Tensor:
    """Return ``log|A|`` of ``A = L L'``; `chol` is L of shape (..., D, D), the result (...)."""
    return 2.0 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inv_chol(chol: Tensor) -> Tensor:
    """Return ``L^-1`` of a lower triangular L, shape (..., D, D), by forward substitution."""
    eye = torch.eye(chol.shape[-1], dtype=chol.dtype, device=chol.device).expand_as(chol)
    return torch.linalg.solve_triangular(chol, eye, upper=False)


def add_products(products: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the lower triangle of the symmetric ``left right`` in place, panel by panel of rows.

    In torch like everything else: beside its threads those of another library, which go on
    spinning after each call, would make both several times slower.
    """
    columns = len(products)
    width = _PANEL if columns <= 8 * _PANEL else 4 * _PANEL
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        products[start:stop, :stop].addmm_(left[start:stop], right[:, :stop])
