"""BayesianLinearVI as its users meet it."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg, sparse, special, stats
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from skvi.estimators.linear import BayesianLinearVI

PRIORS = ["ridge", "ard", "horseshoe", "fixed", "flat"]
OWN = {"ard", "horseshoe"}  # whose many precisions approach the top in smaller and smaller steps
GROUPS = ["a", "b", "b", "a"]  # of the four features of most tests below
SHAPES = [(40, 4), (6, 9)]  # more rows than features, and fewer


def _skip_flat_without_rank(prior, n, p):
    if prior == "flat" and n <= p:
        pytest.skip("flat weights need full column rank")


def _data(rng, n=40, p=4, outputs=None):
    X = rng.normal(size=(n, p)) * np.linspace(0.5, 2.0, p) + 3.0
    w = rng.normal(size=(p, outputs or 1))
    y = X @ w + 1.0 + 0.3 * rng.normal(size=(n, outputs or 1))
    return X, y if outputs else y[:, 0]


def _assert_never_falls(history):
    """Beyond the rounding of its terms, which may be larger than the bound."""
    assert (np.diff(history) >= -1e-11 * np.abs(history[1:]).clip(1.0)).all()


def _assert_identity(model, X, y, weight=None, rel=1e-9):
    weight = np.ones(len(X)) if weight is None else weight
    total = weight @ model.score_samples(X, y)
    assert model.elbo_ == pytest.approx(total - model.kl_, rel=rel)


# -- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("outputs", [None, 2])
def test_elbo_is_the_score_minus_the_price(prior, fit_intercept, n, p, outputs, rng, device):
    _skip_flat_without_rank(prior, n, p)
    X, y = _data(rng, n, p, outputs)
    weight = rng.integers(1, 4, size=n).astype(float)
    model = BayesianLinearVI(prior=prior, fit_intercept=fit_intercept, device=device)
    model.fit(X, y, sample_weight=weight)
    _assert_identity(model, X, y, weight)
    assert model.elbo_history_[-1] == model.elbo_
    assert len(model.elbo_history_) == model.n_iter_
    _assert_never_falls(model.elbo_history_)
    assert model.converged_
    terms = model.elbo_terms(X, y)
    np.testing.assert_array_equal(terms.reconstruction - terms.kl, model.score_samples(X, y))
    np.testing.assert_array_equal(terms.energy + terms.entropy, model.score_samples(X, y))
    assert (model.score_samples(X, y) <= model.log_predictive(X, y)).all()


@pytest.mark.parametrize("prior", ["ridge", "ard", "fixed"])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_every_prior_parameter_in_the_units_of_the_docstring(prior, fit_intercept, rng):
    """The bound is a Student-t evidence at the published precisions less the price of q(alpha)."""
    X, y = _data(rng, 15, 3)
    X, y = 7.0 * X, 300.0 * y
    a0, noise_rate, c0, weight_rate = 1.3, 0.2, 0.8, 0.05
    model = BayesianLinearVI(
        prior=prior,
        weight_precision=30.0,
        noise_shape=a0,
        noise_rate=noise_rate,
        weight_shape=c0,
        weight_rate=weight_rate,
        fit_intercept=fit_intercept,
    ).fit(X, y)
    # a flat intercept leaves the contrasts of the rows, and a Jacobian
    contrasts = linalg.null_space(np.ones((1, 15))).T if fit_intercept else np.eye(15)
    log_jacobian = -0.5 * np.log(15) if fit_intercept else 0.0
    b0 = noise_rate * (y.var() if fit_intercept else np.mean(y**2))
    spread_x = X.var(axis=0) if fit_intercept else np.mean(X**2, axis=0)

    def log_evidence(alpha):
        cov = contrasts @ (np.eye(15) + (X / alpha) @ X.T) @ contrasts.T
        target = contrasts @ y
        shape, rate = a0 + len(target) / 2, b0 + target @ linalg.solve(cov, target) / 2
        constant = special.gammaln(shape) - special.gammaln(a0) + a0 * np.log(b0)
        spread = len(target) * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1]
        return constant - shape * np.log(rate) - spread / 2 + log_jacobian

    E_alpha = np.atleast_1d(model.weight_precision_)
    expected = log_evidence(np.broadcast_to(E_alpha, 3))
    if prior == "fixed":
        assert E_alpha == 30.0
    else:
        size = 3 / len(E_alpha)
        d0 = weight_rate / (spread_x if prior == "ard" else spread_x.mean())
        shape = c0 + size / 2
        E_log_alpha = special.digamma(shape) - np.log(shape / E_alpha)
        E_log_prior = c0 * np.log(d0) - special.gammaln(c0) + (c0 - 1) * E_log_alpha - d0 * E_alpha
        kl = -stats.gamma(shape, scale=E_alpha / shape).entropy() - E_log_prior
        expected -= (kl + size / 2 * (np.log(E_alpha) - E_log_alpha)).sum()
    assert model.elbo_ == pytest.approx(expected, rel=1e-9)
    if prior == "ridge":
        log_alpha = np.log(E_alpha) + np.linspace(-16.0, 14.0, 601)
        values = [log_evidence(np.full(3, np.exp(point))) for point in log_alpha]
        log_prior = stats.gamma(c0, scale=1 / d0).logpdf(np.exp(log_alpha)) + log_alpha
        total = special.logsumexp(values + log_prior) + np.log(0.05)
        assert model.log_evidence_ == pytest.approx(total, rel=1e-9)


def test_diabetes_ranks_the_priors_and_leaves_little_gap():
    X, y = load_diabetes(return_X_y=True)
    ridge = BayesianLinearVI().fit(X, y)
    assert 0.0 < ridge.evidence_gap_ == ridge.log_evidence_ - ridge.elbo_ < 0.2
    fixed = BayesianLinearVI(prior="fixed", weight_precision=ridge.weight_precision_).fit(X, y)
    np.testing.assert_allclose(fixed.coef_, ridge.coef_, rtol=1e-12)
    np.testing.assert_allclose(fixed.noise_precision_, ridge.noise_precision_, rtol=1e-12)
    assert fixed.log_evidence_ == fixed.elbo_ > ridge.log_evidence_
    assert fixed.evidence_gap_ == 0.0
    assert (fixed.n_iter_, fixed.converged_) == (1, True)
    sklearns = BayesianRidge().fit(X, y)
    assert ridge.r2_score(X, y) == pytest.approx(sklearns.score(X, y), abs=0.01)
    _, std = ridge.predict(X, return_std=True)
    np.testing.assert_allclose(std, sklearns.predict(X, return_std=True)[1], rtol=0.02)


def test_ard_finds_the_features_that_matter_with_fewer_rows_than_features():
    """A vague prior of the weight precisions explains every row here: noise zero, R^2 one."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 300))
    w = np.zeros(300)
    w[:5] = [2.0, -1.5, 1.0, 3.0, -2.0]
    y = X @ w + 0.5 * rng.normal(size=100)
    model = BayesianLinearVI(prior="ard").fit(X, y)
    assert 0.3 < model.noise_precision_**-0.5 < 0.7
    assert set(np.argsort(-model.coef_snr_)[:5]) == set(range(5))
    assert model.elbo_ > BayesianLinearVI().fit(X, y).elbo_


def test_log_evidence_is_absent_for_ard_and_before_fit(rng):
    X, y = _data(rng)
    assert not hasattr(BayesianLinearVI(), "log_evidence_")
    assert not hasattr(BayesianLinearVI(), "coef_cov_")
    model = BayesianLinearVI(prior="ard").fit(X, y)
    with pytest.raises(AttributeError, match="ridge"):
        _ = model.log_evidence_
    # the fitted prior decides, not the parameter
    assert not hasattr(model.set_params(prior="ridge"), "log_evidence_")
    assert not hasattr(model, "evidence_gap_")


