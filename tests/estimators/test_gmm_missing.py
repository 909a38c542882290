"""VariationalGMM on tables with holes: fits, scores, imputation, conditioning."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import get_tags

from skvi import VariationalGMM

SHAPES = ["full", "tied", "diag", "spherical"]
every_shape = pytest.mark.parametrize("covariance_type", SHAPES)
every_law = pytest.mark.parametrize("law", ["dirichlet_process", "dirichlet_distribution"])


def _holed(X, share=0.2, seed=0):
    holes = np.random.default_rng(seed).uniform(size=X.shape) < share
    return np.where(holes, np.nan, X)


def _fit(X, sample_weight=None, **params):
    defaults = {"n_components": 4, "random_state": 0, "device": "cpu", "max_iter": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return VariationalGMM(**{**defaults, **params}).fit(X, sample_weight=sample_weight)


@pytest.fixture(scope="module")
def X():
    X = _holed(load_iris().data)
    X[3] = np.nan
    return X


@every_shape
@every_law
def test_every_method_takes_missing_cells(X, covariance_type, law, device):
    weight = np.random.default_rng(0).integers(0, 4, size=len(X))
    model = _fit(
        X,
        weight,
        covariance_type=covariance_type,
        weight_concentration_prior_type=law,
        device=device,
    )
    local = model.score_samples(X)
    assert local[3] == pytest.approx(0.0, abs=1e-12)
    assert_allclose(model.elbo_, weight @ local - model.kl_, rtol=1e-9)
    assert np.diff(model.elbo_history_).min() > -1e-12 * abs(model.elbo_)
    terms = model.elbo_terms(X)
    assert_allclose(terms.reconstruction - terms.kl, local, rtol=1e-10, atol=1e-12)
    assert_allclose(terms.energy + terms.entropy, local, rtol=1e-10, atol=1e-12)
    assert [term[3] for term in terms] == [0.0] * 4
    predictive = model.log_predictive(X)
    assert (predictive >= local - 1e-12).all()
    assert predictive[3] == pytest.approx(0.0, abs=1e-12)
    resp = model.transform(X)
    assert_allclose(resp.sum(1), 1.0)
    assert_allclose(resp[3], model.weights_, rtol=1e-12)
    assert_array_equal(model.predict(X), resp.argmax(1))
    assert model.score(X, sample_weight=weight) == pytest.approx(np.average(local, weights=weight))
    assert np.isfinite(model.precisions_).all()
    assert np.isfinite(model.sample(20, random_state=0)[0]).all()


@every_shape
def test_rows_with_nothing_observed_have_no_effect(X, covariance_type):
    without = _fit(np.delete(X, 3, axis=0), covariance_type=covariance_type)
    assert _fit(X, covariance_type=covariance_type).elbo_ == without.elbo_


@every_shape
def test_a_fitted_posterior_serves_complete_and_incomplete_rows_alike(X, covariance_type):
    complete = load_iris().data
    for model in (_fit(X, covariance_type=covariance_type),
                  _fit(complete, covariance_type=covariance_type)):  # fmt: skip
        alone = model.score_samples(complete), model.log_predictive(complete)
        mixed = np.vstack([complete, X])
        assert_allclose(model.score_samples(mixed)[: len(X)], alone[0], rtol=1e-9)
        assert_allclose(model.log_predictive(mixed)[: len(X)], alone[1], rtol=1e-9)


@every_shape
@pytest.mark.parametrize("init_params", ["k-means++", "kmeans", "random_from_data", "random"])
def test_weights_are_repeats_and_order_does_not_matter(X, covariance_type, init_params):
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 3, size=len(X))
    params = {"covariance_type": covariance_type, "init_params": init_params, "max_iter": 15}
    weighted = _fit(X, weight, **params)
    repeated = _fit(rng.permutation(np.repeat(X, weight, axis=0)), **params)
    assert_allclose(weighted.elbo_, repeated.elbo_, rtol=1e-9)
    assert_allclose(weighted.means_, repeated.means_, rtol=1e-6)


@every_shape
def test_units_move_scores_by_the_observed_cells_alone(X, covariance_type):
    scale = 1000.0 if covariance_type == "spherical" else np.array([1e-3, 1.0, 7.0, 1e5])
    model = _fit(X, covariance_type=covariance_type)
    other = _fit(X * scale - 5.0, covariance_type=covariance_type)
    shift = ~np.isnan(X) @ np.log(np.broadcast_to(scale, 4))
    assert_allclose(
        other.score_samples(X * scale - 5.0), model.score_samples(X) - shift, rtol=1e-6, atol=1e-12
    )
    assert_allclose(other.elbo_, model.elbo_ - shift.sum(), rtol=1e-8)
    assert_allclose(other.impute(X * scale - 5.0), model.impute(X) * scale - 5.0, rtol=1e-6)


@given(st.sampled_from(SHAPES), st.integers(0, 2**16), st.floats(0.0, 0.95), st.booleans())
def test_any_mask_can_be_fitted(covariance_type, seed, share, single):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(3, 30), rng.integers(1, 6)
    X = (rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 4, size=d)).astype(
        np.float32 if single else np.float64
    )
    observed = rng.uniform(size=X.shape) >= share
    observed[:2] = True
    X[~observed] = np.nan
    model = _fit(X, covariance_type=covariance_type, max_iter=20)
    local = model.score_samples(X)
    assert np.diff(model.elbo_history_, prepend=model.elbo_history_[0]).min() > -1e-10 * max(
        1.0, abs(model.elbo_)
    )
    assert_allclose(model.elbo_, local.sum() - model.kl_, rtol=1e-7, atol=1e-7)
    assert (model.log_predictive(X) >= local - 1e-9).all()
    filled, std = model.impute(X, return_std=True)
    assert filled.dtype == std.dtype == X.dtype
    assert_array_equal(filled[observed], X[observed])
    assert (std[observed] == 0.0).all()
    assert np.isfinite(filled).all()
    assert (std[~observed] > 0.0).all()


def test_held_out_bound_beats_mean_imputation():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0, 0.0], [6.0, 6.0, -6.0]])
    chol = np.array([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [0.5, -0.5, 0.6]])
    data = centres[rng.integers(2, size=900)] + rng.normal(size=(900, 3)) @ chol.T
    train, test = _holed(data[:600], 0.3), data[600:]
    for covariance_type in SHAPES:
        ours = _fit(train, covariance_type=covariance_type)
        means = np.where(np.isnan(train), np.nanmean(train, axis=0), train)
        naive = _fit(means, covariance_type=covariance_type)
        assert ours.score(test) > naive.score(test) + 0.1
        holed = _holed(test, 0.3, seed=1)
        holes = np.isnan(holed)
        error = ours.impute(holed) - test
        filled = np.where(holes, np.nanmean(train, axis=0), test) - test
        assert np.square(error[holes]).mean() < 0.5 * np.square(filled[holes]).mean()


def test_standard_deviations_are_calibrated_on_the_models_own_rows():
    model = _fit(load_iris().data, n_components=2)
    rows = model.sample(4000, random_state=0)[0]
    holed = _holed(rows, 0.3)
    filled, std = model.impute(holed, return_std=True)
    holes = np.isnan(holed)
    inside = np.abs(filled - rows)[holes] < std[holes]
    assert 0.63 < inside.mean() < 0.76


@every_shape
def test_conditioning_integrates_to_one_and_has_its_mean(covariance_type):
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, size=300)
    data = np.column_stack([x, x**2 + 0.3 * rng.normal(size=300), rng.normal(size=300)])
    model = _fit(data, covariance_type=covariance_type, n_components=6)
    given = np.array([[1.2, np.nan, 0.3]])
    grid = np.linspace(-300, 300, 120_001)
    rows = np.tile(given, (grid.size, 1))
    rows[:, 1] = grid
    density = np.exp(model.log_conditional(rows, targets=1)) * (grid[1] - grid[0])
    assert density.sum() == pytest.approx(1.0, abs=1e-4)
    mean, std = model.condition(given, targets=[1], return_std=True)
    assert mean.shape == std.shape == (1, 1)
    assert mean[0, 0] == pytest.approx(density @ grid, abs=5e-3)
    assert std[0, 0] > 0
    assert_array_equal(model.condition(given[:, [0, 2]], targets=1), mean)
    rows[:, 0] = np.nan  # given the third feature alone
    density = np.exp(model.log_conditional(rows, targets=1)) * (grid[1] - grid[0])
    assert density.sum() == pytest.approx(1.0, abs=1e-2)


def test_targets_by_name():
    frame = load_iris(as_frame=True).data
    names = list(frame.columns)
    model = _fit(frame)
    by_name = model.condition(frame, [names[2], names[0]])
    assert_array_equal(by_name, model.condition(frame.drop(columns=[names[0], names[2]]), [2, 0]))
    assert_array_equal(by_name[:, :1], model.condition(frame, [names[2], -4])[:, :1])
    holed = frame.copy()
    holed[names[2]] = np.nan
    assert_allclose(
        model.log_conditional(frame, names[2]),
        model.log_predictive(frame) - model.log_predictive(holed),
    )
    assert_array_equal(model.impute(holed)[:, [2]], model.condition(frame, names[2]))
    assert isinstance(holed, pd.DataFrame)
    with pytest.raises(ValueError, match="were expected"):
        model.condition(frame[[names[1], names[0], names[3]]], names[2])
    for targets in ("petal", 4, -5, [], [0, 0], [0, -4], range(4), True, 1.5 * np.ones(1)):
        with pytest.raises(ValueError, match="targets="):
            model.condition(frame, targets)
        with pytest.raises(ValueError, match="targets="):
            model.log_conditional(frame, targets)


def test_input_that_cannot_be_used(X):
    model = VariationalGMM(2, device="cpu")
    unseen = X.copy()
    unseen[:, 2] = np.nan
    with pytest.raises(ValueError, match=r"Features \[2\] of X have no observed value"):
        model.fit(unseen)
    only = np.where(np.arange(len(X)) == 7, 0.0, 1.0)
    unseen[7] = 1.0
    with pytest.raises(ValueError, match="no observed value"):
        model.fit(unseen, sample_weight=only)
    constant = X.copy()
    constant[~np.isnan(constant[:, 1]), 1] = 3.0
    with pytest.raises(ValueError, match="constant"):
        model.fit(constant)
    assert not hasattr(model, "elbo_")
    infinite = X.copy()
    infinite[0, 0] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        model.fit(infinite)
    fitted = _fit(X)
    for call in (fitted.score_samples, fitted.impute, lambda X: fitted.condition(X, 1)):
        with pytest.raises(ValueError, match="infinity"):
            call(infinite)
    with pytest.raises(ValueError, match="Features"):
        fitted.condition(np.full((1, 3), 1e300), 1)
    assert get_tags(model).input_tags.allow_nan


@every_shape
def test_warm_start_and_tensors(X, covariance_type):
    first = _fit(X, covariance_type=covariance_type, max_iter=5)
    kept = first.elbo_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        first.set_params(warm_start=True, max_iter=50).fit(X)
    assert first.elbo_ >= kept
    tensor = torch.tensor(X)
    assert_array_equal(first.score_samples(tensor), first.score_samples(X))
    assert_array_equal(first.impute(tensor), first.impute(X))


def test_default_covariance_prior_is_that_of_complete_data_where_nothing_is_missing():
    complete = load_iris().data
    prior = _fit(complete, max_iter=1).covariance_prior_
    assert_allclose(prior, np.cov(complete.T), rtol=1e-12)
    holed = _holed(complete, 0.3)
    with_holes = _fit(holed, max_iter=1).covariance_prior_
    assert_allclose(with_holes.diagonal(), np.nanvar(holed, axis=0, ddof=1), rtol=1e-12)
    assert np.linalg.eigvalsh(with_holes)[0] > 0
    seen = ~np.isnan(holed)
    centred = np.where(seen, holed - np.nanmean(holed, axis=0), 0.0)
    count = seen.sum(0)
    expected = (centred[:, 0] @ centred[:, 2]) / np.sqrt((count[0] - 1) * (count[2] - 1))
    assert with_holes[0, 2] == pytest.approx(expected, rel=1e-10)


@every_shape
@pytest.mark.parametrize("algorithm", ["memoized", "svi"])
def test_algorithms_over_batches_take_missing_cells(X, covariance_type, algorithm):
    params = {"covariance_type": covariance_type, "algorithm": algorithm, "batch_size": 40}
    model = _fit(X, **params, max_iter=400, tol=1e-9)
    assert_allclose(model.elbo_, model.score_samples(X).sum() - model.kl_, rtol=1e-9)
    if algorithm == "svi":
        return
    assert np.diff(model.elbo_history_).min() > -1e-11 * abs(model.elbo_)
    # A summit of laps is one of coordinate ascent.
    summit = model.set_params(algorithm="cavi", warm_start=True, tol=0.0, max_iter=3)
    before = model.elbo_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        summit.fit(X)
    assert_allclose(summit.elbo_, before, rtol=1e-8)


@every_shape
def test_a_stream_with_missing_cells_has_an_exact_bound(X, covariance_type):
    """The bound of the responsibilities at the visits, recomputed from a second visit's terms."""
    complete = load_iris().data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = VariationalGMM(
            4, covariance_type=covariance_type, random_state=0, device="cpu", max_iter=50
        ).partial_fit(complete[::3])
        first_local = model.score_samples(complete[::3]).sum()
        assert_allclose(model.elbo_, first_local - model.kl_, rtol=1e-9)
        previous = model.elbo_
        visited = model.score_samples(X[1::3]).sum()  # under the posterior of the visit
        model.partial_fit(X[1::3])
    # The update can only raise what the old posterior made of old and new rows together.
    assert model.elbo_ >= previous + visited - 1e-9
    everything = np.concatenate([complete[::3], X[1::3]])
    assert model.elbo_ <= model.score_samples(everything).sum() - model.kl_ + 1e-9
    before = model.elbo_
    model.partial_fit(np.full((2, 4), np.nan))  # says nothing
    assert model.elbo_ == before
    with pytest.raises(ValueError, match="cannot continue"):
        model.set_params(n_components=5).partial_fit(np.full((2, 4), np.nan))


@every_shape
def test_weights_over_hundreds_of_orders_of_magnitude(covariance_type):
    """A feature may be known from rows that count for nothing beside those that lack it."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    X[:30, 1] = np.nan
    weight = np.r_[np.full(30, 1e200), np.full(30, 1e-200)]
    model = _fit(X, weight, n_components=3, covariance_type=covariance_type, moves=None, max_iter=3)
    assert_allclose(model.mean_prior_[1], X[30:, 1].mean(), rtol=1e-9)
    assert_allclose(model.elbo_, weight @ model.score_samples(X) - model.kl_, rtol=1e-9)
