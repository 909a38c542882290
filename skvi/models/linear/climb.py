r"""The bound, its terms, and one pass of the climb.

With :math:`\gamma_g = p_g - \alpha_g \mathrm{tr} V_{gg}` [relevance] and all terms in nats:

.. math::
    E \log p(y|\cdot) &= \tfrac n2 (E\log\beta - \log 2\pi)
        - \tfrac12 (E\beta \,\|y - Xm\|^2 + \textstyle\sum_g \gamma_g) \\
    \mathrm{KL}(w) &= \tfrac12 [\textstyle\sum_g (E\alpha_g E\beta \|m_g\|^2 - \gamma_g)
        + \log|I + A^{-1/2} G A^{-1/2}| + p (\log E\alpha - E \log\alpha)]

Source: Drugowitsch (2013), arXiv:1310.5438, the bound of the linear model, rearranged so that no
large terms cancel. The flat intercept, :math:`q(b | w, \beta) = N(\bar y - \bar x'w, 1/(n\beta))`,
adds :math:`-\frac12` to the first line and its negative entropy to the divergence. Flat weights,
:math:`q(w | \beta) = N(m, (\beta G)^{-1})`, put their negative entropy in the place of KL(w):

.. math:: \tfrac p2 (E\log\beta - \log 2\pi - 1) + \tfrac12 \log|G|
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from skvi.distributions import gamma
from skvi.distributions.normal import LOG_2PI
from skvi.models.linear import horseshoe
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.reduction import Statistics
from skvi.models.linear.weights import Weights, least_squares, solve

# Precisions stay normal numbers.
_LOG_ALPHA_LIMIT = 690.0
# Relative rounding of the two halves of the bound.
_BOUND_ROUNDING = 1e-14
# How far the horseshoe's second proposal goes, in steps of coordinate ascent.
_STRETCH = 4.0


class WeightPrior(NamedTuple):
    """``alpha_g ~ Gam(shape, rate_g)``, in fitted units.

    Attributes
    ----------
    shape : float
        c0.
    rate : Tensor of shape (H,)
        d0, in units of x to the power -2.
    group : Tensor of shape (D,), optional
        Which precision g each feature has; None if all have one (H = 1) or each its own (H = D).
    """

    shape: float
    rate: Tensor
    group: Tensor | None = None


class Prior(NamedTuple):
    """Hyper-parameters, in fitted units.

    Attributes
    ----------
    noise_shape : float
        a0.
    noise_rate : Tensor of shape (M,)
        b0, in units of y squared.
    weight : WeightPrior, HorseshoePrior or None
        None if alpha is known.
    n_flat : int
        How many weights have the flat prior ``p(w) = 1``: none or all D, and alpha is zero then.
    """

    noise_shape: float
    noise_rate: Tensor
    weight: WeightPrior | HorseshoePrior | None
    n_flat: int = 0

    @property
    def group(self) -> Tensor | None:
        """Which precision each feature has, if that is neither one for all nor one each."""
        return self.weight.group if isinstance(self.weight, WeightPrior) else None


class State(NamedTuple):
    """A posterior and its bound.

    Attributes
    ----------
    alpha : Tensor of shape (M, H)
        E[alpha]: with the fixed shape ``c0 + p_g / 2`` it names q(alpha).
    weights : Weights
        q(w | beta), the optimal one given `alpha`.
    scale : Tensor of shape (M,)
        The share of `alpha` that all weights have in common, E[gamma] of the horseshoe; else 1.
    noise_rate : Tensor of shape (M,)
        Rate of q(beta), the optimal one; its shape is :func:`noise_shape`.
    log_lik : Tensor of shape (M,)
        E_q[log p(y | w, b, beta)], summed over the rows.
    kl : Tensor of shape (M,)
        KL(q(w, b, beta, alpha) || p), with density 1 for the flat intercept.
    """

    alpha: Tensor
    scale: Tensor
    weights: Weights
    noise_rate: Tensor
    log_lik: Tensor
    kl: Tensor

    @property
    def bound(self) -> Tensor:
        """The evidence lower bound of each output, shape (M,)."""
        return self.log_lik - self.kl


def noise_shape(statistics: Statistics, prior: Prior) -> float:
    """Shape of q(beta): ``a0 + n/2``, where n is less one row for each flat coefficient."""
    return prior.noise_shape + (statistics.n_observed - prior.n_flat) / 2.0


def group_size(statistics: Statistics, prior: Prior, alpha: Tensor) -> Tensor:
    """Return p_g, shape (H,): how many features share each precision."""
    if prior.group is None:
        return torch.full_like(alpha[0], statistics.basis.shape[0] / alpha.shape[1])
    return torch.bincount(prior.group).to(alpha.dtype)


def evaluate(
    statistics: Statistics, prior: Prior, alpha: Tensor, scale: Tensor | None = None
) -> State:
    """Return the best posterior given q(alpha), and its bound."""
    scale = torch.ones_like(alpha[:, 0]) if scale is None else scale
    flat = prior.n_flat > 0
    weights = least_squares(statistics) if flat else solve(statistics, alpha, prior.group)
    penalty = (alpha * weights.norm).sum(-1)
    rate = prior.noise_rate + 0.5 * (weights.squares + penalty)
    shape = torch.full_like(rate, noise_shape(statistics, prior))
    E_noise = gamma.mean(shape, rate)
    E_log_noise = gamma.expected_log(shape, rate)

    n_rows, relevance = statistics.n_rows, weights.relevance.sum(-1)
    log_lik = 0.5 * (n_rows * (E_log_noise - LOG_2PI) - E_noise * weights.squares - relevance)
    kl = 0.5 * (E_noise * penalty - relevance + weights.log_det)
    kl = kl + 0.5 * prior.n_flat * (E_log_noise - LOG_2PI)
    # the laws of all precisions, so that their divergences are one call
    shape0, rate0 = torch.full_like(rate, prior.noise_shape), prior.noise_rate
    laws = [tuple(part[:, None] for part in (shape, rate, shape0, rate0))]
    if statistics.intercept:
        log_lik = log_lik - 0.5
        kl = kl + 0.5 * (E_log_noise + math.log(statistics.total) - LOG_2PI - 1.0)
    if isinstance(prior.weight, HorseshoePrior):
        kl = kl + horseshoe.divergence(prior.weight, alpha, scale)
    elif prior.weight is not None:
        size = group_size(statistics, prior, alpha)
        excess, law = _precision_law(prior.weight, alpha, size)
        kl = kl + excess
        laws.append(law)
    kl = kl + gamma.kl(*(torch.cat(part, dim=1) for part in zip(*laws, strict=True))).sum(1)
    return State(alpha, scale, weights, rate, log_lik, kl)


def precision_divergence(
    prior: WeightPrior | HorseshoePrior, alpha: Tensor, scale: Tensor, size: Tensor
) -> Tensor:
    """Return what learnt precisions add to KL(q || p), shape (M,), beyond known ones.

    Parameters
    ----------
    prior : WeightPrior or HorseshoePrior
    alpha : Tensor of shape (M, H)
        E[alpha].
    scale : Tensor of shape (M,)
        E[gamma] of the horseshoe.
    size : Tensor of shape (H,)
        How many features share each precision.
    """
    if isinstance(prior, HorseshoePrior):
        return horseshoe.divergence(prior, alpha, scale)
    excess, law = _precision_law(prior, alpha, size)
    return excess + gamma.kl(*law).sum(-1)


def _precision_law(
    prior: WeightPrior, alpha: Tensor, size: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return what KL(w) gains by not knowing the precisions, (M,), and their laws.

    The laws are shape and rate of q and of p, (M, H) each; their divergences come on top.
    """
    shape0 = torch.full_like(alpha, prior.shape)
    shape = shape0 + size / 2.0
    log_excess = shape.log() - torch.digamma(shape)  # log E[alpha] - E[log alpha]
    law = (shape, shape / alpha, shape0, prior.rate.expand_as(alpha))
    return 0.5 * (size * log_excess).sum(-1), law