# -- flat weights and groups ----------------------------------------------------------------------


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_flat_weights_are_classical_least_squares(fit_intercept, rng):
    """Coefficients, standard errors, degrees of freedom and the flat evidence in data units."""
    X, y = _data(rng, 20, 3)
    X = X * [1e-3, 1.0, 40.0]
    model = BayesianLinearVI(
        prior="flat", noise_shape=1e-12, noise_rate=1e-12, fit_intercept=fit_intercept
    ).fit(X, y)
    Z = np.column_stack([np.ones(20), X]) if fit_intercept else X
    coef, squares, *_ = linalg.lstsq(Z, y)
    dof = 20 - Z.shape[1]
    np.testing.assert_allclose(model.coef_, coef[-3:], rtol=1e-9)
    inverse = linalg.inv(Z.T @ Z)
    # the standard deviation of a t law is larger than its scale, the standard error
    error = np.sqrt(np.diag(inverse)[-3:] * squares / dof)
    np.testing.assert_allclose(model.coef_std_, error * np.sqrt(dof / (dof - 2)), rtol=1e-9)
    assert (model.n_iter_, model.converged_, model.weight_precision_) == (1, True, 0.0)
    _assert_identity(model, X, y)
    a0, b0 = 1e-12, 1e-12 * (y.var() if fit_intercept else np.mean(y**2))
    expected = special.gammaln(a0 + dof / 2) - special.gammaln(a0) + a0 * np.log(b0)
    expected -= (a0 + dof / 2) * np.log(b0 + squares / 2) + dof / 2 * np.log(2 * np.pi)
    expected += np.linalg.slogdet(inverse)[1] / 2
    assert model.elbo_ == pytest.approx(expected, rel=1e-9)
    assert model.log_evidence_ == model.elbo_


def test_flat_weights_need_independent_columns(rng):
    X, y = _data(rng, 6, 9)
    with pytest.raises(ValueError, match=r"linearly independent.*rank 5"):
        BayesianLinearVI(prior="flat").fit(X, y)
    X, y = _data(rng)
    with pytest.raises(ValueError, match="ridge"):
        BayesianLinearVI(prior="flat").fit(np.column_stack([X, X[:, 0]]), y)
    with pytest.raises(ValueError, match=r"take 5 row\(s\)"):
        BayesianLinearVI(prior="flat").fit(X, y, sample_weight=np.full(40, 0.1))


@pytest.mark.parametrize(("prior", "slope", "sd"), [("flat", -9.0, 1.9), ("ridge", -8.76, 1.81)])
def test_seven_points_on_which_factorised_posteriors_turn_the_slope_around(prior, slope, sd):
    """pymc-devs/pymc#2162, where sampling gives a slope of about -9; here with its spread."""
    x = np.array([1.17, 2.97, 3.26, 4.69, 5.83, 6.00, 6.41])
    y = np.array([78.93, 58.20, 67.47, 37.47, 45.65, 32.92, 29.97])
    # a shape next to zero: hardly any prior for the precision of the weight
    model = BayesianLinearVI(prior=prior, weight_shape=1e-3).fit(x[:, None], y)
    assert model.coef_[0] == pytest.approx(slope, abs=0.02)
    assert model.coef_std_[0] == pytest.approx(sd, rel=0.03)
    if prior == "flat":
        law = stats.linregress(x, y)
        assert model.coef_[0] == pytest.approx(law.slope, rel=1e-10)
        assert model.coef_std_[0] == pytest.approx(law.stderr * np.sqrt(5 / 3), rel=1e-3)


def _gibbs(X, y, a0, b0, rng, n_chains=400, n_warm=30, n_kept=100):
    """Sample intercept, weights and noise in turns, under flat priors of the former."""
    design = np.column_stack([np.ones(len(X)), X])
    centre = np.linalg.lstsq(design, y, rcond=None)[0]
    root = np.linalg.inv(np.linalg.qr(design, mode="r"))  # root root' = (design'design)^-1
    precision = np.full(n_chains, 1.0 / np.var(y))
    kept = []
    for i in range(n_warm + n_kept):
        noise = rng.normal(size=(n_chains, len(centre)))
        coef = centre + noise @ root.T / np.sqrt(precision)[:, None]
        sse = np.square(y - coef @ design.T).sum(axis=1)
        precision = rng.gamma(a0 + len(y) / 2.0, 1.0 / (b0 + 0.5 * sse))
        if i >= n_warm:
            kept.append(coef)
    return np.array(kept)  # (n_kept, n_chains, 1 + D)


@pytest.mark.parametrize("case", ["n=40", "diabetes", "n=1400"])
def test_flat_weights_agree_with_long_gibbs_chains(case, rng):
    """Means and spreads, and far inside 0.15 posterior sd and 5 %.

    400 chains are independent, so the spread of their means is the Monte-Carlo error, about
    0.006 posterior sd; the limit of 5 such errors has a false-positive rate of 6e-7 a number.
    """
    if case == "diabetes":
        X, y = load_diabetes(return_X_y=True)
        X = X[:, :9]
    else:
        n, p = (40, 9) if case == "n=40" else (1400, 4)
        X, y = _data(rng, n, p)
        X = X @ rng.normal(size=(p, p)) + 3.0  # correlated, off centre
    model = BayesianLinearVI(prior="flat").fit(X, y)
    draws = _gibbs(X, y, model.noise_shape, model.noise_rate * np.var(y), rng)
    chains = draws.mean(axis=0)  # (n_chains, 1 + D)
    error = chains.std(axis=0, ddof=1) / np.sqrt(len(chains))
    gap = np.abs(chains.mean(axis=0) - np.append(model.intercept_, model.coef_))
    assert (gap < 5.0 * error).all()
    assert (gap[1:] < 0.15 * model.coef_std_).all()
    about = np.square(draws[..., 1:] - model.coef_)
    of_chains = about.mean(axis=0)  # (n_chains, D)
    error = of_chains.std(axis=0, ddof=1) / np.sqrt(len(of_chains))
    assert (np.abs(of_chains.mean(axis=0) - model.coef_std_**2) < 5.0 * error).all()
    np.testing.assert_allclose(np.sqrt(of_chains.mean(axis=0)), model.coef_std_, rtol=0.05)


def _legendre(x, degree):
    return np.polynomial.legendre.legvander(x[:, 0], degree)[:, 1:]


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_bound_and_evidence_choose_the_same_degree(degree, rng):
    """Polynomials that are nearly orthogonal, for which one precision is a sensible prior."""
    pipeline = make_pipeline(FunctionTransformer(_legendre), BayesianLinearVI())
    degrees = {"functiontransformer__kw_args": [{"degree": d} for d in range(1, 8)]}
    for _ in range(3):
        x = rng.uniform(-1.0, 1.0, (80, 1))
        y = _legendre(x, degree).sum(axis=1) + 0.2 * rng.normal(size=80)

        def chosen(name, x=x, y=y):
            search = GridSearchCV(
                pipeline,
                degrees,
                scoring=lambda fitted, X, y: getattr(fitted[-1], name),
                cv=[(np.arange(80), np.arange(80))],
            )
            return search.fit(x, y).best_params_["functiontransformer__kw_args"]["degree"]

        assert chosen("elbo_") == chosen("log_evidence_") >= degree


def test_groups_between_ridge_and_ard(rng):
    X, y = _data(rng)
    one = BayesianLinearVI(groups=np.zeros(4)).fit(X, y)
    _assert_same_fit(one, BayesianLinearVI().fit(X, y), rtol=1e-12)
    assert one.log_evidence_ == pytest.approx(BayesianLinearVI().fit(X, y).log_evidence_)
    own = BayesianLinearVI(groups=["a", "b", "c", "d"]).fit(X, y)
    _assert_same_fit(own, BayesianLinearVI(prior="ard").fit(X, y), rtol=1e-12)
    model = BayesianLinearVI(groups=GROUPS, tol=1e-14)
    weight = rng.integers(0, 4, size=40)
    model.fit(X, y, sample_weight=weight)
    _assert_identity(model, X, y, weight)
    _assert_never_falls(model.elbo_history_)
    assert not hasattr(model, "log_evidence_")
    alpha = model.weight_precision_
    assert alpha.shape == (4,)
    assert alpha[0] == alpha[3] != alpha[1] == alpha[2]
    repeated = clone(model).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    _assert_same_fit(model, repeated, rtol=1e-7)
    # the units of a group change nothing
    scaled = clone(model).fit(X * [1e60, 1e-5, 1e-5, 1e60], y, sample_weight=weight)
    np.testing.assert_allclose(scaled.coef_ * [1e60, 1e-5, 1e-5, 1e60], model.coef_, rtol=1e-7)
    assert scaled.elbo_ == pytest.approx(model.elbo_, rel=1e-11)
    # nor does the order of the features
    order = [2, 0, 3, 1]
    moved = clone(model).set_params(groups=np.array(GROUPS)[order])
    moved.fit(X[:, order], y, sample_weight=weight)
    np.testing.assert_allclose(moved.coef_, model.coef_[order], rtol=1e-7)


