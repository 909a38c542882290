"""One law suite over every distribution family.

Each family states how to make parameters, torch's own distribution where there is one, and its
functions. Laws: KL >= 0 and exactly 0 at equality; KL = cross entropy - entropy by Monte Carlo
with a stated error rate; KL and entropy equal torch's; expectations are gradients of the
log-normaliser.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from skvi.distributions import dirichlet, gamma, normal, stick_breaking, student_t, wishart

# A two-sided normal deviate beyond 5 has probability 6e-7: the false-positive rate per check.
Z_LIMIT = 5.0


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _spd_chol(rng, dim):
    root = rng.normal(size=(dim, dim + 3))
    return torch.linalg.cholesky(_t(root @ root.T / dim))


class Family(NamedTuple):
    make: object  # rng -> parameters
    kl: object  # (*p, *q) -> scalar
    entropy: object  # (*p) -> scalar
    frozen: object  # (*p) -> object with sample(n) -> (n, ...) and log_prob(x) -> (n,)


class _Torch:
    """torch.distributions, with log_prob summed over independent coordinates."""

    def __init__(self, law):
        self.law = law

    def sample(self, n):
        return self.law.sample((n,))

    def log_prob(self, x):
        value = self.law.log_prob(x)
        return value.reshape(value.shape[0], -1).sum(-1)


class _Wishart:
    def __init__(self, dof, chol):
        scale = np.linalg.inv((chol @ chol.T).numpy())
        self.law = stats.wishart(df=float(dof), scale=(scale + scale.T) / 2)

    def sample(self, n):
        return _t(self.law.rvs(size=n, random_state=np.random.default_rng(1)))

    def log_prob(self, x):
        return _t(self.law.logpdf(np.moveaxis(x.numpy(), 0, -1)))


FAMILIES = {
    "gamma": Family(
        lambda rng: (_t(rng.gamma(2.0, size=3) + 0.3), _t(rng.gamma(2.0, size=3) + 0.1)),
        lambda *p: gamma.kl(*p).sum(),
        lambda *p: gamma.entropy(*p).sum(),
        lambda a, b: _Torch(torch.distributions.Gamma(a, b)),
    ),
    "dirichlet": Family(
        lambda rng: (_t(rng.gamma(2.0, size=4) + 0.3),),
        dirichlet.kl,
        dirichlet.entropy,
        lambda a: _Torch(torch.distributions.Dirichlet(a)),
    ),
    "stick_breaking": Family(
        lambda rng: (_t(rng.gamma(2.0, size=4) + 0.3), _t(rng.gamma(2.0, size=4) + 0.3)),
        stick_breaking.kl,
        stick_breaking.entropy,
        lambda a, b: _Torch(torch.distributions.Beta(a, b)),
    ),
    "wishart": Family(
        lambda rng: (_t(3.0 + 4.0 * rng.random()), _spd_chol(rng, 3)),
        wishart.kl,
        wishart.entropy,
        _Wishart,
    ),
    "normal": Family(
        lambda rng: (_t(rng.normal(size=3)), _t(rng.normal(size=3))),
        None,
        lambda mean, log_var: normal.entropy(log_var),
        lambda mean, log_var: _Torch(torch.distributions.Normal(mean, (0.5 * log_var).exp())),
    ),
}
WITH_KL = [name for name, family in FAMILIES.items() if family.kl is not None]


def _check_monte_carlo(draws, expected):
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - expected) < Z_LIMIT * error


@pytest.mark.parametrize("name", WITH_KL)
def test_kl_is_zero_at_equality_and_positive_elsewhere(name, rng):
    family = FAMILIES[name]
    for _ in range(20):
        p, q = family.make(rng), family.make(rng)
        assert abs(float(family.kl(*p, *p))) < 1e-13
        assert float(family.kl(*p, *q)) > 0.0


@pytest.mark.parametrize("name", WITH_KL)
def test_kl_is_the_expected_log_ratio(name, rng):
    torch.manual_seed(3)
    family = FAMILIES[name]
    p, q = family.make(rng), family.make(rng)
    law_p, law_q = family.frozen(*p), family.frozen(*q)
    x = law_p.sample(40_000)
    _check_monte_carlo(law_p.log_prob(x) - law_q.log_prob(x), float(family.kl(*p, *q)))


@pytest.mark.parametrize("name", FAMILIES)
def test_entropy_is_minus_the_expected_log_density(name, rng):
    torch.manual_seed(4)
    family = FAMILIES[name]
    p = family.make(rng)
    law = family.frozen(*p)
    _check_monte_carlo(-law.log_prob(law.sample(40_000)), float(family.entropy(*p)))


def test_the_monte_carlo_check_can_fail(rng):
    """A constant that is off by 0.05 nats is seen by the check above."""
    torch.manual_seed(4)
    family = FAMILIES["gamma"]
    p = family.make(rng)
    law = family.frozen(*p)
    with pytest.raises(AssertionError):
        _check_monte_carlo(-law.log_prob(law.sample(40_000)), float(family.entropy(*p)) + 0.05)


@pytest.mark.parametrize("name", ["gamma", "dirichlet"])
def test_entropy_and_kl_equal_torchs_closed_forms(name, rng):
    family = FAMILIES[name]
    for _ in range(10):
        p, q = family.make(rng), family.make(rng)
        law_p, law_q = family.frozen(*p).law, family.frozen(*q).law
        assert torch.allclose(family.entropy(*p), law_p.entropy().sum(), rtol=1e-12)
        expected = torch.distributions.kl_divergence(law_p, law_q).sum()
        assert torch.allclose(family.kl(*p, *q), expected, rtol=1e-11)


def test_dirichlet_expected_log_is_the_gradient_of_the_log_normaliser(rng):
    concentration = _t(rng.gamma(2.0, size=5)).requires_grad_()
    (gradient,) = torch.autograd.grad(dirichlet.log_normaliser(concentration), concentration)
    assert torch.allclose(dirichlet.expected_log(concentration), gradient, rtol=1e-12)


def test_wishart_expected_log_det_is_the_gradient_of_the_log_normaliser(rng):
    chol = _spd_chol(rng, 4)
    dof = _t(6.5).requires_grad_()
    (gradient,) = torch.autograd.grad(wishart.log_normaliser(dof, chol), dof)
    # the natural parameter of log|Lambda| is nu / 2
    assert torch.allclose(wishart.expected_log_det(dof, chol), 2.0 * gradient, rtol=1e-12)


def test_wishart_in_one_dimension_is_a_gamma(rng):
    dof, rate = _t(3.7), _t(1.9)
    dof0, rate0 = _t(2.2), _t(0.4)

    def root(rate):
        return (2.0 * rate).sqrt().reshape(1, 1)

    assert torch.allclose(
        wishart.kl(dof, root(rate), dof0, root(rate0)),
        gamma.kl(dof / 2, rate, dof0 / 2, rate0),
        rtol=1e-12,
    )
    assert torch.allclose(
        wishart.expected_log_det(dof, root(rate)), gamma.expected_log(dof / 2, rate), rtol=1e-12
    )


def test_gamma_expected_log_density_at_its_own_law_is_minus_the_entropy(rng):
    shape, rate = FAMILIES["gamma"].make(rng)
    moments = gamma.mean(shape, rate), gamma.expected_log(shape, rate)
    assert torch.allclose(
        gamma.expected_log_density(*moments, shape, rate), -gamma.entropy(shape, rate)
    )


def test_stick_breaking_means_and_remaining_mass_sum_to_one(rng):
    log_weights, log_rest = stick_breaking.log_mean(*FAMILIES["stick_breaking"].make(rng))
    assert math.isclose(float(log_weights.exp().sum() + log_rest.exp()), 1.0, rel_tol=1e-13)


def test_stick_breaking_expected_log_weights_by_monte_carlo(rng):
    torch.manual_seed(5)
    a, b = FAMILIES["stick_breaking"].make(rng)
    v = torch.distributions.Beta(a, b).sample((40_000,))
    rest = torch.log1p(-v).cumsum(-1)
    log_pi = v.log() + rest - torch.log1p(-v)
    for draws, expected in zip(log_pi.T, stick_breaking.expected_log(a, b), strict=True):
        _check_monte_carlo(draws, float(expected))


def test_normal_kl_to_standard_equals_torchs_and_is_exact_near_equality():
    mean, log_var = _t([0.3, -2.0, 1e-9]), _t([0.7, -3.0, 1e-9])
    law = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(law, standard)
    assert torch.allclose(normal.kl_standard(mean, log_var)[:2], expected[:2], rtol=1e-12)
    assert float(normal.kl_standard(mean, log_var)[2]) == pytest.approx(7.5e-19, rel=1e-6, abs=0)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("dof", [1.5, 30.0, 2e7, 1e12])
def test_student_t_equals_scipys_or_its_normal_limit(dim, dof, rng):
    x = rng.normal(size=(5, dim))
    chol = _spd_chol(rng, dim)
    scale = (chol @ chol.T).numpy()
    log_det = 2.0 * float(chol.diagonal().log().sum())
    white = np.linalg.solve(chol.numpy(), x.T)
    value = student_t.log_density(_t((white**2).sum(0)), _t(log_det), _t(dof), dim)
    if dof < 1e6:
        expected = stats.multivariate_t(shape=scale, df=dof).logpdf(x)
        np.testing.assert_allclose(value, expected, rtol=1e-10)
    else:
        expected = stats.multivariate_normal(cov=scale).logpdf(x)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
