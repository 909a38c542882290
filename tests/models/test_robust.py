"""Student-t noise of the linear model against slow, independent oracles.

The oracle treats the intercept as one more column with precision zero, works with dense algebra,
and adds the terms of the bound one by one, those of every row's precision included.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from skvi.models.linear import climb, predictive, robust
from skvi.models.linear.climb import Prior, WeightPrior
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.robust import Data
from skvi.runtime.blocks import Affine, Rows

Z_LIMIT = 5.0  # a false-positive rate of 6e-7
LOG_2PI = math.log(2.0 * math.pi)
NU = 3.5


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _data(X, y, s, intercept):
    def rows(array):
        affine = Affine(np.zeros(array.shape[1]), np.ones(array.shape[1]))
        return Rows(array, affine, torch.device("cpu"), s, keep="rows")

    return Data(rows(X), rows(y[:, None]), _t(s), intercept)


class Case(NamedTuple):
    X: np.ndarray
    y: np.ndarray
    s: np.ndarray
    intercept: bool
    prior: Prior
    alpha: torch.Tensor  # (1, H)

    @property
    def data(self):
        return _data(self.X, self.y, self.s, self.intercept)

    @property
    def design(self):
        columns = [np.ones((len(self.X), 1))] * self.intercept + [self.X]
        return _t(np.hstack(columns))

    def start(self, dof=NU, learn_dof=False):
        data = self.data
        statistics = robust.reweigh(data, torch.ones_like(data.weight))
        linear = climb.evaluate(statistics, self.prior, self.alpha)
        return robust.measure(data, self.prior, statistics, linear, dof, learn_dof=learn_dof)

    def climb(self, n_passes, dof=NU, learn_dof=False):
        states = [self.start(dof, learn_dof)]
        data = self.data
        for _ in range(n_passes):
            states.append(robust.improve(data, self.prior, states[-1], 1e-12, learn_dof=learn_dof))
        return states


def _case(rng, n=12, p=3, intercept=True, precisions="shared", noise=0.5):
    X = rng.normal(size=(n, p)) + 0.7
    y = X @ rng.normal(size=p) + 1.3 + noise * rng.normal(size=n)
    y[:2] += 8.0 * noise * rng.normal(size=2)
    s = rng.integers(1, 4, size=n).astype(float)
    size = {"shared": 1, "known": 1, "own": p}[precisions]
    rate = _t(np.linspace(0.3, 0.6, size))
    weight = None if precisions == "known" else WeightPrior(0.7, rate)
    return Case(
        X, y, s, intercept, Prior(1.2, _t([0.4]), weight), _t(rng.gamma(2.0, size=(1, size)))
    )


class Law(NamedTuple):
    """q: theta = (b, w) given beta is N(mean, cov / beta); gamma laws for beta, alpha and u."""

    mean: torch.Tensor
    cov: torch.Tensor
    shape: torch.Tensor
    rate: torch.Tensor
    u_shape: torch.Tensor
    u_rate: torch.Tensor
    alpha_shape: torch.Tensor
    alpha_rate: torch.Tensor


def _law(case, state):
    """The posterior that a state stands for, by dense algebra from its weights and alpha."""
    p, Z, s, y = case.X.shape[1], case.design, _t(case.s), _t(case.y)
    alpha = state.linear.alpha[0].expand(p)
    precision = torch.zeros(Z.shape[1], dtype=torch.float64)
    precision[-p:] = alpha
    # the weights for which q(theta, beta) is the best one: found from the sum of squares they give
    r = case.weights
    cov = torch.linalg.inv(Z.T @ (r[:, None] * Z) + torch.diag(precision))
    mean = cov @ (Z.T @ (r * y))
    shape = case.prior.noise_shape + (s.sum() - float(case.intercept)) / 2
    rate = case.prior.noise_rate[0] + (r @ (y - Z @ mean) ** 2 + precision @ mean**2) / 2
    square = shape / rate * (y - Z @ mean) ** 2 + ((Z @ cov) * Z).sum(1)
    u_shape = torch.full_like(square, (state.dof + 1) / 2)
    size = p / state.linear.alpha.shape[1]
    alpha_shape = torch.full_like(state.linear.alpha[0], size / 2)
    if case.prior.weight is not None:
        alpha_shape = alpha_shape + case.prior.weight.shape
    return Law(
        mean, cov, shape, rate, u_shape, (state.dof + square) / 2,
        alpha_shape, alpha_shape / state.linear.alpha[0],
    )  # fmt: skip


class Weighted(NamedTuple):
    """A case with the weights s E[u] that its last posterior was found with."""

    case: Case
    weights: torch.Tensor

    def __getattr__(self, name):
        return getattr(self.case, name)


def _second_pass(case, dof=NU):
    """Return the case with its weights, and the state after one pass."""
    first, second = case.climb(1, dof)
    weights = _t(case.s) * robust.mean_precision(dof, first.square)
    return Weighted(case, weights), second


def _log_gamma_law(E_x, E_log_x, shape, rate):
    shape, rate = (v if torch.is_tensor(v) else _t(v) for v in (shape, rate))
    return shape * rate.log() - torch.lgamma(shape) + (shape - 1) * E_log_x - rate * E_x


def _entropy(shape, rate):
    return shape - rate.log() + torch.lgamma(shape) + (1 - shape) * torch.digamma(shape)


def _oracle_bound(case, law, nu):
    """E_q log p - E_q log q, term by term."""
    p, Z, s, y = case.X.shape[1], case.design, _t(case.s), _t(case.y)
    E_beta, E_log_beta = law.shape / law.rate, torch.digamma(law.shape) - law.rate.log()
    E_u, E_log_u = law.u_shape / law.u_rate, torch.digamma(law.u_shape) - law.u_rate.log()
    E_alpha = law.alpha_shape / law.alpha_rate
    E_log_alpha = torch.digamma(law.alpha_shape) - law.alpha_rate.log()
    known = case.prior.weight is None
    if known:
        E_log_alpha = E_alpha.log()
    square = E_beta * (y - Z @ law.mean) ** 2 + ((Z @ law.cov) * Z).sum(1)
    nu = torch.as_tensor(nu, dtype=torch.float64)
    rows = 0.5 * (E_log_u + E_log_beta - LOG_2PI - E_u * square)
    rows = rows + _log_gamma_law(E_u, E_log_u, nu / 2, nu / 2) + _entropy(law.u_shape, law.u_rate)
    bound = s @ rows
    second = E_beta * law.mean**2 + law.cov.diagonal()
    bound += 0.5 * (E_log_alpha.expand(p) + E_log_beta - LOG_2PI).sum()
    bound -= 0.5 * (E_alpha.expand(p) * second[-p:]).sum()
    bound += _log_gamma_law(E_beta, E_log_beta, case.prior.noise_shape, case.prior.noise_rate[0])
    dim = len(law.mean)
    bound += 0.5 * (dim * (1 + LOG_2PI - E_log_beta) + torch.logdet(law.cov))
    bound += _entropy(law.shape, law.rate)
    if not known:
        c0, d0, _ = case.prior.weight
        bound += _log_gamma_law(E_alpha, E_log_alpha, _t(c0), d0).sum()
        bound += _entropy(law.alpha_shape, law.alpha_rate).sum()
    return bound


# -- the bound ------------------------------------------------------------------------------------

every_case = pytest.mark.parametrize(
    ("n", "p", "precisions", "intercept"),
    [
        (n, p, precisions, intercept)
        for n, p in [(12, 3), (4, 7)]
        for precisions in ("shared", "own", "known")
        for intercept in (True, False)
    ],
)


@every_case
def test_bound_is_the_sum_of_its_terms(n, p, precisions, intercept, rng):
    case, state = _second_pass(_case(rng, n, p, intercept, precisions))
    law = _law(case, state)
    torch.testing.assert_close(2 * law.u_rate - state.dof, state.square, rtol=1e-9, atol=1e-12)
    assert float(state.linear.noise_rate) == pytest.approx(float(law.rate), rel=1e-10)
    assert float(state.bound) == pytest.approx(float(_oracle_bound(case, law, NU)), rel=1e-10)


@pytest.mark.parametrize("precisions", ["shared", "own", "known"])
@pytest.mark.parametrize("intercept", [True, False])
def test_gradient_vanishes_at_the_top(precisions, intercept, rng):
    """Autograd of the oracle's bound by every parameter of q, and by nu where it is learnt."""
    case = _case(rng, 20, 3, intercept, precisions)
    state = case.climb(150, learn_dof=True)[-1]
    assert 1.0 < state.dof < 1e5
    case = Weighted(case, _t(case.s) * robust.mean_precision(state.dof, state.square))
    leaves = Law(*(v.detach().clone().requires_grad_() for v in _law(case, state)))
    nu = _t(state.dof).requires_grad_()
    wanted = [leaves.mean, leaves.cov, leaves.shape, leaves.rate, leaves.u_shape, leaves.u_rate, nu]
    if precisions != "known":
        wanted.append(leaves.alpha_rate)
    gradients = torch.autograd.grad(_oracle_bound(case, leaves, nu), wanted)
    for gradient in gradients:
        assert gradient.abs().max() < 2e-5


