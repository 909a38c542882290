"""VAETransformer on tables with holes: exact marginals, imputation, and rows of nothing."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import get_tags

from skvi.estimators.vae import VAETransformer


def _short(**params):
    settings = {"hidden_layer_sizes": (8,), "max_iter": 60, "random_state": 0}
    return VAETransformer(**settings | params)


def _fit(estimator, X, **fit_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **fit_params)


def _with_holes(X, share=0.3, seed=0):
    holes = np.random.default_rng(seed).uniform(size=X.shape) < share
    return np.where(holes, np.nan, X), holes


@pytest.fixture(scope="module")
def iris():
    return load_iris().data


@pytest.fixture(scope="module")
def linear():
    """A fit that is factor analysis, and its mean and covariance in the units of X."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 2)) @ rng.normal(size=(2, 6)) + rng.normal(size=(600, 6)) + 9.0
    vae = _fit(_short(hidden_layer_sizes=(), max_iter=200), X)
    weights, (shift, scale) = vae._model.weights, vae._model.affine
    # A posterior a little wider than the prior: importance weights are then bounded for any holes.
    weights["encoder.linear.weight"][:] = 0.0
    weights["encoder.linear.bias"][:] = [0.0, 0.0, 5.0, 5.0]
    W = weights["decoder.linear.weight"].astype(float) * scale[:, None]
    mean = weights["decoder.linear.bias"].astype(float) * scale + shift
    return vae, X, mean, W @ W.T + np.diag(vae.noise_std_**2)


def test_scores_are_those_of_the_marginal_of_the_observed_cells(linear):
    vae, X, mean, cov = linear
    holed, holes = _with_holes(X[:20])
    ours = vae.log_predictive(holed, 100_000)
    for row, hole, value in zip(X, holes, ours, strict=False):
        seen = np.flatnonzero(~hole)
        law = stats.multivariate_normal(mean[seen], cov[np.ix_(seen, seen)])
        assert value == pytest.approx(law.logpdf(row[seen]), abs=0.1)
    assert (vae.score_samples(holed) < ours + 0.05).all()


def test_imputation_is_the_conditional_law_of_a_normal(linear):
    vae, X, mean, cov = linear
    holed, holes = _with_holes(X[:20])
    filled, std = vae.impute(holed, n_importance=100_000, return_std=True)
    np.testing.assert_array_equal(filled[~holes], X[:20][~holes])
    assert (std[~holes] == 0).all()
    for i, hole in enumerate(holes):
        gone, seen = np.flatnonzero(hole), np.flatnonzero(~hole)
        gain = cov[np.ix_(gone, seen)] @ np.linalg.inv(cov[np.ix_(seen, seen)])
        expected = mean[gone] + gain @ (X[i, seen] - mean[seen])
        spread = np.sqrt(np.diag(cov[np.ix_(gone, gone)] - gain @ cov[np.ix_(seen, gone)]))
        np.testing.assert_allclose(filled[i, gone], expected, atol=0.15)
        np.testing.assert_allclose(std[i, gone], spread, rtol=0.1)


def test_without_holes_nothing_is_imputed_and_nothing_changes(iris):
    vae = _fit(_short(), iris)
    filled, std = vae.impute(iris, 10, return_std=True)
    np.testing.assert_array_equal(filled, iris)
    assert not std.any()
    holed = np.r_[iris, np.full((1, 4), np.nan)]
    # in the company of a row with holes, by the route that masks
    np.testing.assert_allclose(vae.score_samples(holed)[:-1], vae.score_samples(iris), rtol=1e-9)
    np.testing.assert_allclose(vae.transform(holed)[:-1], vae.transform(iris), rtol=1e-9)


def test_a_row_of_nothing_has_the_prior_and_the_score_zero(iris):
    vae = _fit(_short(), iris)
    nothing = np.full((2, 4), np.nan)
    np.testing.assert_array_equal(vae.score_samples(nothing), 0.0)
    np.testing.assert_allclose(vae.log_predictive(nothing, 50), 0.0, atol=1e-12)
    mean, std = vae.posterior(nothing)
    assert (mean == 0).all()
    assert (std == 1).all()
    filled = vae.impute(nothing, 5000)
    np.testing.assert_allclose(filled[0], vae.sample(20_000)[0].mean(0), atol=0.15)
    with_it = _fit(_short(), np.r_[iris, nothing])
    assert np.isfinite(with_it.elbo_)


@pytest.mark.parametrize("likelihood", ["gaussian", "student_t", "gaussian_heteroscedastic"])
def test_imputation_beats_column_means(iris, likelihood):
    holed, holes = _with_holes(iris, 0.25)
    vae = _fit(_short(likelihood=likelihood, max_iter=300), holed)
    filled = vae.impute(holed, 500)
    means = np.broadcast_to(np.nanmean(holed, axis=0), iris.shape)
    scale = iris.std(axis=0)
    error, baseline = (
        np.sqrt(np.mean(((guess - iris) / scale)[holes] ** 2)) for guess in (filled, means)
    )
    assert error < 0.75 * baseline
    assert vae.elbo_ == pytest.approx(vae.score_samples(holed).sum(), rel=1e-9)
    single = vae.impute(holed.astype(np.float32), 500)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, filled, atol=0.02)