@pytest.mark.parametrize("labels", [list("dcba"), [1, 2, 3, 0]])
@pytest.mark.parametrize("noise", ["gaussian", "student_t"])
def test_one_label_for_each_feature_in_any_order(labels, noise, rng):
    X, y = _data(rng)
    X = X * [1.0, 50.0, 0.02, 3.0]
    own = BayesianLinearVI(prior="ard", noise=noise).fit(X, y)
    model = BayesianLinearVI(groups=labels, noise=noise).fit(X, y)
    _assert_same_fit(model, own, rtol=1e-6)
    np.testing.assert_allclose(model.weight_precision_, own.weight_precision_, rtol=1e-5)
    np.testing.assert_allclose(model.relevance_, own.relevance_, rtol=1e-6, atol=1e-8)
    # the path is in the order of the sorted labels
    sort = np.argsort(labels)
    np.testing.assert_allclose(model.relevance_path_[-1], own.relevance_[sort], atol=1e-6)


def test_groups_shrink_what_is_noise_and_not_the_signal(rng):
    X = rng.normal(size=(60, 40))
    y = X[:, :10] @ rng.normal(size=10) + rng.normal(size=60)
    groups = np.arange(40) >= 10
    model, ridge = BayesianLinearVI(groups=groups).fit(X, y), BayesianLinearVI().fit(X, y)
    assert model.elbo_ > ridge.elbo_ + 5.0
    assert model.weight_precision_[20] > 10 * model.weight_precision_[0]
    assert model.n_iter_ < 60


def test_errors_of_groups(rng):
    X, y = _data(rng)
    with pytest.raises(ValueError, match="one label for each feature"):
        BayesianLinearVI(groups=[0, 1]).fit(X, y)
    with pytest.raises(ValueError, match="groups=None"):
        BayesianLinearVI(prior="ard", groups=GROUPS).fit(X, y)
    with pytest.raises(ValueError, match="labels of one type"):
        BayesianLinearVI(groups=[0, 1, None, 1]).fit(X, y)
    with pytest.raises(ValueError, match="NaN"):
        BayesianLinearVI(groups=[0.0, 1.0, np.nan, 1.0]).fit(X, y)
    model = BayesianLinearVI(groups=GROUPS, warm_start=True).fit(X, y)
    assert model.fit(X, y).n_iter_ <= 2
    with pytest.raises(ValueError, match="of groups"):
        model.set_params(groups=list("abcd")).fit(X, y)


# -- rows in blocks -------------------------------------------------------------------------------


