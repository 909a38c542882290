"""BayesianLogisticVI as its users meet it."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skvi import BayesianLogisticVI

from .strategies import awkward_data, awkward_weights

PRIORS = ["ridge", "ard", "horseshoe", "fixed"]
SHAPES = [(40, 4), (6, 9)]  # more rows than features, and fewer


def _data(rng, n=40, p=4, n_classes=2):
    X = rng.normal(size=(n, p)) * np.linspace(0.5, 2.0, p) + 3.0
    odds = (X - 3.0) @ rng.normal(size=(p, n_classes)) * 1.5 + rng.gumbel(size=(n, n_classes))
    y = odds.argmax(axis=1)
    y[:n_classes] = np.arange(n_classes)  # no class without a row
    return X, y


def _assert_never_falls(history):
    assert (np.diff(history) >= 0.0).all()


def _assert_identity(model, X, y, weight=None, rel=1e-9):
    weight = np.ones(len(X)) if weight is None else weight
    total = weight @ model.score_samples(X, y)
    assert model.elbo_ == pytest.approx(total - model.kl_, rel=rel)


# -- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_elbo_is_the_score_minus_the_price(prior, fit_intercept, n, p, n_classes, rng, device):
    X, y = _data(rng, n, p, n_classes)
    weight = rng.integers(1, 4, size=n).astype(float)
    model = BayesianLogisticVI(prior=prior, fit_intercept=fit_intercept, device=device)
    model.fit(X, y, sample_weight=weight)
    _assert_identity(model, X, y, weight)
    assert model.elbo_history_[-1] == model.elbo_
    assert len(model.elbo_history_) == model.n_iter_
    _assert_never_falls(model.elbo_history_)
    assert model.converged_
    assert model.kl_ > 0.0
    scores = model.score_samples(X, y)
    terms = model.elbo_terms(X, y)
    np.testing.assert_allclose(terms.reconstruction - terms.kl, scores, rtol=1e-12)
    np.testing.assert_allclose(terms.energy + terms.entropy, scores, rtol=1e-12)
    assert (terms.kl >= 0.0).all()
    assert (scores <= model.log_predictive(X, y)).all()
    assert model.score(X, y, sample_weight=weight) == pytest.approx(weight @ scores / weight.sum())


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("groups", [None, ["a", "b", "b", "a"]])
def test_every_prior_parameter_in_the_units_of_the_docstring(n_classes, groups, rng):
    """The bound, its parts rebuilt in the units of the data from the published attributes."""
    X, y = _data(rng, 30, 4, n_classes)
    X = X * 7.0
    c0, weight_rate, tau = 0.8, 0.05, 3.0
    model = BayesianLogisticVI(
        weight_shape=c0, weight_rate=weight_rate, intercept_scale=tau, groups=groups
    ).fit(X, y)
    member = np.zeros(4, int) if groups is None else np.array([0, 1, 1, 0])
    size = np.bincount(member)
    mean_spread = np.bincount(member, X.var(axis=0)) / size
    kl = 0.0
    Z = np.column_stack([X - X.mean(axis=0), np.ones(30)])
    for k, alpha in enumerate(np.atleast_2d(model.weight_precision_.T).T):
        own = np.broadcast_to(alpha, 4)
        precision = np.append(own, tau**-2)
        # the tilts at which q(w, b) is optimal, from the published posterior itself
        t = np.where(y == (1 if n_classes == 2 else k), 1.0, -1.0)
        odds = model.transform(X).reshape(30, -1, 2)[:, k]
        tilt = np.hypot(odds[:, 0], odds[:, 1])
        omega = np.tanh(tilt / 2) / (2 * tilt)
        V = np.linalg.inv(np.diag(precision) + Z.T @ (omega[:, None] * Z))
        m = V @ Z.T @ t / 2
        np.testing.assert_allclose(model.coef_[k], m[:4], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(model.coef_cov_[k], V[:4, :4], rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(model.coef_std_[k], np.sqrt(np.diag(V)[:4]), rtol=2e-3)
        np.testing.assert_allclose(
            model.relevance_[k], 1 - own * np.diag(V)[:4], rtol=2e-3, atol=1e-3
        )
        intercept = m[4] - m[:4] @ X.mean(axis=0)
        assert model.intercept_[k] == pytest.approx(intercept, rel=2e-3, abs=1e-3)
        kl += 0.5 * (precision @ (m**2 + np.diag(V)) - 5 - np.linalg.slogdet(V)[1])
        kl -= 0.5 * np.log(precision).sum()
        E_alpha = alpha if groups is None else np.array([own[0], own[1]])
        shape, d0 = c0 + size / 2, weight_rate / mean_spread
        # the best q(alpha), whose mean this is
        moment = np.bincount(member, m[:4] ** 2 + np.diag(V)[:4])
        np.testing.assert_allclose(E_alpha, shape / (d0 + moment / 2), rtol=2e-3)
        log_excess = np.log(shape) - special.digamma(shape)
        rate = shape / E_alpha
        kl += (size / 2 * log_excess).sum()
        kl += (
            c0 * np.log(rate / d0) + special.gammaln(c0) - special.gammaln(shape)
            + (shape - c0) * special.digamma(shape) - shape + d0 * E_alpha
        ).sum()  # fmt: skip
    assert model.kl_ == pytest.approx(kl, rel=1e-3)


def test_one_label_for_each_feature_in_any_order(rng):
    X, y = _data(rng, 60, 3, 2)
    X = X * [1.0, 50.0, 0.02]
    own = BayesianLogisticVI(prior="ard", tol=1e-10).fit(X, y)
    model = BayesianLogisticVI(groups=["c", "a", "b"], tol=1e-10).fit(X, y)
    assert model.elbo_ == pytest.approx(own.elbo_, abs=1e-6)
    for name in ("coef_", "weight_precision_", "relevance_"):
        np.testing.assert_allclose(getattr(model, name), getattr(own, name), rtol=1e-3, atol=1e-6)


def test_fixed_precisions_approach_the_mode_where_rows_are_many(rng):
    X = rng.normal(size=(4000, 3))
    y = (X @ [1.0, -0.5, 0.2] + 0.3 + rng.logistic(size=4000) > 0).astype(int)
    model = BayesianLogisticVI(prior="fixed", weight_precision=2.0, intercept_scale=1e3).fit(X, y)
    mode = LogisticRegression(C=0.5, tol=1e-10).fit(X, y)
    assert (np.abs(model.coef_ - mode.coef_) < 0.05 * model.coef_std_).all()
    np.testing.assert_allclose(model.predict_proba(X), mode.predict_proba(X), atol=2e-3)


def test_horseshoe_and_ard_shrink_what_is_noise(rng):
    X = rng.normal(size=(300, 20))
    y = X[:, 0] * 3.0 - X[:, 1] * 2.0 + rng.logistic(size=300) > 0
    ridge = BayesianLogisticVI().fit(X, y)
    for prior in ("ard", "horseshoe"):
        model = BayesianLogisticVI(prior=prior).fit(X, y)
        noise, ridges_noise = (np.abs(m.coef_[0, 2:]).mean() for m in (model, ridge))
        assert noise < 0.5 * ridges_noise
        assert set(np.argsort(-model.coef_snr_[0])[:2]) == {0, 1}
        assert model.elbo_ > ridge.elbo_
    selector = SelectFromModel(
        BayesianLogisticVI(prior="ard"), importance_getter="coef_snr_", threshold=3.0
    )
    assert selector.fit(X, y).get_support(indices=True).tolist() == [0, 1]


# -- probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_predictions_agree_with_each_other(n_classes, n, p, rng, device):
    X, y = _data(rng, n, p, n_classes)
    names = np.array(["beech", "ash", "oak"])[y]
    model = BayesianLogisticVI(device=device).fit(X, names)
    assert model.classes_.tolist() == sorted(set(names))
    proba, log_proba = model.predict_proba(X), model.predict_log_proba(X)
    np.testing.assert_allclose(np.exp(log_proba), proba, rtol=1e-12)
    np.testing.assert_allclose(proba.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(model.predict(X), model.classes_[proba.argmax(axis=1)])
    decision = model.decision_function(X)
    if n_classes == 2:
        np.testing.assert_allclose(special.expit(decision), proba[:, 1], rtol=1e-12)
    else:
        one_each = special.expit(decision)
        np.testing.assert_allclose(one_each / one_each.sum(1, keepdims=True), proba, rtol=1e-12)
    # the mean of a sigmoid over 400 quantiles of the law of the log odds
    levels = special.ndtri((np.arange(4000) + 0.5) / 4000)
    odds = model.transform(X).reshape(n, -1, 2)
    mean = special.expit(odds[..., :1] + odds[..., 1:] * levels).mean(axis=-1)
    np.testing.assert_allclose(special.expit(decision.reshape(n, -1)), mean, atol=1e-4)
    index = np.searchsorted(model.classes_, names)
    np.testing.assert_array_equal(model.log_predictive(X, names), log_proba[np.arange(n), index])
    assert model.accuracy_score(X, names) == np.mean(model.predict(X) == names)


def test_the_mean_of_the_log_odds_is_the_plane_of_the_coefficients(rng):
    X, y = _data(rng, 60, 4, 3)
    model = BayesianLogisticVI(prior="ard").fit(X, y)
    odds = model.transform(X).reshape(60, 3, 2)
    np.testing.assert_allclose(odds[..., 0], X @ model.coef_.T + model.intercept_, rtol=1e-9)
    assert list(model.get_feature_names_out())[:2] == [
        "bayesianlogisticvi_mean0",
        "bayesianlogisticvi_std0",
    ]
    no_intercept = BayesianLogisticVI(fit_intercept=False).fit(X, y)
    assert (no_intercept.intercept_ == 0.0).all()
    np.testing.assert_allclose(no_intercept.decision_function(np.zeros((1, 4))), 0.0, atol=1e-12)


def test_uncertainty_grows_away_from_the_rows_and_pulls_probabilities_to_the_middle(rng):
    X, y = _data(rng, 30, 4)
    model = BayesianLogisticVI().fit(X, y)
    far = X.mean(axis=0) + 30.0 * (X - X.mean(axis=0))
    odds = model.transform(far)
    plug_in = np.abs(special.expit(odds[:, 0]) - 0.5)
    assert (np.abs(model.predict_proba(far)[:, 1] - 0.5) <= plug_in).all()
    assert (odds[:, 1] > model.transform(X)[:, 1]).all()


@pytest.mark.parametrize("n_classes", [2, 3])
def test_sample_y_has_the_frequencies_of_predict_proba(n_classes, rng):
    X, y = _data(rng, 200, 3, n_classes)
    model = BayesianLogisticVI().fit(X, y)
    draws = model.sample_y(X[:7], n_samples=4000, random_state=1)
    assert draws.shape == (7, 4000)
    np.testing.assert_array_equal(draws, model.sample_y(X[:7], 4000, random_state=1))
    proba = model.predict_proba(X[:7])
    # 5 standard errors; with three classes also what separate averages differ by
    slack = 5 * np.sqrt(0.25 / 4000) + (0.0 if n_classes == 2 else 0.02)
    for k, label in enumerate(model.classes_):
        assert (np.abs((draws == label).mean(axis=1) - proba[:, k]) < slack).all()
    with pytest.raises(ValueError, match="n_samples"):
        model.sample_y(X, n_samples=0)


def test_held_out_log_loss_is_that_of_a_good_classifier():
    """Within a hundredth of a nat of LogisticRegression, class against rest like this one."""
    for X, y in (load_breast_cancer(return_X_y=True), load_wine(return_X_y=True)):
        losses = [
            log_loss(
                y,
                cross_val_predict(
                    make_pipeline(StandardScaler(), classifier), X, y, method="predict_proba"
                ),
            )
            for classifier in (BayesianLogisticVI(), OneVsRestClassifier(LogisticRegression()))
        ]
        assert losses[0] < losses[1] + 0.01


# -- weights, units, and data that go wrong -------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("n", "p"), [(40, 4), (9, 14)])
def test_weights_are_repeats_and_zero_is_removal(prior, n, p, rng):
    X, y = _data(rng, n, p, 3)
    weight = rng.integers(0, 4, size=n).astype(float)
    weight[:3] = 1.0
    weighted = BayesianLogisticVI(prior=prior).fit(X, y, sample_weight=weight)
    times = weight.astype(int)
    repeated = BayesianLogisticVI(prior=prior).fit(np.repeat(X, times, axis=0), np.repeat(y, times))
    assert weighted.elbo_ == pytest.approx(repeated.elbo_, rel=1e-8)
    np.testing.assert_allclose(
        weighted.predict_log_proba(X), repeated.predict_log_proba(X), rtol=1e-6
    )


@pytest.mark.parametrize("prior", ["ridge", "ard", "horseshoe"])
def test_the_grid_of_extrapolations_does_not_stop_them_near_the_summit(prior):
    """With a grid that does not shrink, the four digits more took 60 to 145 passes more."""
    X, y = load_iris(return_X_y=True)
    rough, fine = (BayesianLogisticVI(prior=prior, tol=tol).fit(X, y) for tol in (1e-8, 1e-12))
    assert fine.elbo_ >= rough.elbo_
    assert fine.n_iter_ < 2 * rough.n_iter_


def test_rounding_does_not_grow_from_pass_to_pass():
    """Extrapolations multiply it, to 1e-10 here, unless they are rounded to a grid.

    One order of rows in many may round to another point of the grid.
    """
    rng = np.random.default_rng(0)
    X, y = rng.random((30, 60)), np.arange(30) % 3
    first = BayesianLogisticVI(prior="horseshoe").fit(X, y)
    apart = []
    for order in (rng.permutation(30) for _ in range(5)):
        second = BayesianLogisticVI(prior="horseshoe").fit(X[order], y[order])
        apart.append(np.abs(second.predict_log_proba(X) - first.predict_log_proba(X)).max())
    assert first.n_iter_ > 50
    assert np.median(apart) < 1e-12


@pytest.mark.parametrize("prior", ["ard", "horseshoe"])
def test_units_of_single_columns_do_not_matter(prior, rng):
    X, y = _data(rng, 30, 4, 3)
    # weights are known to the root of the tolerance of the bound
    classifier = BayesianLogisticVI(prior=prior, tol=1e-13)
    scale = np.array([1e-150, 1e8, 1.0, 2.0**-7])
    model, other = clone(classifier).fit(X, y), clone(classifier).fit(X * scale, y)
    assert other.elbo_ == pytest.approx(model.elbo_, rel=1e-8)
    np.testing.assert_allclose(other.coef_ * scale, model.coef_, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(other.predict_proba(X * scale), model.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("unit", [1e-150, 1e-8, 2.0**9, 1e150])
def test_units_of_all_columns_do_not_matter(unit, rng):
    X, y = _data(rng, 30, 4)
    model, other = BayesianLogisticVI().fit(X, y), BayesianLogisticVI().fit(X * unit, y)
    assert other.elbo_ == pytest.approx(model.elbo_, rel=1e-8)
    np.testing.assert_allclose(other.coef_ * unit, model.coef_, rtol=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_separable_rows_and_single_rows_of_a_class_have_an_answer(prior, rng):
    X = rng.normal(size=(30, 3))
    separable = X[:, 0] > 0
    single = np.arange(30) == 4
    for y in (separable, single):
        model = BayesianLogisticVI(prior=prior).fit(X, y)
        _assert_never_falls(model.elbo_history_)
        assert np.isfinite(model.coef_).all()
        assert (model.coef_std_ > 0.0).all()
    two = BayesianLogisticVI(prior=prior).fit([[0.0], [1.0]], ["a", "b"])
    _assert_never_falls(two.elbo_history_)
    assert two.predict_proba([[0.5]]) == pytest.approx(np.full((1, 2), 0.5))


@pytest.mark.parametrize("prior", PRIORS)
def test_constant_duplicated_and_collinear_columns(prior, rng):
    X, y = _data(rng, 25, 3)
    X = np.column_stack([X, X[:, 0], X[:, 0] - 2.0 * X[:, 1], np.full(25, 7.0)])
    model = BayesianLogisticVI(prior=prior).fit(X, y)
    _assert_never_falls(model.elbo_history_)
    _assert_identity(model, X, y)
    assert model.coef_[0, -1] == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(model.coef_[0, 0], model.coef_[0, 3], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prior", PRIORS)
@given(data=awkward_data(), weight_seed=st.integers(0, 2**16), draw=st.data())
@settings(max_examples=15)
def test_hard_data_give_a_finite_answer(prior, data, weight_seed, draw):
    X, _ = data
    y = np.random.default_rng(weight_seed).integers(0, 2, size=len(X))
    y[0] = 1 - y[-1]
    weight = draw.draw(awkward_weights(len(X)))
    if weight is not None and len(np.unique(y[weight > 0])) < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            model = BayesianLogisticVI(prior=prior, max_iter=50).fit(X, y, sample_weight=weight)
        except ValueError as error:
            assert "range of float64" in str(error)  # noqa: PT017
            return
    _assert_never_falls(model.elbo_history_)
    assert np.isfinite(model.elbo_)
    assert np.isfinite(model.predict_log_proba(X)).all()
    assert np.isfinite(model.coef_std_).all()


def test_float32_equals_float64(rng):
    X, y = _data(rng, 50, 4, 3)
    X = X.astype(np.float32)
    narrow, wide = (BayesianLogisticVI().fit(A, y) for A in (X, X.astype(np.float64)))
    np.testing.assert_allclose(narrow.predict_proba(X), wide.predict_proba(X), rtol=1e-7)


def test_many_features_need_no_square_of_them(rng, monkeypatch):
    """Shared precisions work in the span of few rows; own ones on the side of the rows."""
    X, y = _data(rng, 12, 300)
    sizes = []
    cholesky = torch.linalg.cholesky_ex

    def watched(matrix):
        sizes.append(matrix.shape[-1])
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", watched)
    for prior in PRIORS:
        model = BayesianLogisticVI(prior=prior).fit(X, y)
        _assert_identity(model, X, y)
        assert model.relevance_.sum() < 12.0
    assert max(sizes) <= 12


# -- the contract ---------------------------------------------------------------------------------


def test_scores_do_not_depend_on_company_or_blocks(rng, monkeypatch):
    X, y = _data(rng, 50, 4, 3)
    model = BayesianLogisticVI().fit(X, y)
    together = model.score_samples(X, y), model.predict_log_proba(X), model.transform(X)
    monkeypatch.setattr("skvi.estimators.logistic.block_rows", lambda *_: 7)
    for values, method in zip(
        together, (None, model.predict_log_proba, model.transform), strict=True
    ):
        apart = model.score_samples(X, y) if method is None else method(X)
        np.testing.assert_allclose(apart, values, rtol=1e-10)


def test_warm_start_continues(rng):
    X, y = _data(rng, 60, 4, 3)
    model = BayesianLogisticVI(prior="ard", warm_start=True).fit(X, y)
    first, n_iter = model.elbo_, model.n_iter_
    model.fit(X, y)
    assert model.elbo_ >= first - 1e-12 * abs(first)
    assert model.n_iter_ < n_iter
    with pytest.raises(ValueError, match="warm_start"):
        model.set_params(prior="ridge").fit(X, y)
    assert model.elbo_ >= first - 1e-12 * abs(first)  # as it was
    with pytest.raises(ValueError, match="warm_start"):
        model.set_params(prior="ard").fit(X, np.array(["a", "b", "c"])[y])
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *((name, end) for name in ("weight_shape", "weight_rate") for end in (1e-100, 1e100)),
        *(("global_scale", end) for end in (1e-100, 1e100)),
        *(("intercept_scale", end) for end in (1e-100, 1e8)),
    ],
)
def test_hyperparameters_up_to_the_ends_of_their_range_and_not_beyond(name, end, rng):
    X, y = _data(rng, 30, 4, 2)
    prior = "horseshoe" if name == "global_scale" else "ridge"
    model = BayesianLogisticVI(prior=prior, max_iter=5, **{name: end})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    assert model.elbo_ == pytest.approx(model.score_samples(X, y).sum() - model.kl_)
    coef = model.coef_
    with pytest.raises(ValueError, match=f"'{name}' parameter .* range"):
        model.set_params(**{name: end**1.6}).fit(X, y)
    assert model.coef_ is coef


def test_a_nearly_flat_intercept_keeps_its_digits(rng):
    X, y = _data(rng, 30, 4, 2)
    wide = BayesianLogisticVI(prior="fixed", intercept_scale=1e5).fit(X, y)
    flat = BayesianLogisticVI(prior="fixed", intercept_scale=1e8).fit(X, y)
    np.testing.assert_allclose(flat.intercept_, wide.intercept_, rtol=1e-6)
    assert flat.elbo_ + 3 * np.log(10.0) == pytest.approx(wide.elbo_, abs=1e-6)


def test_errors_name_cause_and_remedy(rng):
    X, y = _data(rng)
    with pytest.raises(ValueError, match="one class only"):
        BayesianLogisticVI().fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="one class only"):
        BayesianLogisticVI().fit(X, y, sample_weight=(y == 1).astype(float))
    with pytest.raises(ValueError, match=r'groups= is for prior="ridge"'):
        BayesianLogisticVI(prior="ard", groups=[0, 0, 1, 1]).fit(X, y)
    with pytest.raises(ValueError, match="one label for each feature"):
        BayesianLogisticVI(groups=[0, 1]).fit(X, y)
    with pytest.raises(ValueError, match=r"[Uu]nknown label type"):
        BayesianLogisticVI().fit(X, rng.normal(size=len(X)))
    model = BayesianLogisticVI().fit(X, y)
    for method in (model.score_samples, model.score, model.log_predictive, model.elbo_terms):
        with pytest.raises(ValueError, match=r"not seen in fit: \[2\]"):
            method(X, y + 1)
    assert not hasattr(BayesianLogisticVI(), "coef_cov_")
    with pytest.warns(ConvergenceWarning, match="increase max_iter"):
        BayesianLogisticVI(max_iter=1).fit(X, y)


def test_labels_that_were_not_observed_score_zero(rng):
    X, y = _data(rng)
    assert (BayesianLogisticVI().fit(X, y).score_samples(X) == 0.0).all()


def test_verbose_prints_each_pass(rng, capsys):
    X, y = _data(rng)
    model = BayesianLogisticVI(verbose=2).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == model.n_iter_
    assert lines[-1].startswith("[BayesianLogisticVI]")


def test_pickle_frames_and_clones(rng):
    frame, y = load_iris(return_X_y=True, as_frame=True)
    names = np.array(["a", "b", "c"])[y]
    model = BayesianLogisticVI().set_output(transform="pandas").fit(frame, names)
    payload = pickle.dumps(model)
    assert b"torch" not in payload
    again = pickle.loads(payload)
    pd.testing.assert_frame_equal(again.transform(frame), model.transform(frame))
    assert clone(model).fit(frame, names).elbo_ == model.elbo_
