"""Rows with missing cells against oracles: loops with dense inverses, quadrature, autograd."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import digamma, gammaln, logsumexp

from skvi.models.mixture import bound, missing, start
from skvi.models.mixture.bound import Posterior, State
from skvi.models.mixture.components import COMPONENTS, Moments
from skvi.models.mixture.missing import Cells, IncompleteRows
from skvi.models.mixture.weights import WEIGHTS
from skvi.runtime.blocks import Affine, Rows

from . import by_row

SHAPES = list(COMPONENTS)
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_law = pytest.mark.parametrize("law", list(WEIGHTS))
CPU = torch.device("cpu")


def _t(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def _holed(X, share, rng):
    """Make holes, but leave one complete row, one empty row, and one cell in every other."""
    holes = rng.uniform(size=X.shape) < share
    holes[np.arange(len(X)), rng.integers(X.shape[1], size=len(X))] = False
    holes[0], holes[1] = False, True
    return np.where(holes, np.nan, X)


def _cells(X):
    observed = ~np.isnan(X)
    return Cells(_t(np.where(observed, X, 0.0)), torch.from_numpy(observed))


def _problem(shape, law="dirichlet_process", *, D=3, K=3, N=30, seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(D, D))
    X = rng.normal(size=(N, D)) @ mix + 2.0 * rng.normal(size=(3, D))[rng.integers(3, size=N)]
    root = rng.normal(size=(D, D + 2))
    covariance = {
        "full": root @ root.T,
        "tied": root @ root.T,
        "diag": rng.gamma(3.0, size=D),
        "spherical": np.float64(rng.gamma(3.0)),
    }[shape]
    cls = COMPONENTS[shape]
    m0, kappa0, nu0 = rng.normal(size=D), 0.7, D + 0.6
    components = cls(
        _t(m0)[None], _t([kappa0]), _t([nu0]),
        cls.factor(cls.prior_inverse_scale(_t(covariance), D)),
    )  # fmt: skip
    weight = rng.integers(1, 4, size=N).astype(float)
    holed = _holed(X, share, rng)
    affine = Affine(np.zeros(D), np.ones(D))
    return SimpleNamespace(
        X=X, holed=holed, weight=weight, K=K, D=D, N=N, cls=cls, shape=shape,
        m0=m0, kappa0=kappa0, nu0=nu0, covariance=covariance, affine=affine,
        prior=Posterior(WEIGHTS[law].prior(K, 0.9, CPU), components),
        rows=IncompleteRows(holed, affine, CPU, weight),
    )  # fmt: skip


def _climb(problem, n_steps, kind="k-means++", seed=0):
    """Run coordinate ascent; return the last state and all bounds."""
    rng = np.random.default_rng(seed)
    moments = start.start(kind, problem.rows, problem.cls, problem.K, rng)
    step = bound.coordinate_ascent(problem.prior, problem.rows)
    state, values = State(problem.prior, moments), []
    for _ in range(n_steps):
        state, value = step(state)
        values.append(value)
    return state, values


def _precision(components, k):
    """Return nu_k, W_k and E log|Lambda_k| with plain NumPy."""
    dof = float(components.dof.expand(len(components.mean))[k])
    W = np.linalg.inv(components.inverse_scale().expand(len(components.mean), -1, -1)[k].numpy())
    D = len(W)
    digammas = sum(digamma((dof - d) / 2) for d in range(D))
    return dof, W, digammas + D * math.log(2) + np.linalg.slogdet(W)[1]


def _augmented(components, k, row, mean_mis, cov_mis):
    """``E_q[log N(x | theta_k)] + H[q(x_mis)]`` for any normal q(x_mis), term by term."""
    dof, W, E_log_det = _precision(components, k)
    hole = np.isnan(row)
    x = row.copy()
    x[hole] = mean_mis
    d = x - components.mean[k].numpy()
    square = d @ W @ d + np.trace(W[np.ix_(hole, hole)] @ cov_mis)
    D, kappa = len(row), float(components.kappa[k])
    energy = 0.5 * (E_log_det - D * math.log(2 * math.pi) - D / kappa - dof * square)
    n = hole.sum()
    return energy + 0.5 * (n * (1 + math.log(2 * math.pi)) + np.linalg.slogdet(cov_mis)[1])


def _best_q(components, k, row):
    """Mean and covariance of the best q(x_mis), from the precision matrix."""
    dof, W, _ = _precision(components, k)
    hole = np.isnan(row)
    m = components.mean[k].numpy()
    inverse = np.linalg.inv(W[np.ix_(hole, hole)])
    mean = m[hole] - inverse @ W[np.ix_(hole, ~hole)] @ (row[~hole] - m[~hole])
    return mean, inverse / dof


def _gamma_log_prob(components, k, row):
    """Sum over the observed cells of E[log N(x_d | mu_kd, 1 / lambda_kd)]."""
    K, D = components.mean.shape
    shapes, rates = (p.reshape(K, -1).expand(K, D)[k].numpy() for p in components.gamma())
    kappa = components.kappa.reshape(K, -1).expand(K, D)[k].numpy()
    mean = components.mean[k].numpy()
    total = 0.0
    for d in np.flatnonzero(~np.isnan(row)):
        E_log = digamma(shapes[d]) - math.log(rates[d])
        square = 1 / kappa[d] + shapes[d] / rates[d] * (row[d] - mean[d]) ** 2
        total += 0.5 * (E_log - math.log(2 * math.pi) - square)
    return total


@every_shape
def test_local_bound_equals_the_sum_of_its_terms(shape):
    problem = _problem(shape)
    components = _climb(problem, 5)[0].posterior.components
    ours = missing.E_log_prob(components, _cells(problem.holed))
    rng = np.random.default_rng(1)
    for n, row in enumerate(problem.holed):
        if n == 1:  # nothing observed
            continue
        for k in range(problem.K):
            if shape in {"diag", "spherical"}:
                expected = _gamma_log_prob(components, k, row)
            else:
                mean, cov = _best_q(components, k, row)
                expected = _augmented(components, k, row, mean, cov)
                if np.isnan(row).any():  # any other q gives a lower bound
                    step = 0.3 * rng.normal(size=mean.size)
                    assert _augmented(components, k, row, mean + step, cov) < expected
                    scale = math.exp(0.3 * rng.choice([-1, 1]))
                    assert _augmented(components, k, row, mean, scale * cov) < expected
            np.testing.assert_allclose(ours[k, n], expected, rtol=1e-10)


@pytest.mark.parametrize("shape", ["full", "tied"])
def test_augmented_bound_is_the_monte_carlo_mean_of_log_p_minus_log_q(shape):
    """Draw theta and x_mis from q and average log N(x | theta) - log q(x_mis)."""
    problem = _problem(shape)
    components = _climb(problem, 5)[0].posterior.components
    row, k, S = problem.holed[2].copy(), 0, 20_000
    row[:2], row[2] = np.nan, 0.4
    dof, W, _ = _precision(components, k)
    mean, cov = _best_q(components, k, row)
    rng = np.random.default_rng(5)
    Lambda = stats.wishart(df=dof, scale=W).rvs(S, random_state=rng)
    chol = np.linalg.cholesky(Lambda)
    noise = np.linalg.solve(np.swapaxes(chol, 1, 2), rng.standard_normal((S, problem.D, 1)))
    mu = components.mean[k].numpy() + noise[:, :, 0] / math.sqrt(float(components.kappa[k]))
    x = np.tile(row, (S, 1))
    x[:, :2] = rng.multivariate_normal(mean, cov, size=S)
    d = x - mu
    log_p = 0.5 * (
        np.linalg.slogdet(Lambda)[1]
        - problem.D * math.log(2 * math.pi)
        - np.einsum("si,sij,sj->s", d, Lambda, d)
    )
    value = log_p - stats.multivariate_normal(mean, cov).logpdf(x[:, :2])
    expected = float(missing.E_log_prob(components, _cells(row[None]))[k, 0])
    # A normal deviate beyond 5 has probability 6e-7.
    assert abs(value.mean() - expected) < 5 * value.std() / math.sqrt(S)


@every_shape
def test_statistics_equal_the_loops(shape):
    problem = _problem(shape)
    posterior = _climb(problem, 5)[0].posterior
    components = posterior.components
    moments, local = bound.expectation(posterior, problem.rows)
    cells = _cells(problem.holed)
    resp = by_row.responsibilities(posterior, cells).numpy() * problem.weight
    resp[:, 1] = 0.0  # nothing observed
    K, D = problem.K, problem.D
    counts, seen = resp.sum(1), np.zeros((K, D))
    first, second = np.zeros((K, D)), np.zeros((K, D, D))
    for k in range(K):
        for n, row in enumerate(problem.holed):
            hole = np.isnan(row)
            seen[k] += resp[k, n] * ~hole
            d = row - moments.reference[k].numpy()
            extra = np.zeros((D, D))
            if shape in {"diag", "spherical"}:
                d = np.where(hole, 0.0, d)
            elif n != 1:
                mean, cov = _best_q(components, k, row)
                d[hole] = mean - moments.reference[k].numpy()[hole]
                extra[np.ix_(hole, hole)] = cov
            else:
                d[:] = 0.0
            first[k] += resp[k, n] * d
            second[k] += resp[k, n] * (np.outer(d, d) + extra)
    expected = {
        "full": second,
        "tied": second.sum(0)[None],
        "diag": np.diagonal(second, axis1=1, axis2=2),
        "spherical": np.trace(second, axis1=1, axis2=2),
    }[shape]
    np.testing.assert_allclose(moments.counts, counts, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.first, first, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(moments.second, expected, rtol=1e-8, atol=1e-9)
    if shape in {"diag", "spherical"}:
        np.testing.assert_allclose(moments.cells, seen, rtol=1e-10)
    scores = by_row.local_bound(posterior, cells)
    assert abs(float(scores[1])) < 1e-14
    np.testing.assert_allclose(local, problem.weight @ scores.numpy(), rtol=1e-12)


@every_shape
@every_law
@pytest.mark.parametrize("kind", ["k-means++", "kmeans", "random_from_data", "random"])
def test_the_bound_never_falls(shape, law, kind):
    problem = _problem(shape, law, N=40, K=5)
    values = _climb(problem, 40, kind)[1]
    assert np.diff(values).min() > -1e-12 * abs(values[-1])


def test_the_check_of_rises_can_fail():
    """Statistics without the covariance of the missing cells make the bound fall."""
    problem = _problem("full")
    state, values = _climb(problem, 60)
    moments = state.moments
    wrong = Moments(*moments[:3], 0.9 * moments.second)
    posterior = bound.maximisation(problem.prior, wrong)
    local = bound.expectation(posterior, problem.rows)[1]
    assert local - float(posterior.kl(problem.prior)) < values[-1] - 1e-3


@every_shape
@every_law
def test_gradient_vanishes_at_the_summit(shape, law):
    """At a fixed point the bound of the rows, labels and missing cells maximised, is stationary."""
    problem = _problem(shape, law, share=0.25)
    state, values = _climb(problem, 400)
    leaves = []

    def leaf(tensor):
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    tracked = state.posterior.map(leaf)
    local = by_row.local_bound(tracked, _cells(problem.holed))
    value = _t(problem.weight) @ local - tracked.kl(problem.prior)
    np.testing.assert_allclose(float(value.detach()), values[-1], rtol=1e-12)
    for gradient in torch.autograd.grad(value, leaves):
        if gradient.ndim == 3:  # the factor of Full and Tied has nothing above its diagonal
            gradient = gradient.tril()
        assert gradient.abs().max() < 1e-5


@every_shape
def test_rows_without_holes_are_served_alike(shape):
    problem = _problem(shape)
    posterior = _climb(problem, 5)[0].posterior
    ordinary = Rows(problem.X, problem.affine, CPU, problem.weight)
    other = IncompleteRows(problem.X, problem.affine, CPU, problem.weight)
    (a, bound_a), (b, bound_b) = (bound.expectation(posterior, rows) for rows in (ordinary, other))
    np.testing.assert_allclose(bound_b, bound_a, rtol=1e-12)
    after_a, after_b = (bound.maximisation(problem.prior, m).components for m in (a, b))
    for name in ("mean", "root"):
        np.testing.assert_allclose(getattr(after_b, name), getattr(after_a, name), rtol=1e-9)
    x, cells = _t(problem.X), _cells(problem.X)
    for function in (by_row.local_bound, lambda q, x: bound.log_predictive(q, problem.prior, x)):
        torch.testing.assert_close(function(posterior, cells), function(posterior, x))


@every_shape
def test_long_patterns_and_tight_components_are_served_alike(shape, monkeypatch):
    """Pieces of patterns, and centred rows where the products cancel, change nothing."""
    problem = _problem(shape, N=60)
    posterior = _climb(problem, 5)[0].posterior
    before = bound.expectation(posterior, problem.rows)
    monkeypatch.setattr(missing, "_LONGEST_PIECE", 2)
    monkeypatch.setattr("skvi.models.mixture.components._ILL", 0.0)
    fresh = dataclasses.replace(posterior.components)  # nothing is cached
    assert fresh.ill.numel() == problem.K
    after = bound.expectation(Posterior(posterior.weights, fresh), problem.rows)
    np.testing.assert_allclose(after[1], before[1], rtol=1e-11)
    components = [bound.maximisation(problem.prior, m).components for m, _ in (before, after)]
    for name in ("mean", "root", "kappa", "dof"):
        a, b = (getattr(c, name) for c in components)
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-10)


def _log_evidence_of_cells(p):
    """Log evidence of the observed cells in one component of Diag or Spherical, by quadrature.

    Given its precision, the cells of a feature are normal with covariance (I + 11'/kappa0)/lambda.
    """

    def log_given(log_lambda, d):
        x = p.holed[:, d]
        x = np.repeat(x[~np.isnan(x)], p.weight[~np.isnan(x)].astype(int)) - p.m0[d]
        n = x.size
        square = x @ x - x.sum() ** 2 / (p.kappa0 + n)
        log_det = math.log1p(n / p.kappa0)
        return 0.5 * (
            n * (log_lambda - math.log(2 * math.pi)) - log_det - math.exp(log_lambda) * square
        )

    def integral(features, shape, rate):
        def log_f(u):
            prior = shape * math.log(rate) - gammaln(shape) + shape * u - rate * math.exp(u)
            return prior + sum(log_given(u, d) for d in features)

        grid = np.linspace(-12, 8, 20_001)
        values = np.array([log_f(u) for u in grid])
        return logsumexp(values) + math.log(grid[1] - grid[0])

    if p.shape == "diag":
        return sum(integral([d], p.nu0 / 2, p.covariance[d] / 2) for d in range(p.D))
    return integral(range(p.D), p.D * p.nu0 / 2, p.D * p.covariance / 2)


@pytest.mark.parametrize("shape", ["diag", "spherical"])
def test_bound_of_one_component_is_the_exact_evidence_of_the_cells(shape):
    problem = _problem(shape, "dirichlet_distribution", K=1, N=12)
    value = _climb(problem, 3)[1][-1]
    np.testing.assert_allclose(value, _log_evidence_of_cells(problem), rtol=1e-9)
    prior = problem.prior.components
    moments, _ = bound.expectation(_climb(problem, 1)[0].posterior, problem.rows)
    found = float(prior.log_evidence(prior.update(moments)))
    np.testing.assert_allclose(found, value, rtol=1e-11)


@pytest.mark.parametrize("shape", ["full", "tied"])
def test_bound_lies_below_the_evidence_with_one_cell_integrated_out(shape):
    """For one component the complete bound is the evidence; integrate it over a missing cell."""
    problem = _problem(shape, "dirichlet_distribution", K=1, N=12)
    X = problem.X.copy()

    def log_evidence(value):
        X[4, 1] = value
        rows = Rows(X, problem.affine, CPU, problem.weight)
        moments = start.start("k-means++", rows, problem.cls, 1, np.random.default_rng(0))
        return bound.coordinate_ascent(problem.prior, rows)(State(problem.prior, moments))[1]

    problem.weight[4] = 1.0
    grid = np.linspace(-60, 60, 301)
    exact = logsumexp([log_evidence(u) for u in grid]) + math.log(grid[1] - grid[0])
    X[4, 1] = np.nan
    problem.rows = IncompleteRows(X, problem.affine, CPU, problem.weight)
    value = _climb(problem, 60)[1][-1]
    assert exact - 0.2 < value < exact


@every_shape
@every_law
def test_margins_and_conditionals_of_the_predictive_by_quadrature(shape, law):
    problem = _problem(shape, law, D=3)
    posterior = _climb(problem, 30)[0].posterior
    row = np.array([0.7, np.nan, -0.4])

    def log_density(row):
        return float(bound.log_predictive(posterior, problem.prior, _cells(np.atleast_2d(row))))

    # x = c + s tan u maps the fat tails to an interval
    u, weights = np.polynomial.legendre.leggauss(400)
    u, weights = u * math.pi / 2, weights * math.pi / 2
    centre, spread = 0.0, 2.0
    nodes = centre + spread * np.tan(u)
    weights = weights * spread / np.cos(u) ** 2

    full = np.tile(row, (nodes.size, 1))
    full[:, 1] = nodes
    density = bound.log_predictive(posterior, problem.prior, _cells(full)).exp().numpy()
    np.testing.assert_allclose(math.log(weights @ density), log_density(row), rtol=1e-7)
    mean, var = bound.conditional(posterior, problem.prior, _cells(row[None]))
    np.testing.assert_allclose(
        float(mean[0, 1]), weights @ (density * nodes) / (weights @ density), rtol=1e-5
    )
    assert mean[0, [0, 2]].tolist() == row[[0, 2]].tolist()
    assert var[0, [0, 2]].tolist() == [0.0, 0.0]

    # Two cells integrated out of three.
    two = np.array([0.7, np.nan, np.nan])
    table = np.tile(two, (nodes.size, 1))
    table[:, 1] = nodes
    margin = bound.log_predictive(posterior, problem.prior, _cells(table)).exp().numpy()
    np.testing.assert_allclose(math.log(weights @ margin), log_density(two), rtol=1e-7)
    assert abs(log_density(np.full(3, np.nan))) < 1e-12


@every_shape
@pytest.mark.parametrize("hole", [[1], [0, 1], [0, 2], [0, 1, 2]])
def test_conditional_variance_is_that_of_draws(shape, hole):
    """Draw the component, then the cells under its expected precision."""
    problem = _problem(shape, D=3)
    posterior = _climb(problem, 30)[0].posterior
    row = np.array([0.7, 0.2, -0.4])
    seen = [d for d in range(3) if d not in hole]
    row[hole] = np.nan
    mean, var = bound.conditional(posterior, problem.prior, _cells(row[None]))
    parts = []
    for law in (posterior.components, problem.prior.components):
        for k in range(len(law.mean)):
            K = len(law.mean)
            cov = law.covariances().numpy()
            if shape == "spherical":
                cov = cov[k] * np.eye(3)
            elif shape == "diag":
                cov = np.diag(cov[k])
            else:
                cov = np.broadcast_to(cov, (K, 3, 3))[k]
            m = law.mean[k].numpy()
            gain = cov[np.ix_(hole, seen)] @ np.linalg.inv(cov[np.ix_(seen, seen)])
            location = m[hole] + gain @ (row[seen] - m[seen])
            left = cov[np.ix_(hole, hole)] - gain @ cov[np.ix_(seen, hole)]
            parts.append((location, left.diagonal()))
    log_weight = bound._log_predictive_parts(posterior, problem.prior, _cells(row[None]))
    w = torch.softmax(log_weight[:, 0], 0).numpy()
    location, variance = np.array(parts).swapaxes(0, 1)  # (K + 1, holes) each
    expected = w @ location
    np.testing.assert_allclose(mean[0, hole], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(var[0, hole], w @ (variance + (location - expected) ** 2), rtol=1e-9)
    assert (var[0, seen] == 0.0).all()


@pytest.mark.parametrize("shape", ["diag", "spherical"])
@every_law
def test_predictive_integrates_to_one_where_features_have_their_own_counts(shape, law):
    problem = _problem(shape, law, D=1, K=2)
    problem.holed[1] = 0.5
    problem.rows = IncompleteRows(problem.holed, problem.affine, CPU, problem.weight)
    posterior = _climb(problem, 30)[0].posterior
    assert posterior.components.kappa.shape == (2, 1)

    def density(x):
        return float(bound.log_predictive(posterior, problem.prior, _t([[x]])).exp())

    total = integrate.quad(density, -np.inf, np.inf, limit=400, epsabs=1e-10)[0]
    assert total == pytest.approx(1.0, abs=1e-7)
    x, z = bound.sample(posterior.map(np.asarray), problem.prior.map(np.asarray), 50,
                        np.random.default_rng(0))  # fmt: skip
    assert x.shape == (50, 1)
    assert z.shape == (50,)
