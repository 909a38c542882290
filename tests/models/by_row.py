"""The scores of a mixture written plainly: what the fast ones are compared with."""

from torch import Tensor

from skvi.models.mixture.bound import Posterior, log_rho
from skvi.models.mixture.missing import Cells


def local_bound(posterior: Posterior, x: Tensor | Cells) -> Tensor:
    """``log sum_k rho_nk`` of rows (B, D), shape (B,)."""
    return log_rho(posterior, x).logsumexp(0)


def responsibilities(posterior: Posterior, x: Tensor | Cells) -> Tensor:
    """``r_nk`` of rows (B, D), shape (K, B)."""
    return log_rho(posterior, x).softmax(0)
