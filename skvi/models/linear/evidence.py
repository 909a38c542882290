r"""The exact evidence when all weights share one precision, by quadrature over that precision.

.. math::
    \log p(y) = \log \int \mathrm{Gam}(\alpha | c_0, d_0)\, p(y | \alpha)\, d\alpha
"""

import math

import torch
from torch import Tensor

from skvi.distributions.normal import LOG_2PI
from skvi.models.linear.climb import Prior, WeightPrior, noise_shape
from skvi.models.linear.reduction import Statistics

# What lies this many nats below the peak of the integrand is below the rounding of the sum.
_DEPTH = 60.0
_LOG_ALPHA_RANGE = (-700.0, 700.0)
_CHUNK_FLOATS = 1 << 20


def log_evidence_given_alpha(statistics: Statistics, prior: Prior, log_alpha: Tensor) -> Tensor:
    r"""Return :math:`\log p(y | \alpha)` in fitted units, shape (M, K), for K precisions.

    .. math::
        \log\frac{\Gamma(a)}{\Gamma(a_0)} + a_0 \log b_0 - a \log b(\alpha) - \tfrac n2 \log 2\pi
        - \tfrac12 \log|I + G/\alpha|, \quad
        b(\alpha) = b_0 + \tfrac12 \mathrm{rss}
        + \tfrac12 \sum_k \frac{t_k^2 \alpha}{\lambda_k + \alpha}

    with n - 1 for n and :math:`-\frac12 \log n` more if a flat intercept is integrated out.
    """
    log_spectrum = statistics.spectrum.log()
    squares = statistics.target.square()  # (M, R)
    pieces = []
    for piece in log_alpha.split(max(1, _CHUNK_FLOATS // max(1, len(log_spectrum)))):
        log_ratio = log_spectrum - piece[:, None]  # (K, R)
        penalised = squares @ torch.sigmoid(-log_ratio).T  # (M, K)
        rate = prior.noise_rate[:, None] + 0.5 * (statistics.residual[:, None] + penalised)
        log_det = torch.nn.functional.softplus(log_ratio, threshold=40.0).sum(-1)
        pieces.append(-noise_shape(statistics, prior) * rate.log() - 0.5 * log_det)
    constant = (
        math.lgamma(noise_shape(statistics, prior))
        - math.lgamma(prior.noise_shape)
        - 0.5 * statistics.n_observed * LOG_2PI
    )
    if statistics.intercept:
        constant -= 0.5 * math.log(statistics.total)
    at_prior = prior.noise_shape * prior.noise_rate.log()  # (M,)
    return torch.cat(pieces, dim=-1) + (constant + at_prior)[:, None]


def log_evidence(statistics: Statistics, prior: Prior) -> Tensor:
    """Return ``log p(y)`` of each output in fitted units, shape (M,).

    The trapezoidal rule in ``log alpha``, whose error falls exponentially with the number of
    nodes for a smooth integrand that vanishes at both ends; doubled until nothing changes.
    """
    return torch.stack(
        [_integrate(_only_output(statistics, m), _only_output_prior(prior, m))
         for m in range(statistics.target.shape[0])]
    )  # fmt: skip


def _only_output(statistics: Statistics, m: int) -> Statistics:
    return statistics._replace(
        target=statistics.target[m : m + 1], residual=statistics.residual[m : m + 1]
    )


def _only_output_prior(prior: Prior, m: int) -> Prior:
    return prior._replace(noise_rate=prior.noise_rate[m : m + 1])


def _integrate(statistics: Statistics, prior: Prior) -> Tensor:
    assert isinstance(prior.weight, WeightPrior)
    c0, rate = prior.weight.shape, prior.weight.rate
    log_rate = float(rate.log())

    def integrand(log_alpha: Tensor) -> Tensor:
        """Log density of ``log alpha`` under the prior, plus ``log p(y | alpha)``."""
        scaled = log_alpha + log_rate
        log_prior = c0 * scaled - scaled.exp() - math.lgamma(c0)
        return log_prior + log_evidence_given_alpha(statistics, prior, log_alpha)[0]

    if statistics.spectrum.numel() == 0:  # the rows say nothing about alpha
        return log_evidence_given_alpha(statistics, prior, -rate.log())[0, 0]

    low, high = _LOG_ALPHA_RANGE
    for _ in range(3):  # zoom on where the integrand is not negligible
        nodes = torch.linspace(low, high, 1401, dtype=torch.float64, device=rate.device)
        value = integrand(nodes)
        (inside,) = torch.nonzero(value >= value.max() - _DEPTH, as_tuple=True)
        first, last = max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, len(nodes) - 1)
        low, high = float(nodes[first]), float(nodes[last])

    n_nodes, previous = 257, math.inf
    while True:
        nodes = torch.linspace(low, high, n_nodes, dtype=rate.dtype, device=rate.device)
        value = torch.logsumexp(integrand(nodes), 0) + math.log((high - low) / (n_nodes - 1))
        if abs(float(value) - previous) <= 1e-13 * max(1.0, abs(previous)) or n_nodes > 1 << 16:
            return value
        n_nodes, previous = 2 * n_nodes - 1, float(value)