def _stream(model, X, y, weight, order, cuts):
    """Rows in the given order, cut into blocks."""
    for block in np.split(order, cuts):
        model.partial_fit(X[block], y[block], sample_weight=weight[block])
    return model


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("outputs", [None, 2])
def test_blocks_give_the_posterior_of_one_fit(prior, fit_intercept, outputs, rng):
    X, y = _data(rng, 60, 4, outputs)
    weight = rng.integers(1, 4, size=60).astype(float)
    weight[7] = 0.0
    tol = 0.0 if prior in OWN else 1e-10
    model = BayesianLinearVI(prior=prior, fit_intercept=fit_intercept, tol=tol)
    batch = clone(model).fit(X, y, sample_weight=weight)
    first = 8 if prior == "flat" else 2
    # many precisions climb slowly on the first few rows, where a stop short of the top is no harm
    one_by_one = [] if prior in OWN else [list(range(first, 60))]
    for cuts in [[], [first, 20, 21, 40], *one_by_one]:
        order = rng.permutation(np.flatnonzero(weight))
        cuts = [cut for cut in cuts if cut < len(order)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            parts = _stream(clone(model), X, y, weight, order, cuts)
        _assert_same_fit(parts, batch, rtol=1e-6 if prior in OWN else 1e-10)
        assert parts.n_samples_seen_ == batch.n_samples_seen_ == weight.sum()
        assert parts.kl_ == pytest.approx(batch.kl_, rel=1e-9, abs=1e-8)
        np.testing.assert_allclose(parts.score_samples(X, y), batch.score_samples(X, y), atol=1e-6)
        _assert_identity(parts, X, y, weight)
        _assert_never_falls(parts.elbo_history_)


@pytest.mark.parametrize("prior", ["ard", "horseshoe"])
def test_a_constant_column_keeps_no_spread_from_block_to_block(prior, rng):
    """Beside twins, whose principal axes leave rounding in the other columns."""
    X = rng.normal(size=(60, 20))
    X[:, 9], X[:, 15] = -X[:, 1], 1.0
    y = X[:, 0] - X[:, 3] + rng.normal(size=60)
    model = BayesianLinearVI(prior=prior)
    for block in np.split(np.arange(60), [30, 40]):
        model.partial_fit(X[block], y[block])
    assert abs(model.coef_[15]) < 1e-14
    assert model.elbo_ == pytest.approx(clone(model).fit(X, y).elbo_, abs=1e-6)


@given(seed=st.integers(0, 2**31 - 1), n_cuts=st.integers(0, 6), prior=st.sampled_from(PRIORS))
def test_any_split_in_any_order_is_the_batch(seed, n_cuts, prior):
    """Offsets, units, twins and constants included; the posterior, not only the statistics."""
    rng = np.random.default_rng(seed)
    n, p = int(rng.integers(12, 40)), int(rng.integers(1, 5))
    X = rng.normal(size=(n, p)) * 10.0 ** rng.integers(-3, 4, size=p)
    X = X + rng.choice([0.0, 1e3 * np.abs(X).max()])
    if prior != "flat" and rng.random() < 0.3:
        X[:, 0] = rng.choice([0.1, 0.0, 1e5])
    y = X.sum(axis=1) + np.abs(X).mean() * rng.normal(size=n) * rng.choice([1.0, 1e-3])
    y *= 10.0 ** int(rng.integers(-20, 20))
    order = rng.permutation(n)
    cuts = np.sort(rng.integers(8 if prior == "flat" else 3, n, size=n_cuts))
    cuts = np.unique(cuts)
    model = BayesianLinearVI(prior=prior, tol=1e-14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        batch = clone(model).fit(X, y)
        parts = _stream(clone(model), X, y, np.ones(n), order, cuts)
    loose = 1e-5 if prior in OWN else 1e-9
    assert parts.elbo_ == pytest.approx(batch.elbo_, rel=1e-9, abs=1e-8)
    distance = np.abs(parts.coef_ - batch.coef_) / np.maximum(batch.coef_std_, 1e-300)
    assert (distance < loose * (1.0 + batch.coef_snr_)).all()
    np.testing.assert_allclose(parts.predict(X), batch.predict(X), rtol=loose)


def test_partial_fit_after_fit_continues_and_knows_what_changed(rng):
    X, y = _data(rng, 60, 4)
    model = BayesianLinearVI().fit(X[:25], y[:25]).partial_fit(X[25:], y[25:])
    _assert_same_fit(model, BayesianLinearVI().fit(X, y), rtol=1e-10)
    # the priors may change: the statistics know nothing of them
    model.set_params(prior="ard", tol=0.0).partial_fit(X[:5], y[:5])
    doubled = np.r_[np.full(5, 2.0), np.ones(55)]
    ard = BayesianLinearVI(prior="ard", tol=0.0)
    _assert_same_fit(model, clone(ard).fit(X, y, sample_weight=doubled), rtol=1e-6)
    # fit forgets, a failed call changes nothing
    _assert_same_fit(model.fit(X[:25], y[:25]), clone(ard).fit(X[:25], y[:25]), rtol=0.0)
    for bad, message in [((X[:, :3], y), "features"), ((X, y[:, None]), "same form")]:
        with pytest.raises(ValueError, match=message):
            model.partial_fit(*bad)
    with pytest.raises(ValueError, match="fit_intercept"):
        model.set_params(fit_intercept=False).partial_fit(X, y)
    assert model.n_samples_seen_ == 25.0
    flat = BayesianLinearVI(prior="flat")
    with pytest.raises(ValueError, match="linearly independent"):
        flat.partial_fit(X[:3], y[:3])
    assert not hasattr(flat, "coef_")
    assert pickle.loads(pickle.dumps(model.set_params(fit_intercept=True))).partial_fit(X, y)


def test_streamed_rows_leave_a_summary_of_fixed_size(rng):
    X, y = _data(rng, 500, 6)
    model = BayesianLinearVI()
    sizes = set()
    for rows in np.split(np.arange(500), 10):
        model.partial_fit(X[rows], y[rows])
        sizes.add(len(pickle.dumps(model._model)))
    assert max(sizes) < 1.01 * min(sizes)


# -- sparse rows ----------------------------------------------------------------------------------


def _sparse_data(rng, n, p, density=0.05, outputs=None):
    X = rng.normal(size=(n, p)) + 2.0
    X[rng.random((n, p)) > density] = 0.0
    y = X @ rng.normal(size=(p, outputs or 1)) + 3.0 + 0.5 * rng.normal(size=(n, outputs or 1))
    return X, y if outputs else y[:, 0]


def _refuse_to_densify(monkeypatch, largest):
    plain = sparse.csr_array.toarray

    def guarded(self, *args, **kwargs):
        assert np.prod(self.shape) <= largest, self.shape
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(sparse.csr_array, "toarray", guarded)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csc_array, sparse.csr_matrix])
def test_sparse_rows_equal_dense_ones(prior, fit_intercept, container, rng):
    X, y = _sparse_data(rng, 1200, 30, outputs=2)
    X *= np.logspace(-1, 1, 30)
    weight = rng.integers(0, 3, size=1200)
    model = BayesianLinearVI(prior=prior, fit_intercept=fit_intercept, tol=0.0, max_iter=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        dense = clone(model).fit(X, y, sample_weight=weight)
        thin = clone(model).fit(container(X), y, sample_weight=weight)
    # Both climbs end where the bound (about 3e3 nats, so a rounding of 3e-12) rises no more, and a
    # precision of its own moves the bound by the square of its error: it is known to 2e-6, no
    # better, and 5 deviations of that are allowed.
    _assert_same_fit(thin, dense, rtol=1e-5 if prior in OWN else 1e-9)
    S = container(X)
    _assert_identity(thin, S, y, weight)
    np.testing.assert_allclose(thin.predict(S[:50]), thin.predict(X[:50]), rtol=1e-12)
    np.testing.assert_allclose(thin.transform(S), thin.transform(X), rtol=1e-10)
    np.testing.assert_allclose(
        thin.predict(S[:9], return_cov=True)[1], thin.predict(X[:9], return_cov=True)[1], rtol=1e-9
    )
    np.testing.assert_array_equal(thin.sample_y(S[:9], 3), thin.sample_y(X[:9], 3))
    np.testing.assert_array_equal(thin.predict_interval(S), thin.predict_interval(X))
    np.testing.assert_array_equal(thin.log_predictive(S, y), thin.log_predictive(X, y))
    assert thin.score(S, y, sample_weight=weight) == thin.score(X, y, sample_weight=weight)
    assert thin.r2_score(S, y) == thin.r2_score(X, y)
    np.testing.assert_array_equal(thin.score_samples(S), np.zeros(1200))


def test_sparse_rows_are_not_made_dense(rng, monkeypatch):
    X = sparse.random_array((20_000, 300), density=0.005, rng=rng, format="csr")
    y = X @ rng.normal(size=300) + 0.1 * rng.normal(size=20_000)
    _refuse_to_densify(monkeypatch, largest=300 * 2000)
    model = BayesianLinearVI().fit(X, y)
    assert model.r2_score(X, y) > 0.5
    _assert_identity(model, X, y, np.ones(20_000))
    parts = BayesianLinearVI()
    for rows in np.split(np.arange(20_000), 4):
        parts.partial_fit(X[rows], y[rows])
    _assert_same_fit(parts, model, rtol=1e-9)


@pytest.mark.parametrize("case", ["offset", "filled", "few rows", "small", "heavy"])
def test_sparse_rows_whose_centring_would_cancel(case, rng):
    """A dense column far from zero, many entries, more features than rows, weight on entries."""
    n, p = {"few rows": (30, 60), "small": (50, 5)}.get(case, (3000, 20))
    X, y = _sparse_data(rng, n, p, density=0.5 if case == "filled" else 0.05)
    weight = np.ones(n)
    if case == "offset":
        X[:, 3] = 1e7 + np.round(rng.normal(size=n), 4)
        y = y + X[:, 3] - 1e7
    elif case == "heavy":
        X[X[:, 0] != 0, 0] += 1e6
        weight = np.where(X[:, 0] != 0, 1e6, 1.0)
    model = BayesianLinearVI(prior="ridge")
    dense = clone(model).fit(X, y, sample_weight=weight)
    thin = clone(model).fit(sparse.csr_array(X), y, sample_weight=weight)
    np.testing.assert_allclose(thin.coef_, dense.coef_, rtol=1e-6, atol=1e-9)
    assert thin.elbo_ == pytest.approx(dense.elbo_, rel=1e-8)


def test_sparse_rows_with_repeated_entries_and_empty_columns(rng):
    X, y = _sparse_data(rng, 1200, 30)
    X[:, 5] = 0.0
    X[:, 6] = 4.0
    S = sparse.csr_array(X)
    parts = sparse.coo_array(S)
    coords = [np.tile(axis, 2) for axis in parts.coords]
    twice = sparse.coo_array((np.tile(parts.data / 2, 2), coords), shape=X.shape).tocsr()
    halves = sparse.csr_array(
        (np.repeat(S.data / 2, 2), np.repeat(S.indices, 2), 2 * S.indptr), shape=X.shape
    )
    before = halves.data.copy()
    dense = BayesianLinearVI(prior="ard").fit(X, y)
    for rows in (S, twice, halves, S.astype(np.float64)):
        thin = BayesianLinearVI(prior="ard").fit(rows, y)
        np.testing.assert_allclose(thin.coef_, dense.coef_, rtol=1e-4, atol=1e-6)
        assert thin.elbo_ == pytest.approx(dense.elbo_, rel=1e-8)
        assert abs(thin.coef_[5]) < 1e-12
    np.testing.assert_array_equal(halves.data, before)


# -- the horseshoe --------------------------------------------------------------------------------


def test_horseshoe_leaves_strong_signals_alone(rng):
    X = rng.normal(size=(80, 40))
    w = np.zeros(40)
    w[:3] = [8.0, -5.0, 3.0]
    y = X @ w + rng.normal(size=80)
    model = BayesianLinearVI(prior="horseshoe").fit(X, y)
    ridge = BayesianLinearVI().fit(X, y)
    assert np.abs(model.coef_ - w).max() < 0.5
    assert np.abs(model.coef_[3:]).mean() < 0.5 * np.abs(ridge.coef_[3:]).mean()
    assert model.weight_precision_.shape == (40,)
    assert model.converged_
    _assert_never_falls(model.elbo_history_)
    assert not hasattr(model, "log_evidence_")
    assert not hasattr(model.fit(X[:, :1], y), "log_evidence_")
    # a smaller global scale shrinks more
    few = BayesianLinearVI(prior="horseshoe", global_scale=1e-3).fit(X, y)
    assert few.relevance_.sum() < BayesianLinearVI(prior="horseshoe").fit(X, y).relevance_.sum()
    units = 10.0 ** rng.integers(-30, 30, size=40)
    scaled = clone(few).fit(X * units, y)
    np.testing.assert_allclose(scaled.coef_ * units, few.coef_, rtol=1e-3, atol=1e-6)
    warm = clone(few).set_params(warm_start=True, tol=1e-8).fit(X, y)
    assert warm.fit(X, y).n_iter_ < 4


# -- invariances ----------------------------------------------------------------------------------

PUBLIC = ["coef_", "intercept_", "coef_std_", "noise_precision_", "weight_precision_", "elbo_"]


def _assert_same_fit(a, b, rtol=1e-8):
    for name in PUBLIC:
        got, expected = np.broadcast_arrays(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(got, expected, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_weights_are_repeats_and_zero_is_removal(prior, n, p, rng):
    _skip_flat_without_rank(prior, n, p)
    X, y = _data(rng, n, p)
    weight = rng.integers(0, 4, size=n)
    model = BayesianLinearVI(prior=prior, tol=0.0)
    rtol = 1e-6 if prior in OWN else 1e-9
    weighted = clone(model).fit(X, y, sample_weight=weight)
    repeated = clone(model).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    _assert_same_fit(weighted, repeated, rtol)
    kept = weight > 0
    removed = clone(model).fit(X[kept], y[kept], sample_weight=weight[kept])
    _assert_same_fit(weighted, removed, rtol=0.0)
    # rows without weight may hold anything in range
    wild = np.where(kept[:, None], X, 1e150)
    _assert_same_fit(weighted, clone(model).fit(wild, y, sample_weight=weight), rtol=0.0)
    score = weighted.score(X, y, sample_weight=weight)
    assert score == pytest.approx(weighted.score(np.repeat(X, weight, 0), np.repeat(y, weight)))


@pytest.mark.parametrize("prior", ["ridge", "ard", "horseshoe", "flat", "groups"])
@pytest.mark.parametrize(("x_unit", "y_unit"), [(1e100, 1e-100), (1e-100, 1e100), (3e7, 0.1)])
def test_default_priors_know_no_units(prior, x_unit, y_unit, rng):
    X, y = _data(rng)
    model = BayesianLinearVI(prior=prior, tol=0.0)
    if prior == "groups":
        model.set_params(prior="ridge", groups=GROUPS)
    plain = clone(model).fit(X, y)
    scaled = clone(model).fit(X * x_unit, y * y_unit)
    for name, unit in {
        "coef_": y_unit / x_unit,
        "coef_std_": y_unit / x_unit,
        "intercept_": y_unit,
        "noise_precision_": y_unit**-2.0,
        "weight_precision_": x_unit**2.0,
    }.items():
        got, expected = getattr(scaled, name), getattr(plain, name) * unit
        np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)
    rows_left = len(X) - 1
    moved = -rows_left * np.log(y_unit)
    if prior == "flat":  # whose density is one in the units of the weights
        moved += X.shape[1] * np.log(y_unit / x_unit)
    assert scaled.elbo_ == pytest.approx(plain.elbo_ + moved, rel=1e-10)
    np.testing.assert_allclose(
        scaled.score_samples(X * x_unit, y * y_unit),
        plain.score_samples(X, y) - np.log(y_unit),
        atol=1e-6,
    )


def test_ard_does_not_depend_on_the_units_of_single_columns(rng):
    X, y = _data(rng)
    units = np.array([1e-60, 1.0, 1e40, 3.0])
    plain = BayesianLinearVI(prior="ard").fit(X, y)
    scaled = BayesianLinearVI(prior="ard").fit(X * units, y)
    np.testing.assert_allclose(scaled.coef_ * units, plain.coef_, rtol=1e-7)
    assert scaled.elbo_ == pytest.approx(plain.elbo_, rel=1e-11)


@pytest.mark.parametrize("prior", ["ridge", "ard", "horseshoe", "flat", "groups"])
def test_outputs_are_fitted_as_if_alone(prior, rng):
    X, y = _data(rng, outputs=3)
    model = BayesianLinearVI(prior=prior, tol=1e-14)
    if prior == "groups":
        model.set_params(prior="ridge", groups=GROUPS)
    alone = [clone(model).fit(X, column) for column in y.T]
    model.fit(X, y)
    for name in [*PUBLIC[:-1], "coef_cov_", "coef_snr_"]:
        expected = np.array([getattr(single, name) for single in alone])
        np.testing.assert_allclose(getattr(model, name), expected, rtol=1e-6, err_msg=name)
    assert model.elbo_ == pytest.approx(sum(single.elbo_ for single in alone), rel=1e-10)
    if prior == "ridge":
        total = sum(single.log_evidence_ for single in alone)
        assert model.log_evidence_ == pytest.approx(total, rel=1e-10)
    mean, cov = model.predict(X[:5], return_cov=True)
    assert (mean.shape, cov.shape) == ((5, 3), (3, 5, 5))
    np.testing.assert_allclose(cov[1], alone[1].predict(X[:5], return_cov=True)[1], rtol=1e-6)
    expected = sum(
        single.log_predictive(X, column) for single, column in zip(alone, y.T, strict=True)
    )
    np.testing.assert_allclose(model.log_predictive(X, y), expected, atol=1e-7)


@pytest.mark.parametrize("prior", PRIORS)
def test_scores_do_not_depend_on_company_or_order(prior, rng, monkeypatch):
    X, y = _data(rng, 200, 5)
    model = BayesianLinearVI(prior=prior).fit(X, y)
    scores, order = model.score_samples(X, y), rng.permutation(200)
    np.testing.assert_allclose(model.score_samples(X[order], y[order]), scores[order], atol=1e-12)
    singly = [model.score_samples(X[i : i + 1], y[i : i + 1])[0] for i in range(20)]
    np.testing.assert_allclose(singly, scores[:20], atol=1e-12)
    monkeypatch.setattr("skvi.models.linear.reduction._SMALL", 0)
    for module in ("skvi.estimators.linear", "skvi.models.linear.reduction"):
        monkeypatch.setattr(f"{module}.block_rows", lambda floats, device: 7)
    np.testing.assert_allclose(model.score_samples(X, y), scores, atol=1e-12)
    _assert_same_fit(clone(model).fit(X, y), model)


def test_float32_at_an_offset_equals_float64(rng):
    X, y = _data(rng)
    X = (X + 1e4).astype(np.float32)
    single = BayesianLinearVI().fit(X, y)
    _assert_same_fit(single, BayesianLinearVI().fit(X.astype(np.float64), y), rtol=1e-13)
    assert single.r2_score(X, y) > 0.9


@pytest.mark.parametrize("prior", PRIORS)
def test_offsets_of_1e8_cost_the_intercept_only(prior, rng):
    X, y = _data(rng)
    X = np.round(X, 6)
    plain = BayesianLinearVI(prior=prior).fit(X, y)
    shifted = BayesianLinearVI(prior=prior).fit(X + 1e8, y)
    np.testing.assert_allclose(shifted.coef_, plain.coef_, rtol=1e-6)
    assert shifted.elbo_ == pytest.approx(plain.elbo_, abs=1e-4)
    np.testing.assert_allclose(shifted.predict(X + 1e8), plain.predict(X), atol=1e-6)


# -- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_predict_and_transform_agree(prior, rng, device):
    X, y = _data(rng)
    model = BayesianLinearVI(prior=prior, device=device).fit(X, y)
    mean, std = model.predict(X, return_std=True)
    again, cov = model.predict(X, return_cov=True)
    np.testing.assert_array_equal(mean, model.predict(X))
    np.testing.assert_array_equal(mean, again)
    np.testing.assert_allclose(mean, X @ model.coef_ + model.intercept_, rtol=1e-10)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), std, rtol=1e-10)
    assert np.linalg.eigvalsh(cov).min() > 0.0
    np.testing.assert_array_equal(model.transform(X), np.column_stack([mean, std]))
    np.testing.assert_allclose(np.sqrt(np.diag(model.coef_cov_)), model.coef_std_, rtol=1e-10)
    # two rows far apart along one direction: their difference sees the weights, not the intercept
    x = np.vstack([X[0], X[0] + 1.0])
    cov = model.predict(x, return_cov=True)[1]
    difference = cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    of_weights = model.coef_cov_.sum()
    beta = model._model.posterior
    noise_variance = (
        float(beta.noise_rate[0] / (beta.noise_shape - 1)) * model._model.y.scale[0] ** 2
    )
    assert difference == pytest.approx(of_weights + 2 * noise_variance, rel=1e-8)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.999])
