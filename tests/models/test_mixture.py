"""The mixture against oracles that share no code with it.

The slow reference below writes the textbook formulas with loops over rows and components; SciPy
supplies the densities. Everything runs for each shape of the precision and each law of the
weights.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import betaln, digamma, gammaln, logsumexp, multigammaln
from sklearn.mixture import BayesianGaussianMixture

from skvi.models.mixture import active, bound, start
from skvi.models.mixture.bound import Posterior, State
from skvi.models.mixture.components import COMPONENTS, Full, Moments
from skvi.models.mixture.weights import WEIGHTS
from skvi.runtime.blocks import Affine, Rows, Workspace

from . import by_row

SHAPES = list(COMPONENTS)
WEIGHT_LAWS = list(WEIGHTS)
# Per Monte-Carlo check: a normal deviate beyond 5 has probability 6e-7.
Z_LIMIT = 5.0

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_law = pytest.mark.parametrize("law", WEIGHT_LAWS)


def _t(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def _problem(shape, law, *, D=2, K=3, N=12, seed=0, weighted=False):
    """A random prior, rows and responsibilities; nothing is at a special value."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D)
    root = rng.normal(size=(D, D + 2))
    covariance = {
        "full": root @ root.T,
        "tied": root @ root.T,
        "diag": rng.gamma(3.0, size=D),
        "spherical": np.float64(rng.gamma(3.0)),
    }[shape]
    hyper = SimpleNamespace(
        m0=rng.normal(size=D), kappa0=0.7, nu0=D + 0.6, covariance=covariance, a0=0.9
    )
    cls = COMPONENTS[shape]
    components = cls(
        _t(hyper.m0)[None],
        _t([hyper.kappa0]),
        _t([hyper.nu0]),
        cls.factor(cls.prior_inverse_scale(_t(covariance), D)),
    )
    weights = WEIGHTS[law].prior(K, hyper.a0, torch.device("cpu"))
    weight = rng.integers(1, 4, size=N).astype(float) if weighted else np.ones(N)
    resp = rng.dirichlet(np.ones(K), size=N)  # (N, K)
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"), weight)
    return SimpleNamespace(
        X=X, resp=resp, weight=weight, rows=rows, hyper=hyper, K=K, D=D, N=N,
        prior=Posterior(weights, components), shape=shape, law=law, cls=cls,
    )  # fmt: skip


def _update(problem):
    """Return the posterior from the problem's responsibilities, by the code under test."""
    reference = torch.zeros(problem.K, problem.D, dtype=torch.float64)
    x, resp = _t(problem.X), _t((problem.weight[:, None] * problem.resp).T)
    moments = problem.cls.unpack(reference, problem.cls.sums(x, problem.cls.monomials(x), resp))
    return Posterior(
        problem.prior.weights.update(moments.counts), problem.prior.components.update(moments)
    )


# -- the slow reference ------------------------------------------------------------------------


def _reference_posterior(p):
    """Textbook posterior, by loops, in terms of W^-1 (or gamma rates)."""
    h, D = p.hyper, p.D
    r = p.weight[:, None] * p.resp
    counts = r.sum(0)
    result = []
    pooled = np.array(h.covariance, dtype=float)
    for k in range(p.K):
        xbar = sum(r[n, k] * p.X[n] for n in range(p.N)) / counts[k]
        kappa = h.kappa0 + counts[k]
        mean = (h.kappa0 * h.m0 + counts[k] * xbar) / kappa
        S = sum(r[n, k] * np.outer(p.X[n] - xbar, p.X[n] - xbar) for n in range(p.N))
        S = S + h.kappa0 * counts[k] / kappa * np.outer(xbar - h.m0, xbar - h.m0)
        if p.shape == "full":
            scale, dof = h.covariance + S, h.nu0 + counts[k]
        elif p.shape == "tied":
            pooled = pooled + S
            scale, dof = pooled, h.nu0 + counts.sum()
        elif p.shape == "diag":
            scale, dof = h.covariance + np.diag(S), h.nu0 + counts[k]
        else:
            scale, dof = D * h.covariance + np.trace(S), h.nu0 + counts[k]
        result.append(SimpleNamespace(mean=mean, kappa=kappa, scale=scale, dof=dof))
    if p.shape == "tied":
        for q in result:
            q.scale = pooled
    return counts, result


def _reference_weights(p, counts):
    """E[log pi] and the two halves of -KL of the weights."""
    a0, K = p.hyper.a0, p.K
    if p.law == "dirichlet_distribution":
        a = a0 + counts
        E_log = digamma(a) - digamma(a.sum())

        def log_c(a):
            return gammaln(a.sum()) - gammaln(a).sum()

        kl = log_c(a) - log_c(np.full(K, a0)) + ((a - a0) * E_log).sum()
        return E_log, kl
    a = 1 + counts
    b = np.array([a0 + counts[k + 1 :].sum() for k in range(K)])
    E_log_v = digamma(a) - digamma(a + b)
    E_log_rest = digamma(b) - digamma(a + b)
    E_log = np.array([E_log_v[k] + E_log_rest[:k].sum() for k in range(K)])
    kl = (betaln(1.0, a0) - betaln(a, b) + (a - 1.0) * E_log_v + (b - a0) * E_log_rest).sum()
    return E_log, kl


