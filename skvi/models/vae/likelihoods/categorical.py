"""The likelihood of integer codes."""

import itertools
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from skvi.models.vae.likelihoods.base import Likelihood, Marginals

# Levels that are rarer start as if they had this share.
_SMALLEST_P = 1e-4


class Categorical(Likelihood):
    r"""Codes ``0 .. K_j - 1``; the output holds the logits of all levels, column by column.

    .. math:: \log p(x|z) = \sum_j \Bigl[f_{j x_j}(z) - \log \sum_l e^{f_{jl}(z)}\Bigr]

    The encoder reads indicators of the levels.

    Parameters
    ----------
    n_levels : tuple of int
        K_j of each column.
    """

    support: ClassVar[str] = "code"

    def __init__(self, n_levels: tuple[int, ...]) -> None:
        super().__init__(len(n_levels), sum(n_levels), sum(n_levels))
        # Neighbours with equally many levels are one operation: how many columns, how many levels.
        self.runs = [(len(list(run)), n) for n, run in itertools.groupby(n_levels)]

    def _columns(self, x: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Cut one value per column, (..., D), into runs (..., n), with their numbers of levels."""
        parts = x.split([n for n, _ in self.runs], dim=-1)
        return zip(parts, [n_levels for _, n_levels in self.runs], strict=True)

    def _levels(self, output: Tensor) -> list[Tensor]:
        """Cut one value per level, (..., n_outputs), into runs (..., n, K)."""
        parts = output.split([n * n_levels for n, n_levels in self.runs], dim=-1)
        return [part.unflatten(-1, run) for part, run in zip(parts, self.runs, strict=True)]

    def features(self, x: Tensor) -> Tensor:
        runs = [
            (codes[..., None] == torch.arange(n, device=x.device)).flatten(-2)
            for codes, n in self._columns(x)
        ]
        return torch.cat(runs, -1).to(x.dtype)

    def per_feature(self, cells: Tensor) -> Tensor:
        runs = [c[..., None].expand(*c.shape, n).flatten(-2) for c, n in self._columns(cells)]
        return torch.cat(runs, -1)

    def least_noise(self, floor: Tensor) -> Tensor:
        # Indicators of a column determine each other, which is nothing for a code to explain.
        return floor.new_full((self.n_inputs,), 0.5)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        runs = []
        for (codes, _), logits in zip(self._columns(x.long()), self._levels(output), strict=True):
            shape = torch.broadcast_shapes(codes.shape, logits.shape[:-1])
            chosen = logits.expand(*shape, -1).gather(-1, codes.expand(shape)[..., None])
            runs.append(chosen.squeeze(-1) - logits.logsumexp(-1))
        return torch.cat(runs, -1)

    def statistics(self, output: Tensor) -> Tensor:
        """Return ``P(x_j = l|z)`` of all levels -> (..., n_outputs)."""
        return torch.cat([logits.softmax(-1).flatten(-2) for logits in self._levels(output)], -1)

    @property
    def n_statistics(self) -> int:
        return self.n_outputs

    def summarise(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most probable codes, and the variances ``p (1 - p)`` of their indicators."""
        best = [p.max(-1) for p in self._levels(averages)]
        mode = torch.cat([b.indices for b in best], -1).to(averages.dtype)
        p = torch.cat([b.values for b in best], -1)
        return mode, p * (1.0 - p).clamp_min(0.0)  # averages may be above 1 by rounding

    def mean(self, output: Tensor) -> Tensor:
        """Return the most probable code; the arithmetic mean of codes says nothing."""
        return self.summarise(output)[0]

    def variance(self, output: Tensor) -> Tensor:
        return self.summarise(self.statistics(output))[1]

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        # The largest of logits plus Gumbel noise is a draw.
        noise = torch.empty_like(output).exponential_(generator=generator)
        return self.mean(output - noise.log())

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        p = known.feature_mean.clamp_min(_SMALLEST_P)
        # First order around the shares: P(level) = p + p (f - mean of f).
        return p.log(), known.loadings / p.clamp_min(0.05)[:, None]

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # A common shift of a column's logits does nothing. Without their mean under p the
        # information diag(p) - p p' is that of independent levels, since indicators add up to one.
        p = self.statistics(bias)
        means = [
            (share * slopes).sum(-1, keepdim=True).expand_as(slopes).flatten(-2)
            for share, slopes in zip(self._levels(p), self._levels(weight.T), strict=True)
        ]
        return p[:, None] * (weight - torch.cat(means, -1).T), p
