"""Likelihoods of binary values and of shares in [0, 1]."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skvi.distributions import continuous_bernoulli
from skvi.models.vae.likelihoods.base import Likelihood, Marginals, bend, bend_slope, unbend
from skvi.runtime.blocks import row_slices

# Columns that are almost constant start at logits of +-9, not at infinite ones.
_SMALLEST_P = 1e-4
# Logits of shares end here: the density of a column that is always 0 or 1 would grow for ever.
_LARGEST_LOGIT = 300.0
_BISECTIONS = 60
# So many cells and what is made of them fit the caches, and pay for the operations on a block.
_CELLS_PER_BLOCK = 1 << 20


class _LogProb(torch.autograd.Function):
    """``sum_j x_j f_j - log(1 + exp(f_j))``, block by block.

    Steps of training have their largest arrays here. Each operation would write another one, to
    memory that the system first has to find; what is made of a block stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        """Sum the cells of x, which may lack dimensions, and logits f, (..., D) -> (...).

        The logits may have fewer digits than x, which all that is computed has.
        """
        ctx.save_for_backward(x, f)
        total = x.new_empty(f.shape[:-1])
        for sums, cells, logits in _blocks(total[..., None], x, f):
            wide = logits.to(x.dtype)
            sums[..., 0] = nn.functional.softplus(wide).neg_().addcmul_(cells, wide).sum(-1)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return the gradient of the logits; the data have none."""
        x, f = ctx.saved_tensors
        slope = f.new_empty(f.shape)
        for into, factor, cells, logits in _blocks(slope, grad[..., None], x, f):
            p = torch.sigmoid(logits.to(x.dtype))
            torch.mul(torch.sub(cells, p, out=p), factor, out=into)
        return None, slope


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors into the same parts that fit the caches; into one where there is no need to.

    The last one has the shape (..., B, D), to which the others extend but for their last dimension.
    """
    shape = tensors[-1].shape
    if tensors[-1].device.type != "cpu" or shape.numel() <= _CELLS_PER_BLOCK or len(shape) < 2:
        yield tensors
        return
    *_, n_rows, width = shape
    n_parts = math.ceil(n_rows * width / _CELLS_PER_BLOCK)  # of one draw
    whole = [t.expand(*shape[:-1], -1) for t in tensors]
    whole = [t[None] if t.dim() == 2 else t.flatten(0, -3) for t in whole]  # (S, B, .)
    draws = row_slices(len(whole[0]), max(1, _CELLS_PER_BLOCK // (n_rows * width)))
    rows = row_slices(n_rows, math.ceil(n_rows / n_parts))
    for place in itertools.product(draws, rows):
        yield tuple(t[place] for t in whole)


class Bernoulli(Likelihood):
    r"""Binary columns; the output holds the logits.

    .. math:: \log p(x|z) = \sum_j \bigl[x_j f_j(z) - \log(1 + e^{f_j(z)})\bigr]
    """

    support: ClassVar[str] = "binary"
    widens: ClassVar[bool] = True

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, n_features, n_features)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        output = output.to(x.dtype)
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

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.variance(bias)
        return variance[:, None] * weight, variance


class ContinuousBernoulli(Likelihood):
    r"""Shares in [0, 1] with the density ``exp(f x)``, normalised; the output holds f.

    .. math:: \log p(x|z) = \sum_j \Bigl[x_j f_j(z) - \log\frac{e^{f_j(z)} - 1}{f_j(z)}\Bigr]

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

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.variance(bias)
        slope = variance * bend_slope(bias, _LARGEST_LOGIT)
        return slope[:, None] * weight, variance