def start(statistics: Statistics, prior: Prior) -> Tensor:
    """Return the shared E[alpha] with the highest bound on a grid, shape (M, 1).

    The bound may have one peak with and one without a signal, and be nearly flat in between.
    """
    like = prior.noise_rate
    log_largest = float(statistics.spectrum[0].log()) if statistics.spectrum.numel() else 0.0
    grid = (
        log_largest + torch.linspace(-24.0, 8.0, 65, dtype=like.dtype, device=like.device)
    ).exp()
    if isinstance(prior.weight, HorseshoePrior):
        prior = prior._replace(weight=None)
    elif prior.weight is not None:
        rate = prior.weight.rate.mean(0, keepdim=True)
        shared = prior.weight._replace(rate=rate, group=None)
        prior = prior._replace(weight=shared)

    def best(m: int) -> Tensor:
        """Evaluate the grid as if its nodes were outputs, all equal to output m."""
        repeated = statistics._replace(
            target=statistics.target[m].expand(len(grid), -1),
            residual=statistics.residual[m].expand(len(grid)),
        )
        noise_rate = prior.noise_rate[m].expand(len(grid))
        bound = evaluate(repeated, prior._replace(noise_rate=noise_rate), grid[:, None]).bound
        return grid[bound.nan_to_num(nan=-torch.inf).argmax()]

    return torch.stack([best(m) for m in range(len(prior.noise_rate))])[:, None]


