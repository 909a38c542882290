"""One law suite over every distribution family.

Each family states how to make parameters, torch's own distribution where there is one, and its
functions. Laws: KL >= 0 and exactly 0 at equality; KL = cross entropy - entropy by Monte Carlo
with a stated error rate; KL equals torch's; expectations are gradients of the log-normaliser.
"""

import math
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from skvi.distributions import (
    dirichlet,
    gamma,
    normal,
    special,
    stick_breaking,
    student_t,
    wishart,
)

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
        lambda a, b: _Torch(torch.distributions.Gamma(a, b)),
    ),
    "dirichlet": Family(
        lambda rng: (_t(rng.gamma(2.0, size=4) + 0.3),),
        dirichlet.kl,
        lambda a: _Torch(torch.distributions.Dirichlet(a)),
    ),
    "stick_breaking": Family(
        lambda rng: (_t(rng.gamma(2.0, size=4) + 0.3), _t(rng.gamma(2.0, size=4) + 0.3)),
        stick_breaking.kl,
        lambda a, b: _Torch(torch.distributions.Beta(a, b)),
    ),
    "wishart": Family(
        lambda rng: (_t(3.0 + 4.0 * rng.random()), _spd_chol(rng, 3)),
        wishart.kl,
        _Wishart,
    ),
}


def _check_monte_carlo(draws, expected):
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - expected) < Z_LIMIT * error


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_is_zero_at_equality_and_positive_elsewhere(name, rng):
    family = FAMILIES[name]
    for _ in range(20):
        p, q = family.make(rng), family.make(rng)
        assert abs(float(family.kl(*p, *p))) < 1e-13
        assert float(family.kl(*p, *q)) > 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_is_the_expected_log_ratio(name, rng):
    torch.manual_seed(3)
    family = FAMILIES[name]
    p, q = family.make(rng), family.make(rng)
    law_p, law_q = family.frozen(*p), family.frozen(*q)
    x = law_p.sample(40_000)
    _check_monte_carlo(law_p.log_prob(x) - law_q.log_prob(x), float(family.kl(*p, *q)))


def test_the_monte_carlo_check_can_fail(rng):
    """A constant that is off by 0.2 nats is seen by the check above."""
    torch.manual_seed(3)
    family = FAMILIES["gamma"]
    p, q = family.make(rng), family.make(rng)
    law_p, law_q = family.frozen(*p), family.frozen(*q)
    x = law_p.sample(40_000)
    with pytest.raises(AssertionError):
        _check_monte_carlo(law_p.log_prob(x) - law_q.log_prob(x), float(family.kl(*p, *q)) + 0.2)


@pytest.mark.parametrize("name", ["gamma", "dirichlet"])
def test_kl_equals_torchs_closed_form(name, rng):
    family = FAMILIES[name]
    for _ in range(10):
        p, q = family.make(rng), family.make(rng)
        law_p, law_q = family.frozen(*p).law, family.frozen(*q).law
        expected = torch.distributions.kl_divergence(law_p, law_q).sum()
        assert torch.allclose(family.kl(*p, *q), expected, rtol=1e-11)


