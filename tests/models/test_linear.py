"""The linear model's mathematics against slow, independent oracles.

The oracle never centres: it treats the intercept as one more column with precision zero, works
with dense inverses in the units of the data, and adds the terms of the bound one by one.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, linalg, special, stats

from skvi.models.linear import climb, evidence, predictive, reduction, stream, weights
from skvi.models.linear.climb import Prior, WeightPrior
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.runtime.blocks import Affine, Rows

# A two-sided normal deviate beyond 5 has probability 6e-7: the false-positive rate per check.
Z_LIMIT = 5.0
LOG_2PI = math.log(2.0 * math.pi)
SHAPES = [(12, 3), (4, 7)]  # more rows than features, and fewer


@pytest.fixture(autouse=True, scope="module", params=["svd", "gram"])
def reduction_path(request):
    """Every test runs with the way of small problems and with that of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gram":
            patch.setattr(reduction, "_SMALL", 0)
        yield


class Problem(NamedTuple):
    X: np.ndarray
    y: np.ndarray  # (N, 1)
    s: np.ndarray
    intercept: bool

    def statistics(self):
        def rows(array):
            n_columns = array.shape[1]
            affine = Affine(np.zeros(n_columns), np.ones(n_columns))
            return Rows(array, affine, torch.device("cpu"), self.s)

        return reduction.reduce_rows(rows(self.X), rows(self.y), intercept=self.intercept)

    def design(self):
        columns = [np.ones((len(self.X), 1))] * self.intercept + [self.X]
        return torch.as_tensor(np.hstack(columns))


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _problem(rng, n, p, intercept=True, noise=0.5):
    X = rng.normal(size=(n, p)) + 0.7
    y = X @ rng.normal(size=p) + 1.3 + noise * rng.normal(size=n)
    return Problem(X, y[:, None], rng.integers(1, 4, size=n).astype(float), intercept)


def _prior(n_groups, *, fixed=False):
    weight = None if fixed else WeightPrior(0.7, _t(np.linspace(0.3, 0.6, n_groups)))
    return Prior(1.2, _t([0.4]), weight)


class Law(NamedTuple):
    """q in the oracle's parametrisation: theta = (b, w) given beta is N(mean, cov / beta)."""

    mean: torch.Tensor
    cov: torch.Tensor
    shape: torch.Tensor
    rate: torch.Tensor
    alpha_shape: torch.Tensor | None
    alpha_rate: torch.Tensor | None


def _members(prior, alpha, p):
    """Which precision each feature has, and how many features each precision has."""
    member = torch.arange(p) * len(alpha) // p if prior.group is None else prior.group
    return member, torch.bincount(member).double()


def _best_law(problem, prior, alpha):
    """The optimal q(theta, beta) given E[alpha] = alpha, by dense algebra."""
    p = problem.X.shape[1]
    member, size = _members(prior, alpha, p)
    Z, s, y = problem.design(), _t(problem.s), _t(problem.y[:, 0])
    precision = torch.zeros(Z.shape[1], dtype=torch.float64)
    precision[-p:] = alpha[member]
    cov = torch.linalg.inv(Z.T @ (s[:, None] * Z) + torch.diag(precision))
    mean = cov @ (Z.T @ (s * y))
    shape = prior.noise_shape + (s.sum() - float(problem.intercept)) / 2
    rate = prior.noise_rate[0] + (s @ (y - Z @ mean) ** 2 + precision @ mean**2) / 2
    if prior.weight is None:
        return Law(mean, cov, shape, rate, None, None)
    alpha_shape = prior.weight.shape + size / 2
    return Law(mean, cov, shape, rate, alpha_shape, alpha_shape / alpha)


def _expected_log_gamma(E_x, E_log_x, shape, rate):
    shape = _t(shape)
    return shape * rate.log() - torch.lgamma(shape) + (shape - 1) * E_log_x - rate * E_x


def _gamma_entropy(shape, rate):
    return shape - rate.log() + torch.lgamma(shape) + (1 - shape) * torch.digamma(shape)


def _oracle_bound(problem, prior, law, alpha=None):
    """E_q log p - E_q log q, term by term; `alpha` stands in for q(alpha) if it is known."""
    p = problem.X.shape[1]
    Z, s, y = problem.design(), _t(problem.s), _t(problem.y[:, 0])
    n = s.sum()
    E_beta, E_log_beta = law.shape / law.rate, torch.digamma(law.shape) - law.rate.log()
    if prior.weight is None:
        E_alpha, E_log_alpha = alpha, alpha.log()
    else:
        E_alpha = law.alpha_shape / law.alpha_rate
        E_log_alpha = torch.digamma(law.alpha_shape) - law.alpha_rate.log()
    second = E_beta * law.mean**2 + law.cov.diagonal()  # E[beta theta^2]
    squares = s @ (y - Z @ law.mean) ** 2
    trace = torch.trace(Z.T @ (s[:, None] * Z) @ law.cov)
    dim = len(law.mean)
    member, size = _members(prior, E_alpha, p)
    bound = 0.5 * (n * (E_log_beta - LOG_2PI) - E_beta * squares - trace)
    bound += 0.5 * (
        p * (E_log_beta - LOG_2PI) + (size * E_log_alpha).sum()
        - (E_alpha[member] * second[-p:]).sum()
    )  # fmt: skip
    bound += _expected_log_gamma(E_beta, E_log_beta, prior.noise_shape, prior.noise_rate[0])
    bound += 0.5 * (dim * (1 + LOG_2PI - E_log_beta) + torch.logdet(law.cov))
    bound += _gamma_entropy(law.shape, law.rate)
    if prior.weight is not None:
        c0, d0, _ = prior.weight
        bound += _expected_log_gamma(E_alpha, E_log_alpha, c0, d0).sum()
        bound += _gamma_entropy(law.alpha_shape, law.alpha_rate).sum()
    return bound


CASES = [
    pytest.param(n, p, groups, intercept, id=f"{n}x{p}-{groups}-{intercept}")
    for n, p in SHAPES
    for groups in ("shared", "own", "groups")
    for intercept in (True, False)
]