def _wishart_log_B(scale_inv, dof):
    """Log of Bishop's B(W, nu), equation B.79."""
    D = len(scale_inv)
    return (
        0.5 * dof * np.linalg.slogdet(scale_inv)[1]
        - 0.5 * dof * D * math.log(2.0)
        - multigammaln(dof / 2.0, D)
    )


def _precision_terms(shape, D, scale, dof):
    """E[Lambda], E log|Lambda|, and E log density under a law with given (scale, dof)."""
    if shape in {"full", "tied"}:
        E = dof * np.linalg.inv(scale)
        E_log_det = (
            sum(digamma((dof - d) / 2.0) for d in range(D))
            + D * math.log(2.0)
            - np.linalg.slogdet(scale)[1]
        )

        def E_log_density(scale0, dof0):
            return (
                _wishart_log_B(scale0, dof0)
                + 0.5 * (dof0 - D - 1.0) * E_log_det
                - 0.5 * np.trace(scale0 @ E)
            )

        return E, E_log_det, E_log_density
    if shape == "diag":
        shapes, rates = np.full(D, dof / 2.0), scale / 2.0
    else:
        shapes, rates = np.array([D * dof / 2.0]), np.array([scale / 2.0])
    mean, log_mean = shapes / rates, digamma(shapes) - np.log(rates)

    def E_log_density(scale0, dof0):
        a = dof0 / 2.0 if shape == "diag" else D * dof0 / 2.0
        b = np.asarray(scale0) / 2.0
        return (a * np.log(b) - gammaln(a) + (a - 1.0) * log_mean - b * mean).sum()

    E = np.diag(mean) if shape == "diag" else mean[0] * np.eye(D)
    E_log_det = log_mean.sum() if shape == "diag" else D * log_mean[0]
    return E, E_log_det, E_log_density


def _reference_bound(p):
    """Bishop's equations 10.70-10.77, term by term, at the posterior of the responsibilities."""
    h, D = p.hyper, p.D
    counts, components = _reference_posterior(p)
    E_log_pi, kl = _reference_weights(p, counts)
    scale0 = D * h.covariance if p.shape == "spherical" else h.covariance
    total = -kl
    for k, q in enumerate(components):
        E, E_log_det, E_log_density = _precision_terms(p.shape, D, q.scale, q.dof)
        for n in range(p.N):
            d = p.X[n] - q.mean
            E_log_lik = 0.5 * (E_log_det - D * math.log(2 * math.pi) - D / q.kappa - d @ E @ d)
            r = p.resp[n, k]
            total += p.weight[n] * r * (E_log_lik + E_log_pi[k] - math.log(r))
        d = q.mean - h.m0
        total += 0.5 * (  # E log p(mu | Lambda)
            D * math.log(h.kappa0 / (2 * math.pi)) + E_log_det
            - D * h.kappa0 / q.kappa - h.kappa0 * d @ E @ d
        )  # fmt: skip
        total -= 0.5 * (D * math.log(q.kappa / (2 * math.pi)) + E_log_det - D)  # E log q(mu|.)
        if p.shape != "tied" or k == 0:
            total += E_log_density(scale0, h.nu0) - E_log_density(q.scale, q.dof)
    return total


def _bound_at(problem, posterior, resp):
    """The bound of the code under test for arbitrary responsibilities (K, N), as a tensor."""
    log_rho = bound.log_rho(posterior, _t(problem.X))
    rows = (resp * (log_rho - resp.log())).sum(0)
    return (_t(problem.weight) * rows).sum() - posterior.kl(problem.prior)


@every_shape
@every_law
def test_update_equals_the_textbook(shape, law):
    problem = _problem(shape, law, weighted=True)
    posterior = _update(problem)
    counts, components = _reference_posterior(problem)
    q = posterior.components
    scale = q.inverse_scale().expand(problem.K, *q.root.shape[1:])
    dof = q.dof.expand(problem.K)
    for k, expected in enumerate(components):
        np.testing.assert_allclose(q.mean[k], expected.mean, rtol=1e-12)
        np.testing.assert_allclose(q.kappa[k], expected.kappa, rtol=1e-12)
        np.testing.assert_allclose(dof[k], expected.dof, rtol=1e-12)
        np.testing.assert_allclose(scale[k], expected.scale, rtol=1e-10)
    E_log, kl = _reference_weights(problem, counts)
    np.testing.assert_allclose(posterior.weights.E_log(), E_log, rtol=1e-12)
    np.testing.assert_allclose(posterior.weights.kl(problem.prior.weights), kl, rtol=1e-11)


@every_shape
@every_law
@pytest.mark.parametrize("seed", [0, 1])
def test_bound_equals_the_term_by_term_sum(shape, law, seed):
    problem = _problem(shape, law, D=3, seed=seed, weighted=True)
    value = _bound_at(problem, _update(problem), _t(problem.resp.T))
    np.testing.assert_allclose(float(value), _reference_bound(problem), rtol=1e-11)


