"""BayesianLinearVI with Student-t noise as its users meet it."""

import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, sparse, special, stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from skvi import BayesianLinearVI

PRIORS = ["ridge", "ard", "horseshoe", "fixed"]
GROUPS = ["a", "b", "b", "a"]
COEF = np.array([2.0, -1.0, 0.0, 0.5])


def _data(rng, n=60, n_outliers=6):
    """Rows about a plane; the outliers lie far above it, on one side of X."""
    X = rng.normal(size=(n, 4)) * np.linspace(0.5, 2.0, 4) + 3.0
    y = X @ COEF + 1.0 + 0.2 * rng.normal(size=n)
    y[np.argsort(X[:, 0])[:n_outliers]] += 20.0 + 5.0 * rng.normal(size=n_outliers)
    return X, y


def _robust(**params):
    return BayesianLinearVI(noise="student_t", **params)


# Options that the common checks do not meet.
@parametrize_with_checks(
    [_robust(prior="ard", noise_dof=None, fit_intercept=False, max_iter=5)],
    xfail_strict=True,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learn(estimator, check):
    if "transform" in str(check):
        pytest.skip("noise that is found to have no variance has no columns to transform to")
    check(estimator)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("noise_dof", [3.0, None])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("n", "n_outliers"), [(30, 3), (4, 1)])
