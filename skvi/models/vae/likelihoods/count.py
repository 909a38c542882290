"""Likelihoods of counts."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from skvi.distributions import counts
from skvi.models.vae.likelihoods.base import Likelihood, Marginals, bend, bend_slope, unbend

# Logarithms of means are bent smoothly into +-30: e^30 is far beyond any count that is accepted.
_LARGEST_LOG_MEAN = 30.0
# Columns that are zero in all rows start at this mean.
_SMALLEST_MEAN = 1e-4
# The logarithm of the size r stays between -7 (wild) and 14 (a Poisson to the last digit).
_LOG_SIZE_CENTRE, _LOG_SIZE_RADIUS = 3.5, 10.5


class Poisson(Likelihood):
    r"""Counts whose variance is their mean; the output holds its logarithm.

    .. math:: \log p(x|z) = \sum_j \bigl[x_j f_j(z) - e^{f_j(z)} - \log x_j!\bigr]

    The encoder reads ``log(1 + x)``.
    """

    support: ClassVar[str] = "count"

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, n_features, n_features)

    def features(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    @staticmethod
    def _log_mean(output: Tensor) -> Tensor:
        return bend(output, _LARGEST_LOG_MEAN)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return counts.poisson_log_mass(x, self._log_mean(output))

    def mean(self, output: Tensor) -> Tensor:
        return self._log_mean(output).exp()

    def variance(self, output: Tensor) -> Tensor:
        return self.mean(output)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return counts.sample_poisson(self._log_mean(output), generator)

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        # The mean of exp(b + w'z) is exp(b + |w|^2 / 2).
        log_mean = known.mean.clamp_min(_SMALLEST_MEAN).log()
        log_mean = log_mean - 0.5 * known.loadings.square().sum(-1)
        return unbend(log_mean, known.loadings, _LARGEST_LOG_MEAN)

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # log(1 + x) to first order around the mean m: dm / (1 + m). Rates are skewed: the one at
        # z = 0 is less than that of all z, which has the information of most rows.
        loadings = bend_slope(bias, _LARGEST_LOG_MEAN)[:, None] * weight
        output = bias + 0.5 * loadings.square().sum(-1)
        mean = self.mean(output)
        noise = self.variance(output) / (1.0 + mean).square()
        return (mean / (1.0 + mean))[:, None] * loadings, noise


class NegativeBinomial(Poisson):
    r"""Counts with variance ``m + m^2 / r``: a mean m per cell, a size r per column, learned.

    .. math:: \log p(x|z) = \sum_j \log\frac{\Gamma(x_j+r_j)}{\Gamma(r_j)\,x_j!}
        + r_j \log\frac{r_j}{r_j+m_j} + x_j \log\frac{m_j}{r_j+m_j}, \qquad m_j = e^{f_j(z)}

    Source: Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        self.rho = nn.Parameter(torch.empty(n_features))  # (D,)

    def size(self) -> Tensor:
        """``r``, shape (D,)."""
        return (_LOG_SIZE_CENTRE + _LOG_SIZE_RADIUS * torch.tanh(self.rho)).exp()

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return counts.negative_binomial_log_mass(x, self._log_mean(output), self.size())

    def variance(self, output: Tensor) -> Tensor:
        mean = self.mean(output)
        return mean + mean.square() / self.size()

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return counts.sample_negative_binomial(self._log_mean(output), self.size(), generator)

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        # By moments, as if the code explained nothing: training then raises r.
        mean = known.mean.clamp_min(_SMALLEST_MEAN)
        size = mean.square() / (known.var - mean).clamp_min(1e-3 * mean)
        ratio = (size.log() - _LOG_SIZE_CENTRE) / _LOG_SIZE_RADIUS
        with torch.no_grad():
            self.rho.copy_(torch.atanh(ratio.clamp(-0.9, 0.9)))
        return super().start(known)

    def learned(self) -> dict[str, Tensor]:
        return {"dispersion": self.size().reciprocal()}