def test_the_term_by_term_check_can_fail():
    """Dropping the KL constant D/2 log kappa0, as a known library does, is seen."""
    problem = _problem("full", "dirichlet_process")
    value = float(_bound_at(problem, _update(problem), _t(problem.resp.T)))
    dropped = value - 0.5 * problem.K * problem.D * math.log(problem.hyper.kappa0)
    assert abs(dropped - _reference_bound(problem)) > 0.1


@every_shape
@every_law
@pytest.mark.parametrize("optimal", [True, False])
def test_bound_is_the_monte_carlo_mean_of_log_p_minus_log_q(shape, law, optimal):
    """Draw parameters from q and average log p(X, z, theta) - log q(z, theta).

    At the optimal q(theta) of the given q(z) the average over q(z) does not depend on theta at
    all (that is what conjugacy means), so the check is exact there.
    """
    p = _problem(shape, law, N=5)
    h, D, K = p.hyper, p.D, p.K
    resp_z = p.resp if optimal else np.random.default_rng(3).dirichlet(np.ones(K), size=p.N)
    counts, components = _reference_posterior(p)
    rng = np.random.default_rng(7)
    S = 50 if optimal else 4000
    value = np.zeros(S)
    # weights
    if law == "dirichlet_distribution":
        pi = rng.dirichlet(h.a0 + counts, size=S)
        value += stats.dirichlet(np.full(K, h.a0)).logpdf(pi.T)
        value -= stats.dirichlet(h.a0 + counts).logpdf(pi.T)
        log_pi = np.log(pi)
    else:
        a = 1 + counts
        b = np.array([h.a0 + counts[k + 1 :].sum() for k in range(K)])
        v = rng.beta(a, b, size=(S, K))
        value += stats.beta(1.0, h.a0).logpdf(v).sum(1) - stats.beta(a, b).logpdf(v).sum(1)
        log_rest = np.log1p(-v)
        log_pi = np.log(v) + np.cumsum(log_rest, axis=1) - log_rest
    # components
    log_lik = np.empty((S, p.N, K))
    shared = None
    for k, q in enumerate(components):
        if shape in {"full", "tied"}:
            law_q = stats.wishart(df=q.dof, scale=np.linalg.inv(q.scale))
            law_p = stats.wishart(df=h.nu0, scale=np.linalg.inv(h.covariance))
            if shape == "full" or shared is None:
                shared = law_q.rvs(size=S, random_state=rng)
                for s in range(S):
                    value[s] += law_p.logpdf(shared[s]) - law_q.logpdf(shared[s])
            Lambda = shared
        else:
            n_free = D if shape == "diag" else 1
            factor = 1 if shape == "diag" else D
            law_q = stats.gamma(factor * q.dof / 2, scale=2 / q.scale)
            law_p = stats.gamma(factor * h.nu0 / 2, scale=2 / (factor * h.covariance))
            free = law_q.rvs(size=(S, n_free), random_state=rng)
            value += law_p.logpdf(free).sum(1) - law_q.logpdf(free).sum(1)
            Lambda = np.stack([np.diag(np.broadcast_to(row, D)) for row in free])
        chol = np.linalg.cholesky(Lambda)
        log_det = 2 * np.log(np.diagonal(chol, axis1=1, axis2=2)).sum(1)
        z = rng.standard_normal((S, D))
        deviation = np.stack([np.linalg.solve(chol[s].T, z[s]) for s in range(S)])
        mu = q.mean + deviation / math.sqrt(q.kappa)

        def normal(x, mean, kappa, Lambda=Lambda, log_det=log_det):
            d = x - mean
            quadratic = np.einsum("si,sij,sj->s", d, Lambda, d)
            return 0.5 * (D * math.log(kappa / 2 / math.pi) + log_det - kappa * quadratic)

        value += normal(mu, h.m0, h.kappa0) - normal(mu, q.mean, q.kappa)
        for n in range(p.N):
            log_lik[:, n, k] = normal(p.X[n], mu, 1.0)
    # labels: averaged exactly under q(z), since they are few
    for n in range(p.N):
        value += (resp_z[n] * (log_lik[:, n] + log_pi - np.log(resp_z[n]))).sum(1)
    expected = float(_bound_at(p, _update(p), _t(resp_z.T)))
    if optimal:
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        return
    assert abs(value.mean() - expected) < Z_LIMIT * value.std() / math.sqrt(S)


def _log_evidence(p, rows):
    """Log marginal likelihood of rows in one component: a chain of Student-t predictives."""
    h, D = p.hyper, p.D
    kappa, dof, mean = h.kappa0, h.nu0, h.m0.copy()
    scale = np.array(D * h.covariance if p.shape == "spherical" else h.covariance)
    total = 0.0
    for x in rows:
        widen = 1.0 + 1.0 / kappa
        if p.shape in {"full", "tied"}:
            law = stats.multivariate_t(mean, widen * scale / (dof + 1 - D), df=dof + 1 - D)
            total += law.logpdf(x)
        elif p.shape == "diag":
            total += stats.t(dof, mean, np.sqrt(widen * scale / dof)).logpdf(x).sum()
        else:
            law = stats.multivariate_t(mean, widen * scale / (D * dof) * np.eye(D), df=D * dof)
            total += law.logpdf(x)
        d = x - mean
        gain = kappa / (kappa + 1)
        scale = scale + gain * {"diag": d**2, "spherical": d @ d}.get(p.shape, np.outer(d, d))
        mean = mean + d / (kappa + 1)
        kappa, dof = kappa + 1, dof + 1
    return total