def test_elbo_is_the_score_minus_the_price(
    prior, noise_dof, fit_intercept, n, n_outliers, rng, device
):
    X, y = _data(rng, n, n_outliers)
    y = 1e3 * y
    weight = rng.integers(1, 4, size=n).astype(float)
    model = _robust(
        prior=prior, noise_dof=noise_dof, fit_intercept=fit_intercept, tol=1e-9, device=device
    ).fit(X, y, sample_weight=weight)
    values = model.score_samples(X, y)
    assert model.elbo_ == pytest.approx(weight @ values - model.kl_, rel=1e-9)
    assert model.elbo_history_[-1] == model.elbo_
    assert len(model.elbo_history_) == model.n_iter_ == len(model.relevance_path_)
    rises = np.diff(model.elbo_history_)
    assert (rises >= -1e-11 * np.abs(model.elbo_history_[1:]).clip(1.0)).all()
    assert model.converged_
    assert model.n_samples_seen_ == weight.sum()
    if noise_dof is not None:
        assert model.noise_dof_ == noise_dof
    assert (values <= model.log_predictive(X, y)).all()
    terms = model.elbo_terms(X, y)
    np.testing.assert_allclose(terms.reconstruction - terms.kl, values, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(terms.energy + terms.entropy, values, rtol=1e-10, atol=1e-10)
    assert (terms.kl >= 0.0).all()
    repeated = clone(model).fit(
        np.repeat(X, weight.astype(int), 0), np.repeat(y, weight.astype(int))
    )
    assert repeated.elbo_ == pytest.approx(model.elbo_, rel=1e-7)
    np.testing.assert_allclose(repeated.coef_, model.coef_, rtol=1e-3, atol=1e-3)


def test_outliers_do_not_move_the_coefficients(rng):
    X, y = _data(rng)
    gaussian = BayesianLinearVI().fit(X, y)
    assert np.abs(gaussian.coef_ - COEF).max() > 1.0
    for noise_dof in (4.0, None):
        model = _robust(noise_dof=noise_dof).fit(X, y)
        assert np.abs(model.coef_ - COEF).max() < 0.25
        assert abs(model.intercept_ - 1.0) < 1.0
        assert model.elbo_ > gaussian.elbo_ + 20.0
        # a row is an outlier if knowing its precision is worth much
        surprise = model.elbo_terms(X, y).kl
        assert set(np.argsort(-surprise)[:6]) == set(np.argsort(X[:, 0])[:6])
    assert model.noise_dof_ < 2.0
    groups = _robust(groups=GROUPS).fit(X, y)
    assert np.abs(groups.coef_ - COEF).max() < 0.25
    assert groups.weight_precision_[0] == groups.weight_precision_[3] != groups.weight_precision_[1]


def test_many_degrees_of_freedom_are_gaussian_noise(rng):
    X, y = _data(rng)
    gaussian, model = BayesianLinearVI().fit(X, y), _robust(noise_dof=1e13).fit(X, y)
    assert gaussian.noise_dof_ == np.inf
    assert model.elbo_ == pytest.approx(gaussian.elbo_, rel=1e-8)
    for name in ("coef_", "coef_std_", "noise_precision_", "kl_", "intercept_"):
        np.testing.assert_allclose(getattr(model, name), getattr(gaussian, name), rtol=1e-5)
    for expected, found in zip(
        gaussian.predict(X, return_std=True), model.predict(X, return_std=True), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(model.predict_interval(X), gaussian.predict_interval(X), rtol=1e-5)
    np.testing.assert_allclose(model.log_predictive(X, y), gaussian.log_predictive(X, y), rtol=1e-5)


def test_gaussian_rows_are_found_gaussian_and_heavy_tails_heavy():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(3000, 2))
    line = X @ [1.0, -2.0]
    heavy = _robust(noise_dof=None).fit(X, line + 0.7 * rng.standard_t(3.0, size=3000))
    # the standard error of the degrees of freedom is about 0.25
    assert 2.0 < heavy.noise_dof_ < 4.0
    assert heavy.noise_precision_**-0.5 == pytest.approx(0.7, rel=0.1)
    assert _robust(noise_dof=None).fit(X, line + rng.normal(size=3000)).noise_dof_ > 20.0


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_the_answer_scales_with_the_units(fit_intercept, rng):
    X, y = _data(rng)
    model = _robust(prior="ard", fit_intercept=fit_intercept).fit(X, y)
    units = 2.0 ** np.array([-20, 0, 3, 12])
    scaled = clone(model).fit(X * units, y * 2.0**30)
    np.testing.assert_allclose(scaled.coef_ * units, model.coef_ * 2.0**30, rtol=1e-6)
    assert scaled.score(X * units, y * 2.0**30) == pytest.approx(
        model.score(X, y) - 30 * np.log(2.0), rel=1e-8
    )


# -- new rows -------------------------------------------------------------------------------------


def test_predictions_describe_the_draws(rng, device):
    X, y = _data(rng, 30, 3)
    model = _robust(noise_dof=5.0, device=device).fit(X, y)
    x = np.vstack([X[:2], [[3.0, 3.0, 3.0, 40.0]]])
    draws = model.sample_y(x, n_samples=40_000)
    mean, std = model.predict(x, return_std=True)
    # a law of 5 degrees of freedom has a kurtosis of 9
    np.testing.assert_allclose(draws.mean(1), mean, atol=5 * std.max() / 200)
    np.testing.assert_allclose(draws.std(1), std, rtol=5 * np.sqrt(8 / 4 / 40_000))
    _, cov = model.predict(x, return_cov=True)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), std, rtol=1e-10)
    assert cov[0, 1] != 0.0
    for level in (0.5, 0.9):
        low, high = model.predict_interval(x, level).T
        inside = ((draws > low[:, None]) & (draws < high[:, None])).mean(1)
        error = np.sqrt(level * (1 - level) / 40_000)
        np.testing.assert_allclose(inside, level, atol=5 * error)
    np.testing.assert_array_equal(model.transform(x), np.column_stack([mean, std]))


def test_the_standard_deviation_is_that_of_the_density(rng):
    X, y = _data(rng, 30, 3)
    model = _robust(noise_dof=3.0).fit(X, y)
    x = np.array([[1.0, -2.0, 0.5, 4.0]])
    mean, std = (float(value[0]) for value in model.predict(x, return_std=True))
    t = np.linspace(-30.0, 30.0, 2001)
    nodes = mean + std * np.sinh(t)
    density = np.exp(model.log_predictive(np.repeat(x, len(t), 0), nodes)) * std * np.cosh(t)
    variance = integrate.trapezoid((nodes - mean) ** 2 * density, t)
    assert np.sqrt(variance) == pytest.approx(std, rel=1e-7)