def test_holes_in_a_mixed_table():
    rng = np.random.default_rng(0)
    f = rng.normal(size=500)
    X = np.c_[
        5.0 * f + rng.normal(size=500),
        np.digitize(f, [-0.5, 0.5]),
        rng.poisson(np.exp(1.0 + f)),
        f > 0,
        -f + 0.3 * rng.normal(size=500),
    ].astype(float)
    kinds = {"gaussian": [0, 4], "categorical": [1], "poisson": [2], "bernoulli": [3]}
    holed, holes = _with_holes(X, 0.2)
    vae = _fit(_short(likelihood=kinds, n_components=1, max_iter=150), holed)
    filled, std = vae.impute(holed, 300, return_std=True)
    codes = holes[:, 1]
    assert (filled[codes, 1] == X[codes, 1]).mean() > 0.6
    assert (std[codes, 1] <= 0.5).all()
    flags = filled[holes[:, 3], 3]
    assert ((flags > 0.5) == X[holes[:, 3], 3]).mean() > 0.8
    counts = holes[:, 2]
    assert np.corrcoef(np.log1p(filled[counts, 2]), np.log1p(X[counts, 2]))[0, 1] > 0.6
    assert np.isfinite(filled).all()


def test_auto_looks_at_observed_cells_only():
    X = (np.random.default_rng(0).uniform(size=(60, 3)) < 0.5).astype(float)
    X[0, 0] = np.nan
    assert _fit(_short(max_iter=2), X).likelihood_ == "bernoulli"


def test_holes_do_not_move_units_or_order(iris):
    holed, _ = _with_holes(iris)
    vae = _fit(_short(max_iter=5), holed)
    np.testing.assert_allclose(vae._model.affine.shift, np.nanmean(holed, axis=0), rtol=1e-12)
    np.testing.assert_allclose(vae._model.affine.scale, np.nanstd(holed, axis=0), rtol=1e-12)
    scores = vae.score_samples(holed)
    np.testing.assert_allclose(vae.score_samples(holed[::-1])[::-1], scores, rtol=1e-9)
    alone = [vae.score_samples(holed[i : i + 1])[0] for i in range(10)]
    np.testing.assert_allclose(alone, scores[:10], rtol=1e-9)
    scaled = _fit(clone(vae), holed * 1024.0)
    n_seen = (~np.isnan(holed)).sum(axis=1)
    np.testing.assert_allclose(
        scaled.score_samples(holed * 1024.0), scores - n_seen * np.log(1024.0), rtol=1e-6
    )


def test_empty_columns_and_infinities_are_errors(iris):
    empty = iris.copy()
    empty[:, 2] = np.nan
    with pytest.raises(ValueError, match="Column 2 of X has no observed value"):
        _short().fit(empty)
    vae = _fit(_short(max_iter=2), iris)
    assert np.isfinite(vae.score(empty))
    infinite = iris.copy()
    infinite[3, 1] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        vae.impute(infinite)
    with pytest.raises(ValueError, match="n_importance"):
        vae.impute(iris, n_importance=0)
    assert get_tags(vae).input_tags.allow_nan


def test_partial_fit_and_held_out_rows_take_holes(iris):
    holed, _ = _with_holes(iris)
    vae = _short().partial_fit(holed).partial_fit(holed[:40])
    assert np.isfinite(vae.elbo_)
    vae = _fit(_short(early_stopping=True, max_iter=5), holed)
    assert np.isfinite(vae.validation_elbo_history_).all()


def test_histories_are_in_the_units_of_the_cells_that_their_rows_have(iris):
    """Other units move the bound of a row by the log of their ratio for each observed cell."""
    X, holes = _with_holes(iris)
    common = {"early_stopping": True, "validation_fraction": 0.2, "max_iter": 2}
    here, there = (_fit(_short(**common), X * unit) for unit in (1.0, 2.0**20))
    moved = [
        (np.subtract(getattr(here, name), getattr(there, name)) / 150 / np.log(2.0**20))
        for name in ("elbo_history_", "validation_elbo_history_")
    ]  # observed cells per row, in each epoch
    n_cells = np.array([120, 30])[:, None] * moved
    np.testing.assert_allclose(n_cells, n_cells.round(), atol=1e-6)
    np.testing.assert_allclose(n_cells.sum(0), (~holes).sum(), atol=1e-6)


def test_posterior_and_interpolate(iris):
    vae = _fit(_short(), iris)
    means, stds = vae.posterior(iris)
    np.testing.assert_array_equal(means, vae.transform(iris))
    assert (stds > 0).all()
    line = vae.interpolate(iris[0], iris[100:101], 5)
    assert line.shape == (5, 4)
    np.testing.assert_allclose(line[[0, -1]], vae.reconstruct(iris[[0, 100]]), rtol=1e-9)
    ends = [torch.tensor(row, requires_grad=True) for row in (iris[0], iris[100:101])]
    np.testing.assert_allclose(vae.interpolate(*ends, 5), line, rtol=1e-12)
    frame = pd.DataFrame(iris, columns=list("abcd"))
    named = _fit(_short(), frame)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # names of features that are not valid
        np.testing.assert_allclose(
            named.interpolate(frame.iloc[0], frame.iloc[100], 5),
            named.interpolate(frame.iloc[[0]], frame.iloc[[100]], 5),
        )
    with pytest.raises(ValueError, match="feature names"):
        named.interpolate(frame.iloc[0, ::-1], frame.iloc[100], 5)
    middle = vae.inverse_transform(0.5 * (means[[0]] + means[[100]]))
    np.testing.assert_allclose(line[[2]], middle, rtol=1e-9)
    with pytest.raises(ValueError, match="one row to one row; got 3"):
        vae.interpolate(iris[0], iris[:3])
    with pytest.raises(ValueError, match="n=0"):
        vae.interpolate(iris[0], iris[1], 0)
