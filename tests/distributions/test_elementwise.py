"""Laws of single features: normalisation, moments, agreement with scipy, digits at extremes."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss
from scipy import stats

from skvi.distributions import continuous_bernoulli, counts
from skvi.runtime.random import make_generator

Z_LIMIT = 5.0
LOGITS = [-200.0, -30.0, -1.0, -0.2001, -0.1999, -1e-3, -1e-9, 0.0, 1e-7, 0.2, 0.21, 3.0, 100.0]


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _unit_interval(n_panels=400):
    """Composite Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = leggauss(10)
    left = np.arange(n_panels) / n_panels
    x = (left[:, None] + (nodes + 1.0) / (2 * n_panels)).ravel()
    return _t(x), _t(np.tile(weights / (2 * n_panels), n_panels))


@pytest.mark.parametrize("logit", LOGITS)
def test_the_continuous_bernoulli_integrates_to_one_and_has_its_moments(logit):
    x, weight = _unit_interval()
    eta = _t(logit)
    density = continuous_bernoulli.log_density(x, eta).exp() * weight
    mean = continuous_bernoulli.mean(eta)
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-10)
    assert float(density @ x) == pytest.approx(float(mean), rel=1e-9)
    variance = float(continuous_bernoulli.variance(eta))
    assert float(density @ (x - mean).square()) == pytest.approx(variance, rel=1e-8)


def test_the_continuous_bernoulli_equals_torchs():
    x, eta = _t(np.linspace(0, 1, 11))[:, None], _t(LOGITS[1:-1])
    law = torch.distributions.ContinuousBernoulli(logits=eta)
    ours = continuous_bernoulli.log_density(x, eta)
    assert torch.allclose(ours, law.log_prob(x), atol=1e-5)  # torch's series is the coarser one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_continuous_bernoulli_is_smooth_in_its_logit(dtype):
    eta = torch.tensor([*LOGITS, -1e5, 1e5], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        continuous_bernoulli.log_density(torch.full_like(eta, 0.3), eta).sum(), eta
    )
    # an exponential family: d log p / d eta = x - E[x]
    expected = 0.3 - continuous_bernoulli.mean(eta.detach())
    assert torch.allclose(gradient, expected, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("logit", [-8.0, 0.0, 1e-8, 2.5])
def test_draws_of_the_continuous_bernoulli_have_its_mean(logit):
    eta = _t(logit).expand(40_000)
    draws = continuous_bernoulli.sample(eta, make_generator(0))
    assert ((draws >= 0) & (draws <= 1)).all()
    error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean() - continuous_bernoulli.mean(eta)[0])) < Z_LIMIT * error
    variance = float(continuous_bernoulli.variance(eta)[0])
    assert float(draws.var()) == pytest.approx(variance, rel=0.05)


def test_the_stirling_error_completes_the_factorial():
    z = _t([1e-6, 0.3, 1.0, 9.999, 10.001, 50.0, 1e6])
    stirling = (z + 0.5) * z.log() - z + 0.5 * math.log(2 * math.pi)
    exact = torch.lgamma(z + 1.0)
    assert torch.allclose(stirling + counts.stirling_error(z), exact, rtol=1e-12, atol=1e-11)


X = np.r_[np.arange(20), 100, 10_000, 1_000_000].astype(float)


@pytest.mark.parametrize("mean", [1e-6, 0.3, 7.0, 1e4, 1e6])
def test_poisson_masses_equal_scipys(mean):
    ours = counts.poisson_log_mass(_t(X), _t(math.log(mean)))
    np.testing.assert_allclose(ours, stats.poisson(mean).logpmf(X), rtol=1e-9, atol=1e-8)
    single = counts.poisson_log_mass(_t(X).float(), torch.tensor(math.log(mean)))
    np.testing.assert_allclose(single.double(), ours, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("mean", [1e-3, 0.3, 7.0, 1e4])
@pytest.mark.parametrize("size", [1e-3, 0.5, 30.0, 1e6])
def test_negative_binomial_masses_equal_scipys(mean, size):
    log_mean, r = _t(math.log(mean)), _t(size)
    ours = counts.negative_binomial_log_mass(_t(X), log_mean, r)
    # scipy rounds p = r / (r + m): where it is near 1, its complement has few digits
    theirs = stats.nbinom(size, size / (size + mean)).logpmf(X)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    single = counts.negative_binomial_log_mass(_t(X).float(), log_mean.float(), r.float())
    np.testing.assert_allclose(single.double(), ours, rtol=3e-5, atol=1e-3)


@pytest.mark.parametrize("size", [0.5, 4.0, 1e6])
def test_count_masses_sum_to_one(size):
    x = _t(np.arange(3000.0))
    for log_mass in (
        counts.poisson_log_mass(x, _t(2.5)),
        counts.negative_binomial_log_mass(x, _t(2.5), _t(size)),
    ):
        assert float(log_mass.exp().sum()) == pytest.approx(1.0, abs=1e-10)


def test_a_large_size_is_the_poisson_limit():
    poisson = counts.poisson_log_mass(_t(X[:20]), _t(1.2))
    limit = counts.negative_binomial_log_mass(_t(X[:20]), _t(1.2), _t(1e9))
    assert torch.allclose(limit, poisson, atol=1e-6)


def test_gradients_of_the_masses_are_right_everywhere():
    x = _t([0.0, 1.0, 3.0, 50.0, 1000.0])
    log_mean = _t([-3.0, 0.0, 2.0, 9.0, -8.0]).requires_grad_()
    size = _t([0.4, 1e-3, 20.0, 3000.0, 0.1]).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: counts.poisson_log_mass(x, m), (log_mean,))
    assert torch.autograd.gradcheck(
        lambda m, r: counts.negative_binomial_log_mass(x, m, r), (log_mean, size)
    )


def test_draws_of_counts_have_their_moments():
    generator, log_mean, size = make_generator(0), _t(1.5).expand(40_000), _t(2.0)
    mean = math.exp(1.5)
    for draws, variance in (
        (counts.sample_poisson(log_mean, generator), mean),
        (counts.sample_negative_binomial(log_mean, size, generator), mean + mean**2 / 2.0),
    ):
        error = math.sqrt(variance / len(draws))
        assert abs(float(draws.mean()) - mean) < Z_LIMIT * error
        assert float(draws.var()) == pytest.approx(variance, rel=0.06)
