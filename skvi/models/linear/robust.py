r"""Student-t noise: each row has a noise precision of its own, with a variational posterior.

.. math::
    y_i | w, b, \beta, u_i \sim N(x_i'w + b, (u_i \beta)^{-1}), \qquad
    u_i \sim \mathrm{Gam}(\nu/2, \nu/2), \qquad q(w, b, \beta) \prod_g q(\alpha_g) \prod_i q(u_i)

With :math:`e_i = E_q[\beta (y_i - x_i'w - b)^2]` the best q(u) is
:math:`\mathrm{Gam}(\frac{\nu + 1}2, \frac{\nu + e_i}2)`, and given it everything else is the
model with Gaussian noise and weights :math:`s_i E[u_i]`; but each row still counts :math:`s_i`
times for the noise. With the best q(u) the bound of a row,
:math:`E \log p(y_i | \cdot) - \mathrm{KL}(q(u_i) \| p(u_i))`, is

.. math::
    \tfrac12 E \log \beta + \log \mathrm{St}(\sqrt{e_i} | \nu, 0, 1)

Source: Tipping and Lawrence (2005), Variational inference for Student-t models; here with the
joint q(w, b, beta), the flat intercept integrated, and q(u) eliminated from the bound.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from skvi.distributions import gamma, student_t
from skvi.models.linear import climb, predictive
from skvi.models.linear.climb import Prior, State
from skvi.models.linear.reduction import Statistics, reduce_rows
from skvi.runtime.blocks import Rows, block_rows, row_slices

# Where the degrees of freedom are looked for. Below one, a fit through half of the rows and the
# noise of a point would have an unbounded density; above, the noise is Gaussian.
DOF_RANGE = (1.0, 1e6)
FIRST_DOF = 4.0
# Passes over the weight precisions, which need no rows, in one over the rows.
_INNER = 5


class Data(NamedTuple):
    """Rows in fitted units.

    Attributes
    ----------
    x, y : Rows
        Features (N, D) and one output (N, 1).
    weight : Tensor of shape (N,)
        s.
    intercept : bool
    """

    x: Rows
    y: Rows
    weight: Tensor
    intercept: bool


class RobustState(NamedTuple):
    """A posterior and its bound.

    Attributes
    ----------
    statistics : Statistics
        Of the rows with the weights that `linear` is the best posterior for.
    linear : State
        q(w, b, beta, alpha). Its `log_lik` is that of a given q(u), and left out here.
    square : Tensor of shape (N,)
        e: with `dof` it names q(u).
    dof : float
        nu.
    log_lik : Tensor of shape ()
        Bounds of the rows, summed with their sample weights.
    """

    statistics: Statistics
    linear: State
    square: Tensor
    dof: float
    log_lik: Tensor

    @property
    def bound(self) -> Tensor:
        """The evidence lower bound, shape ()."""
        return self.log_lik - self.linear.kl[0]


def reweigh(data: Data, precision: Tensor) -> Statistics:
    """Return the statistics given E[u] (N,)."""
    weight = data.weight * precision
    x, y = data.x.reweighted(weight), data.y.reweighted(weight)
    statistics = reduce_rows(x, y, intercept=data.intercept)
    return statistics._replace(row_count=float(data.weight.sum()))


def mean_precision(dof: float, square: Tensor) -> Tensor:
    """Return ``E[u] = (nu + 1) / (nu + e)``."""
    return (dof + 1.0) / (dof + square)


def measure(
    data: Data, prior: Prior, statistics: Statistics, linear: State, dof: float, *, learn_dof: bool
) -> RobustState:
    """Complete q(w, b, beta, alpha) by the best q(u) of all rows and, if learnt, the best nu."""
    posterior = predictive.make_posterior(statistics, prior, linear)
    height = block_rows(predictive.floats_per_row(posterior), data.x.device)
    square = torch.cat(
        [
            predictive.expected_square(posterior, data.x[rows][0], data.y[rows][0])[:, 0]
            for rows in row_slices(data.x.n_rows, height)
        ]
    )
    if learn_dof:
        dof = best_dof(square, data.weight, dof)
    E_log_noise = gamma.expected_log(posterior.noise_shape, posterior.noise_rate[0])
    log_lik = _log_student(square, data.weight, dof) + 0.5 * data.weight.sum() * E_log_noise
    return RobustState(statistics, linear, square, dof, log_lik)


def _log_student(square: Tensor, weight: Tensor, dof: float) -> Tensor:
    nu, zero = torch.full_like(square[0], dof), torch.zeros_like(square[0])
    return weight @ student_t.log_density(square, zero, nu, 1)


def best_dof(square: Tensor, weight: Tensor, dof: float) -> float:
    """Return the nu with the highest bound, q(u) being the best for each: a point estimate.

    Brent's search over log nu; `dof` if that is as good.
    """

    def loss(log_dof: float) -> float:
        return -float(_log_student(square, weight, math.exp(log_dof)))

    bounds = [math.log(end) for end in DOF_RANGE]
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    best = min((float(found.x), *bounds), key=loss)
    return math.exp(best) if loss(best) < loss(math.log(dof)) else dof


def improve(
    data: Data, prior: Prior, state: RobustState, tol: float, *, learn_dof: bool
) -> RobustState:
    """One pass over the rows: coordinate ascent over q(u), then q(w, b, beta, alpha), then nu.

    The climb over alpha stops for this time where it rises by less than `tol` nats.
    """
    statistics = reweigh(data, mean_precision(state.dof, state.square))
    linear = climb.evaluate(statistics, prior, state.linear.alpha, state.linear.scale)
    if prior.weight is not None:
        for _ in range(_INNER):
            before, linear = linear, climb.improve(statistics, prior, linear, tol)
            if float(linear.bound - before.bound) < tol:
                break
    return measure(data, prior, statistics, linear, state.dof, learn_dof=learn_dof)