def _case(rng, n, p, groups, intercept):
    problem = _problem(rng, n, p, intercept)
    n_groups = {"shared": 1, "own": p, "groups": 2}[groups]
    alpha = _t(rng.gamma(2.0, size=n_groups))
    prior = _prior(n_groups)
    if groups == "groups":  # of different sizes, their features not in a row
        group = (torch.arange(p) % 3 == 1).long()
        prior = prior._replace(weight=prior.weight._replace(group=group))
    return problem, prior, alpha


# -- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "groups", "intercept"), CASES)
def test_bound_is_the_sum_of_its_terms(n, p, groups, intercept, rng):
    problem, prior, alpha = _case(rng, n, p, groups, intercept)
    state = climb.evaluate(problem.statistics(), prior, alpha[None])
    law = _best_law(problem, prior, alpha)
    assert float(state.bound) == pytest.approx(float(_oracle_bound(problem, prior, law)), rel=1e-11)
    assert float(state.noise_rate) == pytest.approx(float(law.rate), rel=1e-11)


@pytest.mark.parametrize(("n", "p", "groups", "intercept"), CASES)
def test_weights_equal_dense_algebra(n, p, groups, intercept, rng):
    problem, prior, alpha = _case(rng, n, p, groups, intercept)
    statistics = problem.statistics()
    member, size = _members(prior, alpha, p)
    factor = weights.factorise(
        statistics, alpha[None] if groups == "shared" else alpha[member][None]
    )
    law = _best_law(problem, prior, alpha)
    V = law.cov[-p:, -p:]
    tight = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(factor.mean[0], law.mean[-p:], **tight)
    torch.testing.assert_close(weights.covariance(factor)[0], V, **tight)
    torch.testing.assert_close(weights.variances(factor)[0], V.diagonal(), **tight)
    solved = weights.solve(statistics, alpha[None], prior.group)
    expected = size.clone().index_add(0, member, -alpha[member] * V.diagonal())
    torch.testing.assert_close(solved.relevance[0], expected, **tight)
    squares = torch.zeros_like(alpha).index_add(0, member, law.mean[-p:].square())
    torch.testing.assert_close(solved.norm[0], squares, **tight)


@pytest.mark.parametrize(("n", "p", "groups", "intercept"), CASES)
def test_gradient_of_the_bound_vanishes_at_every_update(n, p, groups, intercept, rng):
    """Autograd of the oracle's bound at the implementation's posterior."""
    problem, prior, alpha = _case(rng, n, p, groups, intercept)
    statistics = problem.statistics()
    law = _best_law(problem, prior, alpha)
    state = climb.evaluate(statistics, prior, alpha[None])
    posterior = predictive.make_posterior(statistics, prior, state)
    mean = torch.cat([law.mean[: int(intercept)], posterior.factor.mean[0]])
    law = law._replace(mean=mean, rate=state.noise_rate[0])

    leaves = law._replace(
        **{k: v.detach().clone().requires_grad_() for k, v in law._asdict().items()}
    )
    gradients = torch.autograd.grad(_oracle_bound(problem, prior, leaves), leaves[:4])
    for gradient in gradients:
        assert gradient.abs().max() < 1e-9

    updated = climb.coordinate_update(statistics, prior, state)[0]
    leaves = leaves._replace(alpha_rate=(law.alpha_shape / updated).detach().requires_grad_())
    gradients = torch.autograd.grad(_oracle_bound(problem, prior, leaves), leaves[4:])
    for gradient in gradients:
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("groups", ["shared", "own", "groups"])
def test_bound_by_monte_carlo(groups, rng):
    problem, prior, alpha = _case(rng, 12, 3, groups, True)
    law = _best_law(problem, prior, alpha)
    size, p = 40_000, 3
    Z, s, y = problem.design().numpy(), problem.s, problem.y[:, 0]
    law_beta = stats.gamma(float(law.shape), scale=1 / float(law.rate))
    law_alpha = stats.gamma(law.alpha_shape.numpy(), scale=1 / law.alpha_rate.numpy())
    beta = law_beta.rvs(size, random_state=rng)
    alphas = law_alpha.rvs((size, len(alpha)), random_state=rng)
    chol = np.linalg.cholesky(law.cov.numpy())
    z = rng.normal(size=(size, p + 1))
    theta = law.mean.numpy() + (z @ chol.T) / np.sqrt(beta)[:, None]
    log_q = law_beta.logpdf(beta) + law_alpha.logpdf(alphas).sum(1)
    log_q += (
        stats.norm.logpdf(z).sum(1) - np.log(np.diag(chol)).sum() + 0.5 * (p + 1) * np.log(beta)
    )
    sd = beta[:, None] ** -0.5
    log_p = (s * stats.norm.logpdf(y, theta @ Z.T, sd)).sum(1)
    member, _ = _members(prior, alpha, p)
    log_p += stats.norm.logpdf(theta[:, 1:], 0, sd / np.sqrt(alphas[:, member])).sum(1)
    log_p += stats.gamma.logpdf(beta, prior.noise_shape, scale=1 / float(prior.noise_rate))
    c0, d0, _ = prior.weight
    log_p += stats.gamma.logpdf(alphas, c0, scale=1 / d0.numpy()).sum(1)
    draws = log_p - log_q
    bound = float(climb.evaluate(problem.statistics(), prior, alpha[None]).bound)
    assert abs(draws.mean() - bound) < Z_LIMIT * draws.std() / math.sqrt(size)


