"""The likelihood of integer codes."""

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
        self.n_levels = n_levels

    def features(self, x: Tensor) -> Tensor:
        codes = zip(x.unbind(-1), self.n_levels, strict=True)
        return torch.cat(
            [code[..., None] == torch.arange(n, device=x.device) for code, n in codes], -1
        ).to(x.dtype)

    def per_feature(self, cells: Tensor) -> Tensor:
        columns = zip(cells.unbind(-1), self.n_levels, strict=True)
        return torch.cat([c[..., None].expand(*c.shape, n) for c, n in columns], -1)

    def _by_column(self, output: Tensor) -> tuple[Tensor, ...]:
        return output.split(self.n_levels, dim=-1)

    def least_noise(self, floor: Tensor) -> Tensor:
        # Indicators of a column determine each other, which is nothing for a code to explain.
        return floor.new_full((self.n_inputs,), 0.5)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        columns = []
        for code, logits in zip(x.long().unbind(-1), self._by_column(output), strict=True):
            shape = torch.broadcast_shapes(code.shape, logits.shape[:-1])
            chosen = logits.expand(*shape, -1).gather(-1, code.expand(shape)[..., None])
            columns.append(chosen.squeeze(-1) - logits.logsumexp(-1))
        return torch.stack(columns, -1)

    def statistics(self, output: Tensor) -> Tensor:
        """Return ``P(x_j = l|z)`` of all levels -> (..., n_outputs)."""
        return torch.cat([logits.softmax(-1) for logits in self._by_column(output)], -1)

    @property
    def n_statistics(self) -> int:
        return self.n_outputs

    def summarise(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most probable codes, and the variances ``p (1 - p)`` of their indicators."""
        best = [p.max(-1) for p in self._by_column(averages)]
        mode = torch.stack([b.indices for b in best], -1).to(averages.dtype)
        p = torch.stack([b.values for b in best], -1)
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
            (share @ logits).expand_as(logits)
            for share, logits in zip(
                p.split(self.n_levels), weight.split(self.n_levels), strict=True
            )
        ]
        return p[:, None] * (weight - torch.cat(means)), p