@every_shape
@every_law
def test_bound_of_one_component_is_the_exact_log_evidence(shape, law):
    problem = _problem(shape, law, K=1, D=3)
    problem.resp[:] = 1.0
    value = float(_bound_at(problem, _update(problem), _t(problem.resp.T)))
    expected = _log_evidence(problem, problem.X)
    if law == "dirichlet_process":  # the first stick holds every row: E[v^N] under the prior
        expected += betaln(1 + problem.N, problem.hyper.a0) - betaln(1, problem.hyper.a0)
    np.testing.assert_allclose(value, expected, rtol=1e-11)


def _enumerated_evidence(p):
    """``log p(X)`` for two components: sum over all labellings, exactly."""
    joint = []
    for z in itertools.product([0, 1], repeat=p.N):
        z = np.array(z)
        n1 = z.sum()
        log_prior = betaln(p.hyper.a0 + p.N - n1, p.hyper.a0 + n1) - betaln(p.hyper.a0, p.hyper.a0)
        joint.append(log_prior + sum(_log_evidence(p, p.X[z == k]) for k in (0, 1)))
    return logsumexp(joint)


@pytest.mark.parametrize("shape", ["full", "diag", "spherical"])
@pytest.mark.parametrize("separated", [False, True])
def test_bound_against_the_enumerated_evidence(shape, separated):
    """The bound lies below; where labels are certain the gap is log 2, for the two symmetric
    labellings of which a factorised q holds one.
    """
    p = _problem(shape, "dirichlet_distribution", K=2, N=6)
    kind = "random"
    if separated:
        p.X[:3] += 1e4
        p.hyper.kappa0 = 1e-6
        p.prior = Posterior(
            p.prior.weights, dataclasses.replace(p.prior.components, kappa=_t([1e-6]))
        )
        kind = "k-means++"
    step = bound.coordinate_ascent(p.prior, p.rows)
    state = State(p.prior, start.start(kind, p.rows, p.cls, 2, np.random.default_rng(0)))
    for _ in range(100):
        state, value = step(state)
    gap = _enumerated_evidence(p) - value
    if separated:
        assert gap == pytest.approx(math.log(2.0), abs=1e-6)
    else:
        assert gap > 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_log_density_by_quadrature(shape):
    """One dimension: integrate log N(x | mu, 1/lambda) over q(mu, lambda) on a grid."""
    problem = _problem(shape, "dirichlet_process", D=1, K=1)
    problem.resp[:] = 1.0
    q = _update(problem).components
    kappa, mean = float(q.kappa[0]), float(q.mean[0, 0])
    law = stats.gamma(float(q.dof[0]) / 2, scale=2 / float(q.root.square().reshape(-1)[0]))
    x = 0.8

    def inner(lam):
        sd = 1 / math.sqrt(kappa * lam)
        grid, weights = np.polynomial.hermite_e.hermegauss(20)
        values = stats.norm.logpdf(x, mean + sd * grid, 1 / math.sqrt(lam))
        return law.pdf(lam) * (weights @ values) / math.sqrt(2 * math.pi)

    expected = integrate.quad(inner, *law.ppf([1e-14, 1 - 1e-14]), epsabs=1e-11, limit=400)[0]
    value = q.E_log_prob(q.squared_distance(_t([[x]]), q.monomials(_t([[x]]))))
    np.testing.assert_allclose(float(value), expected, atol=1e-8)


@every_shape
@every_law
def test_gradient_vanishes_at_each_update(shape, law):
    """Each half of the update is the exact maximiser: autograd of the bound is zero there."""
    problem = _problem(shape, law, weighted=True)
    posterior = _update(problem)
    leaves = []

    def leaf(tensor):
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    tracked = posterior.map(leaf)
    value = _bound_at(problem, tracked, _t(problem.resp.T))
    for gradient in torch.autograd.grad(value, leaves):
        assert gradient.abs().max() < 1e-9

    logits = by_row.responsibilities(posterior, _t(problem.X)).log().requires_grad_()
    value = _bound_at(problem, posterior, logits.softmax(0))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.abs().max() < 1e-10


@every_shape
@every_law
def test_the_gradient_check_can_fail(shape, law):
    problem = _problem(shape, law)
    posterior = _update(problem)
    kappa = posterior.components.kappa.clone().mul_(1.01).requires_grad_()
    wrong = type(posterior.components)(
        posterior.components.mean, kappa, posterior.components.dof, posterior.components.root
    )
    value = _bound_at(problem, Posterior(posterior.weights, wrong), _t(problem.resp.T))
    (gradient,) = torch.autograd.grad(value, kappa)
    assert gradient.abs().max() > 1e-5


