r"""The bound, its terms, and one pass of the climb.

With :math:`\gamma_j = 1 - a_j V_{jj}` [relevance] of the columns j of the design, whose prior
precisions are a:

.. math::
    E \log p(t|\cdot) - \mathrm{KL}(\omega) &= \textstyle\sum_i s_i
        [\tfrac12 (t_i \mu_i - \xi_i) + \log \sigma(\xi_i)], \qquad \xi_i^2 = \mu_i^2 + v_i \\
    \mathrm{KL}(w, b) &= \tfrac12 [\textstyle\sum_j (a_j m_j^2 - \gamma_j)
        + \log|I + A^{-1/2} Z' \Omega Z A^{-1/2}|]

and the divergence of the precisions. Source: Drugowitsch (2013), arXiv:1310.5438, the bound of
logistic regression, rearranged so that no large terms cancel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from skvi.models.linear import horseshoe
from skvi.models.linear.climb import WeightPrior, precision_divergence
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.reduction import Statistics
from skvi.models.logistic.bound import best_tilt, local_bound
from skvi.models.logistic.weights import Design, Weights, solve

# Precisions and tilts stay normal numbers whose products do.
_LOG_LIMIT = 300.0
# The tilt of a row of zeros, whose log odds are certain, is zero.
_SMALLEST_TILT = 1e-12
# Longest extrapolation, in steps of coordinate ascent.
_LONGEST_STEP = 256.0
# Extrapolations move the logarithms of precisions and tilts by multiples of this, or of so small a
# share of the longest move. They multiply the rounding of sums over rows, which depends on their
# order, and the next one that of the last: 1e-15 became 1e-6 in thirty passes. The nearest multiple
# is nearly always the same for all orders. See docs/decisions/0003.
_GRID, _GRID_SHARE = 2.0**-16, 2.0**-12
# What belongs to rows and models, (N, M); the other fields of a state have the models first.
_FIELDS_OF_ROWS = {"tilt", "odds_mean", "odds_variance"}


class Prior(NamedTuple):
    """Hyper-parameters, in fitted units.

    Attributes
    ----------
    weight : WeightPrior, HorseshoePrior or None
        None if alpha is known.
    intercept_precision : float
        ``tau^-2``: that of the log odds at the mean of the rows.
    """

    weight: WeightPrior | HorseshoePrior | None
    intercept_precision: float

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
    scale : Tensor of shape (M,)
        E[gamma] of the horseshoe; else 1.
    tilt : Tensor of shape (N, M)
        Those for which q(w, b) is optimal, together with `alpha`.
    weights : Weights
        q(w, b).
    log_lik : Tensor of shape (M,)
        The local bounds at their best tilts, summed over the rows.
    kl : Tensor of shape (M,)
        KL(q(w, b, alpha) || p).
    """

    alpha: Tensor
    scale: Tensor
    tilt: Tensor
    weights: Weights
    log_lik: Tensor
    kl: Tensor

    @property
    def bound(self) -> Tensor:
        """The evidence lower bound of each binary model, shape (M,)."""
        return self.log_lik - self.kl


Record = TypeVar("Record", State, Weights)


def column_precision(design: Design, prior: Prior, alpha: Tensor) -> Tensor:
    """Return the prior precisions of the columns of the design, shape (M, C)."""
    own = alpha if prior.group is None else alpha[:, prior.group]
    own = own.expand(-1, design.rows.n_features)
    if not design.intercept:
        return own
    return torch.cat([own, torch.full_like(own[:, :1], prior.intercept_precision)], dim=1)


def _per_precision(design: Design, prior: Prior, alpha: Tensor, values: Tensor) -> Tensor:
    """Sum values of the columns (M, C) over the features of each precision, (M, H)."""
    own = values[:, : design.rows.n_features]
    if prior.group is not None:
        return torch.zeros_like(alpha).index_add(1, prior.group, own)
    return own.sum(-1, keepdim=True) if alpha.shape[1] == 1 else own


def _group_size(design: Design, prior: Prior, alpha: Tensor) -> Tensor:
    if prior.group is None:
        return torch.full_like(alpha[0], design.n_features / alpha.shape[1])
    return torch.bincount(prior.group).to(alpha.dtype)


def evaluate(design: Design, prior: Prior, alpha: Tensor, scale: Tensor, tilt: Tensor) -> State:
    """Return the best q(w, b) given q(alpha) and the tilts of the rows, and its bound."""
    precision = column_precision(design, prior, alpha)
    weights = solve(design, tilt, precision)
    log_lik = design.weight @ local_bound(design.sign, weights.odds_mean, weights.odds_variance)
    penalty = (precision * weights.mean.square()).sum(-1)
    kl = 0.5 * (penalty - weights.relevance.sum(-1) + weights.log_det)
    if prior.weight is not None:
        size = _group_size(design, prior, alpha)
        kl = kl + precision_divergence(prior.weight, alpha, scale, size)
    return State(alpha, scale, tilt, weights, log_lik, kl)


class _Point(NamedTuple):
    """What names a state: alpha (M, H), scale (M,) and tilt (N, M)."""

    alpha: Tensor
    scale: Tensor
    tilt: Tensor


