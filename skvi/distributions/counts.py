r"""Poisson and negative binomial masses of counts, elementwise, from the logarithm of the mean.

Both are written as deviances about x, with Stirling's series for the rest: no large numbers
cancel, so that float32 keeps its digits at counts of a million.

.. math::
    \log z! = (z + \tfrac12)\log z - z + \tfrac12 \log 2\pi + \delta(z)

Source: Loader (2000), Fast and accurate computation of binomial probabilities.
"""

import torch
from torch import Tensor

from skvi.distributions.normal import LOG_2PI


def stirling_error(z: Tensor) -> Tensor:
    r"""``delta(z)`` for z > 0: what Stirling's formula leaves of ``log z!``."""
    large = torch.where(z > 10.0, z, 10.0)
    inverse2 = large.reciprocal().square()
    series = (1 / 12 - inverse2 * (1 / 360 - inverse2 * (1 / 1260 - inverse2 / 1680))) / large
    small = torch.where(z > 10.0, 1.0, z)
    exact = torch.lgamma(small) - (small - 0.5) * small.log() + small - 0.5 * LOG_2PI
    return torch.where(z > 10.0, series, exact)


def poisson_log_mass(x: Tensor, log_mean: Tensor) -> Tensor:
    r"""``x log m - m - log x!`` for integers x >= 0.

    .. math:: -x (e^d - 1 - d) - \tfrac12 \log 2 \pi x - \delta(x), \qquad d = \log m - \log x
    """
    positive = x.clamp_min(1.0)
    d = log_mean - positive.log()
    counted = -positive * (torch.expm1(d) - d) - 0.5 * (LOG_2PI + positive.log())
    return torch.where(x > 0, counted - stirling_error(positive), -log_mean.exp())


def negative_binomial_log_mass(x: Tensor, log_mean: Tensor, size: Tensor) -> Tensor:
    r"""Mass of a count with variance ``m + m^2 / r``, for integers x >= 0 and size r > 0.

    .. math::
        \log\frac{\Gamma(x+r)}{\Gamma(r)\,x!} + r \log\frac{r}{r+m} + x \log\frac{m}{r+m}
        = -x \log\frac{x(r+m)}{m(r+x)} - r \log\frac{r+m}{r+x} + \tfrac12\log\frac{r}{2\pi x(x+r)}
        + \delta(x+r) - \delta(r) - \delta(x)

    It tends to the Poisson mass as r grows.
    """
    mean = log_mean.exp()
    positive = x.clamp_min(1.0)
    total = positive + size
    excess = (mean - positive) / total
    counted = (
        -positive * _log1p(-excess * (size / mean), positive * ((size + mean) / mean) / total)
        - size * _log1p(excess, (size + mean) / total)
        + 0.5 * ((size / total).log() - LOG_2PI - positive.log())
        + stirling_error(total)
        - stirling_error(size)
        - stirling_error(positive)
    )
    return torch.where(x > 0, counted, -size * torch.log1p(mean / size))


def _log1p(value: Tensor, one_plus_value: Tensor) -> Tensor:
    """``log(1 + value)``, from the form of the argument that has the digits."""
    near = value > -0.5
    return torch.where(
        near,
        torch.log1p(torch.where(near, value, 0.0)),
        torch.where(near, 1.0, one_plus_value).log(),
    )


def sample_poisson(log_mean: Tensor, generator: torch.Generator) -> Tensor:
    """Draw counts; same shape."""
    return torch.poisson(log_mean.exp(), generator=generator)


def sample_negative_binomial(log_mean: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """Draw counts: Poisson ones whose mean is ``m / r`` times a Gamma(r, 1); same shape."""
    rate = torch._standard_gamma(size.expand_as(log_mean).contiguous(), generator=generator)
    return torch.poisson(rate * (log_mean.exp() / size), generator=generator)