@every_shape
@every_law
@pytest.mark.parametrize("kind", ["k-means++", "kmeans", "random_from_data", "random"])
def test_coordinate_ascent_never_falls(shape, law, kind):
    for seed in range(3):
        problem = _problem(shape, law, K=5, N=40, seed=seed, weighted=True)
        moments = start.start(kind, problem.rows, problem.cls, 5, np.random.default_rng(seed))
        step = bound.coordinate_ascent(problem.prior, problem.rows)
        state, values = State(problem.prior, moments), []
        for _ in range(60):
            state, value = step(state)
            values.append(value)
        assert np.diff(values).min() > -1e-12 * abs(values[-1])


@every_shape
@every_law
def test_terms_add_up_both_ways(shape, law):
    problem = _problem(shape, law)
    posterior, x = _update(problem), _t(problem.X)
    terms = bound.elbo_terms(posterior, x)
    local = by_row.local_bound(posterior, x)
    torch.testing.assert_close(terms.reconstruction - terms.kl, local, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.energy + terms.entropy, local, rtol=1e-12, atol=1e-12)
    assert (terms.kl >= 0).all()
    assert (terms.entropy >= 0).all()


@every_shape
@pytest.mark.parametrize("ill", [1e7, 0.0], ids=["products", "centred rows"])
def test_scores_of_blocks_are_those_of_rows(shape, ill, monkeypatch):
    """One workspace serves blocks of any length; equal components go to the first."""
    monkeypatch.setattr("skvi.models.mixture.components._ILL", ill)
    problem = _problem(shape, "dirichlet_distribution")
    posterior = _update(problem)
    # A component twice, in the middle and at the end: every row of it is a tie.
    order = torch.tensor([1, 0, 2, 0])
    weights = posterior.weights.map(lambda a: a[order])
    posterior = Posterior(weights, posterior.components.take(order))
    scores = bound.Scores(posterior, Workspace())

    # As rounding may have it, the last of the two is the larger.
    def with_heavier_last(excess):
        heavier = posterior.weights.map(lambda a: a * _t([1.0, 1.0, 1.0, 1.0 + excess]))
        return bound.Scores(posterior._replace(weights=heavier), Workspace())

    rounded = with_heavier_last(1e-14)
    assert (rounded.log_rho(_t(problem.X))[3] > rounded.log_rho(_t(problem.X))[1]).any()
    for block in (slice(None, 5), slice(5, None), slice(1, 2)):
        x = _t(problem.X[block])
        expected = bound.log_rho(posterior, x)
        torch.testing.assert_close(scores.log_rho(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scores.local_bound(x), expected.logsumexp(0))
        torch.testing.assert_close(scores.responsibilities(x), expected.softmax(0))
        np.testing.assert_array_equal(scores.labels(x), expected.numpy().argmax(0))
        assert (scores.labels(x) < 3).all()
        np.testing.assert_array_equal(rounded.labels(x), scores.labels(x))
        heavier = with_heavier_last(1e-11)
        np.testing.assert_array_equal(heavier.labels(x), heavier.log_rho(x).argmax(0))


@every_shape
@every_law
def test_predictive_is_the_ratio_of_evidences_for_one_component(shape, law):
    problem = _problem(shape, law, K=1)
    problem.resp[:] = 1.0
    x = np.array([[0.3, -1.0]])
    value = float(bound.log_predictive(_update(problem), problem.prior, _t(x)))
    inside = _log_evidence(problem, np.vstack([problem.X, x])) - _log_evidence(problem, problem.X)
    if law == "dirichlet_distribution":
        assert value == pytest.approx(inside, rel=1e-10)
    else:  # E[v_1] of the component and the rest of the prior predictive
        weight = (1 + problem.N) / (1 + problem.N + problem.hyper.a0)
        beyond = math.log1p(-weight) + _log_evidence(problem, x)
        assert value == pytest.approx(np.logaddexp(math.log(weight) + inside, beyond), rel=1e-10)


@every_shape
@every_law
def test_predictive_integrates_to_one(shape, law):
    problem = _problem(shape, law, N=30)
    posterior = _update(problem)
    # Students have fat tails: map the square to the plane by x = c + s tan(u).
    centre, spread = problem.X.mean(0), 2.0 * problem.X.std(0)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    u, w = nodes * math.pi / 2, weights * math.pi / 2
    line = np.tan(u)
    jacobian = w / np.cos(u) ** 2
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2) * spread + centre
    density = bound.log_predictive(posterior, problem.prior, _t(grid)).exp().numpy()
    mass = density @ np.outer(jacobian, jacobian).ravel() * spread.prod()
    assert mass == pytest.approx(1.0, abs=1e-4)


@every_shape
@every_law
def test_local_bound_lies_below_the_predictive(shape, law):
    problem = _problem(shape, law)
    posterior = _update(problem)
    x = _t(np.random.default_rng(1).normal(scale=5.0, size=(200, 2)))
    gap = bound.log_predictive(posterior, problem.prior, x) - by_row.local_bound(posterior, x)
    assert gap.min() > 0


