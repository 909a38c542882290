"""VAETransformer over columns of every kind, and tables that mix them."""

import copy
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import MinMaxScaler

from skvi.estimators.vae import VAETransformer

REAL = ["gaussian", "gaussian_heteroscedastic", "student_t"]
NAMES = [
    *REAL,
    "bernoulli",
    "continuous_bernoulli",
    "poisson",
    "negative_binomial",
    "categorical",
]


def _short(**params):
    settings = {"hidden_layer_sizes": (8,), "max_iter": 10, "random_state": 0}
    return VAETransformer(**settings | params)


def _fit(estimator, X, **fit_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **fit_params)


def _with(vae, **params):
    """A fitted estimator with other parameters of scoring."""
    return copy.deepcopy(vae).set_params(**params)


def _column_data(name, n=300, d=4, seed=0):
    """Rows whose columns share one factor."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(n, 1)) * np.linspace(0.5, 1.0, d)
    if name in REAL:
        return 10.0 + 3.0 * (factor + 0.5 * rng.normal(size=(n, d)))
    if name == "poisson":
        return rng.poisson(np.exp(1.0 + factor)).astype(float)
    if name == "negative_binomial":
        return rng.poisson(np.exp(1.0 + factor) * rng.gamma(2.0, 0.5, size=(n, d))).astype(float)
    share = 1.0 / (1.0 + np.exp(-2.0 * factor))
    if name == "continuous_bernoulli":
        return rng.beta(5.0 * share, 5.0 * (1.0 - share))
    if name == "bernoulli":
        return (rng.uniform(size=(n, d)) < share).astype(float)
    return rng.binomial(3, share).astype(float)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_column_fits_scores_draws_and_reconstructs(name):
    X = _column_data(name)
    vae = _fit(_short(likelihood=name, max_iter=40), X)
    assert vae.likelihood_ == name
    scores = vae.score_samples(X)
    assert np.isfinite(scores).all()
    assert vae.elbo_ == pytest.approx(scores.sum(), rel=1e-9)
    assert vae.log_predictive(X, 512).mean() > _with(vae, n_mc=512).score(X)
    assert vae.active_units_.any()
    drawn, _ = vae.sample(4000)
    np.testing.assert_allclose(drawn.mean(0), X.mean(0), rtol=0.25, atol=0.1)
    assert np.isfinite(vae.score_samples(drawn[:50])).all()
    assert np.isfinite(vae.reconstruct(X)).all()
    single = vae.score_samples(X.astype(np.float32))
    np.testing.assert_allclose(single, scores, atol=2e-2)
    np.testing.assert_allclose(vae.score_samples(X[7:9]), scores[7:9], rtol=1e-9, atol=1e-9)
    refitted = _fit(clone(vae), X)
    assert refitted.elbo_ == vae.elbo_
    assert np.isfinite(refitted.partial_fit(X[:20]).elbo_)


@pytest.mark.parametrize(
    ("name", "independent"),
    [
        ("poisson", lambda x: stats.poisson(x.mean()).logpmf(x)),
        ("bernoulli", lambda x: stats.bernoulli(x.mean()).logpmf(x)),
        ("gaussian_heteroscedastic", lambda x: stats.norm(x.mean(), x.std()).logpdf(x)),
        ("categorical", lambda x: np.log((np.bincount(x.astype(int)) / len(x))[x.astype(int)])),
        ("continuous_bernoulli", lambda x: np.zeros(len(x))),
    ],
)
def test_shared_codes_beat_independent_columns(name, independent):
    X = _column_data(name, n=600)
    vae = _fit(_short(likelihood=name, max_iter=100), X)
    assert vae.score(X) > np.mean(sum(independent(x) for x in X.T)) + 0.05


def test_the_right_law_of_counts_wins():
    X = _column_data("negative_binomial", n=1500)
    poisson, negative = (
        _fit(_short(likelihood=name, max_iter=60, n_components=1), X)
        for name in ("poisson", "negative_binomial")
    )
    assert negative.score(X) > poisson.score(X) + 0.1
    np.testing.assert_allclose(negative.dispersion_, 0.5, rtol=0.5)


def test_students_t_shrugs_outliers_off():
    rng = np.random.default_rng(0)
    X = _column_data("gaussian", n=600)
    X[rng.uniform(size=600) < 0.02] += 1e3 * rng.standard_cauchy(size=4)
    normal, robust = (
        _fit(_short(likelihood=name, max_iter=100), X) for name in ("gaussian", REAL[2])
    )
    assert robust.score(X) > normal.score(X) + 1.0
    assert (robust.dof_ < 10).all()
    assert (robust.noise_std_ < 3.0).all()
    assert not hasattr(normal, "dof_")


def test_predicted_variances_win_where_the_spread_changes():
    rng = np.random.default_rng(0)
    t = rng.uniform(-2, 2, size=(1200, 1))
    X = np.c_[t, t, t] + rng.normal(size=(1200, 3)) * np.exp(t) * [0.01, 0.3, 0.3]
    common = {"n_components": 1, "max_iter": 150, "hidden_layer_sizes": (32,)}
    plain = _fit(_short(likelihood="gaussian", **common), X)
    predicted = _fit(_short(likelihood="gaussian_heteroscedastic", **common), X)
    assert predicted.score(X) > plain.score(X) + 0.2
    assert not hasattr(predicted, "noise_std_")
    assert (predicted.noise_floor_ > 0).all()


@pytest.mark.parametrize("noise_std", [0.7, [0.7, 0.3, 5.0, 0.2]])
def test_fixed_noise_is_in_the_units_of_x(noise_std):
    X = load_iris().data
    vae = _fit(_short(noise_std=noise_std, hidden_layer_sizes=(), max_iter=150), X)
    np.testing.assert_allclose(vae.noise_std_, np.broadcast_to(noise_std, 4), rtol=1e-6)
    assert not hasattr(vae, "noise_floor_")
    weights, (shift, scale) = vae._model.weights, vae._model.affine
    W = weights["decoder.linear.weight"].astype(float) * scale[:, None]
    mean = weights["decoder.linear.bias"].astype(float) * scale + shift
    exact = stats.multivariate_normal(mean, W @ W.T + np.diag(vae.noise_std_**2)).logpdf(X)
    np.testing.assert_allclose(vae.log_predictive(X, 5000), exact, atol=0.05)
    with pytest.raises(ValueError, match="warm_start=False"):
        vae.set_params(noise_std=0.3).partial_fit(X)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"noise_std": [1.0, 2.0]}, r"noise_std has shape \(2,\)"),
        ({"noise_std": [1.0, 2.0, 0.0, 1.0]}, "noise_std must be positive"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"noise_std": ["a", "b", "c", "d"]}, r"noise_std=.* must be a number or \(4,\)"),
        ({"noise_std": [[1.0], [1.0, 2.0]]}, r"noise_std=.* must be a number or \(4,\)"),
        ({"noise_std": 1e-200}, "noise_std of column 0 is 1.21e-200 times"),
        ({"noise_std": [1.0, 1.0, 1e30, 1.0]}, "noise_std of column 2 is 5.68e.29 times"),
        ({"hidden_layer_sizes": [[1], [2, 3]]}, "hidden_layer_sizes=.* must hold integers"),
        ({"noise_std": 1.0, "likelihood": "student_t"}, "there are none"),
        ({"likelihood": "cauchy"}, "likelihood"),
        ({"likelihood": {"auto": range(4)}}, "key 'auto'"),
        ({"likelihood": {"gaussian": [0, 1]}}, r"Column 2 of X has no likelihood \(2 of 4"),
        ({"likelihood": {"gaussian": range(4), "student_t": 3}}, "Column 3 of X is listed twice"),
        ({"likelihood": {"gaussian": [0, 1, 2, 4]}}, "4, which is neither an index below 4"),
        ({"likelihood": {"gaussian": [0, 1, 2, "age"]}}, "'age', which is neither"),
        ({"likelihood": {"gaussian": [0, 1, 2, True]}}, "True, which is neither"),
        ({"likelihood": {"gaussian": None}}, "must be a list of columns"),
        ({"likelihood": {"gaussian": [[0, 1, 2, 3]]}}, r"\[0, 1, 2, 3\], which is neither"),
        ({"likelihood": {}}, "Column 0 of X has no likelihood"),
    ],
    ids=str,
)
def test_wrong_choices_are_errors_that_say_what_is_wrong(params, message):
    with pytest.raises(ValueError, match=message):
        _short(**params).fit(load_iris().data)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bernoulli", 0.5, "other than 0 and 1"),
        ("continuous_bernoulli", 1.5, r"outside \[0, 1\].*MinMaxScaler"),
        ("poisson", -1.0, "other than counts"),
        ("poisson", 2.5, "other than counts"),
        ("negative_binomial", 1e9, "up to 16777216"),
        ("categorical", 1.5, "OrdinalEncoder"),
        ("categorical", 1e6, "below 10000"),
    ],
)
def test_values_outside_the_support_are_errors_that_name_the_column(name, value, message):
    X = _column_data(name)
    fitted = _fit(_short(likelihood=name, max_iter=2), X)
    X[5, 2] = value
    for call in (_short(likelihood=name).fit, fitted.score, fitted.transform):
        with pytest.raises(ValueError, match=rf"Column 2 of X .*{message}"):
            call(X)
    frame = pd.DataFrame(X, columns=["a", "b", "waist", "d"])
    with pytest.raises(ValueError, match=r"Column 2 \('waist'\) of X"):
        _short(likelihood=name).fit(frame)


def test_codes_that_the_fit_has_not_seen_are_an_error():
    X = _column_data("categorical")
    vae = _fit(_short(likelihood="categorical"), np.minimum(X, [3, 3, 2, 3]))
    X[0, 2] = 3
    with pytest.raises(ValueError, match=r"Column 2 of X has the code 3, .* codes 0 to 2"):
        vae.score(X)
    with pytest.raises(ValueError, match="Column 2 of X has the code 3"):
        vae.partial_fit(X)


def _table(n=500, seed=0):
    """One factor behind a length, an outlier-ridden weight, a kind, a flag, a count, a share."""
    rng = np.random.default_rng(seed)
    f = rng.normal(size=n)
    return pd.DataFrame(
        {
            "length": 100.0 + 20.0 * f + 5.0 * rng.normal(size=n),
            "kind": np.digitize(f + 0.3 * rng.normal(size=n), [-0.5, 0.5]).astype(float),
            "flag": (f + 0.5 * rng.normal(size=n) > 0).astype(float),
            "count": rng.poisson(np.exp(1.0 + 0.7 * f)).astype(float),
            "weight": -3.0 * f + rng.standard_t(2, size=n),
            "share": 1.0 / (1.0 + np.exp(-f - 0.5 * rng.normal(size=n))),
        }
    )


CHOICE = {
    "categorical": ["kind"],
    "gaussian": "length",
    "student_t": [4],
    "bernoulli": ["flag"],
    "poisson": ["count"],
    "continuous_bernoulli": ["share"],
}


@pytest.fixture(scope="module")
def mixed():
    return _fit(_short(likelihood=CHOICE, n_components=1, max_iter=100), _table())


def test_a_mixed_table_finds_the_factor_behind_all_columns(mixed):
    X = _table(seed=1)
    assert mixed.likelihood_ == {
        "categorical": [1],
        "gaussian": [0],
        "student_t": [4],
        "bernoulli": [2],
        "poisson": [3],
        "continuous_bernoulli": [5],
    }
    assert abs(np.corrcoef(mixed.transform(X)[:, 0], X["length"])[0, 1]) > 0.9
    back = mixed.reconstruct(X)
    assert (back[:, 1] == X["kind"]).mean() > 0.6
    assert np.corrcoef(back[:, 4], X["weight"].clip(-10, 10))[0, 1] > 0.6
    drawn, _ = mixed.sample(3000)
    assert np.isfinite(mixed.score_samples(pd.DataFrame(drawn, columns=X.columns))).all()
    np.testing.assert_allclose(
        drawn.mean(0)[[0, 2, 3, 5]], X.mean().to_numpy()[[0, 2, 3, 5]], rtol=0.2
    )
    assert np.flatnonzero(~np.isnan(mixed.noise_std_)).tolist() == [0, 4]


def test_scores_of_a_mixed_table_change_with_the_units_of_its_real_columns_only(mixed):
    X = _table()
    scaled = X.assign(length=X["length"] * 1024.0, weight=X["weight"] / 4.0)
    other = _fit(clone(mixed), scaled)
    expected = mixed.score(X) - math.log(1024.0) + math.log(4.0)
    assert other.score(scaled) == pytest.approx(expected, abs=1e-3)


def test_the_order_of_a_mixed_tables_columns_and_names_is_free(mixed):
    X = _table()
    by_index = {
        name: [X.columns.get_loc(c) if isinstance(c, str) else c for c in np.atleast_1d(columns)]
        for name, columns in CHOICE.items()
        if name != "student_t"
    } | {"student_t": np.array([4])}
    again = _fit(clone(mixed).set_params(likelihood=by_index), X.to_numpy())
    assert again.elbo_ == mixed.elbo_
    assert again.likelihood_ == mixed.likelihood_


def test_one_kind_as_a_dict_is_the_same_model():
    X = _column_data("poisson")
    as_dict = _fit(_short(likelihood={"poisson": range(4)}), X)
    assert as_dict.elbo_ == _fit(_short(likelihood="poisson"), X).elbo_
    assert as_dict.likelihood_ == {"poisson": [0, 1, 2, 3]}


def test_auto_keeps_the_choice_for_a_mixed_table():
    X = np.c_[_column_data("poisson"), load_iris().data[:, 0].repeat(2)]
    choice = {"poisson": [0, 1, 2, 3], "gaussian": [4]}
    vae = _fit(_short(likelihood=choice, max_iter=1), X)
    vae = _fit(vae.set_params(likelihood="auto", warm_start=True), X)
    assert vae.likelihood_ == choice


def test_likelihoods_can_be_searched_over():
    X = _column_data("negative_binomial", n=400)
    grid = {"likelihood": ["poisson", "negative_binomial", {"negative_binomial": [0, 1, 2, 3]}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search = GridSearchCV(_short(max_iter=30), grid, cv=2).fit(X)
    assert "negative_binomial" in search.best_params_["likelihood"]


@pytest.mark.parametrize("name", ["continuous_bernoulli", "poisson", "categorical"])
def test_constant_columns_stay_finite(name):
    X = np.c_[_column_data(name), np.zeros(300), np.ones(300)]
    assert np.isfinite(_fit(_short(likelihood=name, max_iter=200), X).elbo_)


def test_shares_are_what_minmaxscaler_makes():
    X = MinMaxScaler().fit_transform(load_iris().data)
    # rounding may leave the largest value a hair above 1
    assert np.isfinite(_fit(_short(likelihood="continuous_bernoulli"), X.clip(0, 1)).elbo_)


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_a_hundred_times_too_large_ends_well(name):
    X = _column_data(name)
    try:
        vae = _fit(_short(likelihood=name, learning_rate_init=0.3, max_iter=30), X)
    except ValueError as error:
        assert "learning_rate_init" in str(error)  # noqa: PT017
        return
    assert np.isfinite(vae.elbo_)
    assert np.isfinite(vae.transform(X)).all()