def test_intervals_hold_what_they_promise(level, rng):
    X, y = _data(rng)
    model = BayesianLinearVI().fit(X, y)
    ends = model.predict_interval(X[:3], level)
    assert ends.shape == (3, 2)
    draws = model.sample_y(X[:3], n_samples=20_000)
    inside = (ends[:, :1] < draws) & (draws < ends[:, 1:])
    error = np.sqrt(level * (1 - level) / 20_000)
    assert (np.abs(inside.mean(axis=1) - level) < 5 * error).all()
    np.testing.assert_allclose(ends.mean(axis=1), model.predict(X[:3]), rtol=1e-12)
    # the density has the same height at both ends, and the ends are its quantiles
    low, high = (model.log_predictive(X[:3], end) for end in ends.T)
    np.testing.assert_allclose(low, high, rtol=1e-10)
    beta = model._model.posterior
    mean, std = model.predict(X[:3], return_std=True)
    dof = 2 * float(beta.noise_shape)
    law = stats.t(dof, mean, std * np.sqrt((dof - 2) / dof))
    np.testing.assert_allclose(law.cdf(ends.T), np.outer([1 - level, 1 + level], np.ones(3)) / 2)


def test_intervals_of_several_outputs_few_rows_and_wrong_levels(rng):
    X, y = _data(rng, outputs=2)
    ends = BayesianLinearVI().fit(X, y).predict_interval(X)
    assert ends.shape == (40, 2, 2)
    alone = BayesianLinearVI().fit(X, y[:, 1]).predict_interval(X)
    np.testing.assert_allclose(ends[:, 1], alone, rtol=1e-9)
    # two rows: no variance, but quantiles
    model = BayesianLinearVI().fit(X[:2], y[:2, 0])
    assert np.isfinite(model.predict_interval(X)).all()
    for level in (0.0, 1.0, -0.1, 90, "0.9"):
        with pytest.raises(ValueError, match="level"):
            model.predict_interval(X, level)


