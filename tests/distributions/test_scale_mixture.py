"""t noise about an uncertain line: normalisation, scipy's quadrature, limits, quantiles."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from skvi.distributions import scale_mixture
from skvi.distributions.special import log_gamma_excess


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _log_density(y, k, dof, noise_dof):
    y = np.asarray(y, dtype=np.float64)
    square, extra = _t(y**2), _t(np.broadcast_to(k, y.shape).copy())
    return scale_mixture.log_density(square, extra, dof=dof, noise_dof=noise_dof).numpy()


def _by_quadrature(y, k, dof, noise_dof):
    """Scipy's adaptive rule, panel by panel over log u."""

    def integrand(v):
        log_u = noise_dof / 2 * (v - math.exp(v) + math.log(noise_dof / 2))
        conditional = stats.t._logpdf(y / math.sqrt(math.exp(-v) + k), dof)
        return math.exp(
            conditional - 0.5 * math.log(math.exp(-v) + k) + log_u - special.gammaln(noise_dof / 2)
        )

    cuts = np.linspace(-60.0, math.log(100 / noise_dof + 10), 60)
    ends = pairwise(cuts)
    return sum(integrate.quad(integrand, *pair, epsabs=0, epsrel=1e-10)[0] for pair in ends)


@pytest.mark.parametrize("noise_dof", [0.5, 4.0, 30.0])
@pytest.mark.parametrize("dof", [1.0, 300.0])
@pytest.mark.parametrize(("k", "y"), [(0.0, 1.3), (0.1, 400.0), (50.0, 0.0)])
def test_density_equals_an_adaptive_quadrature(noise_dof, dof, k, y):
    expected = _by_quadrature(y, k, dof, noise_dof)
    density = math.exp(float(_log_density([y], k, dof, noise_dof)[0]))
    assert density == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("noise_dof", [1.5, 4.0, 1e6])
@pytest.mark.parametrize(("dof", "k"), [(3.0, 0.0), (3.0, 20.0), (500.0, 0.3)])
def test_density_integrates_to_one(noise_dof, dof, k):
    # over y = sinh t, whose integrand falls exponentially on both sides
    t = np.linspace(0.0, 60.0, 1201)
    log_density = _log_density(np.sinh(t), k, dof, noise_dof)
    values = np.exp(log_density + np.log(np.cosh(t)))
    assert 2 * integrate.simpson(values, x=t) == pytest.approx(1.0, abs=1e-9)


def test_limits_are_student_laws():
    y = np.array([0.0, 0.3, 2.0, 50.0, 1e6])
    gaussian_noise = stats.t.logpdf(y, 7.0, scale=math.sqrt(1.3))
    np.testing.assert_allclose(_log_density(y, 0.3, 7.0, 1e13), gaussian_noise, rtol=1e-10)
    known_line = stats.t.logpdf(y, 3.0)
    np.testing.assert_allclose(_log_density(y, 0.0, 1e13, 3.0), known_line, rtol=1e-9)


def test_far_rows_and_extreme_parameters_stay_finite():
    y = np.array([0.0, 1.0, 1e8, 1e150])
    for noise_dof in (1e-3, 1.0, 1e6, 1e15):
        for dof in (0.1, 3.0, 1e6):
            values = _log_density(y, 0.5, dof, noise_dof)
            assert np.isfinite(values).all()
            assert (np.diff(values) < 0.0).all()


@pytest.mark.parametrize("noise_dof", [0.7, 1e6])
@pytest.mark.parametrize(("dof", "k"), [(3.0, 0.0), (40.0, 0.5), (2000.0, 1e4)])
@pytest.mark.parametrize("level", [1e-9, 0.9, 0.999])
def test_half_width_holds_the_level(noise_dof, dof, k, level):
    t = float(scale_mixture.half_width(level, _t([k]), dof=dof, noise_dof=noise_dof)[0])
    nodes = np.linspace(0.0, t, 1001) if t < 1.0 else np.sinh(np.linspace(0, math.asinh(t), 1001))
    values = np.exp(_log_density(nodes, k, dof, noise_dof))
    assert 2 * integrate.simpson(values, x=nodes) == pytest.approx(level, rel=1e-6)


def test_half_width_of_a_known_law():
    k = _t([0.0, 0.3, 7.0])
    for level in (1e-300, 0.2, 0.95, 1 - 1e-6):
        found = scale_mixture.half_width(level, k, dof=9.0, noise_dof=1e13).numpy()
        expected = stats.t.ppf(0.5 + level / 2, 9.0) * np.sqrt(1 + k.numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-99)


@pytest.mark.parametrize("x", [1e-9, 0.3, 1.0, 19.9, 20.1, 700.0, 1e12])
def test_log_gamma_excess(x):
    import mpmath

    with mpmath.workdps(40):
        expected = float(mpmath.loggamma(x) - (x * mpmath.log(x) - x))
    assert float(log_gamma_excess(_t(x))) == pytest.approx(expected, rel=1e-13, abs=1e-13)