def coordinate_update(statistics: Statistics, prior: Prior, state: State) -> Tensor:
    """Return E[alpha] under the best q(alpha) given the rest, shape (M, H).

    ``(2 c0 + p_g) / (2 d0 + E[beta] ||m_g||^2 + tr V_gg)``: Bishop (2006), equations 10.94 and
    10.95, with the prior of the weights scaled by the noise.
    """
    assert isinstance(prior.weight, WeightPrior)
    size = group_size(statistics, prior, state.alpha)
    return (2.0 * prior.weight.shape + size) / (
        2.0 * prior.weight.rate + second_moment(statistics, prior, state)
    )


def second_moment(statistics: Statistics, prior: Prior, state: State) -> Tensor:
    """Return ``E[beta ||w_g||^2] = E[beta] ||m_g||^2 + tr V_gg``, shape (M, H)."""
    size = group_size(statistics, prior, state.alpha)
    E_noise = (noise_shape(statistics, prior) / state.noise_rate)[:, None]
    return E_noise * state.weights.norm + (size - state.weights.relevance) / state.alpha


def newton_update(statistics: Statistics, prior: Prior, state: State) -> Tensor:
    """Propose E[alpha] by a Newton step on ``log alpha``, shape (M, H).

    The fixed point of :func:`coordinate_update` solves ``alpha = f`` with
    ``f = (2 c0 + relevance) / (2 d0 + E[beta] ||m||^2)``; the step is ``log(f / alpha)`` over one
    minus the derivative of ``log f`` by the group's own ``log alpha``. A proposal, not an ascent:
    the caller compares bounds. For vague priors f is Bishop (2006), equation 3.92.
    """
    assert isinstance(prior.weight, WeightPrior)
    weights = state.weights
    rate = state.noise_rate[:, None]
    E_noise = noise_shape(statistics, prior) / rate
    above = 2.0 * prior.weight.shape + weights.relevance
    below = 2.0 * prior.weight.rate + E_noise * weights.norm
    # E[beta] itself falls when alpha grows: d rate / d alpha = ||m||^2 / 2.
    noise_slope = 0.5 * state.alpha * weights.norm / rate
    slope = (
        E_noise * (weights.norm_slope + weights.norm * noise_slope) / below
        - weights.relevance_slope / above
    )
    # With one group the derivative is exact; with several it leaves out the others, and a step
    # that is stretched too far would be refused.
    floor = 1e-6 if state.alpha.shape[1] == 1 else 0.2
    log_alpha = state.alpha.log()
    step = (above.log() - below.log() - log_alpha) / (1.0 - slope).clamp(min=floor)
    log_alpha = log_alpha + step.clamp(-6.0, 6.0)
    return log_alpha.clamp(-_LOG_ALPHA_LIMIT, _LOG_ALPHA_LIMIT).exp()


def improve(statistics: Statistics, prior: Prior, state: State, tol: float) -> State:
    """One pass: the Newton proposal if it raises the bound by `tol` nats, else coordinate ascent.

    The choice is made output by output. At the top, where the bounds differ by rounding only, the
    Newton proposal is the better one, since the bound is flat there and its slope is not: so the
    bound may fall by its rounding, and by no more. The horseshoe has no Newton step: there the
    steps of coordinate ascent compete with longer ones.
    """
    if isinstance(prior.weight, HorseshoePrior):
        moment = second_moment(statistics, prior, state)
        alpha, scale = horseshoe.update(prior.weight, state.alpha, state.scale, moment)
        plain = evaluate(statistics, prior, alpha, scale)
        alpha, scale = _stretch(state.alpha, alpha), _stretch(state.scale, scale)
        longer = evaluate(statistics, prior, alpha, scale)
        return _higher(_higher(state, plain, 0.0), longer, 0.0)
    proposal = evaluate(statistics, prior, newton_update(statistics, prior, state))
    if bool((proposal.bound > state.bound + tol).all()):
        return proposal
    plain = evaluate(statistics, prior, coordinate_update(statistics, prior, state))
    best = _higher(state, plain, 0.0)
    rounding = _BOUND_ROUNDING * (best.log_lik.abs() + best.kl.abs())
    return _higher(best, proposal, rounding)


def _stretch(before: Tensor, after: Tensor) -> Tensor:
    log_value = before.log() + _STRETCH * (after / before).log()
    return log_value.clamp(-_LOG_ALPHA_LIMIT, _LOG_ALPHA_LIMIT).exp()


def _higher(first: State, second: State, slack: Tensor | float) -> State:
    """Take `second` for the outputs where its bound is at most `slack` lower, else `first`."""
    better = second.bound > first.bound - slack  # False for NaN

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return State(
        choose(first.alpha, second.alpha),
        choose(first.scale, second.scale),
        Weights(*map(choose, first.weights, second.weights)),
        choose(first.noise_rate, second.noise_rate),
        choose(first.log_lik, second.log_lik),
        choose(first.kl, second.kl),
    )