def test_the_gradient_check_sees_rows_that_count_as_their_precisions(rng, monkeypatch):
    """Planted: the noise has as many rows as the sum of s E[u]."""
    plain = robust.reweigh
    monkeypatch.setattr(robust, "reweigh", lambda data, u: plain(data, u)._replace(row_count=None))
    case, state = _second_pass(_case(rng, 20, 3))
    bound = float(_oracle_bound(case, _law(case, state), NU))
    assert abs(float(state.bound) - bound) > 1e-3


def test_bound_by_monte_carlo(rng):
    """E_q[log p(y, theta, beta, u) - log q], each repeated row with a precision of its own."""
    case, state = _second_pass(_case(rng, 8, 2, precisions="known"))
    law = Law(*(part.numpy() for part in _law(case, state)))
    size, p, repeats = 40_000, 2, case.s.astype(int)
    Z = np.repeat(case.design.numpy(), repeats, axis=0)
    y = np.repeat(case.y, repeats)
    u_shape, u_rate = np.repeat(law.u_shape, repeats), np.repeat(law.u_rate, repeats)
    beta = stats.gamma.rvs(law.shape, scale=1 / law.rate, size=size, random_state=rng)
    u = stats.gamma.rvs(u_shape, scale=1 / u_rate, size=(size, len(y)), random_state=rng)
    chol = np.linalg.cholesky(law.cov)
    z = rng.normal(size=(size, p + 1))
    theta = law.mean + (z @ chol.T) / np.sqrt(beta)[:, None]
    log_q = stats.gamma.logpdf(beta, law.shape, scale=1 / law.rate)
    log_q += stats.gamma.logpdf(u, u_shape, scale=1 / u_rate).sum(1)
    log_q += stats.norm.logpdf(z).sum(1) - np.log(np.diag(chol)).sum()
    log_q += 0.5 * (p + 1) * np.log(beta)
    log_p = stats.norm.logpdf(y, theta @ Z.T, (u * beta[:, None]) ** -0.5).sum(1)
    log_p += stats.gamma.logpdf(u, NU / 2, scale=2 / NU).sum(1)
    sd = (beta * float(case.alpha)) ** -0.5
    log_p += stats.norm.logpdf(theta[:, 1:], 0, sd[:, None]).sum(1)
    log_p += stats.gamma.logpdf(
        beta, case.prior.noise_shape, scale=1 / float(case.prior.noise_rate)
    )
    draws = log_p - log_q
    error = draws.mean() - float(state.bound)
    assert abs(error) < Z_LIMIT * draws.std() / math.sqrt(size)