class TestConcentratedLaws:
    """Large parameters, where differences of log Gamma return rounding; truth by mpmath."""

    @pytest.mark.parametrize("size", [1e2, 1e6, 1e10, 1e14])
    def test_gamma(self, size):
        a, b, a0, b0 = size + 50, size + 60, size, size
        with mpmath.workdps(60):
            a, b, a0, b0 = map(mpmath.mpf, (a, b, a0, b0))
            expected = (
                (a - a0) * mpmath.digamma(a) - mpmath.loggamma(a) + mpmath.loggamma(a0)
                + a0 * (mpmath.log(b) - mpmath.log(b0)) + a * (b0 / b - 1)
            )  # fmt: skip
        value = gamma.kl(*(_t(float(x)) for x in (a, b, a0, b0)))
        assert float(value) == pytest.approx(float(expected), rel=1e-9)

    @pytest.mark.parametrize("a0", [1e-300, 1e-16, 1.0, 1e8, 1e12, 1e16, 1e30])
    def test_sticks(self, a0):
        value = stick_breaking.kl(_t([41.0]), _t([a0 + 60.0]), _t([1.0]), _t([a0]))
        with mpmath.workdps(400):
            a, b, total = mpmath.mpf(41), mpmath.mpf(a0 + 60.0), mpmath.mpf(a0) + 101
            if a0 >= 1e16:  # the sum that float64 holds
                b, total = mpmath.mpf(a0), mpmath.mpf(a0) + 41
            psi = [mpmath.digamma(x) for x in (a, b, total)]
            expected = (
                mpmath.log(mpmath.beta(1, a0)) - mpmath.log(mpmath.beta(a, b))
                + 40 * (psi[0] - psi[2]) + (b - a0) * (psi[1] - psi[2])
            )  # fmt: skip
        assert float(value) == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize("size", [1e3, 1e8, 1e12])
    def test_wishart(self, size, rng):
        chol0 = _spd_chol(rng, 3) * size**0.5
        chol = torch.linalg.cholesky(chol0 @ chol0.T + 5.0 * torch.eye(3, dtype=torch.float64))
        value = float(wishart.kl(_t(size + 7.0), chol, _t(size), chol0))
        assert 0.0 <= value < 1e3 / size * 100
        same = float(wishart.kl(_t(size), chol0, _t(size), chol0))
        assert abs(same) < 1e-18 * size

    @pytest.mark.parametrize("x", [0.3, 19.9, 20.1, 1e3, 1e9])
    @pytest.mark.parametrize("ratio", [1e-3, 0.5, 0.999, 1.0, 1 + 1e-9, 1.3, 50.0])
    def test_divergence_of_log_gamma(self, x, ratio):
        x0 = x * ratio
        with mpmath.workdps(60):
            expected = (
                mpmath.loggamma(x0)
                - mpmath.loggamma(x)
                - mpmath.digamma(x) * (mpmath.mpf(x0) - mpmath.mpf(x))
            )
        value = float(special.log_gamma_divergence(_t(x0), _t(x)))
        rounding = 1e-14 * abs(float(mpmath.loggamma(x))) if min(x, x0) < 20 else 0.0
        assert value == pytest.approx(float(expected), rel=1e-10, abs=rounding + 1e-14)


def test_dirichlet_expected_log_is_the_gradient_of_the_log_normaliser(rng):
    concentration = _t(rng.gamma(2.0, size=5)).requires_grad_()
    log_normaliser = torch.lgamma(concentration).sum() - torch.lgamma(concentration.sum())
    (gradient,) = torch.autograd.grad(log_normaliser, concentration)
    assert torch.allclose(dirichlet.expected_log(concentration), gradient, rtol=1e-12)


def test_wishart_expected_log_det_is_the_gradient_of_the_log_normaliser(rng):
    chol = _spd_chol(rng, 4)
    dof = _t(6.5).requires_grad_()
    log_det = -2.0 * chol.diagonal().log().sum()  # of W
    log_normaliser = dof / 2 * (4 * math.log(2.0) + log_det) + torch.mvlgamma(dof / 2, 4)
    (gradient,) = torch.autograd.grad(log_normaliser, dof)
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


def test_gamma_entropy_equals_torchs(rng):
    shape, rate = FAMILIES["gamma"].make(rng)
    expected = torch.distributions.Gamma(shape, rate).entropy()
    assert torch.allclose(gamma.entropy(shape, rate), expected, rtol=1e-12)


def test_normal_entropy_equals_torchs():
    log_var = _t([0.7, -3.0])
    law = torch.distributions.Normal(torch.zeros(2).double(), (0.5 * log_var).exp())
    assert torch.allclose(normal.entropy(log_var), law.entropy().sum(), rtol=1e-12)


def test_sticks_far_larger_than_the_rest_do_not_round_it():
    a, b = _t([1.0, 50.0, 30.0]), _t([80.0, 30.0, 1e-16])
    E_log = stick_breaking.expected_log(a, b)
    expected = sum(float(torch.digamma(b[k]) - torch.digamma(a[k] + b[k])) for k in (0, 1))
    assert float(E_log[2]) == pytest.approx(expected, rel=1e-12)


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