@every_shape
@every_law
def test_draws_follow_the_predictive(shape, law):
    """Kolmogorov-Smirnov of one feature against the integrated density; false positives 1e-6."""
    problem = _problem(shape, law, D=1, K=3)
    posterior = _update(problem)
    x, labels = bound.sample(posterior, problem.prior, 20_000, np.random.default_rng(5))
    n_nodes = 20_000  # midpoint rule after x = tan(u)
    u = ((np.arange(n_nodes) + 0.5) / n_nodes - 0.5) * math.pi
    grid, jacobian = np.tan(u), math.pi / n_nodes / np.cos(u) ** 2
    density = bound.log_predictive(posterior, problem.prior, _t(grid[:, None])).exp().numpy()
    cdf = np.cumsum(density * jacobian) - 0.5 * density * jacobian
    result = stats.kstest(x[:, 0], lambda value: np.interp(value, grid, cdf))
    assert result.pvalue > 1e-6
    beyond = float(posterior.weights.log_mean()[1].exp())
    assert stats.binomtest(int((labels == 3).sum()), 20_000, beyond).pvalue > 1e-6


@pytest.mark.parametrize("law", WEIGHT_LAWS)
def test_full_update_and_bound_differences_equal_scikit_learns(law):
    """For "full" with no jitter scikit-learn's update is exact and its bound lacks constants."""
    p = _problem("full", law, D=3, K=4, N=50)
    h = p.hyper
    peer = BayesianGaussianMixture(
        n_components=4,
        reg_covar=0.0,
        weight_concentration_prior_type=law,
        weight_concentration_prior=h.a0,
        mean_precision_prior=h.kappa0,
        mean_prior=h.m0,
        degrees_of_freedom_prior=h.nu0,
        covariance_prior=h.covariance,
    )
    peer._check_parameters(p.X)
    resp = p.resp
    for _ in range(2):
        peer._m_step(p.X, np.log(resp))
        p.resp = resp
        posterior = _update(p)
        np.testing.assert_allclose(posterior.components.mean, peer.means_, rtol=1e-10)
        np.testing.assert_allclose(posterior.components.covariances(), peer.covariances_, rtol=1e-9)
        np.testing.assert_allclose(posterior.components.dof, peer.degrees_of_freedom_, rtol=1e-12)
        _, log_resp = peer._e_step(p.X)
        resp = np.exp(log_resp)
        np.testing.assert_allclose(
            by_row.responsibilities(posterior, _t(p.X)).T, resp, rtol=1e-8, atol=1e-12
        )
        exact = float(_bound_at(p, posterior, _t(p.resp.T)))
        lacking = (
            -0.5 * p.N * p.D * math.log(2 * math.pi)
            + p.K * _wishart_log_B(h.covariance, h.nu0)
            + 0.5 * p.D * p.K * math.log(h.kappa0)
            # the power of pi in the multivariate gamma function is left out on both sides
            + 0.25 * p.K * p.D * (p.D - 1) * math.log(math.pi)
        )
        if law == "dirichlet_distribution":
            lacking += gammaln(p.K * h.a0) - p.K * gammaln(h.a0)
        else:
            lacking -= p.K * betaln(1.0, h.a0)
        peer_bound = peer._compute_lower_bound(np.log(p.resp), None)
        np.testing.assert_allclose(peer_bound + lacking, exact, rtol=1e-10)


@pytest.mark.parametrize("law", WEIGHT_LAWS)
def test_reordering_is_kept_only_where_it_raises_the_bound(law):
    prior = WEIGHTS[law].prior(4, 0.3, torch.device("cpu"))
    counts = _t([1.0, 7.0, 0.0, 12.0])
    order = prior.best_order(counts)
    if law == "dirichlet_distribution":
        assert order is None
        return
    assert order.tolist() == [3, 1, 0, 2]
    assert prior.best_order(counts[order]) is None

    def value(permutation):
        posterior = prior.update(counts[list(permutation)])
        return float(counts[list(permutation)] @ posterior.E_log() - posterior.kl(prior))

    best = max(itertools.permutations(range(4)), key=value)
    assert value(best) == pytest.approx(value(order.tolist()), rel=1e-12)


def _ill_conditioned(shape):
    """Rows in fitted units: thin, tight clusters far apart and one ordinary cluster, labelled."""
    rng = np.random.default_rng(0)
    D, K, N = 4, 4, 400
    matrix = shape in {"full", "tied"}
    scales = np.array([0.3, 1e-2, 1e-4, 1e-6]) if matrix else np.full(D, 1e-6)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0] if matrix else np.eye(D)
    labels = rng.integers(K, size=N)
    X = 3.0 * rng.normal(size=(K, D))[labels] + (rng.normal(size=(N, D)) * scales) @ rotation
    if shape != "tied":
        X[labels == 0] += rng.normal(size=((labels == 0).sum(), D))
    shift, unit = X.mean(0), X.std(0)
    X = (X - shift) / unit
    cls = COMPONENTS[shape]
    covariance = {"diag": 1e-12 * np.ones(D), "spherical": np.float64(1e-12)}
    components = cls(
        torch.zeros(1, D, dtype=torch.float64),
        _t([1e-12]),  # else the pull to the prior mean alone would widen the clusters
        _t([float(D)]),
        cls.factor(cls.prior_inverse_scale(_t(covariance.get(shape, 1e-12 * np.eye(D))), D)),
    )
    prior = Posterior(WEIGHTS["dirichlet_process"].prior(K, 0.5, torch.device("cpu")), components)
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"))
    reference = _t(np.stack([X[labels == k].mean(0) for k in range(K)]))
    diff = _t(X) - reference[labels]
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(labels), K).T.double()
    return prior, rows, cls.unpack(reference, cls.sums(diff, cls.monomials(diff), one_hot))


