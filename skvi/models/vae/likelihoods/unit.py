"""Likelihoods of binary values and of shares in [0, 1]."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skvi.distributions import continuous_bernoulli
from skvi.models.vae.likelihoods.base import Likelihood, Marginals, bend, unbend

# Columns that are almost constant start at logits of +-9, not at infinite ones.
_SMALLEST_P = 1e-4
# Logits of shares end here: the density of a column that is always 0 or 1 would grow for ever.
_LARGEST_LOGIT = 300.0
_BISECTIONS = 60


class _LogProb(torch.autograd.Function):
    """``sum_j x_j f_j - log(1 + exp(f_j))`` with as few passes over the cells as there can be.

    Of a step of training they take a tenth of the time or more: autograd would make eight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        """Sum the cells of x, which may lack dimensions, and logits f, (..., D) -> (...)."""
        ctx.save_for_backward(x, f)
        return nn.functional.softplus(f).neg_().addcmul_(x, f).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return the gradient of the logits; the data have none."""
        x, f = ctx.saved_tensors
        slope = torch.sigmoid(f)
        torch.sub(x, slope, out=slope)
        return None, slope.mul_(grad[..., None])


class Bernoulli(Likelihood):
    r"""Binary columns; the output holds the logits.

    .. math:: \log p(x|z) = \sum_j x_j f_j(z) - \log(1 + e^{f_j(z)})
    """

    support: ClassVar[str] = "binary"

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, n_features, n_features)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return x * output - nn.functional.softplus(output)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return _LogProb.apply(x, output.expand(torch.broadcast_shapes(x.shape, output.shape)))

    def mean(self, output: Tensor) -> Tensor:
        """``P(x = 1|z)``."""
        return torch.sigmoid(output)

    def variance(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output) * torch.sigmoid(-output)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.empty_like(output).uniform_(generator=generator)
        return (uniform < torch.sigmoid(output)).to(output.dtype)

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        # First order around the mean: P(x = 1) = p + p (1 - p) f.
        p = known.mean.clamp(_SMALLEST_P, 1.0 - _SMALLEST_P)
        return torch.logit(p), known.loadings / (p * (1.0 - p)).clamp_min(0.05)[:, None]


class ContinuousBernoulli(Likelihood):
    r"""Shares in [0, 1] with the density ``exp(f x)``, normalised; the output holds f.

    .. math:: \log p(x|z) = \sum_j x_j f_j(z) - \log\frac{e^{f_j(z)} - 1}{f_j(z)}

    The logits are bent smoothly into +-300, which bounds the density, by 300.
    Source: Loaiza-Ganem & Cunningham (2019), arXiv:1907.06845.
    """

    support: ClassVar[str] = "unit"

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, n_features, n_features)

    @staticmethod
    def _logit(output: Tensor) -> Tensor:
        return bend(output, _LARGEST_LOGIT)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return continuous_bernoulli.log_density(x, self._logit(output))

    def mean(self, output: Tensor) -> Tensor:
        return continuous_bernoulli.mean(self._logit(output))

    def variance(self, output: Tensor) -> Tensor:
        return continuous_bernoulli.variance(self._logit(output))

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return continuous_bernoulli.sample(self._logit(output), generator)

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        low = torch.full_like(known.mean, -100.0)
        high = -low
        for _ in range(_BISECTIONS):  # the logit of the mean has no closed form
            middle = 0.5 * (low + high)
            below = continuous_bernoulli.mean(middle) < known.mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        # First order around the mean, as above: the variance is the mean's derivative.
        loadings = known.loadings / continuous_bernoulli.variance(low).clamp_min(0.01)[:, None]
        return unbend(low, loadings, _LARGEST_LOGIT)