def coordinate_update(design: Design, prior: Prior, state: State) -> _Point:
    """Return the best q(alpha) and the best tilts given q(w, b).

    ``E[alpha_g] = (2 c0 + p_g) / (2 d0 + ||m_g||^2 + tr V_gg)``: Bishop (2006), equation 10.177.
    """
    weights, alpha, scale = state.weights, state.alpha, state.scale
    tilt = best_tilt(weights.odds_mean, weights.odds_variance).clamp(min=_SMALLEST_TILT)
    if prior.weight is None:
        return _Point(alpha, scale, tilt)
    size = _group_size(design, prior, alpha)
    norm = _per_precision(design, prior, alpha, weights.mean.square())
    relevance = _per_precision(design, prior, alpha, weights.relevance)
    moment = norm + (size - relevance) / alpha  # E ||w_g||^2
    if isinstance(prior.weight, HorseshoePrior):
        return _Point(*horseshoe.update(prior.weight, alpha, scale, moment), tilt)
    alpha = (2.0 * prior.weight.shape + size) / (2.0 * prior.weight.rate + moment)
    return _Point(alpha, scale, tilt)


def start(design: Design, prior: Prior, statistics: Statistics) -> Tensor:
    r"""Return the shared E[alpha] with the highest bound on a grid, shape (M, 1).

    The bound with all tilts zero, which needs no rows but only the principal axes of
    :class:`Statistics`, whose outputs are :math:`\tfrac12 t`:

    .. math:: \tfrac12 \textstyle\sum_k \left[\frac{\lambda_k t_k^2}{\lambda_k / 4 + \alpha}
        - \log\left(1 + \frac{\lambda_k}{4 \alpha}\right)\right] - \mathrm{KL}(\alpha)
    """
    spectrum = statistics.spectrum / 4.0  # E[omega] = 1/4
    log_largest = float(spectrum[0].log()) if spectrum.numel() else 0.0
    grid = torch.linspace(-24.0, 8.0, 65, dtype=spectrum.dtype, device=spectrum.device)
    grid = (log_largest + grid).exp()
    shrink = spectrum / (spectrum + grid[:, None])  # (K, R)
    fit = 4.0 * statistics.target.square() @ shrink.T  # (M, K)
    bound = 0.5 * (fit - torch.log1p(spectrum / grid[:, None]).sum(-1))
    if isinstance(prior.weight, WeightPrior):
        rate = prior.weight.rate.mean(0, keepdim=True)
        shared = prior.weight._replace(rate=rate, group=None)
        size = torch.full_like(rate, design.n_features)
        bound = bound - precision_divergence(shared, grid[:, None], torch.ones_like(grid), size)
    return grid[bound.nan_to_num(nan=-torch.inf).argmax(-1)][:, None]


def improve(design: Design, prior: Prior, state: State, models: Tensor) -> State:
    """One pass over some binary models: two steps of coordinate ascent or more.

    The second step competes with an extrapolation of both: the squared one, scheme S3 of Varadhan
    and Roland (2008), in the logarithms of precisions and tilts.

    Parameters
    ----------
    design : Design
    prior : Prior
    state : State
    models : Tensor of shape (K,)
        Which models to improve; the others stay as they are.
    """
    part = _map_fields(lambda dim, a: a.index_select(dim, models), state)
    design = design._replace(sign=design.sign[:, models])
    origin = _Point(part.alpha, part.scale, part.tilt)
    first = coordinate_update(design, prior, part)
    once = _higher(part, evaluate(design, prior, *first))
    second = coordinate_update(design, prior, once)
    far = evaluate(design, prior, *_extrapolate(design, origin, first, second))
    best = _higher(once, far)
    if not bool((far.bound > once.bound).all()):
        best = _higher(best, evaluate(design, prior, *second))
    return _map_fields(lambda dim, a, b: a.index_copy(dim, models, b), state, best)


def _extrapolate(design: Design, origin: _Point, first: _Point, second: _Point) -> _Point:
    def logs(point: _Point) -> list[Tensor]:
        """Model by model: (M, H), (M, 1) and (M, N)."""
        return [point.alpha.log(), point.scale.log()[:, None], point.tilt.log().T]

    steps = [b - a for a, b in zip(logs(origin), logs(first), strict=True)]
    turns = [c - b - r for b, c, r in zip(logs(first), logs(second), steps, strict=True)]
    # A row of weight s counts like s rows.
    one = torch.ones_like(design.weight[:1])
    counts = [one, one, design.weight]

    def length(parts: list[Tensor]) -> Tensor:
        squares = [(s * part.square()).sum(-1) for s, part in zip(counts, parts, strict=True)]
        return torch.stack(squares).sum(0).sqrt()

    reach = (length(steps) / length(turns)).nan_to_num(nan=1.0).clamp(1.0, _LONGEST_STEP)[:, None]
    ways = [2.0 * reach * r + reach.square() * v for r, v in zip(steps, turns, strict=True)]
    longest = torch.cat([way.abs().amax(-1, keepdim=True) for way in ways], -1).amax(-1)  # (M,)
    # A power of two, that rounding does not change.
    grid = (_GRID_SHARE * longest.log2().floor().exp2()).clamp(max=_GRID)[:, None]
    alpha, scale, tilt = (
        (a + (grid * (way / grid).round()).nan_to_num()).clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()
        for a, way in zip(logs(origin), ways, strict=True)
    )
    return _Point(alpha, scale[:, 0], tilt.T.contiguous())


def _higher(first: State, second: State) -> State:
    """Take `second` for the binary models where its bound is higher, else `first`."""
    better = second.bound > first.bound  # False for NaN

    def choose(dim: int, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(better if dim == 1 else better.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return _map_fields(choose, first, second)


def _map_fields(function: Callable[..., Tensor], *records: Record) -> Record:
    """Apply ``function(dim, *fields)`` to the fields of states; models are in dimension `dim`."""
    values: list[Any] = []
    for name, *fields in zip(records[0]._fields, *records, strict=True):
        nested = isinstance(fields[0], Weights)
        dim = 1 if name in _FIELDS_OF_ROWS else 0
        values.append(_map_fields(function, *fields) if nested else function(dim, *fields))
    return type(records[0])(*values)