@every_shape
def test_ill_conditioned_components_keep_their_digits(shape, monkeypatch):
    """The matrix products, where they are used, agree with centred rows to 1e-8."""
    prior, rows, moments = _ill_conditioned(shape)
    step = bound.coordinate_ascent(prior, rows)
    state, values = State(prior, moments), []
    for _ in range(5):
        state, value = step(state)
        values.append(value)
    assert np.diff(values).min() > -1e-9 * abs(values[-1])
    n_ill = state.posterior.components.ill.numel()
    assert n_ill == (4 if shape == "tied" else 3)

    def passes(threshold):
        monkeypatch.setattr("skvi.models.mixture.components._ILL", threshold)
        fresh = state.posterior.map(torch.clone)  # drops what was cached under another threshold
        moments, local = bound.expectation(fresh, rows)
        return local, moments

    mixed, mixed_moments = passes(1e7)
    centred, centred_moments = passes(0.0)
    assert mixed == pytest.approx(centred, rel=1e-8)
    roots = [prior.components.update(m).root for m in (mixed_moments, centred_moments)]
    torch.testing.assert_close(*roots, rtol=1e-8, atol=1e-12)
    products, _ = passes(np.inf)  # without the second way the digits are lost: this can fail
    assert products != pytest.approx(centred, rel=1e-8)


