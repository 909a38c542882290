r"""A Student-t whose scale has an uncertain part: t noise about an uncertain line.

.. math::
    y | u \sim \mathrm{St}(2a, 0, 1/u + k), \qquad u \sim \mathrm{Gam}(\nu/2, \nu/2)

has no closed form. Here it is integrated over :math:`v = \log u` by the trapezoidal rule, whose
error falls exponentially with the number of nodes: the integrand is analytic where
:math:`|\mathrm{Im}\, v| < \pi/2` and vanishes at both ends. Nodes are doubled until nothing
changes. The limits are proven ones: with :math:`h(v) = e^v - 1 - v` the law of v is proportional
to :math:`e^{-\frac\nu2 h(v)}`, and the logarithm of the other factor rises by at most v/2 to the
right of zero; to the left either it has been outweighed by h, or u is so small that it falls.
"""

import math
from collections.abc import Callable

import torch
from scipy.special import betainc, stdtrit
from torch import Tensor

from skvi.distributions.special import log_gamma_excess, log_gamma_ratio

# What is this many nats below the integrand at some point is below the rounding of the sum.
_DEPTH = 45.0
# Changes of the logarithm of an integral at which nodes are no longer doubled, most and first
# number of nodes, and numbers that are worked on at a time.
_PRECISION = 1e-11
_LARGEST_RULE, _FIRST_RULE = (1 << 17) + 1, 65
_CHUNK_FLOATS = 1 << 20
# Less than this has no width beside any mean.
_SMALLEST_LEVEL = 1e-100
# Steps of the search for a quantile, which converges in about eight.
_MAX_STEPS = 200


def log_density(square: Tensor, extra: Tensor, *, dof: float, noise_dof: float) -> Tensor:
    """Return the log density at y, elementwise, to a relative error of the density below 1e-9.

    Parameters
    ----------
    square : Tensor
        ``y^2``.
    extra : Tensor of the same shape
        k, not negative.
    dof : float
        2a.
    noise_dof : float
        nu.
    """
    half = torch.full_like(square, 0.5 * dof)
    constant = log_gamma_ratio(half, 0.5) - 0.5 * math.log(math.pi * dof)

    def factor(nodes: Tensor, square: Tensor, extra: Tensor) -> Tensor:
        return _log_kernel(nodes, square, extra, dof)

    return constant + _integrate(factor, square, extra, dof, noise_dof)


def half_width(level: float, extra: Tensor, *, dof: float, noise_dof: float) -> Tensor:
    """Return t with ``P(|y| < t) = level``, elementwise, to 1e-10 in that probability.

    Newton steps for the logarithm of the odds of ``|y| < t`` as a function of log t, where power
    laws are straight lines, kept inside a bracket.

    Parameters
    ----------
    level : float
        Between 0 and 1, both excluded.
    extra : Tensor
        k, not negative.
    dof, noise_dof : float
        2a and nu.
    """
    level = max(level, _SMALLEST_LEVEL)
    target = math.log(level) - math.log1p(-level)
    first = float(stdtrit(min(dof, noise_dof), 0.5 + 0.5 * level))
    log_t = math.log(max(first, level)) + 0.5 * torch.log1p(extra)
    low, high = torch.full_like(extra, -torch.inf), torch.full_like(extra, torch.inf)
    for _ in range(_MAX_STEPS):
        square = (2.0 * log_t).exp()
        log_inside = _log_central(square, extra, dof, noise_dof).clamp(max=-1e-300)
        log_outside = torch.log(-torch.expm1(log_inside))
        log_odds = log_inside - log_outside
        below = log_odds < target
        low, high = torch.where(below, log_t, low), torch.where(below, high, log_t)
        density = log_density(square, extra, dof=dof, noise_dof=noise_dof)
        log_slope = math.log(2.0) + density + log_t - log_inside - log_outside
        step = ((target - log_odds) / log_slope.exp()).nan_to_num(nan=torch.inf).clamp(-3.0, 3.0)
        proposal = log_t + step
        outside = ((proposal <= low) | (proposal >= high)) & low.isfinite() & high.isfinite()
        proposal = torch.where(outside, (low + high) / 2, proposal)
        done = (proposal - log_t).abs() <= 1e-13 * (1.0 + log_t.abs())
        log_t = proposal
        if bool((done | (high - low <= 1e-13 * (1.0 + log_t.abs()))).all()):
            break
    return log_t.exp()


def _log_kernel(nodes: Tensor, square: Tensor, extra: Tensor, dof: float) -> Tensor:
    """Log density of ``St(2a, 0, 1/u + k)`` at log u = `nodes` less its constant."""
    log_scale = torch.logaddexp(-nodes, extra.log())
    ratio = (square.log() - log_scale).exp() / dof
    return -0.5 * log_scale - 0.5 * (dof + 1.0) * torch.log1p(ratio)