def test_bound_and_evidence_by_brute_force():
    """One weight, no intercept: the integrals over (w, beta, alpha) on a grid."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=6)
    problem = Problem(x[:, None], (0.8 * x + 0.6 * rng.normal(size=6))[:, None], np.ones(6), False)
    prior = Prior(1.5, _t([0.9]), WeightPrior(1.5, _t([1.1])))
    statistics = problem.statistics()
    alpha = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(50):
        alpha = climb.coordinate_update(statistics, prior, climb.evaluate(statistics, prior, alpha))
    state = climb.evaluate(statistics, prior, alpha)
    law = _best_law(problem, prior, alpha[0])

    z = np.linspace(-14, 14, 141)[:, None, None]
    log_beta = np.linspace(-7, 5, 121)[None, :, None]
    log_alpha = np.linspace(-12, 5, 121)[None, None, :]
    beta, alphas = np.exp(log_beta), np.exp(log_alpha)
    width = np.sqrt(float(law.cov)) / np.sqrt(beta)
    w = float(law.mean) + z * width
    cell = np.log(np.diff(z[:2, 0, 0])[0] * np.diff(log_beta[0, :2, 0])[0])
    cell = cell + np.log(np.diff(log_alpha[0, 0, :2])[0]) + np.log(width) + log_beta + log_alpha

    def log_gamma(value, shape, rate):
        return stats.gamma.logpdf(value, float(shape), scale=1 / float(rate))

    log_p = stats.norm.logpdf(problem.y[:, 0], w[..., None] * x, beta[..., None] ** -0.5).sum(-1)
    log_p = log_p + stats.norm.logpdf(w, 0, (beta * alphas) ** -0.5)
    log_p = log_p + log_gamma(beta, 1.5, 0.9) + log_gamma(alphas, 1.5, 1.1)
    log_q = stats.norm.logpdf(z) - np.log(width) + log_gamma(beta, law.shape, law.rate)
    log_q = log_q + log_gamma(alphas, law.alpha_shape, law.alpha_rate)

    mass = np.exp(log_q + cell)
    assert mass.sum() == pytest.approx(1.0, abs=1e-8)
    log_evidence = special.logsumexp(log_p + cell)
    gap = (mass * (log_q - log_p + log_evidence)).sum()  # KL to the exact posterior
    assert gap > 0.0
    assert float(state.bound) == pytest.approx(log_evidence - gap, abs=1e-7)
    assert float(evidence.log_evidence(statistics, prior)) == pytest.approx(log_evidence, abs=1e-6)


# -- the evidence ---------------------------------------------------------------------------------


def _log_evidence_by_student_t(problem, prior, alpha):
    """y is a multivariate t; a flat intercept leaves the contrasts, and a Jacobian 1/sqrt(n)."""
    X, y = (np.repeat(array, problem.s.astype(int), axis=0) for array in (problem.X, problem.y))
    n, p = X.shape
    cov = np.eye(n) + X @ np.diag(1 / np.broadcast_to(alpha, p)) @ X.T
    log_jacobian = 0.0
    if problem.intercept:
        contrasts = linalg.null_space(np.ones((1, n))).T
        y, cov = contrasts @ y, contrasts @ cov @ contrasts.T
        log_jacobian = -0.5 * math.log(n)
    a0, b0 = prior.noise_shape, float(prior.noise_rate)
    law = stats.multivariate_t(shape=b0 / a0 * (cov + cov.T) / 2, df=2 * a0)
    return law.logpdf(y[:, 0]) + log_jacobian


@pytest.mark.parametrize(("n", "p", "groups", "intercept"), CASES)
def test_bound_is_the_evidence_if_precisions_are_known(n, p, groups, intercept, rng):
    if groups == "groups":
        pytest.skip("known precisions belong to single features or to all")
    problem, _, alpha = _case(rng, n, p, groups, intercept)
    prior = _prior(1, fixed=True)
    expected = _log_evidence_by_student_t(problem, prior, alpha.numpy())
    statistics = problem.statistics()
    bound = float(climb.evaluate(statistics, prior, alpha[None]).bound)
    assert bound == pytest.approx(expected, rel=1e-10)
    if groups == "shared":
        given_alpha = evidence.log_evidence_given_alpha(statistics, prior, alpha.log())
        assert float(given_alpha) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("vague", [False, True])
def test_evidence_by_quadrature(n, p, vague, rng):
    problem, prior, _ = _case(rng, n, p, "shared", True)
    if vague:
        prior = prior._replace(weight=WeightPrior(1e-3, _t([1e-6])))
    c0, d0, _ = prior.weight
    peak = float(evidence.log_evidence(problem.statistics(), prior))

    def integrand(log_alpha):
        log_prior = c0 * (log_alpha + math.log(d0)) - d0 * math.exp(log_alpha) - math.lgamma(c0)
        known = prior._replace(weight=None)
        return math.exp(
            _log_evidence_by_student_t(problem, known, math.exp(log_alpha))
            + float(log_prior)
            - peak
        )

    cuts = np.linspace(-18, 25, 25)
    total = sum(
        integrate.quad(integrand, *ends, epsabs=1e-12, epsrel=1e-10)[0] for ends in pairwise(cuts)
    )
    assert total == pytest.approx(1.0, abs=1e-8)


def test_bound_never_exceeds_the_evidence(rng):
    for _ in range(10):
        problem, prior, alpha = _case(rng, 12, 3, "shared", True)
        bound = float(climb.evaluate(problem.statistics(), prior, alpha[None]).bound)
        assert bound <= float(evidence.log_evidence(problem.statistics(), prior)) + 1e-10


# -- flat weights ---------------------------------------------------------------------------------


def _flat_prior(p):
    return Prior(1.2, _t([0.4]), None, p)


@pytest.mark.parametrize("intercept", [True, False])
def test_flat_weights_are_least_squares_with_the_classical_t_posterior(intercept, rng):
    """With a vanishing noise prior: n - p - 1 degrees of freedom, s^2 (Z'Z)^-1 scales."""
    problem = _problem(rng, 12, 3, intercept)
    statistics, prior = problem.statistics(), Prior(1e-12, _t([1e-12]), None, 3)
    state = climb.evaluate(statistics, prior, torch.zeros(1, 1, dtype=torch.float64))
    posterior = predictive.make_posterior(statistics, prior, state)
    Z, s, y = problem.design(), _t(problem.s), _t(problem.y[:, 0])
    inverse = torch.linalg.inv(Z.T @ (s[:, None] * Z))
    coef = inverse @ Z.T @ (s * y)
    dof = float(s.sum()) - Z.shape[1]
    squares = s @ (y - Z @ coef) ** 2
    tight = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(posterior.factor.mean[0], coef[-3:], **tight)
    V = weights.covariance(posterior.factor)[0]
    torch.testing.assert_close(V, inverse[-3:, -3:], **tight)
    torch.testing.assert_close(weights.variances(posterior.factor)[0], V.diagonal(), **tight)
    assert 2.0 * float(posterior.noise_shape) == pytest.approx(dof, rel=1e-10)
    ratio = posterior.noise_rate[0] / posterior.noise_shape
    torch.testing.assert_close(ratio, squares / dof, **tight)
    x = problem._replace(X=rng.normal(size=(5, 3)))
    leverage = (x.design() @ inverse @ x.design().T).diagonal()
    torch.testing.assert_close(predictive.leverage(posterior, _t(x.X))[:, 0], leverage, **tight)


def _flat_law(problem, prior):
    alpha = torch.zeros(problem.X.shape[1], dtype=torch.float64)
    law = _best_law(problem, prior._replace(n_flat=0), alpha)
    shape = law.shape - prior.n_flat / 2
    return law._replace(shape=shape)


@pytest.mark.parametrize("intercept", [True, False])
def test_flat_bound_by_monte_carlo_and_quadrature(intercept, rng):
    """The average of log p - log q has no variance at the exact posterior; and two integrals."""
    problem, prior = _problem(rng, 12, 2, intercept), _flat_prior(2)
    law = _flat_law(problem, prior)
    alpha = torch.zeros(1, 1, dtype=torch.float64)
    state = climb.evaluate(problem.statistics(), prior, alpha)
    assert float(state.noise_rate) == pytest.approx(float(law.rate), rel=1e-11)
    bound = float(state.bound)
    Z, s, y = problem.design().numpy(), problem.s, problem.y[:, 0]
    size, dim = 500, Z.shape[1]
    law_beta = stats.gamma(float(law.shape), scale=1 / float(law.rate))
    beta = law_beta.rvs(size, random_state=rng)
    chol = np.linalg.cholesky(law.cov.numpy())
    z = rng.normal(size=(size, dim))
    theta = law.mean.numpy() + (z @ chol.T) / np.sqrt(beta)[:, None]
    log_q = law_beta.logpdf(beta) + stats.norm.logpdf(z).sum(1)
    log_q += 0.5 * dim * np.log(beta) - np.log(np.diag(chol)).sum()
    log_p = (s * stats.norm.logpdf(y, theta @ Z.T, beta[:, None] ** -0.5)).sum(1)
    log_p += stats.gamma.logpdf(beta, prior.noise_shape, scale=1 / float(prior.noise_rate))
    np.testing.assert_allclose(log_p - log_q, bound, rtol=1e-10)
    # the price is that of q: the entropy of the normal less the gamma's divergence
    n = s.sum()
    E_beta = float(law.shape / law.rate)
    E_log_beta = float(torch.digamma(law.shape) - law.rate.log())
    squares = s @ (y - Z @ law.mean.numpy()) ** 2
    log_lik = 0.5 * (n * (E_log_beta - LOG_2PI) - E_beta * squares - dim)
    assert float(state.log_lik) == pytest.approx(log_lik, rel=1e-11)
    # Likelihood integrated over theta by least squares, then over beta on a grid.
    log_beta = np.linspace(-12, 8, 20_001)
    values = 0.5 * (n - dim) * (log_beta - LOG_2PI) - 0.5 * np.exp(log_beta) * squares
    values += 0.5 * np.linalg.slogdet(law.cov.numpy())[1] + log_beta
    values += stats.gamma.logpdf(np.exp(log_beta), 1.2, scale=1 / 0.4)
    evidence_on_grid = special.logsumexp(values) + math.log(log_beta[1] - log_beta[0])
    assert bound == pytest.approx(evidence_on_grid, abs=1e-8)


def test_flat_is_the_limit_of_a_wide_prior_up_to_its_normaliser(rng):
    problem = _problem(rng, 12, 3)
    statistics = problem.statistics()
    flat = climb.evaluate(statistics, _flat_prior(3), torch.zeros(1, 1, dtype=torch.float64))
    # a prior N(0, (beta alpha)^-1) still has beta^(p/2): take it out of the shape of q(beta)
    wide = climb.evaluate(statistics, Prior(1.2 - 1.5, _t([0.4]), None), _t([[1e-12]]))
    assert float(flat.noise_rate) == pytest.approx(float(wide.noise_rate), rel=1e-9)
    torch.testing.assert_close(flat.weights.norm, wide.weights.norm, rtol=1e-9, atol=0.0)


# -- the climb ------------------------------------------------------------------------------------


def _climb(update, statistics, prior, alpha, n_passes=30):
    """Bounds of plain coordinate ascent with `update` for q(alpha)."""
    bounds = []
    for _ in range(n_passes):
        state = climb.evaluate(statistics, prior, alpha)
        bounds.append(float(state.bound))
        alpha = update(statistics, prior, state)
    return np.array(bounds)


def _assert_never_falls(bounds):
    assert (np.diff(bounds) >= -1e-11 * np.abs(bounds[1:]).clip(1.0)).all()


@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(2, 15),
    p=st.integers(1, 12),
    groups=st.sampled_from(["shared", "own", "groups"]),
    intercept=st.booleans(),
    log_noise=st.floats(-5.0, 2.0),
    log_alpha=st.floats(-6.0, 6.0),
    log_prior=st.floats(-6.0, 0.0),
)
def test_the_bound_never_falls(seed, n, p, groups, intercept, log_noise, log_alpha, log_prior):
    problem = _problem(np.random.default_rng(seed), n, p, intercept, 10**log_noise)
    statistics = problem.statistics()
    group = None
    if groups == "groups" and p > 2:
        group = torch.arange(p) // 3
    n_groups = {"shared": 1, "own": p, "groups": p if group is None else -(-p // 3)}[groups]
    rate = torch.full((n_groups,), 10**log_prior, dtype=torch.float64)
    prior = Prior(10**log_prior, _t([10**log_prior]), WeightPrior(10**log_prior, rate, group))
    alpha = torch.full((1, n_groups), 10**log_alpha, dtype=torch.float64)
    _assert_never_falls(_climb(climb.coordinate_update, statistics, prior, alpha))
    state = climb.evaluate(statistics, prior, alpha)
    for _ in range(20):
        better = climb.improve(statistics, prior, state, 1e-9)
        _assert_never_falls(np.array([float(state.bound), float(better.bound)]))
        state = better


def test_the_monotonicity_check_can_fail(rng):
    """A q(alpha) that forgets the posterior variance of the weights is caught."""

    def wrong_update(statistics, prior, state):
        scale = climb.noise_shape(statistics, prior) / state.noise_rate[:, None]
        size = climb.group_size(statistics, prior, state.alpha)
        above = 2 * prior.weight.shape + size
        return above / (2 * prior.weight.rate + scale * state.weights.norm)

    problem, prior, alpha = _case(rng, 12, 3, "own", True)
    statistics, top = problem.statistics(), alpha[None]
    for _ in range(100):
        top = climb.coordinate_update(statistics, prior, climb.evaluate(statistics, prior, top))
    _assert_never_falls(_climb(climb.coordinate_update, statistics, prior, top))
    with pytest.raises(AssertionError):
        _assert_never_falls(_climb(wrong_update, statistics, prior, top))


@pytest.mark.parametrize("groups", ["shared", "own", "groups"])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_newton_and_coordinate_ascent_share_their_fixed_point(n, p, groups, rng):
    problem, prior, alpha = _case(rng, n, p, groups, True)
    statistics = problem.statistics()
    state = climb.evaluate(statistics, prior, alpha[None])
    for _ in range(200):
        state = climb.improve(statistics, prior, state, 0.0)
    plain = climb.coordinate_update(statistics, prior, state)
    torch.testing.assert_close(plain, state.alpha, rtol=1e-6, atol=0.0)


def test_newton_is_quadratic_for_a_shared_precision(rng):
    problem, prior, alpha = _case(rng, 12, 3, "shared", True)
    statistics = problem.statistics()
    errors = []
    for _ in range(6):
        state = climb.evaluate(statistics, prior, alpha[None])
        alpha = climb.newton_update(statistics, prior, state)[0]
        errors.append(abs(float((alpha / state.alpha[0]).log())))
    assert errors[-1] < 1e-13


def test_several_outputs_are_separate_problems(rng):
    first = _problem(rng, 12, 3)
    second = first._replace(y=rng.normal(size=(12, 1)))
    both = first._replace(y=np.hstack([first.y, second.y]))
    prior = _prior(3)
    two = prior._replace(noise_rate=_t([0.4, 0.4]))
    alpha = _t(rng.gamma(2.0, size=(2, 3)))
    state = climb.improve(
        both.statistics(), two, climb.evaluate(both.statistics(), two, alpha), 0.0
    )
    for m, problem in enumerate([first, second]):
        statistics = problem.statistics()
        alone = climb.evaluate(statistics, prior, alpha[m : m + 1])
        alone = climb.improve(statistics, prior, alone, 0.0)
        assert float(state.bound[m]) == pytest.approx(float(alone.bound), rel=1e-12)


# -- the paths through linear algebra -------------------------------------------------------------


def _by_gram(x, y, intercept):
    return _reduce(reduction._multiply, x, y, intercept)


def _by_svd(x, y, intercept):
    return _reduce(reduction._hold, x, y, intercept)


def _reduce(collect, x, y, intercept):
    one = torch.ones(x.n_features + y.n_features, dtype=torch.float64)
    found = collect(x, y, intercept)
    return reduction.reduce_to_units(found, x, y, shift=torch.zeros_like(one), scale=one)


@pytest.mark.parametrize("intercept", [True, False])
def test_both_reductions_give_the_same_statistics(intercept, rng):
    problem = _problem(rng, 20, 4, intercept)
    rows = [
        Rows(a, Affine(np.zeros(a.shape[1]), np.ones(a.shape[1])), torch.device("cpu"), problem.s)
        for a in (problem.X, problem.y)
    ]
    by_gram = _by_gram(*rows, intercept)
    by_svd = _by_svd(*rows, intercept)
    torch.testing.assert_close(by_gram.spectrum, by_svd.spectrum, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(by_gram.residual, by_svd.residual, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(
        by_gram.basis @ (by_gram.target * by_gram.spectrum.sqrt())[0],
        by_svd.basis @ (by_svd.target * by_svd.spectrum.sqrt())[0],
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("spoil", ["nothing", "twins", "constant"])
def test_few_rows_by_their_products_only_if_these_are_exact(intercept, spoil, rng, monkeypatch):
    problem = _problem(rng, 20, 60, intercept)
    if spoil == "twins":
        problem.X[1] = problem.X[0] + 1e-5 * problem.X[1]
    if spoil == "constant":
        problem.X[:, 7] = 0.0
    slow = problem.statistics()
    calls = []
    axes = reduction._axes
    monkeypatch.setattr(reduction, "_axes", lambda rows: calls.append(0) or axes(rows))
    monkeypatch.setattr(reduction, "_SMALL", 0)
    fast = problem.statistics()
    assert bool(calls) == (spoil == "twins")
    torch.testing.assert_close(fast.spectrum, slow.spectrum, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(fast.residual, slow.residual, rtol=0.0, atol=1e-20)
    torch.testing.assert_close(
        (fast.target * fast.spectrum.rsqrt()) @ fast.basis.T,
        (slow.target * slow.spectrum.rsqrt()) @ slow.basis.T,
        rtol=1e-9,
        atol=1e-11,
    )
    eye = fast.basis.T @ fast.basis
    torch.testing.assert_close(eye, torch.eye(len(eye), dtype=eye.dtype), rtol=0.0, atol=1e-11)


@pytest.mark.parametrize(("n", "p", "solver"), [(12, 3, "cholesky"), (4, 7, "few_rows")])
def test_fast_solvers_equal_the_singular_value_decomposition(n, p, solver, rng):
    statistics = _problem(rng, n, p).statistics()
    alpha = _t(rng.gamma(2.0, size=(2, p)))
    statistics = statistics._replace(
        target=statistics.target.expand(2, -1), residual=statistics.residual.expand(2)
    )
    fast = getattr(weights, f"_solve_{solver}")(statistics, alpha)
    for a, b in zip(fast, weights._solve_svd(statistics, alpha), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_many_features_few_rows_equals_the_padded_problem(rng):
    """Rows of weight zero change nothing but the path: the p > n solvers meet the p < n ones."""
    few = _problem(rng, 4, 7)
    filler = rng.normal(size=(10, 7))
    many = Problem(
        np.vstack([few.X, filler]),
        np.vstack([few.y, filler[:, :1]]),
        np.concatenate([few.s, np.zeros(10)]),
        True,
    )
    prior, alpha = _prior(7), _t(rng.gamma(2.0, size=(1, 7)))
    a, b = (climb.evaluate(problem.statistics(), prior, alpha) for problem in (few, many))
    assert float(a.bound) == pytest.approx(float(b.bound), rel=1e-10)


def test_collinear_columns_with_hardly_any_prior_are_finite(rng):
    X = rng.normal(size=(30, 3))
    problem = Problem(np.hstack([X, X]), X[:, :1], np.ones(30), True)
    alpha = torch.full((1, 6), 1e-17, dtype=torch.float64)
    for value in weights.solve(problem.statistics(), alpha):
        assert value.isfinite().all()


def _near_twins(rng, gap):
    """Two columns that differ by `gap`, so that the rows have a condition number of 1 / gap."""
    problem = _problem(rng, 30, 4)
    problem.X[:, 1] = problem.X[:, 0] + gap * rng.normal(size=30)
    return problem


def test_a_prior_that_the_rows_outweigh_takes_the_slow_exact_way(rng, monkeypatch):
    statistics = _near_twins(rng, 1e-5).statistics()
    alpha = torch.full((1, 4), 1e-10, dtype=torch.float64)
    exact = weights._solve_svd(statistics, alpha)
    torch.testing.assert_close(weights.solve(statistics, alpha).norm, exact.norm, rtol=1e-9, atol=0)
    monkeypatch.setattr(weights, "EXTREME", math.inf)
    error = (weights.solve(statistics, alpha).norm / exact.norm - 1.0).abs().max()
    assert error > 1e-8


def test_refinement_keeps_the_digits_of_ill_conditioned_coefficients(rng):
    """The Gram matrix alone loses digits with the square of the condition number."""
    noisy = _near_twins(rng, 1e-5)
    perfect = noisy._replace(y=noisy.X @ rng.normal(size=(4, 1)))

    def reduce(problem, by):
        units = Affine(np.zeros(4), np.ones(4)), Affine(np.zeros(1), np.ones(1))
        x, y = (
            Rows(array, affine, torch.device("cpu"), problem.s)
            for array, affine in zip((problem.X, problem.y), units, strict=True)
        )
        statistics = by(x, y, True)
        coef = statistics.basis @ (statistics.target[0] / statistics.spectrum.sqrt())
        return coef, float(statistics.residual)

    coef, _ = reduce(noisy, _by_gram)
    torch.testing.assert_close(coef, reduce(noisy, _by_svd)[0], rtol=1e-8, atol=0.0)
    assert reduce(perfect, _by_gram)[1] < 1e-26


def test_residuals_keep_their_digits_at_r2_of_one(rng):
    """yy - h'w would return rounding of order 1e-16 yy, ten times the true residual here."""
    X = rng.normal(size=(200, 5)) + 100.0
    ones = np.hstack([np.ones((200, 1)), X])
    noise = rng.normal(size=200)
    noise -= ones @ np.linalg.lstsq(ones, noise, rcond=None)[0]
    noise *= 1e-7 / np.linalg.norm(noise)
    y = (X - X.mean(0)) @ rng.normal(size=5)
    scale = np.linalg.norm(y)
    problem = Problem(X, (y / scale + noise)[:, None], np.ones(200), True)
    assert float(problem.statistics().residual) == pytest.approx(1e-14, rel=1e-5)


# -- the horseshoe --------------------------------------------------------------------------------


class Scales(NamedTuple):
    """Shape and rate of each gamma law of the horseshoe."""

    local: tuple
    a: tuple
    shared: tuple
    xi: tuple


def _scales(prior, state):
    """What the two published means say about the four laws."""
    tau0, unit = prior.weight
    p, g = len(unit), state.scale[0]
    local = state.alpha[0] / g / unit
    one = torch.ones_like(local)
    shape = _t((p + 1) / 2)
    return Scales((one, 1 / local), (one, 1 + local), (shape, shape / g), (_t(1.0), tau0**-2 + g))


def _horseshoe_bound(problem, prior, law, scales):
    """E_q log p - E_q log q, term by term, for any parameters of q."""
    tau0, unit = prior.weight

    def moments(shape, rate):
        return shape / rate, torch.digamma(shape) - rate.log()

    def log_gamma(x, shape, rate):
        """E log Gam(x | shape, rate) for a random rate: pairs of E and E log."""
        shape = _t(shape)
        return shape * rate[1] - torch.lgamma(shape) + (shape - 1) * x[1] - rate[0] * x[0]

    local, a, shared, xi = (moments(*scale) for scale in scales)
    alpha = local[0] * shared[0] * unit
    known = _oracle_bound(problem, prior._replace(weight=None), law, alpha)
    # the oracle of known precisions took log E for E log
    bound = known + 0.5 * (local[1] + shared[1] + unit.log() - alpha.log()).sum()
    tau = _t(tau0**-2)
    bound += (log_gamma(local, 0.5, a) + log_gamma(a, 0.5, (_t(1.0), _t(0.0)))).sum()
    bound += log_gamma(shared, 0.5, xi) + log_gamma(xi, 0.5, (tau, tau.log()))
    return bound + sum(_gamma_entropy(*scale).sum() for scale in scales)


def _horseshoe_case(rng, n, p, intercept):
    problem = _problem(rng, n, p, intercept)
    prior = Prior(1.2, _t([0.4]), HorseshoePrior(0.7, _t(np.linspace(1.0, 3.0, p))))
    scale = _t(rng.gamma(2.0, size=1))
    alpha = scale[:, None] * _t(rng.gamma(2.0, size=(1, p)))
    return problem, prior, alpha, scale


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), [*SHAPES, (12, 1)])
def test_horseshoe_bound_is_the_sum_of_its_terms_and_climbs_to_its_top(n, p, intercept, rng):
    problem, prior, alpha, scale = _horseshoe_case(rng, n, p, intercept)
    statistics = problem.statistics()
    state = climb.evaluate(statistics, prior, alpha, scale)
    bounds = []
    for passes in [0, 1, 400]:
        for _ in range(passes):
            state = climb.improve(statistics, prior, state, 0.0)
            bounds.append(float(state.bound))
        law = _best_law(problem, prior._replace(weight=None), state.alpha[0])
        expected = _horseshoe_bound(problem, prior, law, _scales(prior, state))
        assert float(state.bound) == pytest.approx(float(expected), rel=1e-10)
    _assert_never_falls(bounds)
    # At the top no parameter of any factor of q has a slope left, relative to its size.
    leaves = [
        value.detach().clone().requires_grad_()
        for value in [*law[:4], *sum(_scales(prior, state), ())]
    ]
    scales = Scales(*zip(leaves[4::2], leaves[5::2], strict=True))
    top = _horseshoe_bound(problem, prior, Law(*leaves[:4], None, None), scales)
    for leaf, gradient in zip(leaves, torch.autograd.grad(top, leaves), strict=True):
        assert (gradient * leaf).abs().max() < 1e-5


def test_horseshoe_gradient_vanishes_at_each_update(rng):
    """One round of updates by hand, with the slope of each factor just after its update."""
    problem, prior, alpha, scale = _horseshoe_case(rng, 12, 3, True)
    state = climb.evaluate(problem.statistics(), prior, alpha, scale)
    law = _best_law(problem, prior._replace(weight=None), alpha[0])
    scales = _scales(prior, state)
    moment = climb.second_moment(problem.statistics(), prior, state)[0] * prior.weight.unit

    def assert_flat(scales, names):
        for name in names:
            pair = [value.detach().clone().requires_grad_() for value in getattr(scales, name)]
            bound = _horseshoe_bound(problem, prior, law, scales._replace(**{name: tuple(pair)}))
            for gradient in torch.autograd.grad(bound, pair):
                assert gradient.abs().max() < 1e-9

    assert_flat(scales, ["a", "xi"])  # the best ones given the others, always
    E_a = 1 / scales.a[1]
    local = (scales.local[0], E_a + 0.5 * scale * moment)
    assert_flat(scales._replace(local=local), ["local"])
    E_local = 1 / local[1]
    rate = 1 / scales.xi[1] + 0.5 * (E_local * moment).sum()
    assert_flat(scales._replace(local=local, shared=(scales.shared[0], rate)), ["shared"])
    # the implementation's first round is this one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(climb.horseshoe, "_INNER", 1)
        new, shared = climb.horseshoe.update(
            prior.weight, alpha, scale, moment[None] / prior.weight.unit
        )
    torch.testing.assert_close(shared[0], scales.shared[0] / rate)
    torch.testing.assert_close(new[0], E_local * shared * prior.weight.unit)


def test_horseshoe_bound_by_monte_carlo(rng):
    problem, prior, alpha, scale = _horseshoe_case(rng, 12, 3, True)
    state = climb.evaluate(problem.statistics(), prior, alpha, scale)
    law = _best_law(problem, prior._replace(weight=None), alpha[0])
    scales, size = _scales(prior, state), 40_000
    laws = [stats.gamma(s.numpy(), scale=1 / r.numpy()) for s, r in scales]
    local, a, shared, xi = (
        scale_law.rvs((size, 3) if i < 2 else size, random_state=rng)
        for i, scale_law in enumerate(laws)
    )
    law_beta = stats.gamma(float(law.shape), scale=1 / float(law.rate))
    beta = law_beta.rvs(size, random_state=rng)
    chol, z = np.linalg.cholesky(law.cov.numpy()), rng.normal(size=(size, 4))
    theta = law.mean.numpy() + (z @ chol.T) / np.sqrt(beta)[:, None]
    log_q = law_beta.logpdf(beta) + stats.norm.logpdf(z).sum(1) + 2 * np.log(beta)
    log_q += laws[0].logpdf(local).sum(1) + laws[1].logpdf(a).sum(1) - np.log(np.diag(chol)).sum()
    log_q += laws[2].logpdf(shared) + laws[3].logpdf(xi)
    tau0, unit = prior.weight
    sd = beta[:, None] ** -0.5
    Z, y = problem.design().numpy(), problem.y[:, 0]
    log_p = (problem.s * stats.norm.logpdf(y, theta @ Z.T, sd)).sum(1)
    precision = local * shared[:, None] * unit.numpy()
    log_p += stats.norm.logpdf(theta[:, 1:], 0, sd / np.sqrt(precision)).sum(1)
    log_p += stats.gamma.logpdf(beta, prior.noise_shape, scale=1 / float(prior.noise_rate))
    log_p += stats.gamma.logpdf(local, 0.5, scale=1 / a).sum(1)
    log_p += stats.gamma.logpdf(a, 0.5).sum(1)
    log_p += stats.gamma.logpdf(shared, 0.5, scale=1 / xi)
    log_p += stats.gamma.logpdf(xi, 0.5, scale=tau0**2)
    draws = log_p - log_q
    assert abs(draws.mean() - float(state.bound)) < Z_LIMIT * draws.std() / math.sqrt(size)


def test_the_auxiliary_laws_give_half_cauchy_scales(rng):
    """The hierarchy of the module's docstring, drawn from the top."""
    a = stats.gamma(0.5, scale=0.7**2).rvs(20_000, random_state=rng)
    precision = stats.gamma(0.5, scale=1 / a).rvs(random_state=rng, size=20_000)
    law = stats.halfcauchy(scale=0.7)
    assert stats.kstest(precision**-0.5, law.cdf).pvalue > 1e-6


# -- rows in blocks -------------------------------------------------------------------------------


def _summary(problem, origin):
    """Rows as they come from the door: float64, less `origin`."""
    D = problem.X.shape[1]

    def rows(array, shift):
        affine = Affine(shift, np.ones(len(shift)))
        return Rows(array, affine, torch.device("cpu"), problem.s)

    return stream.summarise(
        rows(problem.X, origin[:D]),
        rows(problem.y, origin[D:]),
        _t(origin),
        intercept=problem.intercept,
    )


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), [(40, 3), (5, 8)])
def test_merged_summaries_are_those_of_all_rows(intercept, n, p, rng, monkeypatch):
    problem = _problem(rng, n, p, intercept)
    problem = problem._replace(y=rng.normal(size=(n, 2)) + 50.0)
    z = np.hstack([problem.X, problem.y])
    cuts = [0, 1, 3, n]
    monkeypatch.setattr(stream, "block_rows", lambda floats, device: 2)
    summary = None
    for first, last in reversed(list(pairwise(cuts))):
        part = Problem(*(array[first:last] for array in problem[:3]), intercept)
        block = _summary(part, z[first] if intercept else np.zeros(p + 2))
        summary = block if summary is None else stream.merge(summary, block)
    mean = np.average(z, axis=0, weights=problem.s) if intercept else np.zeros(p + 2)
    centred = z - mean
    assert summary.total == problem.s.sum()
    np.testing.assert_allclose(summary.origin + summary.mean, mean, rtol=1e-13)
    scatter = centred.T @ (problem.s[:, None] * centred)
    np.testing.assert_allclose(
        summary.root.T @ summary.root, scatter, rtol=1e-11, atol=1e-11 * np.abs(scatter).max()
    )
    spread = np.sqrt(np.diag(scatter) / problem.s.sum())
    np.testing.assert_allclose(stream.spread(summary), spread, rtol=1e-12)
    assert len(summary.root) <= max(p + 2, n)

    units = (Affine(mean[:p], np.full(p, 2.0)), Affine(mean[p:], np.full(2, 4.0)))
    merged = stream.reduce_summary(summary, *units, intercept=intercept)
    rows = [
        Rows(array, unit, torch.device("cpu"), problem.s)
        for array, unit in zip((problem.X, problem.y), units, strict=True)
    ]
    direct = reduction.reduce_rows(*rows, intercept=intercept)
    tight = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(merged.spectrum, direct.spectrum, **tight)
    torch.testing.assert_close(merged.residual, direct.residual, rtol=1e-9, atol=1e-20)
    slope = [(s.basis * s.spectrum.rsqrt()) @ s.target.T for s in (merged, direct)]
    torch.testing.assert_close(*slope, **tight)
    # and back: what is restored reduces to the same numbers
    again = stream.restore_summary(merged, *units)
    again = stream.reduce_summary(again, *units, intercept=intercept)
    for name in ("spectrum", "residual", "centre_x", "centre_y"):
        torch.testing.assert_close(getattr(again, name), getattr(merged, name), **tight)


def test_a_merged_residual_keeps_its_digits_at_r2_of_one(rng):
    """E[y^2] - E[y]^2 would lose them twice: by the offset, and by the fit."""
    X = rng.normal(size=(60, 3)) + 1e4
    noise = 1e-9 * rng.normal(size=60)
    centred = X - X.mean(0)
    y = (centred @ [1.0, -2.0, 0.5] + noise)[:, None]
    origin = np.hstack([X, y])[0]
    parts = [
        Problem(X[i : i + 7], y[i : i + 7], np.ones(len(X[i : i + 7])), True)
        for i in range(0, 60, 7)
    ]
    summary = _summary(parts[0], origin)
    for part in parts[1:]:
        summary = stream.merge(summary, _summary(part, origin))
    units = Affine(X.mean(0), np.ones(3)), Affine(y.mean(0), np.ones(1))
    merged = stream.reduce_summary(summary, *units, intercept=True)
    Z = np.hstack([np.ones((60, 1)), centred])
    exact = noise - Z @ np.linalg.lstsq(Z, noise, rcond=None)[0]
    assert float(merged.residual) == pytest.approx(exact @ exact, rel=1e-4)


# -- predictions ----------------------------------------------------------------------------------


def _posterior(problem, prior, alpha):
    statistics = problem.statistics()
    state = climb.evaluate(statistics, prior, alpha[None])
    return predictive.make_posterior(statistics, prior, state)


@pytest.mark.parametrize(("n", "p", "groups", "intercept"), CASES)
def test_predictions_equal_dense_algebra(n, p, groups, intercept, rng):
    problem, prior, alpha = _case(rng, n, p, groups, intercept)
    posterior = _posterior(problem, prior, alpha)
    law = _best_law(problem, prior, alpha)
    x, y = rng.normal(size=(5, p)), _t(rng.normal(size=(5, 1)))
    Z = problem._replace(X=x).design()
    x = _t(x)
    mean = Z @ law.mean
    leverage = Z @ law.cov @ Z.T
    torch.testing.assert_close(predictive.mean(posterior, x)[:, 0], mean)
    cov = law.rate / (law.shape - 1) * (torch.eye(5) + leverage)
    torch.testing.assert_close(predictive.covariance(posterior, x)[0], cov)
    torch.testing.assert_close(predictive.variance(posterior, x)[:, 0], cov.diagonal())
    E_log_beta = torch.digamma(law.shape) - law.rate.log()
    expected = 0.5 * (
        E_log_beta - LOG_2PI - law.shape / law.rate * (y[:, 0] - mean) ** 2 - leverage.diagonal()
    )
    torch.testing.assert_close(predictive.local_bound(posterior, x, y)[:, 0], expected)
    scale = (law.rate / law.shape * (1 + leverage.diagonal())).sqrt().numpy()
    np.testing.assert_allclose(predictive.scale(posterior, x)[:, 0], scale, rtol=1e-10)
    t = stats.t.logpdf(y[:, 0].numpy(), 2 * float(law.shape), mean.numpy(), scale)
    np.testing.assert_allclose(predictive.log_predictive(posterior, x, y)[:, 0], t, rtol=1e-10)


def test_predictive_density_integrates_to_one(rng):
    problem, prior, alpha = _case(rng, 12, 3, "own", True)
    posterior = _posterior(problem, prior, alpha)
    x = _t(rng.normal(size=(1, 3)))

    def density(y):
        return float(predictive.log_predictive(posterior, x, _t([[y]])).exp())

    assert integrate.quad(density, -np.inf, np.inf)[0] == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_draws_have_the_predictive_moments(n, p, rng):
    problem, prior, alpha = _case(rng, n, p, "own", True)
    posterior = _posterior(problem, prior, alpha)
    x = _t(rng.normal(size=(3, p)))
    n_draws = 40_000
    lines = predictive.draw_lines(posterior, n_draws, rng)
    draws = predictive.draw_responses(posterior, lines, x, rng, rng)[:, 0].numpy()
    centred = draws - predictive.mean(posterior, x).numpy()
    error = centred.std(axis=1) / math.sqrt(n_draws)
    assert (np.abs(centred.mean(axis=1)) < Z_LIMIT * error).all()
    cov = predictive.covariance(posterior, x)[0].numpy()
    products = centred[:, None] * centred[None]
    error = products.std(axis=-1) / math.sqrt(n_draws)
    assert (np.abs(products.mean(axis=-1) - cov) < Z_LIMIT * error).all()
    # the whole law, not two moments: probability integral transform of one row
    scale = math.sqrt(float(posterior.noise_rate / posterior.noise_shape)) * math.sqrt(
        1 + float(predictive.leverage(posterior, x)[0, 0])
    )
    uniform = stats.t.cdf(centred[0] / scale, 2 * float(posterior.noise_shape))
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6