def test_evidence_of_rows_that_say_nothing_about_the_weights(rng):
    """Any precision explains them alike, so that its integral is the value at one."""
    X, y = np.ones((6, 2)), rng.normal(size=6)
    model = BayesianLinearVI().fit(X, y)
    known = BayesianLinearVI(prior="fixed").fit(X, y)
    assert model.log_evidence_ == pytest.approx(known.log_evidence_, rel=1e-12)
    assert not model.relevance_.any()


def test_relevance_counts_the_weights_that_the_rows_determine(rng):
    X = rng.normal(size=(60, 8))
    y = X[:, :3] @ [2.0, -1.0, 3.0] + 0.5 * rng.normal(size=60)
    ard = BayesianLinearVI(prior="ard").fit(X, y)
    assert (ard.relevance_[:3] > 0.95).all()
    assert (ard.relevance_[3:] < 0.7).all()
    variance = 1.0 / ard.noise_precision_ * ard._model.posterior.noise_shape
    variance /= ard._model.posterior.noise_shape - 1
    expected = 1 - ard.weight_precision_ * ard.coef_std_**2 / variance
    np.testing.assert_allclose(ard.relevance_, expected, atol=1e-9)
    np.testing.assert_array_equal(BayesianLinearVI(prior="flat").fit(X, y).relevance_, 1.0)
    for prior in ("ridge", "fixed"):  # trace of the smoother, by the dense formula
        model = BayesianLinearVI(prior=prior).fit(X, y)
        gram = np.cov(X.T, bias=True) * 60
        smoother = linalg.solve(gram + model.weight_precision_ * np.eye(8), gram)
        np.testing.assert_allclose(model.relevance_, np.diag(smoother), rtol=1e-9)
    two = BayesianLinearVI(groups=[0] * 3 + [1] * 5).fit(X, np.column_stack([y, -y]))
    assert two.relevance_.shape == (2, 8)
    np.testing.assert_allclose(two.relevance_[0], two.relevance_[1], rtol=1e-6)


@pytest.mark.parametrize("outputs", [None, 2])
def test_the_path_of_relevance_ends_at_the_relevance(outputs, rng):
    X, y = _data(rng, 60, 5, outputs)
    X[:, 4] = rng.normal(size=60)
    model = BayesianLinearVI(prior="ard").fit(X, y)
    assert model.relevance_path_.shape == (model.n_iter_, *np.shape(model.relevance_))
    np.testing.assert_allclose(model.relevance_path_[-1], model.relevance_, atol=1e-10)
    assert (model.relevance_path_[-1] <= model.relevance_path_[0] + 1e-9)[..., 4].all()
    groups = ["b", "a", "b", "a", "b"]
    model = BayesianLinearVI(groups=groups).fit(X, y)
    shared = np.stack([model.relevance_[..., [1, 3]], model.relevance_[..., [0, 2]]], axis=-2)
    shared = shared.sum(axis=-1)
    shared[..., 1] += model.relevance_[..., 4]
    np.testing.assert_allclose(model.relevance_path_[-1], shared, atol=1e-10)
    model = BayesianLinearVI(prior="flat").fit(X, y)
    np.testing.assert_allclose(model.relevance_path_, 5.0)