def test_the_predictive_density_integrates_to_its_intervals(rng):
    X, y = _data(rng, 20, 2)
    model = _robust(noise_dof=1.5).fit(X, y)  # no variance
    x = np.array([[3.0, 3.0, 3.0, 9.0]])
    low, high = model.predict_interval(x, 0.9)[0]
    centre, reach = (low + high) / 2, (high - low) / 2
    assert centre == pytest.approx(float(model.predict(x)[0]))
    t = np.linspace(-45.0, 45.0, 2001)
    nodes = centre + reach * np.sinh(t)

    def mass(inside):
        values = np.exp(model.log_predictive(np.repeat(x, len(t), 0), nodes))
        values *= reach * np.cosh(t) * inside
        return integrate.trapezoid(values, t)

    assert mass(np.ones_like(t)) == pytest.approx(1.0, abs=1e-8)
    assert mass(np.abs(np.sinh(t)) < 1.0) == pytest.approx(0.9, abs=0.01)
    for call in (
        lambda: model.predict(x, return_std=True),
        lambda: model.predict(x, return_cov=True),
        lambda: model.transform(x),
    ):
        with pytest.raises(ValueError, match="no variance"):
            call()
    assert model.coef_cov_.shape == (4, 4)


def test_score_of_a_row_is_the_bound_with_its_own_precision(rng):
    """By quadrature: the best q(u) leaves log E_u exp of the expected log density."""
    X, y = _data(rng, 30, 3)
    model = _robust(noise_dof=4.0, prior="fixed", weight_precision=1e-8).fit(X, y)
    posterior = model._model.posterior
    a, b = float(posterior.noise_shape), float(posterior.noise_rate[0])
    rows, target = rng.normal(size=(3, 4)) + 3.0, np.array([0.0, 5.0, 300.0])
    line = (rows - model._model.x.shift) / model._model.x.scale - posterior.centre_x
    factor = posterior.factor
    V = factor.outer[0] ** 2 * (factor.basis[0] * factor.gain[0]) @ factor.basis[0].T
    k = posterior.intercept_variance + np.einsum("nd,de,ne->n", line, V, line)
    error = (target - model.predict(rows)) / model._model.y.scale[0]
    square = a / b * error**2 + k
    E_log_beta = float(stats.loggamma(a).mean()) - np.log(b) - 2 * np.log(model._model.y.scale[0])
    for e, found in zip(square, model.score_samples(rows, target), strict=True):
        expected = integrate.quad(
            lambda v, e=e: (
                np.exp(v - 0.5 * e * np.exp(v) + 0.5 * v)
                * stats.gamma.pdf(np.exp(v), 2.0, scale=0.5)
            ),
            -40.0,
            5.0,
            epsabs=0,
            epsrel=1e-10,
            limit=500,
        )[0]
        assert found == pytest.approx(
            np.log(expected) + 0.5 * (E_log_beta - np.log(2 * np.pi)), rel=1e-7
        )


# -- the contract ---------------------------------------------------------------------------------


def test_combinations_that_do_not_exist_are_refused(rng):
    X, y = _data(rng)
    with pytest.raises(ValueError, match="MultiOutputRegressor"):
        _robust().fit(X, np.column_stack([y, y]))
    with pytest.raises(ValueError, match="proper prior"):
        _robust(prior="flat").fit(X, y)
    with pytest.raises(ValueError, match="sparse"):
        _robust().fit(sparse.csr_array(X), y)
    with pytest.raises(AttributeError, match="partial_fit") as caught:
        _robust().partial_fit(X, y)
    assert "fit on all rows" in str(caught.value.__cause__)
    for noise in ("cauchy", None):
        with pytest.raises(ValueError, match="noise"):
            BayesianLinearVI(noise=noise).fit(X, y)
    with pytest.raises(ValueError, match="noise_dof"):
        _robust(noise_dof=0.0).fit(X, y)
    model = _robust().fit(X, y)
    assert not hasattr(model, "log_evidence_")
    assert not hasattr(model, "evidence_gap_")
    before = model.coef_.copy()
    for bad in (np.where(y == y[3], np.nan, y), y[:-1]):
        with pytest.raises(ValueError):
            model.fit(X, bad)
    np.testing.assert_array_equal(model.coef_, before)
    # the fit decides, not the parameter
    model.set_params(noise="gaussian")
    assert not hasattr(model, "log_evidence_")
    with pytest.raises(ValueError, match="partial_fit"):
        model.partial_fit(X, y)
    # predictions read sparse rows like any others
    np.testing.assert_allclose(model.predict(sparse.csr_array(X)), model.predict(X))