def _log_central(square: Tensor, extra: Tensor, dof: float, noise_dof: float) -> Tensor:
    """``log P(y^2 < square)``."""

    def factor(nodes: Tensor, square: Tensor, extra: Tensor) -> Tensor:
        log_scale = torch.logaddexp(-nodes, extra.log())
        ratio = (square.log() - log_scale).exp() / dof
        share = 1.0 / (1.0 + 1.0 / ratio)
        inside = betainc(0.5, 0.5 * dof, share.cpu().numpy())
        return torch.as_tensor(inside, device=nodes.device).log()

    return _integrate(factor, square, extra, dof, noise_dof)


def _excess(v: Tensor) -> Tensor:
    """``h(v) = e^v - 1 - v``, to rounding near zero as well."""
    w = v.clamp(-0.1, 0.1)
    series = torch.full_like(w, 1.0 / 11.0)
    for n in range(10, 2, -1):
        series = (1.0 + w * series) / n
    near = 0.5 * w.square() * (1.0 + w * series)
    return torch.where(v.abs() < 0.1, near, torch.expm1(v) - v)


def _limits(square: Tensor, extra: Tensor, dof: float, noise_dof: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the integral over v, each of the shape of `square`."""
    # h(v) >= v^2 / 2 on the right, and h of the end is (2 depth + end) / nu
    right = 1.0 / noise_dof + math.sqrt(noise_dof**-2 + 4.0 * _DEPTH / noise_dof)
    for _ in range(50):  # downwards to the solution
        right = min(right, math.log1p((2.0 * _DEPTH + right) / noise_dof + right))
    # most that the other factor may gain on the left of zero, where its scale is above 1 + k
    log_scale = torch.log1p(extra)
    ratio = (square.log() - log_scale).exp()  # y^2 / (1 + k)
    gain = 0.5 * (dof + 1.0) * (torch.log1p(ratio / dof) - math.log1p(1.0 / dof))
    gain = torch.where(ratio > 1.0, gain - 0.5 * ratio.log(), 0.0)
    cost = 2.0 * (gain + _DEPTH) / noise_dof
    # h(-x) >= x^2 / (2 + x)
    outweighed = -(0.5 * cost + (0.25 * cost.square() + 2.0 * cost).sqrt())
    # Where 1/u is above four times y^2 and 1 + k, the log of the other factor falls with a slope
    # of at least 3/4 of the sum below.
    slope = 0.75 * (0.5 * noise_dof + 0.5 - 0.5 * (dof + 1.0) / (4.0 * dof + 1.0))
    small = -math.log(4.0) - torch.maximum(square.log(), log_scale) - (_DEPTH + 5.0) / slope
    return torch.maximum(outweighed, small), torch.full_like(square, right)


def _integrate(
    factor: Callable[[Tensor, Tensor, Tensor], Tensor],
    square: Tensor,
    extra: Tensor,
    dof: float,
    noise_dof: float,
) -> Tensor:
    """Return ``log E_v exp(factor(v, square, extra))``, of the shape of `square`."""
    shape = square.shape
    square, extra = square.reshape(-1, 1), extra.reshape(-1, 1)
    low, high = _limits(square, extra, dof, noise_dof)
    half = torch.full_like(square[:1], 0.5 * noise_dof)
    log_constant = -log_gamma_excess(half)  # of the law of v

    def rule(rows: Tensor, n_nodes: int) -> Tensor:
        grid = torch.linspace(0.0, 1.0, n_nodes, dtype=square.dtype, device=square.device)
        pieces = []
        for piece in rows.split(max(1, _CHUNK_FLOATS // n_nodes)):
            start, end = low[piece], high[piece]
            nodes = start + (end - start) * grid
            values = factor(nodes, square[piece], extra[piece]) - 0.5 * noise_dof * _excess(nodes)
            step = (end - start)[:, 0] / (n_nodes - 1)
            pieces.append(torch.logsumexp(values, 1) + step.log())
        return torch.cat(pieces)

    rows, n_nodes = torch.arange(len(square), device=square.device), _FIRST_RULE
    values = rule(rows, n_nodes)
    while len(rows) and n_nodes < _LARGEST_RULE:
        n_nodes = 2 * n_nodes - 1
        finer = rule(rows, n_nodes)
        moved = ~((finer - values[rows]).abs() <= _PRECISION)
        values[rows] = finer
        rows = rows[moved]
    return (values + log_constant[0, 0]).reshape(shape)