@pytest.mark.parametrize("shape", [(3000, 20), (30, 60)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_mapped_files_give_the_same_fit_and_stay_as_they_are(shape, dtype, rng, tmp_path):
    X = (rng.normal(size=shape) + 5.0).astype(dtype)
    y = X[:, 0] - X[:, 1] + rng.normal(size=len(X))
    np.save(tmp_path / "X.npy", X)
    stored = (tmp_path / "X.npy").read_bytes()
    plain = BayesianLinearVI().fit(X, y)
    for mode in ("r", "r+"):
        mapped = np.load(tmp_path / "X.npy", mmap_mode=mode)
        _assert_same_fit(BayesianLinearVI().fit(mapped, y), plain, rtol=1e-12)
    assert (tmp_path / "X.npy").read_bytes() == stored
    _assert_same_fit(BayesianLinearVI().fit(X[::-1], y[::-1]), plain, rtol=1e-9)
    _assert_same_fit(BayesianLinearVI().fit(np.asfortranarray(X), y), plain, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e153])
@pytest.mark.parametrize("shape", [(3000, 20), (30, 60), (5, 2)])
def test_bad_values_are_found_although_nothing_looks_for_them_first(value, shape, rng):
    X = rng.normal(size=shape)
    y = X[:, 0].copy()
    X[shape[0] // 2 + 1, 1] = value
    with pytest.raises(ValueError, match=r"NaN|infinity|beyond"):
        BayesianLinearVI().fit(X, y)


@pytest.mark.parametrize("case", ["constant", "tiny", "huge", "far", "r2"])
def test_large_problems_whose_products_would_lose_digits(case, rng, monkeypatch):
    """The same as the singular value decomposition of all rows gives."""
    X, y = _data(rng, 600, 5)
    if case == "constant":
        X[:, 2] = 0.1
    elif case == "tiny":
        X[:, 2] *= 1e-130
    elif case == "huge":
        X[:, 2] *= 1e130
    elif case == "far":  # the sampled rows are nothing like the others
        X[np.linspace(0, 599, 256, dtype=int)] += 1e3
        y = X @ rng.normal(size=5) * 1e-3 + rng.normal(size=600)
    else:
        y = 1.0 + X @ rng.normal(size=5) + 1e-9 * rng.normal(size=600)
    slow = BayesianLinearVI(prior="ard").fit(X, y)
    monkeypatch.setattr("skvi.models.linear.reduction._SMALL", 0)
    fast = BayesianLinearVI(prior="ard").fit(X, y)
    assert fast.elbo_ == pytest.approx(slow.elbo_, rel=1e-7)
    np.testing.assert_allclose(fast.predict(X), slow.predict(X), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(fast.coef_std_, slow.coef_std_, rtol=1e-5)
    np.testing.assert_allclose(fast.coef_, slow.coef_, rtol=1e-6, atol=1e-12 * slow.coef_std_.max())


def test_features_are_selected_by_their_signal_to_noise_ratio(rng):
    X = rng.normal(size=(80, 10))
    y = X[:, [1, 4]] @ [1.0, -2.0] + 0.5 * rng.normal(size=80)
    for prior in PRIORS:
        model = BayesianLinearVI(prior=prior)
        selector = SelectFromModel(model, importance_getter="coef_snr_", threshold=5.0).fit(X, y)
        assert np.flatnonzero(selector.get_support()).tolist() == [1, 4], prior
        assert selector.transform(X).shape == (80, 2)


def test_sample_y_shapes_seeds_and_moments(rng):
    X, y = _data(rng)
    model = BayesianLinearVI().fit(X, y)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    draws = model.sample_y(X[:3], n_samples=20_000)
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())
    assert draws.shape == (3, 20_000)
    np.testing.assert_array_equal(draws, model.sample_y(X[:3], 20_000, random_state=0))
    assert not np.array_equal(
        model.sample_y(X, random_state=None), model.sample_y(X, random_state=None)
    )
    mean, cov = model.predict(X[:3], return_cov=True)
    error = np.sqrt(np.diag(cov) / 20_000)
    assert (np.abs(draws.mean(axis=1) - mean) < 5 * error).all()
    np.testing.assert_allclose(np.cov(draws), cov, rtol=0.1, atol=0.02 * cov.max())
    X, y = _data(rng, outputs=2)
    assert BayesianLinearVI().fit(X, y).sample_y(X, 5).shape == (40, 2, 5)
    with pytest.raises(ValueError, match="n_samples"):
        model.sample_y(X, 0)


def test_draws_of_few_rows_know_how_uncertain_the_intercept_is(rng):
    X, y = rng.normal(size=(3, 2)), rng.normal(size=3)
    model = BayesianLinearVI(prior="fixed", weight_precision=1e6, noise_shape=50.0).fit(X, y)
    centre = X.mean(axis=0, keepdims=True)
    std = model.predict(centre, return_std=True)[1]
    draws = model.sample_y(centre, 40_000, random_state=0)
    # the standard error is 0.0036
    assert draws.std() / std[0] == pytest.approx(1.0, abs=0.02)


def test_a_column_of_targets_keeps_its_dimension(rng):
    X, y = _data(rng)
    flat, column = BayesianLinearVI().fit(X, y), BayesianLinearVI().fit(X, y[:, None])
    assert (flat.coef_.shape, column.coef_.shape) == ((4,), (1, 4))
    assert (flat.predict(X).shape, column.predict(X).shape) == ((40,), (40, 1))
    assert (np.ndim(flat.intercept_), column.intercept_.shape) == (0, (1,))
    assert (np.ndim(flat.weight_precision_), column.weight_precision_.shape) == (0, (1,))
    assert (flat.coef_cov_.shape, column.coef_cov_.shape) == ((4, 4), (1, 4, 4))
    assert column.get_feature_names_out().tolist() == [
        "bayesianlinearvi_mean0",
        "bayesianlinearvi_std0",
    ]
    np.testing.assert_array_equal(flat.score_samples(X, y), column.score_samples(X, y[:, None]))


def test_a_response_that_was_not_observed_scores_zero(rng):
    X, y = _data(rng)
    np.testing.assert_array_equal(BayesianLinearVI().fit(X, y).score_samples(X), np.zeros(40))


def test_no_intercept_goes_through_the_origin(rng):
    X, y = _data(rng)
    model = BayesianLinearVI(fit_intercept=False).fit(X, y)
    assert model.intercept_ == 0.0
    np.testing.assert_allclose(model.predict(np.zeros((1, 4))), 0.0, atol=1e-12)


# -- the contract ---------------------------------------------------------------------------------

EXTRA_CHECKS = [
    "check_param_validation",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_dataframe_column_names_consistency",
    "check_inplace_ensure_writeable",
]


def _expected_failures(estimator):
    if estimator.prior != "flat":
        return {}
    reason = "flat weights have no posterior on the 30 features of the check's 15 rows"
    return dict.fromkeys(
        [f"check_sample_weight_equivalence_on_{kind}_data" for kind in ("dense", "sparse")], reason
    )


@parametrize_with_checks(
    [BayesianLinearVI(prior=prior) for prior in PRIORS],
    expected_failed_checks=_expected_failures,
    xfail_strict=True,
)
@pytest.mark.filterwarnings("ignore:X .* feature names:UserWarning")  # the checks mix containers
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("check", EXTRA_CHECKS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.filterwarnings("ignore:X .* feature names:UserWarning")  # the checks mix containers
def test_checks_that_are_not_sent_to_third_parties(prior, check):
    getattr(estimator_checks, check)("BayesianLinearVI", BayesianLinearVI(prior=prior))


def test_containers_and_names(rng):
    X, y = _data(rng, outputs=2)
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = BayesianLinearVI().set_output(transform="pandas").fit(frame, y)
    assert list(model.feature_names_in_) == list("abcd")
    assert list(model.transform(frame).columns) == [
        "bayesianlinearvi_mean0",
        "bayesianlinearvi_std0",
        "bayesianlinearvi_mean1",
        "bayesianlinearvi_std1",
    ]
    np.testing.assert_array_equal(
        BayesianLinearVI().fit(torch.as_tensor(X), torch.as_tensor(y)).coef_,
        BayesianLinearVI().fit(X, y).coef_,
    )


def test_pickle_holds_numpy_only_and_predicts_the_same(rng):
    X, y = _data(rng)
    for prior in PRIORS:
        model = BayesianLinearVI(prior=prior).fit(X, y)
        data = pickle.dumps(model)
        assert b"torch" not in data
        copy = pickle.loads(data)
        np.testing.assert_array_equal(copy.predict(X), model.predict(X))
        np.testing.assert_array_equal(copy.score_samples(X, y), model.score_samples(X, y))


def test_search_selection_and_routed_weights(rng):
    X, y = _data(rng, 60, 4)
    X[:, 3] = rng.normal(size=60)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), BayesianLinearVI()),
        {"bayesianlinearvi__prior": PRIORS},
        cv=3,
        error_score="raise",
    ).fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    selector = SelectFromModel(BayesianLinearVI(), importance_getter="coef_snr_", threshold=5.0)
    assert not selector.fit(X, y).get_support()[3]
    with sklearn.config_context(enable_metadata_routing=True):
        model = BayesianLinearVI().set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=True)
        weight = np.r_[np.ones(30), np.full(30, 2.0)]
        routed = GridSearchCV(model, {"prior": ["ridge"]}, cv=3).fit(X, y, sample_weight=weight)
    direct = BayesianLinearVI().fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(routed.best_estimator_.coef_, direct.coef_)


def test_warm_start_continues(rng):
    X, y = _data(rng, 30, 12)
    model = BayesianLinearVI(prior="ard", max_iter=2, tol=0.0, warm_start=True)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        first = model.fit(X, y).elbo_
    assert not model.converged_
    with pytest.warns(ConvergenceWarning):
        assert model.fit(X, y).elbo_ > first
    model.set_params(max_iter=1000, tol=1e-10).fit(X, y)
    cold = BayesianLinearVI(prior="ard").fit(X, y)
    assert model.elbo_ == pytest.approx(cold.elbo_, rel=1e-8)
    assert model.fit(X, y).n_iter_ <= 2
    with pytest.raises(ValueError, match="warm_start=False"):
        model.set_params(prior="ridge").fit(X, y)
    model.set_params(prior="ard")
    with pytest.raises(ValueError, match="warm_start=False"):
        model.fit(X[:, :5], y)
    with pytest.raises(ValueError, match="warm_start=False"):
        model.fit(X, np.column_stack([y, y]))
    # a fit that fails leaves the estimator as it was
    assert model.n_features_in_ == 12
    assert model.predict(X).shape == (30,)


def test_tol_is_in_nats_per_unit_of_weight(rng):
    X, y = _data(rng, 30, 12)
    weight = np.full(30, 100.0)
    model = BayesianLinearVI(prior="ard", tol=1e-5).fit(X, y, sample_weight=weight)
    rises = np.diff(model.elbo_history_)
    assert len(rises) > 1
    assert (rises[:-1] >= 1e-5 * 3000.0).all()
    assert rises[-1] < 1e-5 * 3000.0


def test_verbose_prints_each_pass(rng, capsys):
    X, y = _data(rng)
    model = BayesianLinearVI(verbose=2).fit(X, y)
    assert capsys.readouterr().out.count("[BayesianLinearVI] pass") == model.n_iter_
    BayesianLinearVI().fit(X, y)
    assert capsys.readouterr().out == ""