def test_the_divergence_of_a_row_is_that_of_two_gamma_laws(rng):
    """From the published mean and scale only: e is what the local bound says it is."""
    X = rng.normal(size=(30, 2))
    y = X[:, 0] + rng.standard_t(2.0, size=30)
    nu = 3.0
    model = BayesianLinearVI(noise="student_t", noise_dof=nu).fit(X, y)
    terms = model.elbo_terms(X, y)
    a = model._model.posterior.noise_shape
    E_log_noise = special.digamma(a) + np.log(model.noise_precision_ / a)
    # log St(sqrt e) + 1/2 E log beta, solved for e
    log_student = model.score_samples(X, y) - 0.5 * E_log_noise - stats.t(nu).logpdf(0.0)
    e = nu * np.expm1(-2.0 / (nu + 1.0) * log_student)
    rate, half = torch.as_tensor((nu + e) / 2), torch.tensor(nu / 2, dtype=torch.float64)
    q, p = torch.distributions.Gamma(half + 0.5, rate), torch.distributions.Gamma(half, half)
    np.testing.assert_allclose(terms.kl, torch.distributions.kl_divergence(q, p), rtol=1e-5)
    np.testing.assert_allclose(terms.entropy, q.entropy(), rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_fit_whatever_noise_says_now(rng):
    X = rng.normal(size=(30, 2))
    y = X + rng.normal(size=(30, 2))
    model = BayesianLinearVI().fit(X, y)
    before = model.score_samples(X, y)
    model.set_params(noise="student_t")
    np.testing.assert_array_equal(model.score_samples(X, y), before)
    model.fit(X, y[:, 0])
    before = model.score_samples(X, y[:, 0])
    model.set_params(noise="gaussian")
    np.testing.assert_array_equal(model.score_samples(X, y[:, 0]), before)
    with pytest.raises(ValueError, match="2 output"):
        model.score(X, y)


def test_warm_start_and_passes_that_run_out(rng):
    X, y = _data(rng)
    model = _robust(prior="ard", noise_dof=None, warm_start=True).fit(X, y)
    n_iter, elbo = model.n_iter_, model.elbo_
    model.fit(X, y)
    assert model.n_iter_ < n_iter
    assert model.elbo_ == pytest.approx(elbo, abs=1e-6)
    gaussian = BayesianLinearVI(prior="ard", warm_start=True).fit(X, y)
    gaussian.set_params(noise="student_t", noise_dof=None).fit(X, y)
    assert gaussian.elbo_ == pytest.approx(elbo, abs=1e-4)
    with pytest.raises(ValueError, match="warm_start"):
        gaussian.set_params(prior="ridge").fit(X, y)
    with pytest.raises(ValueError, match="warm_start"):
        model.fit(X[:, :2], y)
    with pytest.warns(ConvergenceWarning, match="max_iter") as caught:
        _robust(max_iter=2).fit(X, y)
    assert caught[0].filename == __file__


def test_degenerate_rows_are_finite():
    X = np.arange(8.0)[:, None]
    for y in (2.0 * X[:, 0] + 1.0, np.full(8, 3.0), np.r_[np.zeros(7), 1e100]):
        for noise_dof in (4.0, None):
            model = _robust(noise_dof=noise_dof).fit(X, y)
            assert np.isfinite(model.score_samples(X, y)).all()
            assert np.isfinite(model.log_predictive(X, y)).all()
            assert np.isfinite(model.predict_interval(X)).all()
    one = _robust().fit(np.ones((3, 2)), np.ones(3))
    assert np.isfinite(one.elbo_)
    again = pickle.loads(pickle.dumps(one))
    assert again.score(np.ones((3, 2)), np.ones(3)) == one.score(np.ones((3, 2)), np.ones(3))