@every_shape
def test_products_and_centred_rows_agree_where_conditions_are_ordinary(shape):
    problem = _problem(shape, "dirichlet_process", D=3)
    q = _update(problem).components
    x = _t(problem.X)
    assert q.ill.numel() == 0
    torch.testing.assert_close(
        q.squared_distance(x, q.monomials(x)),
        q.centred_distance(x - q.mean[:, None, :]),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.fixture(params=["rows", "pairs"])
def always_restricted(request, monkeypatch):
    """Passes over active rows or pairs, however many there are."""
    for name, value in (
        ("_CHUNK_ROWS", 150),
        ("_LARGEST_SHARE_OF_ROWS", 1.0),
        ("_LARGEST_SHARE_OF_PAIRS", 1.0),
        ("_LONG_PRODUCT", 0 if request.param == "pairs" else np.inf),
        ("_STEADY", np.inf),
    ):
        monkeypatch.setattr(active, name, value)


@pytest.mark.usefixtures("always_restricted")
@every_shape
@every_law
def test_active_passes_climb_to_the_same_bound(shape, law):
    """Leaving out negligible components changes the way, not the summit, and never falls."""
    rng = np.random.default_rng(0)
    N, D, K = 600, 3, 8
    X = 4.0 * rng.normal(size=(6, D))[rng.integers(6, size=N)] + rng.normal(size=(N, D))
    X = (X - X.mean(0)) / X.std(0)
    weight = rng.integers(1, 4, size=N).astype(float)
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"), weight)
    prior = _problem(shape, law, D=D, K=K).prior
    moments = start.start("k-means++", rows, COMPONENTS[shape], K, np.random.default_rng(1))
    plain = bound.coordinate_ascent(prior, rows)
    alternating = active.AlternatingAscent(prior, rows, max_iter=120, negligible=1e-9)
    climbs = {}
    for name, step in (("plain", plain), ("active", alternating)):
        state, values = State(prior, moments), []
        for _ in range(120):
            state, value = step(state)
            values.append(value)
        climbs[name] = np.array(values)
    assert alternating.looked_at_everything
    # Restricted passes give away less than `negligible` a row and component.
    assert np.diff(climbs["active"]).min() > -1e-9 * K * weight.sum()
    np.testing.assert_allclose(climbs["active"][-1], climbs["plain"][-1], rtol=1e-7)


@pytest.mark.usefixtures("always_restricted")
@every_shape
@every_law
def test_restricted_pass_is_a_pass_with_negligible_responsibilities_removed(shape, law):
    """Against responsibilities of all rows and components with zeros put in; a coarse limit."""
    rng = np.random.default_rng(0)
    N, D, K, negligible = 500, 3, 4, 1e-2
    X = 6.0 * rng.normal(size=(4, D))[rng.integers(4, size=N)] + rng.normal(size=(N, D))
    weight = rng.integers(1, 4, size=N).astype(float)
    keep = "columns" if active._LONG_PRODUCT > 0 else "rows"
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"), weight, keep=keep)
    prior = _problem(shape, law, D=D, K=K).prior
    moments = start.start("k-means++", rows, COMPONENTS[shape], K, np.random.default_rng(1))
    step = active.AlternatingAscent(prior, rows, max_iter=100, negligible=negligible)
    zeroth, _ = step(State(prior, moments))
    first, _ = step(zeroth)  # a full one still: the first rise is not known
    second, value = step(first)
    assert not step.looked_at_everything

    x, s = _t(X), _t(weight)
    resp = by_row.responsibilities(first.posterior, x)  # (K, N)
    order = prior.weights.best_order(first.moments.counts)
    needed = resp > negligible
    alone = resp.max(0).values >= 1.0 - negligible
    assert 0.1 < alone.double().mean() < 0.95
    settled = torch.zeros_like(needed).scatter_(0, resp.argmax(0)[None], True)
    by_rows = active._LONG_PRODUCT > 0
    needed = torch.where(alone, settled, torch.ones_like(needed) if by_rows else needed)
    if order is not None:
        needed = needed[order]
    log_rho = bound.log_rho(second.posterior, x).masked_fill(~needed, -torch.inf)
    local = float(s @ log_rho.logsumexp(0))
    assert value == pytest.approx(local - float(second.posterior.kl(prior)), rel=1e-12)
    r = log_rho.softmax(0) * s
    torch.testing.assert_close(second.moments.counts, r.sum(1))
    direct = prior.components.update(
        Moments(torch.zeros(K, D), r.sum(1), r @ x, prior.components.scatter(x.expand(K, N, D), r))
    )
    mine = prior.components.update(second.moments)
    for a, b in zip(vars(direct).values(), vars(mine).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_on_separated_clusters_nothing_is_visited():
    rng = np.random.default_rng(0)
    N, D, K = 4096, 3, 8
    labels = rng.integers(K, size=N)
    corners = np.array(list(itertools.product([-30.0, 30.0], repeat=D)))
    X = corners[labels] + rng.normal(size=(N, D))
    X = (X - X.mean(0)) / X.std(0)
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"))
    prior = _problem("full", "dirichlet_process", D=D, K=K).prior
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(labels), K).T.double()
    moments = Full.unpack(torch.zeros(K, D), Full.sums(_t(X), Full.monomials(_t(X)), one_hot))
    step = active.AlternatingAscent(prior, rows, max_iter=100, negligible=1e-9)
    state = State(prior, moments)
    for _ in range(7):
        state, _ = step(state)
    assert not step.looked_at_everything
    assert len(step._focus.visited) < 0.05 * N


def test_a_pass_is_full_where_a_component_with_settled_rows_became_ill(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    X = 20.0 * labels[:, None] + rng.normal(size=(100, 2))
    rows = Rows(X, Affine(np.zeros(2), np.ones(2)), torch.device("cpu"))
    prior = _problem("full", "dirichlet_process", D=2, K=2).prior
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(labels), 2).T.double()
    moments = Full.unpack(torch.zeros(2, 2), Full.sums(_t(X), Full.monomials(_t(X)), one_hot))
    step = active.AlternatingAscent(prior, rows, max_iter=100, negligible=1e-9)
    state = State(prior, moments)
    for _ in range(3):
        state, _ = step(state)
    assert not step.looked_at_everything
    monkeypatch.setattr("skvi.models.mixture.components._ILL", 0.0)
    state, value = step(state)
    assert step.looked_at_everything
    assert (step._owner < 0).all()  # nor are they settled from now on
    local = by_row.local_bound(state.posterior, _t(X)).sum()
    assert value == pytest.approx(float(local - state.posterior.kl(prior)), rel=1e-12)


def test_passes_are_full_while_the_bound_rises_fast():
    """Heavy tails in many features: one-hot responsibilities long before clusters have formed."""
    rng = np.random.default_rng(2)
    N, D, K = 800, 40, 30
    X = rng.normal(size=(N, D)) + 2.0 * rng.normal(size=(15, D))[rng.integers(0, 15, N)]
    X *= rng.gamma(0.5, 1.0, size=(N, 1))
    X = (X - X.mean(0)) / X.std(0)
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"), keep="columns")
    prior = _problem("diag", "dirichlet_process", D=D, K=K).prior
    moments = start.start("k-means++", rows, COMPONENTS["diag"], K, np.random.default_rng(2))
    step = active.AlternatingAscent(prior, rows, max_iter=100, negligible=1e-9)
    state, before = State(prior, moments), -np.inf
    rise = np.inf
    for _ in range(40):
        state, value = step(state)
        assert step.looked_at_everything or rise < active._STEADY * N
        rise, before = value - before, value
    assert rise < active._STEADY * N  # and restricted passes were made in the end


def test_rows_of_ill_conditioned_components_are_never_settled():
    """Statistics alone would know their bound to few digits."""
    prior, rows, moments = _ill_conditioned("full")
    step = active.AlternatingAscent(prior, rows, max_iter=100, negligible=1e-9)
    state = State(prior, moments)
    for _ in range(3):
        state, _ = step(state)
    ill = state.posterior.components.ill
    assert ill.numel() == 3
    assert step._owner.max() >= 0
    assert not torch.isin(step._owner, ill).any()