@pytest.mark.parametrize("nu", [2.0, 6.0, 1e9])
def test_the_evidence_is_above_the_bound_and_close(nu):
    """One weight of known precision: t densities on a grid of (w, log beta)."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=8)
    y = 0.8 * x + 0.5 * rng.standard_t(3.0, size=8)
    prior = Prior(1.5, _t([0.9]), None)
    case = Case(x[:, None], y, np.ones(8), False, prior, _t([[1.1]]))
    state = case.climb(100, nu)[-1]
    w = np.linspace(-8.0, 8.0, 1601)[:, None]
    log_beta = np.linspace(-6.0, 5.0, 551)[None, :]
    sd = np.exp(-0.5 * log_beta)
    log_p = stats.norm.logpdf(w, 0.0, sd / math.sqrt(1.1)) + log_beta
    log_p = log_p + stats.gamma.logpdf(np.exp(log_beta), 1.5, scale=1 / 0.9)
    for xn, yn in zip(x, y, strict=True):
        log_p = log_p + stats.t.logpdf(yn, nu, w * xn, sd)
    evidence = special.logsumexp(log_p) + math.log(0.01 * 0.02)
    gap = evidence - float(state.bound)
    assert -1e-6 < gap < (0.5 if nu < 10.0 else 1e-6)


def test_many_degrees_of_freedom_are_gaussian_noise(rng):
    case = _case(rng, precisions="own")
    state = case.climb(30, 1e13)[-1]
    data = case.data
    statistics = robust.reweigh(data, torch.ones_like(data.weight))
    linear = climb.evaluate(statistics, case.prior, state.linear.alpha)
    assert float(state.bound) == pytest.approx(float(linear.bound), rel=1e-10)
    gaussian, robust_one = (
        predictive.make_posterior(statistics, case.prior, linear, dof) for dof in (None, 1e13)
    )
    x, y = _t(rng.normal(size=(5, 3))), _t(rng.normal(size=(5, 1)))
    for function in (predictive.local_bound, predictive.log_predictive):
        expected = function(gaussian, x, y)
        torch.testing.assert_close(function(robust_one, x, y), expected, rtol=1e-9, atol=1e-9)
    expected = predictive.half_width(gaussian, x, 0.8)
    torch.testing.assert_close(predictive.half_width(robust_one, x, 0.8), expected)


def test_weights_are_repeated_rows(rng):
    case = _case(rng, precisions="own")
    repeats = case.s.astype(int)
    longer = case._replace(
        X=np.repeat(case.X, repeats, axis=0),
        y=np.repeat(case.y, repeats),
        s=np.ones(repeats.sum()),
    )
    for weighted, repeated in zip(
        case.climb(5, learn_dof=True), longer.climb(5, learn_dof=True), strict=True
    ):
        assert float(weighted.bound) == pytest.approx(float(repeated.bound), rel=1e-10)
        assert weighted.dof == pytest.approx(repeated.dof, rel=1e-5)


# -- the climb ------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(2, 15),
    p=st.integers(1, 12),
    precisions=st.sampled_from(["shared", "own", "known", "horseshoe"]),
    intercept=st.booleans(),
    log_noise=st.floats(-5.0, 2.0),
    dof=st.floats(0.05, 50.0),
    learn_dof=st.booleans(),
)
def test_the_bound_never_falls(seed, n, p, precisions, intercept, log_noise, dof, learn_dof):
    rng = np.random.default_rng(seed)
    kind = "own" if precisions == "horseshoe" else precisions
    case = _case(rng, n, p, intercept, kind, 10**log_noise)
    if precisions == "horseshoe":
        prior = case.prior._replace(weight=HorseshoePrior(0.7, _t(np.linspace(0.5, 2.0, p))))
        case = case._replace(prior=prior)
    bounds = np.array([float(state.bound) for state in case.climb(15, dof, learn_dof)])
    assert (np.diff(bounds) >= -1e-11 * np.abs(bounds[1:]).clip(1.0)).all()


def test_the_best_dof_beats_a_grid_and_knows_the_law(rng):
    square = _t(rng.standard_t(3.0, size=20_000) ** 2)
    weight = torch.ones_like(square)
    best = robust.best_dof(square, weight, 50.0)
    # the standard error of the estimate is about 0.09
    assert 2.5 < best < 3.5
    top = float(robust._log_student(square, weight, best))
    for dof in np.geomspace(*robust.DOF_RANGE, 60):
        assert float(robust._log_student(square, weight, float(dof))) <= top + 1e-9
    assert robust.best_dof(square, weight, best) == best
    gaussian = _t(np.linspace(0.0, 1.0, 50))
    found = robust.best_dof(gaussian, torch.ones_like(gaussian), 4.0)
    assert found == pytest.approx(robust.DOF_RANGE[1], rel=1e-12)


def test_a_search_that_ends_lower_leaves_the_dof_as_it_was(rng, monkeypatch):
    """The search knows one peak; the bound must not fall where there is another."""
    square = _t(rng.standard_t(3.0, size=2000) ** 2)
    found = SimpleNamespace(x=math.log(30.0))
    monkeypatch.setattr(robust, "minimize_scalar", lambda *args, **kwargs: found)
    assert robust.best_dof(square, torch.ones_like(square), 3.0) == 3.0