# -- input that hurts -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [1e-100, 1e100])
@pytest.mark.parametrize(
    "name",
    ["noise_dof", "noise_shape", "noise_rate", "weight_shape", "weight_rate", "global_scale"],
)
def test_hyperparameters_up_to_the_ends_of_their_range_and_not_beyond(name, end, rng):
    X, y = _data(rng)
    prior = "horseshoe" if name == "global_scale" else "ridge"
    noise = "student_t" if name == "noise_dof" else "gaussian"
    model = BayesianLinearVI(prior=prior, noise=noise, max_iter=5, **{name: end})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    _assert_identity(model, X, y)
    coef = model.coef_
    with pytest.raises(ValueError, match=rf"'{name}' parameter .* range \[1e-100, 1e\+100\]"):
        model.set_params(**{name: end**1.6}).fit(X, y)
    assert model.coef_ is coef


def test_errors_name_cause_and_remedy(rng):
    X, y = _data(rng)
    model = BayesianLinearVI()
    with pytest.raises(NotFittedError):
        model.predict(X)
    with pytest.raises(ValueError, match=r"sum to 0.5.*fit_intercept=False"):
        model.fit(X, y, sample_weight=np.full(40, 0.5 / 40))
    assert not hasattr(model, "n_features_in_")
    model.fit(X, y)
    with pytest.raises(ValueError, match="both"):
        model.predict(X, return_std=True, return_cov=True)
    with pytest.raises(ValueError, match="output"):
        model.score_samples(X, np.column_stack([y, y]))
    with pytest.raises(ValueError, match="zero"):
        model.fit(X, y, sample_weight=np.zeros(40))
    with pytest.raises(ValueError, match="far from the training data"):
        BayesianLinearVI().fit(X * 1e-120, y).predict(np.full((1, 4), 1e120), return_std=True)
    with pytest.raises(ValueError, match="range of float64"):
        BayesianLinearVI().fit(X, y * 1e-170)
    with pytest.raises(ValueError, match="cuda"):
        BayesianLinearVI(device="cuda:99").fit(X, y)


@pytest.mark.parametrize("prior", ["ridge", "ard", "horseshoe", "fixed"])
def test_one_row_fits_but_has_no_variance(prior):
    model = BayesianLinearVI(prior=prior).fit([[1.0, 2.0]], [3.0])
    _assert_identity(model, [[1.0, 2.0]], [3.0])
    np.testing.assert_allclose(model.predict([[1.0, 2.0]]), 3.0)
    assert np.isinf(model.coef_std_).all()
    assert (model.coef_snr_ == 0.0).all()
    with pytest.raises(ValueError, match="more rows"):
        model.predict([[1.0, 2.0]], return_std=True)
    with pytest.raises(ValueError, match="more rows"):
        model.transform([[1.0, 2.0]])
    with pytest.raises(AttributeError, match="more rows"):
        _ = model.coef_cov_
    assert not hasattr(model, "coef_cov_")
    assert "coef_std_" in model._repr_html_()  # a notebook looks at every attribute
    with pytest.raises(ValueError, match="more rows"):
        model.sample_y([[1.0, 2.0]], 10)
    informed = BayesianLinearVI(prior=prior, noise_shape=3.0, noise_rate=0.1)
    assert np.isfinite(informed.fit([[1.0, 2.0]], [3.0]).transform([[1.0, 2.0]])).all()


def test_a_weak_prior_does_not_multiply_the_rounding_of_seen_rows(rng):
    """Only truly unseen directions have the prior's variance, here 1e40 times the noise's."""
    X, y = _data(rng, 6, 9)
    model = BayesianLinearVI(prior="fixed", weight_precision=1e-40).fit(X, y)
    _assert_identity(model, X, y)
    std = model.predict(X, return_std=True)[1]
    assert (std < 1e-3 * y.std()).all()
    assert model.predict(rng.normal(size=(1, 9)), return_std=True)[1] > 1e10 * y.std()


@pytest.mark.parametrize("prior", ["ridge", "ard", "horseshoe", "fixed"])
def test_degenerate_targets_and_columns(prior, rng):
    X, _ = _data(rng)
    constant = BayesianLinearVI(prior=prior).fit(X, np.full(40, 7.0))
    np.testing.assert_allclose(constant.coef_, 0.0, atol=1e-12)
    assert constant.intercept_ == pytest.approx(7.0)
    zero = BayesianLinearVI(prior=prior).fit(X, np.zeros(40))
    np.testing.assert_array_equal(zero.predict(X), 0.0)
    y = X[:, 0] + 0.1 * rng.normal(size=40)
    nothing = BayesianLinearVI(prior=prior).fit(np.full((40, 2), 5.0), y)
    np.testing.assert_allclose(nothing.predict([[5.0, 5.0]]), y.mean())
    twins = BayesianLinearVI(prior=prior).fit(np.column_stack([X[:, 0], X[:, 0]]), y)
    assert twins.coef_[0] == pytest.approx(twins.coef_[1], rel=1e-6)
    perfect = BayesianLinearVI(prior=prior, weight_precision=1e-9).fit(X, X[:, 0])
    assert perfect.r2_score(X, X[:, 0]) > 1 - 1e-9
    for model, target in [(constant, np.full(40, 7.0)), (perfect, X[:, 0])]:
        _assert_identity(model, X, target)


@st.composite
def hard_data(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    n, p = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    X = rng.normal(size=(n, p))
    for column in range(p):
        kind = draw(st.sampled_from(["plain", "constant", "twin", "collinear", "tiny"]))
        if kind == "constant":
            X[:, column] = draw(st.sampled_from([0.0, 1.0, -3e5]))
        elif kind == "twin":
            X[:, column] = X[:, 0]
        elif kind == "collinear":
            X[:, column] = X @ rng.normal(size=p)
        elif kind == "tiny":
            X[:, column] *= 1e-9
    y = {
        "noise": rng.normal(size=n),
        "perfect": X.sum(axis=1),
        "constant": np.full(n, 2.0),
        "zero": np.zeros(n),
        "signal": X[:, 0] + 0.1 * rng.normal(size=n),
    }[draw(st.sampled_from(["noise", "perfect", "constant", "zero", "signal"]))]
    X = X * 10.0 ** draw(st.integers(-150, 150)) if draw(st.booleans()) else X
    X = X + draw(st.sampled_from([0.0, 1e4, 1e8]))
    y = y * 10.0 ** draw(st.integers(-140, 150)) + draw(st.sampled_from([0.0, 1e8]))
    if draw(st.booleans()) and np.abs(X).max() < 1e30:
        X = X.astype(np.float32)
    weight = None
    if draw(st.booleans()):
        weight = 10.0 ** rng.uniform(-1, 1, size=n) * 10.0 ** draw(st.integers(0, 100))
        weight[rng.random(n) < 0.2] = 10.0 ** draw(st.integers(-100, 0))
    return X, y, weight


@given(data=hard_data(), prior=st.sampled_from(PRIORS), fit_intercept=st.booleans())
def test_hard_data_give_a_finite_answer_or_a_clear_error(data, prior, fit_intercept):
    X, y, weight = data
    model = BayesianLinearVI(prior=prior, fit_intercept=fit_intercept)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X, y, sample_weight=weight)
    except ValueError as error:
        reasons = ("rescale", "Rescale", *["linearly independent"] * (prior == "flat"))
        assert any(word in str(error) for word in reasons)  # noqa: PT017
        return
    for name in ["coef_", "intercept_", "noise_precision_", "weight_precision_", "elbo_", "kl_"]:
        assert np.isfinite(getattr(model, name)).all(), name
    _assert_never_falls(model.elbo_history_)
    assert np.isfinite(model.predict(X)).all()
    assert (model.coef_std_ >= 0).all()
    # Residuals are differences of y and of the terms of x'w, so they carry the rounding of these.
    terms = np.abs(y) + np.abs(X) @ np.abs(model.coef_) + abs(model.intercept_)
    rounding = 1e-14 * terms.max() * model.noise_precision_**0.5
    # A fixed precision of one under data of 1e150 multiplies the rounding of unseen directions.
    if rounding < 1e-3 and prior != "fixed":
        _assert_identity(model, X, y, weight, rel=1e-7 + rounding)
    if prior == "ridge":
        assert model.log_evidence_ >= model.elbo_ - 1e-9 * abs(model.elbo_)
