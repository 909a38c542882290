"""The mathematics of logistic regression against slow, independent oracles.

Brute-force quadrature over the weights, Monte Carlo of the expectations under q, sums over the
gamma representation of the Polya-Gamma law, and high-precision integrals of the sigmoid.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

from skvi.distributions import polya_gamma
from skvi.distributions.logistic_normal import log_mean_sigmoid
from skvi.models.linear.climb import WeightPrior
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.reduction import reduce_rows
from skvi.models.linear.weights import covariance, draw
from skvi.models.logistic import bound, climb, predictive, weights
from skvi.runtime.blocks import Affine, Rows

# A two-sided normal deviate beyond 5 has probability 6e-7: the false-positive rate per check.
Z_LIMIT = 5.0
SHAPES = [(14, 3), (4, 7)]  # more rows than features, and fewer


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _rows(X, s):
    affine = Affine(np.zeros(X.shape[1]), np.ones(X.shape[1]))
    return Rows(X, affine, torch.device("cpu"), s)


def _design(rng, n, p, intercept=True, n_models=2):
    X = rng.normal(size=(n, p))
    s = rng.integers(1, 4, size=n).astype(float)
    sign = np.where(X @ rng.normal(size=(p, n_models)) + rng.logistic(size=(n, 1)) > 0, 1.0, -1.0)
    return weights.Design(_rows(X, s), _t(s), _t(sign), p, intercept)


def _dense(design):
    z, _ = weights._whole(design)
    return z


KINDS = ["shared", "own", "groups", "fixed", "horseshoe"]


def _prior(kind, p):
    if kind == "fixed":
        return climb.Prior(None, 0.04)
    if kind == "horseshoe":
        return climb.Prior(HorseshoePrior(0.3, _t(np.linspace(0.5, 1.5, p))), 0.04)
    group = torch.arange(p) % 2 if kind == "groups" else None
    n_precisions = {"shared": 1, "own": p, "groups": 2}[kind]
    rate = _t(np.linspace(0.3, 0.6, n_precisions))
    return climb.Prior(WeightPrior(0.7, rate, group), 0.04)


def _alpha(rng, kind, p, n_models=2):
    n_precisions = {"shared": 1, "fixed": 1, "groups": 2}.get(kind, p)
    return _t(rng.gamma(2.0, size=(n_models, n_precisions)))


def _state(rng, design, kind):
    prior = _prior(kind, design.n_features)
    alpha = _alpha(rng, kind, design.n_features)
    scale = _t(rng.gamma(2.0, size=2))
    tilt = _t(rng.gamma(2.0, size=tuple(design.sign.shape)))
    return prior, climb.evaluate(design, prior, alpha, scale, tilt)


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-40.0, -3.0, -0.1, 0.0, 1.0, 20.0, 300.0])
@pytest.mark.parametrize("std", [0.0, 1e-3, 0.1, 1.0, 6.0, 40.0, 1e4])
def test_the_mean_of_a_sigmoid_is_exact(mean, std):
    """By the trapezoidal rule, whose error is exp(-2 pi d / h) with the nearest pole at pi i."""

    def log_expected(m):
        if m > 0.0:  # keeps the digits of a log near zero
            return np.log1p(-np.exp(log_expected(-m)))
        if std == 0.0:
            return special.log_expit(m)
        top = min(std, -m / std)  # the peak is between zero and this
        x, step = np.linspace(-13.0, top + 13.0, 2001 + int(100 * std), retstep=True)
        log_density = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
        return special.logsumexp(log_density + special.log_expit(m + std * x)) + math.log(step)

    yes, no = (float(v) for v in log_mean_sigmoid(_t(mean), _t(std**2)))
    assert yes == pytest.approx(log_expected(mean), rel=1e-12)
    assert no == pytest.approx(log_expected(-mean), rel=1e-12)


def test_probabilities_of_both_labels_sum_to_one_at_any_scale(rng):
    mean = _t(rng.normal(size=500) * 10.0 ** rng.uniform(-8, 8, size=500))
    variance = _t(10.0 ** rng.uniform(-20, 16, size=500))
    yes, no = log_mean_sigmoid(mean, variance)
    assert bool(torch.isfinite(yes).all() & torch.isfinite(no).all())
    torch.testing.assert_close(torch.logaddexp(yes, no), torch.zeros_like(yes), rtol=0, atol=1e-14)
    assert ((yes > no) == (mean > 0)).all()


@pytest.mark.parametrize("tilt", [0.0, 1e-6, 9.9e-4, 1.01e-3, 9.9e-3, 1.01e-2, 0.5, 3.0, 40.0])
def test_the_polya_gamma_law_is_an_infinite_sum_of_gammas(tilt):
    """omega = sum_k Gam(1, 1) / (2 pi^2 [(k - 1/2)^2 + c^2 / (4 pi^2)]), and KL by its tilt."""
    with mpmath.workdps(30):
        c = mpmath.mpf(tilt)
        below = 2 * mpmath.pi**2
        mean = mpmath.nsum(
            lambda k: 1 / (below * ((k - 0.5) ** 2 + c**2 / (2 * below))), [1, mpmath.inf]
        )
        exact = mpmath.log(mpmath.cosh(c / 2)) - c / 4 * mpmath.tanh(c / 2)
        if tilt > 1.0:  # the sum over k has fewer digits than the difference needs
            by_tilt = mpmath.log(mpmath.cosh(c / 2)) - c**2 / 2 * mean
            assert float(by_tilt) == pytest.approx(float(exact), rel=1e-9)
    assert float(polya_gamma.mean(_t(tilt))) == pytest.approx(float(mean), rel=1e-12)
    assert float(polya_gamma.kl(_t(tilt))) == pytest.approx(float(exact), rel=1e-9)


# -- the local bound ------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_both_readings_of_the_local_bound(sign, rng):
    """Jaakkola-Jordan at its best tilt equals the Polya-Gamma form; no other tilt is better."""
    mean, variance = _t(rng.normal(size=50) * 3.0), _t(rng.gamma(1.0, size=50))
    value = bound.local_bound(_t(sign), mean, variance)
    xi = bound.best_tilt(mean, variance)
    second = mean.square() + variance

    def jaakkola_jordan(tilt):
        omega = torch.tanh(tilt / 2) / (2 * tilt)
        start = torch.nn.functional.logsigmoid(tilt) + 0.5 * (sign * mean - tilt)
        return start - 0.5 * omega * (second - tilt.square())

    torch.testing.assert_close(value, jaakkola_jordan(xi), rtol=1e-12, atol=1e-13)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert (jaakkola_jordan(factor * xi) < value).all()
    # E log p(t | omega, a) - KL(q(omega) || PG(1, 0))
    given_omega = -math.log(2) + 0.5 * sign * mean - 0.5 * polya_gamma.mean(xi) * second
    augmented = given_omega - bound.local_divergence(mean, variance)
    torch.testing.assert_close(value, augmented, rtol=1e-12, atol=1e-13)


def test_the_local_bound_is_below_the_expectation_and_that_below_the_predictive(rng):
    nodes, probability = np.polynomial.hermite_e.hermegauss(80)
    probability = probability / probability.sum()
    mean, std = rng.normal(size=40) * 3.0, rng.gamma(1.0, size=40)
    odds = mean[:, None] + std[:, None] * nodes
    expected = special.log_expit(odds) @ probability
    value = bound.local_bound(_t(1.0), _t(mean), _t(std**2)).numpy()
    predicted = log_mean_sigmoid(_t(mean), _t(std**2))[0].numpy()
    assert (value < expected).all()
    assert (expected < predicted).all()


def test_the_divergence_of_small_tilts_keeps_its_digits():
    tilt = np.array([5e-3, 0.99e-2, 1.01e-2, 0.1])
    half = tilt.astype(np.longdouble) / 2
    exact = np.log(np.cosh(half)) - half / 2 * np.tanh(half)
    np.testing.assert_allclose(polya_gamma.kl(_t(tilt)).numpy(), exact, rtol=1e-7)


def test_the_local_bound_keeps_its_digits_for_confident_rows():
    value = bound.local_bound(_t(1.0), _t([50.0, 1e8, 0.0]), _t([1e-6, 1e-3, 0.0]))
    # -v / (2 (xi + |mu|)) - log(1 + e^-xi); at zero log(1/2)
    expected = [-1e-6 / 200 - math.exp(-50.0), -1e-3 / 4e8, -math.log(2)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9)
    # undecided rows: 1/2 (mu - xi) - log(1 + e^-xi) to first order
    value = bound.local_bound(_t(1.0), _t([3e-6, -3e-6]), _t([16e-12, 16e-12])) + math.log(2)
    np.testing.assert_allclose(value.numpy(), [1.5e-6, -1.5e-6], rtol=1e-4)


# -- the global bound -----------------------------------------------------------------------------

CASES = [
    pytest.param(n, p, kind, intercept, id=f"{n}x{p}-{kind}-{intercept}")
    for n, p in SHAPES
    for kind in KINDS
    for intercept in (True, False)
]


@pytest.mark.parametrize(("n", "p", "kind", "intercept"), CASES)
def test_the_posterior_is_that_of_the_weighted_regression(n, p, kind, intercept, rng):
    """By dense algebra: q(w, b), its price as a divergence of two normal laws, and the odds."""
    design = _design(rng, n, p, intercept)
    prior, state = _state(rng, design, kind)
    precision = climb.column_precision(design, prior, state.alpha)
    Z = _dense(design)
    for m in range(2):
        omega = design.weight * polya_gamma.mean(state.tilt[:, m])
        V = torch.linalg.inv(precision[m].diag() + Z.T @ (omega[:, None] * Z))
        mean = V @ (Z.T @ (0.5 * design.weight * design.sign[:, m]))
        torch.testing.assert_close(state.weights.mean[m], mean, rtol=1e-9, atol=1e-12)
        variance = ((Z @ V) * Z).sum(-1)
        torch.testing.assert_close(state.weights.odds_mean[:, m], Z @ mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            state.weights.odds_variance[:, m], variance, rtol=1e-8, atol=1e-12
        )
        if kind == "fixed":
            q = torch.distributions.MultivariateNormal(mean, V)
            p_law = torch.distributions.MultivariateNormal(
                torch.zeros_like(mean), precision_matrix=precision[m].diag()
            )
            kl = torch.distributions.kl_divergence(q, p_law)
            torch.testing.assert_close(state.kl[m], kl, rtol=1e-9, atol=1e-12)
        local = bound.local_bound(design.sign[:, m], Z @ mean, variance)
        torch.testing.assert_close(state.log_lik[m], design.weight @ local, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["shared", "own", "groups"])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_the_divergence_by_monte_carlo(n, p, kind, rng):
    """E_q[log q(w, b, alpha) - log p(w, b, alpha)] from draws, within five standard errors."""
    design = _design(rng, n, p)
    prior, state = _state(rng, design, kind)
    n_draws = 20_000
    member = {"shared": np.zeros(p, int), "own": np.arange(p), "groups": np.arange(p) % 2}[kind]
    shape = 0.7 + np.bincount(member) / 2
    precision = climb.column_precision(design, prior, state.alpha)
    Z = _dense(design)
    for m in range(2):
        alpha = state.alpha[m].numpy()
        omega = design.weight * polya_gamma.mean(state.tilt[:, m])
        V = torch.linalg.inv(precision[m].diag() + Z.T @ (omega[:, None] * Z)).numpy()
        q = stats.multivariate_normal(state.weights.mean[m].numpy(), V)
        theta = q.rvs(n_draws, random_state=rng)
        a = rng.gamma(shape, alpha / shape, size=(n_draws, len(alpha)))
        ratio = q.logpdf(theta) - stats.norm(0, 5.0).logpdf(theta[:, -1])
        ratio -= stats.norm(0, a[:, member] ** -0.5).logpdf(theta[:, :p]).sum(1)
        ratio += stats.gamma(shape, scale=alpha / shape).logpdf(a).sum(1)
        ratio -= stats.gamma(0.7, scale=1 / prior.weight.rate.numpy()).logpdf(a).sum(1)
        error = ratio.std() / math.sqrt(n_draws)
        assert abs(ratio.mean() - float(state.kl[m])) < Z_LIMIT * error


@pytest.mark.parametrize("intercept", [True, False])
def test_the_bound_is_below_the_evidence_by_quadrature(intercept, rng):
    """One weight (and an intercept) of known precision: log p(t) on a grid, and its gap."""
    X, s = rng.normal(size=(12, 1)), rng.integers(1, 3, size=12).astype(float)
    sign = np.where(1.5 * X[:, 0] + 0.5 + rng.logistic(size=12) > 0, 1.0, -1.0)
    design = weights.Design(_rows(X, s), _t(s), _t(sign[:, None]), 1, intercept)
    prior, alpha = climb.Prior(None, 0.25), _t([[0.5]])
    state = climb.evaluate(design, prior, alpha, _t([1.0]), torch.ones_like(design.sign))
    for _ in range(20):
        state = climb.improve(design, prior, state, torch.arange(len(state.alpha)))

    # the trapezoidal rule, whose error falls exponentially for these integrands
    w, step_w = np.linspace(-12.0, 16.0, 561, retstep=True)
    b, step_b = np.linspace(-14.0, 14.0, 281, retstep=True) if intercept else (np.zeros(1), 1.0)
    w, b = (grid.ravel() for grid in np.meshgrid(w, b))
    log_joint = stats.norm(0, 0.5**-0.5).logpdf(w)
    log_joint += stats.norm(0, 2.0).logpdf(b) if intercept else 0.0
    log_lik = special.log_expit(sign * (np.outer(w, X[:, 0]) + b[:, None]))  # (K, N)
    log_joint += log_lik @ s
    log_evidence = special.logsumexp(log_joint) + math.log(step_w * step_b)
    gap = log_evidence - float(state.bound)
    assert 0.0 < gap < 1.0

    # the gap is the divergence from the posterior, and what the local bounds give away
    Z, precision = _dense(design), climb.column_precision(design, prior, alpha)[0]
    omega = design.weight * polya_gamma.mean(state.tilt[:, 0])
    V = torch.linalg.inv(precision.diag() + Z.T @ (omega[:, None] * Z)).numpy()
    theta = np.column_stack([w, b])[:, : Z.shape[1]]
    log_q = stats.multivariate_normal(state.weights.mean[0].numpy(), V).logpdf(theta)
    q = np.exp(log_q) * step_w * step_b
    assert q.sum() == pytest.approx(1.0, rel=1e-9)
    divergence = q @ (log_q - log_joint + log_evidence)
    slack = q @ log_lik @ s - float(state.log_lik)
    assert divergence > 0.0
    assert slack > 0.0
    assert gap == pytest.approx(divergence + slack, rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_the_bound_never_falls_and_ends_where_its_gradient_is_zero(n, p, kind, rng):
    design = _design(rng, n, p)
    prior, state = _state(rng, design, kind)
    history = [state.bound]
    for _ in range(60):
        state = climb.improve(design, prior, state, torch.arange(len(state.alpha)))
        history.append(state.bound)
    history = torch.stack(history)
    assert (history.diff(dim=0) >= 0.0).all()
    # scaled tilts and precisions: the bound is a function of these alone
    point = [state.alpha, state.scale, state.tilt]
    for which in range(2 if kind == "horseshoe" else 3):
        if which == 1 or (which == 0 and kind == "fixed"):
            continue
        for factor in (0.99, 1.01):
            moved = [v * factor if i == which else v for i, v in enumerate(point)]
            assert (climb.evaluate(design, prior, *moved).bound <= state.bound + 1e-10).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_models_are_improved_one_by_one(n, p, kind, rng):
    """A pass over one model leaves the other as it is, and does what a pass over both does."""
    design = _design(rng, n, p)
    prior, state = _state(rng, design, kind)
    both = climb.improve(design, prior, state, torch.arange(2))
    one = climb.improve(design, prior, state, torch.tensor([1]))
    assert float(one.bound[0]) == float(state.bound[0])
    assert float(both.bound[0]) > float(state.bound[0])
    torch.testing.assert_close(one.bound[1], both.bound[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.tilt[:, 1], both.tilt[:, 1], rtol=1e-9, atol=0)
    assert torch.equal(one.weights.mean[0], state.weights.mean[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_every_way_to_solve_gives_the_same(n, p, kind, rng, monkeypatch):
    """Cholesky, the decomposition that cannot fail, and the block size do not matter."""
    design = _design(rng, n, p)
    prior, state = _state(rng, design, kind)
    monkeypatch.setattr(weights, "EXTREME", 0.0)
    monkeypatch.setattr(weights, "block_rows", lambda *_: 3)
    point = (state.alpha, state.scale, state.tilt)
    again = climb.evaluate(design, prior, *point)
    for a, b in zip(state.weights, again.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.bound, again.bound, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("intercept", [True, False])
def test_shared_precisions_see_only_the_span_of_the_rows(intercept, rng):
    """Few rows of many features as coordinates in their span: the same bound and posterior."""
    design = _design(rng, 4, 7, intercept)
    prior, state = _state(rng, design, "shared")
    x, _ = design.rows[slice(0, 4)]
    _, _, right = torch.linalg.svd(x, full_matrices=False)
    basis = right.T  # (7, 4)
    turned = design._replace(rows=_rows((x @ basis).numpy(), design.weight.numpy()))
    again = climb.evaluate(turned, prior, state.alpha, state.scale, state.tilt)
    torch.testing.assert_close(again.bound, state.bound, rtol=1e-11, atol=1e-11)
    update, again_update = (
        climb.coordinate_update(d, prior, s) for d, s in ((design, state), (turned, again))
    )
    torch.testing.assert_close(update.alpha, again_update.alpha, rtol=1e-10, atol=0)

    def factor(d, s, basis):
        precision = climb.column_precision(d, prior, s.alpha)
        return weights.factorise(d, s.tilt, precision, s.weights.mean, basis)

    one, other = factor(design, state, None), factor(turned, again, basis)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(covariance(one), covariance(other), rtol=1e-9, atol=1e-12)


def test_the_first_precision_is_the_best_without_tilts(rng):
    """The closed form of the bound at tilts of zero ranks precisions as `evaluate` would there."""
    design = _design(rng, 30, 3)
    design = design._replace(rows=_rows(rng.normal(size=(30, 3)), design.weight.numpy()))
    x, s = design.rows[slice(0, 30)]
    centred = (x - s @ x / s.sum()).numpy()
    # labels that the rows tell, as otherwise the best precision is the largest
    sign = np.sign(centred[:, :1] + 0.5 * rng.normal(size=(30, 2)))
    design = design._replace(rows=_rows(centred, s.numpy()), sign=_t(sign))
    prior = _prior("shared", 3)
    targets = _rows(0.5 * design.sign.numpy(), s.numpy())
    alpha = climb.start(design, prior, reduce_rows(design.rows, targets, intercept=True))

    def at_zero_tilt(alpha):
        tiny = torch.full_like(design.sign, 1e-12)
        state = climb.evaluate(design, prior, alpha, _t([1.0, 1.0]), tiny)
        mean, variance = state.weights.odds_mean, state.weights.odds_variance
        local = -math.log(2) + 0.5 * design.sign * mean - (mean.square() + variance) / 8
        return s @ local - state.kl

    step = math.exp(32.0 / 64.0)
    assert (at_zero_tilt(alpha) >= at_zero_tilt(alpha * step)).all()
    assert (at_zero_tilt(alpha) >= at_zero_tilt(alpha / step)).all()


# -- the predictive -------------------------------------------------------------------------------


def _posterior(rng, n, p):
    design = _design(rng, n, p, n_models=3)
    prior = _prior("fixed", p)
    alpha, scale = _t(rng.gamma(2.0, size=(3, 1))), torch.ones(3, dtype=torch.float64)
    state = climb.evaluate(design, prior, alpha, scale, torch.ones_like(design.sign))
    precision = climb.column_precision(design, prior, alpha)
    factor = weights.factorise(design, state.tilt, precision, state.weights.mean, None)
    return design, state, predictive.Posterior(factor, True)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_the_factor_repeats_the_odds_of_the_climb(n, p, rng):
    design, state, posterior = _posterior(rng, n, p)
    x, _ = design.rows[slice(0, n)]
    mean, variance = predictive.log_odds(posterior, x)
    torch.testing.assert_close(mean, state.weights.odds_mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, state.weights.odds_variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_probabilities_average_over_draws_of_the_weights(n, p, rng):
    _, _, posterior = _posterior(rng, n, p)
    x = _t(rng.normal(size=(5, p)))
    n_draws = 40_000
    coef = predictive.draw_coefficients(posterior, n_draws, np.random.default_rng(1))
    odds = torch.einsum("bc,smc->bms", weights.add_ones(x), coef)
    draws = torch.sigmoid(odds)
    yes, _ = predictive.log_proba_of_models(posterior, x)
    error = draws.std(-1) / math.sqrt(n_draws)
    assert ((draws.mean(-1) - yes.exp()).abs() < Z_LIMIT * error).all()
    proba = predictive.log_proba(posterior, x).exp()
    torch.testing.assert_close(proba, yes.exp() / yes.exp().sum(-1, keepdim=True))
    cov = torch.stack([torch.cov(coef[:, m].T) for m in range(3)])
    exact = covariance(posterior.factor)
    assert float((cov - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert draw(posterior.factor, torch.zeros(1, 3, p + 1, dtype=torch.float64)).eq(0).all()


def test_one_against_the_rest_is_a_bound_for_the_normalised_law(rng):
    """sigma(a_k) prod_{j != k} (1 - sigma(a_j)) <= sigma(a_k) / sum_j sigma(a_j)."""
    odds = _t(rng.normal(size=(2000, 5)) * 4.0)
    yes, no = (torch.nn.functional.logsigmoid(v) for v in (odds, -odds))
    normalised = predictive.normalise(yes, no)
    independent = yes + no.sum(-1, keepdim=True) - no
    assert (independent <= normalised + 1e-12).all()


def test_labels_are_drawn_with_their_probabilities(rng):
    _, _, posterior = _posterior(rng, 14, 3)
    x = _t(rng.normal(size=(4, 3)))
    n_draws = 20_000
    # one vector of weights, so that the draws are independent
    one = predictive.draw_coefficients(posterior, 1, np.random.default_rng(2))
    coef = one.expand(n_draws, -1, -1)
    labels = predictive.draw_labels(posterior, coef, x, np.random.default_rng(3))
    yes = torch.sigmoid(torch.einsum("bc,mc->bm", weights.add_ones(x), one[0]))
    proba = (yes / yes.sum(-1, keepdim=True)).numpy()
    for k in range(3):
        share = (labels.numpy() == k).mean(1)
        error = np.sqrt(proba[:, k] * (1 - proba[:, k]) / n_draws)
        assert (np.abs(share - proba[:, k]) < Z_LIMIT * error).all()


def test_a_draw_at_the_end_of_the_unit_interval_is_the_last_class(rng):
    """Probabilities whose sum is rounded down must not leave a gap above them."""

    class Highest:
        def random(self, shape):
            return np.full(shape, np.nextafter(1.0, 0.0))

    _, _, posterior = _posterior(rng, 14, 3)
    coef = predictive.draw_coefficients(posterior, 300, rng)
    labels = predictive.draw_labels(posterior, coef, _t(rng.normal(size=(9, 3))), Highest())
    assert set(labels.unique().tolist()) <= {0, 1, 2}
