"""VAETransformer: the contract of a density, a transformer, and honest behaviour on bad input."""

import copy
import math
import pickle
import subprocess
import sys
import warnings

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils._python_dispatch import TorchDispatchMode

from skvi.estimators import vae as module
from skvi.estimators.vae import VAETransformer
from skvi.inference.gradient import descend


def _short(**params):
    """A small fit: what it finds does not matter, that it holds together does."""
    settings = {"hidden_layer_sizes": (8,), "max_iter": 3, "random_state": 0}
    return VAETransformer(**settings | params)


def _fit(estimator, X, **fit_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **fit_params)


@pytest.fixture(scope="module")
def iris():
    return load_iris().data


@pytest.fixture(scope="module")
def fitted(iris):
    return _fit(_short(max_iter=50), iris)


@pytest.fixture(scope="module")
def binary():
    return (load_digits().data[:300] > 7).astype(float)


@pytest.fixture(scope="module")
def fitted_binary(binary):
    return _fit(_short(max_iter=20), binary)


# -- exactness ------------------------------------------------------------------------------------


def _marginal(vae):
    """The law of X under a linear decoder: N(b, W W' + Psi), in the units of X."""
    weights, (shift, scale) = vae._model.weights, vae._model.affine
    W = weights["decoder.linear.weight"].astype(float) * scale[:, None]
    mean = weights["decoder.linear.bias"].astype(float) * scale + shift
    return stats.multivariate_normal(mean, W @ W.T + np.diag(vae.noise_std_**2))


def test_a_linear_model_reaches_probabilistic_pca_and_not_more_than_its_own_marginal():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(800, 2)) @ rng.normal(size=(2, 7)) * 2.0 + rng.normal(size=(800, 7)) + 5.0
    vae = VAETransformer(2, hidden_layer_sizes=(), early_stopping=False, random_state=0).fit(X)
    exact = _marginal(vae).logpdf(X)
    assert vae.score(X) > PCA(2).fit(X).score(X) - 0.05
    assert vae.set_params(n_mc=4096).score(X) <= exact.mean() + 1e-3
    assert exact.mean() <= FactorAnalysis(2, tol=1e-8, max_iter=5000).fit(X).score(X) + 1e-3
    np.testing.assert_allclose(vae.log_predictive(X[:50], 4096), exact[:50], atol=0.02)


def test_the_bound_adds_up(fitted, iris):
    scores = fitted.score_samples(iris)
    terms = fitted.elbo_terms(iris)
    assert fitted.elbo_ == pytest.approx(scores.sum() - fitted.kl_, rel=1e-9)
    np.testing.assert_allclose(terms.reconstruction - terms.kl, scores, rtol=1e-12)
    np.testing.assert_allclose(terms.energy + terms.entropy, scores, rtol=1e-12, atol=1e-12)
    assert fitted.score(iris) == pytest.approx(scores.mean(), rel=1e-12)
    assert fitted.kl_ == 0.0


def test_the_importance_weighted_bound_is_tighter(fitted, fitted_binary, iris, binary):
    for vae, X in ((fitted, iris), (fitted_binary, binary)):
        # the draws are shared by the rows: their errors do not average out over them
        bound = copy.deepcopy(vae).set_params(n_mc=4096).score(X)
        assert vae.log_predictive(X, n_importance=4096).mean() > bound


@pytest.mark.parametrize("factor", [2.0**40, 1e-3, 1e100])
def test_scores_are_densities_in_the_units_of_x(fitted, iris, factor):
    scaled = copy.deepcopy(fitted)
    shift, scale = fitted._model.affine
    affine = fitted._model.affine._replace(shift=shift * factor, scale=scale * factor)
    scaled._model = fitted._model._replace(affine=affine)
    expected = fitted.score_samples(iris) - iris.shape[1] * math.log(factor)
    np.testing.assert_allclose(scaled.score_samples(iris * factor), expected, rtol=1e-9)


def test_a_fit_of_scaled_data_scores_the_same_up_to_the_change_of_units(fitted, iris):
    scaled = _fit(clone(fitted), iris * 2.0**40)
    expected = fitted.score(iris) - iris.shape[1] * math.log(2.0**40)
    assert scaled.score(iris * 2.0**40) == pytest.approx(expected, rel=1e-12)


def test_the_predictive_density_integrates_to_one():
    rng = np.random.default_rng(1)
    angle = rng.uniform(0.0, np.pi, size=300)
    X = 30.0 * np.c_[np.cos(angle), np.sin(angle)] + rng.normal(size=(300, 2)) * 3.0
    vae = _fit(_short(n_components=1, max_iter=100), X)
    axes = [np.linspace(low, high, 121) for low, high in ((-60, 60), (-30, 60))]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    mass = np.exp(vae.log_predictive(grid, n_importance=512)).sum() * cell
    # The estimate is biased low far from the data, where the encoder was never trained.
    assert mass == pytest.approx(1.0, abs=0.05)


def test_histories_are_total_nats_on_the_scale_of_elbo(iris):
    X = np.tile(iris, (8, 1)) + np.random.default_rng(0).normal(size=(1200, 4)) * 0.1
    vae = _fit(_short(max_iter=30), X)
    assert vae.n_iter_ == len(vae.elbo_history_) == len(vae.validation_elbo_history_) == 30
    for history in (vae.elbo_history_, vae.validation_elbo_history_):
        assert history[-1] == pytest.approx(vae.elbo_, abs=0.3 * len(X))
    # without hidden layers there is no prior of weights, for which rows of weight 5 are more rows
    vae = _fit(_short(hidden_layer_sizes=(), max_iter=30), X)
    weighted = _fit(clone(vae), X, sample_weight=np.full(len(X), 5.0))
    np.testing.assert_allclose(weighted.elbo_history_, 5.0 * np.array(vae.elbo_history_), rtol=1e-6)
    assert weighted.elbo_ == pytest.approx(5.0 * vae.elbo_, rel=1e-6)


# -- quality with defaults ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_components"), [("iris", 2), ("wine", 2), ("digits", 8)])
def test_defaults_beat_factor_analysis_on_held_out_rows(name, n_components):
    X = {"iris": load_iris, "wine": load_wine, "digits": load_digits}[name]().data
    X = X[:, (X != 0).sum(axis=0) > 50]  # rarer pixels decide nothing but the noise of FA
    X = X if name == "digits" else StandardScaler().fit_transform(X)
    order = np.random.default_rng(0).permutation(len(X))
    test, train = order[: len(X) // 5], order[len(X) // 5 :]
    vae = VAETransformer(n_components, random_state=0).fit(X[train])
    linear = FactorAnalysis(n_components, max_iter=2000).fit(X[train]).score(X[test])
    assert vae.converged_
    assert vae.active_units_.all()
    gain = {"iris": -0.02, "wine": -0.02, "digits": 0.1}[name]  # nats per feature
    assert vae.score(X[test]) > linear + gain * X.shape[1]


def test_the_budget_is_in_steps():
    vae = VAETransformer()
    assert vae._n_epochs(n_batches=2) == 1000
    assert vae._n_epochs(n_batches=211) == 20
    assert vae._n_epochs(n_batches=100_000) == 1
    assert VAETransformer(max_iter=7)._n_epochs(n_batches=2) == 7


# -- codes, rows and draws ------------------------------------------------------------------------


def test_transform_is_the_posterior_mean_and_keeps_the_dtype(fitted, iris):
    Z, std = fitted.transform(iris, return_std=True)
    assert Z.shape == std.shape == (150, 2)
    assert (std > 0).all()
    assert (std < 1.5).all()
    np.testing.assert_array_equal(fitted.transform(iris), Z)
    single = fitted.transform(iris.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, Z, atol=1e-3)
    assert fitted.inverse_transform(single).dtype == np.float32
    np.testing.assert_allclose(fitted.score(iris.astype(np.float32)), fitted.score(iris), atol=1e-2)


def test_reconstruct_is_there_and_back(fitted, iris):
    reconstructed = fitted.reconstruct(iris)
    np.testing.assert_array_equal(reconstructed, fitted.inverse_transform(fitted.transform(iris)))
    assert ((reconstructed - iris) ** 2).mean() < 0.2 * iris.var(axis=0).mean()


def test_samples_carry_the_noise_of_the_likelihood(fitted, fitted_binary, iris):
    X, Z = fitted.sample(20_000, random_state=1)
    assert X.shape == (20_000, 4)
    assert Z.shape == (20_000, 2)
    residual = X - fitted.inverse_transform(Z)
    np.testing.assert_allclose(residual.std(axis=0), fitted.noise_std_, rtol=0.05)
    np.testing.assert_allclose(X.mean(axis=0), iris.mean(axis=0), atol=0.4)
    np.testing.assert_array_equal(X, fitted.sample(20_000, random_state=1)[0])
    binary_rows, _ = fitted_binary.sample(10)
    assert set(np.unique(binary_rows)) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="n_samples"):
        fitted.sample(0)


def test_inverse_transform_checks_the_width_of_codes(fitted):
    with pytest.raises(ValueError, match="n_components=2"):
        fitted.inverse_transform(np.zeros((3, 5)))


def test_codes_out_of_reach_are_an_error(fitted, iris):
    with pytest.raises(ValueError, match="range of float64"):
        fitted.inverse_transform(np.full((1, 2), 1.7e308))
    large = _fit(_short(), iris * 1e60)
    assert np.isfinite(large.inverse_transform(np.zeros((1, 2)))).all()
    with pytest.raises(ValueError, match=r"range of float32.*as float64"):
        large.inverse_transform(np.zeros((1, 2), dtype=np.float32))


def test_a_bernoulli_model_speaks_of_probabilities(fitted_binary, binary):
    assert fitted_binary.likelihood_ == "bernoulli"
    assert not hasattr(fitted_binary, "noise_std_")
    mean = fitted_binary.reconstruct(binary)
    assert (mean >= 0).all()
    assert (mean <= 1).all()
    assert (fitted_binary.score_samples(binary) < 0).all()


@pytest.mark.parametrize("method", ["fit", "transform", "score", "log_predictive"])
def test_grey_values_under_a_bernoulli_likelihood_are_an_error_that_names_the_column(
    method, binary, fitted_binary
):
    grey = binary.copy()
    grey[17, 3] = 0.5
    vae = _short(likelihood="bernoulli") if method == "fit" else fitted_binary
    with pytest.raises(ValueError, match=r"Column 3 .* other than 0 and 1.*gaussian"):
        getattr(vae, method)(grey)


def test_auto_chooses_the_likelihood_by_the_values(binary):
    assert _fit(_short(), binary).likelihood_ == "bernoulli"
    assert _fit(_short(), binary * 2.0).likelihood_ == "gaussian"
    assert _fit(_short(likelihood="gaussian"), binary).likelihood_ == "gaussian"


# -- determinism, order and company ---------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_global_generators_are_untouched(iris):
    np.random.seed(5)  # noqa: NPY002
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    first, second = _fit(_short(), iris), _fit(_short(), iris)
    other = _fit(_short(random_state=1), iris)
    for vae in (first, second):
        vae.log_predictive(iris[:3], 10)
        vae.sample(2)
    assert first.elbo_ == second.elbo_
    assert first.elbo_ != other.elbo_
    for name, value in first._model.weights.items():
        np.testing.assert_array_equal(value, second._model.weights[name])
    assert torch.equal(torch.get_rng_state(), torch_state)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, after, strict=True))


@pytest.mark.parametrize("method", ["transform", "score_samples", "log_predictive"])
def test_a_row_is_read_alike_in_any_order_and_company(fitted, iris, method):
    function = getattr(fitted, method)
    whole = function(iris)
    order = np.random.default_rng(0).permutation(150)
    np.testing.assert_allclose(function(iris[order]), whole[order], rtol=1e-9, atol=1e-9)
    alone = np.concatenate([function(iris[i : i + 1]) for i in range(0, 150, 30)])
    np.testing.assert_allclose(alone, whole[::30], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(function(np.tile(iris, (5, 1)))[:150], whole, rtol=1e-9, atol=1e-9)


def test_weights_of_zero_remove_rows(iris):
    weight = np.ones(150)
    weight[100:] = 0.0
    some = _fit(_short(), iris, sample_weight=weight)
    np.testing.assert_array_equal(some.transform(iris), _fit(_short(), iris[:100]).transform(iris))
    assert some.elbo_ == pytest.approx(weight @ some.score_samples(iris), rel=1e-9)
    expected = some.score_samples(iris)[:100].mean()
    assert some.score(iris, sample_weight=weight) == pytest.approx(expected, rel=1e-12)


def test_integer_weights_are_repeated_rows_to_the_prior_of_the_curvature(iris):
    X = iris[:60]
    common = {"hidden_layer_sizes": (64,), "max_iter": 500, "n_mc": 32}
    weighted = _fit(_short(batch_size=60, **common), X, sample_weight=np.full(60, 20.0))
    repeated = _fit(_short(batch_size=1200, **common), np.tile(X, (20, 1)))
    once = _fit(_short(batch_size=60, **common), X)
    # They would be 0.6 apart if weights did not count. Steps with twenty draws of a row have less
    # noise than steps with one, which is worth 0.12 to 0.15 nats here.
    assert weighted.score(X) == pytest.approx(repeated.score(X), abs=0.3)
    assert weighted.score(X) > once.score(X) + 0.25
    assert weighted.n_samples_seen_ == repeated.n_samples_seen_ == 1200


@pytest.fixture
def steps(monkeypatch):
    """The weights of every step's rows."""
    steps = []
    training_loss = module.objective.training_loss

    def record(net, x, observed, weight, noise, **options):
        steps.append(weight)
        return training_loss(net, x, observed, weight, noise, **options)

    monkeypatch.setattr(module.objective, "training_loss", record)
    return steps


def test_weights_have_mean_one_over_the_rows_that_are_trained_on(iris, steps):
    weight = np.random.default_rng(0).pareto(1.0, size=150) + 0.01
    held_out = {"early_stopping": True, "validation_fraction": 0.3}
    _fit(_short(max_iter=1, **held_out), iris, sample_weight=weight)
    assert torch.cat(steps).mean() == pytest.approx(1.0, rel=1e-5)


def test_the_prior_of_the_curvature_counts_the_rows_that_are_trained_on(iris, monkeypatch):
    counts = []
    parameter_groups = module.objective.parameter_groups

    def record(net, n_rows):
        counts.append(n_rows)
        return parameter_groups(net, n_rows)

    monkeypatch.setattr(module.objective, "parameter_groups", record)
    vae = _fit(_short(early_stopping=True, validation_fraction=0.3, warm_start=True), iris)
    _fit(vae, iris)
    assert counts == [105, 105]
    assert vae.n_samples_seen_ == 150
    vae.partial_fit(iris[:50], sample_weight=np.full(50, 2.0))
    assert counts[2:] == [250]
    assert vae.n_samples_seen_ == 250


def test_a_fit_of_many_rows_makes_no_large_tensors():
    """Of what they become on the way: here indicators of 200 levels, and 8 draws of 400 logits."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **kwargs or {})
            for part in out if isinstance(out, tuple | list) else (out,):
                # an expanded tensor takes no memory
                if isinstance(part, torch.Tensor) and part.is_contiguous():
                    largest = max(largest, part.numel())
            return out

    X = np.random.default_rng(0).integers(0, 200, size=(8000, 2))
    with Watch():
        _fit(_short(likelihood="categorical", max_iter=1, n_mc=1, early_stopping=True), X)
    # 4096 rows of the start have 1.6 million; all rows have 3.2, draws of those held out 2.6
    assert largest < 2_000_000


def test_weights_below_the_range_of_float32_are_no_obstacle():
    X = np.random.default_rng(0).normal(size=(6000, 3))
    weight = np.full(6000, 1e-60)
    weight[[0, 5]] = 1.0
    X[weight < 1.0] *= 0.1
    vae = _fit(_short(max_iter=1, early_stopping=False), X, sample_weight=weight)
    assert np.isfinite(vae.elbo_)


def test_fitted_state_is_numpy_and_survives_pickle_and_clone(fitted, iris):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.score_samples(iris), fitted.score_samples(iris))
    np.testing.assert_array_equal(copy.deepcopy(fitted).transform(iris), fitted.transform(iris))
    assert b"torch" not in pickle.dumps(fitted)
    assert not hasattr(clone(fitted), "elbo_")


def test_a_memory_mapped_model_can_be_read_and_continued(iris, tmp_path):
    """Joblib maps big arrays read-only into its workers; the warnings of torch are errors here."""
    vae = _short().partial_fit(iris)
    joblib.dump(vae, tmp_path / "vae.joblib")
    mapped = joblib.load(tmp_path / "vae.joblib", mmap_mode="r")
    assert not mapped._model.weights["decoder.linear.weight"].flags.writeable
    np.testing.assert_array_equal(mapped.transform(iris), vae.transform(iris))
    assert mapped.partial_fit(iris).elbo_ == vae.partial_fit(iris).elbo_


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fit_does_not_depend_on_torchs_global_settings(iris, mode):
    expected = _fit(_short(), iris).elbo_
    with mode():
        assert _fit(_short(), iris).elbo_ == expected
    encoder = torch.nn.Linear(4, 4)
    of_encoder = _fit(_short(encoder=encoder), iris).elbo_
    torch.set_default_device("meta")
    try:
        vae = _fit(_short(device="cpu", warm_start=True), iris)
        assert vae.elbo_ == expected
        assert np.isfinite(_fit(vae, iris).sample(2)[0]).all()
        assert _fit(_short(device="cpu", encoder=encoder), iris).elbo_ == of_encoder
    finally:
        torch.set_default_device(None)
    torch.set_default_dtype(torch.float64)
    try:
        # Adam counts its steps in the default dtype.
        assert _fit(_short(), iris).elbo_ == pytest.approx(expected, rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


# -- continuing -----------------------------------------------------------------------------------


def test_partial_fit_makes_one_epoch_a_call_and_climbs(iris):
    vae = _short()
    with pytest.raises(NotFittedError):
        vae.transform(iris)
    for _ in range(30):
        vae.partial_fit(iris)
    assert vae.n_iter_ == len(vae.elbo_history_) == 30
    assert vae.n_samples_seen_ == 30 * 150
    assert np.mean(vae.elbo_history_[-5:]) > np.mean(vae.elbo_history_[:5])
    assert vae.elbo_ == vae.elbo_history_[-1]
    assert vae.elbo_ == pytest.approx(vae.score_samples(iris).sum(), abs=0.3 * len(iris))
    vae.partial_fit(iris[:1])
    with pytest.raises(ValueError, match="features"):
        vae.partial_fit(iris[:, :3])


def test_partial_fit_continues_exactly_through_a_pickle(iris):
    straight, interrupted = _short(), _short()
    for block in (iris[::2], iris[1::2], iris):
        straight.partial_fit(block)
        interrupted = pickle.loads(pickle.dumps(interrupted)).partial_fit(block)
    assert straight.elbo_ == interrupted.elbo_
    np.testing.assert_array_equal(straight.transform(iris), interrupted.transform(iris))


def test_partial_fit_keeps_the_likelihood_of_the_first_block(binary):
    vae = _short().partial_fit(binary)
    with pytest.raises(ValueError, match="other than 0 and 1"):
        vae.partial_fit(binary + 0.5)


def test_warm_start_goes_on_from_where_it_was(iris):
    vae = _fit(_short(warm_start=True, max_iter=100), iris)
    before = vae.elbo_
    _fit(vae, iris)
    assert vae.elbo_ > before - 5.0
    assert vae.elbo_history_[0] > _fit(_short(max_iter=1), iris).elbo_history_[0]
    with pytest.raises(ValueError, match="warm_start=False"):
        vae.set_params(n_components=3).fit(iris)


def test_a_warm_start_holds_out_the_same_rows(iris, monkeypatch):
    rows = []

    def record(objective, parameters, optimizer, training_rows, **options):
        rows.append(training_rows.sort().values)
        return descend(objective, parameters, optimizer, training_rows, **options)

    monkeypatch.setattr(module, "descend", record)
    _fit(_fit(_short(warm_start=True, early_stopping=True), iris), iris)
    assert len(rows[0]) == 135
    assert torch.equal(rows[0], rows[1])


def test_histories_and_counts_agree_whatever_came_before(iris):
    vae = _fit(_fit(_short(warm_start=True), iris), iris)
    assert vae.n_iter_ == len(vae.elbo_history_) == 3
    vae.partial_fit(iris)
    assert vae.n_iter_ == len(vae.elbo_history_) == 4


def test_a_warm_start_that_finds_nothing_better_ends_where_it_began(iris):
    common = {"early_stopping": True, "validation_fraction": 0.3, "warm_start": True}
    vae = _fit(_short(max_iter=100, **common), iris)
    before = copy.deepcopy(vae)
    # Steps so large that every epoch is worse than the start.
    _fit(vae.set_params(learning_rate_init=0.3, max_iter=4), iris)
    assert len(vae.validation_elbo_history_) == 4
    assert max(vae.validation_elbo_history_) < max(before.validation_elbo_history_)
    np.testing.assert_array_equal(vae.transform(iris), before.transform(iris))


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_every_precision_finds_the_same_bound(binary, precision):
    common = {"hidden_layer_sizes": (32,), "max_iter": 60}
    reference = _fit(_short(precision="float32", **common), binary[:200])
    vae = _fit(_short(precision=precision, **common), binary[:200])
    # Of about -22.6 nats per row. The draws of float64 are other draws, not rounded ones: two
    # seeds differ by as much.
    tolerance = {"float32": 0.0, "bfloat16": 0.1, "float64": 0.3}[precision]
    assert abs(vae.score(binary[200:]) - reference.score(binary[200:])) <= tolerance
    stored = {value.dtype for value in vae._model.weights.values()}
    assert stored == {np.dtype("float64" if precision == "float64" else "float32")}
    moments = {entry["exp_avg"].dtype for entry in vae._model.optimizer}
    assert moments == stored


def test_bfloat16_is_for_training_only(binary):
    vae = _fit(_short(precision="bfloat16"), binary)
    other = copy.deepcopy(vae).set_params(precision="float32")
    np.testing.assert_array_equal(vae.score_samples(binary), other.score_samples(binary))
    np.testing.assert_array_equal(vae.transform(binary), other.transform(binary))
    assert vae.elbo_ != _fit(_short(precision="float32"), binary).elbo_
    again = _fit(clone(vae).set_params(warm_start=True), binary)
    assert np.isfinite(_fit(again.set_params(precision="float64"), binary).elbo_)


def test_auto_uses_bfloat16_where_it_pays_and_costs_no_digits(binary, iris, monkeypatch):
    chosen = []
    set_product_dtype = module.VAE.set_product_dtype

    def record(net, dtype):
        chosen.append(dtype)
        set_product_dtype(net, dtype)

    monkeypatch.setattr(module.VAE, "set_product_dtype", record)
    # 64 columns: products of 64 x 512 x 1000 and less
    wide = {"hidden_layer_sizes": (512,), "batch_size": 1000, "max_iter": 1}
    for fast in (True, False):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda device, fast=fast: fast)
        _fit(_short(**wide), binary)
        _fit(_short(**wide | {"hidden_layer_sizes": (256,)}), binary)
        _fit(_short(**wide | {"batch_size": 100}), binary)
        _fit(_short(**wide | {"hidden_layer_sizes": (512, 512)}), iris)
        assert chosen == [torch.bfloat16 if fast else None, None, None, None]
        chosen.clear()


# -- checkpoints ----------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


def _kill_after(monkeypatch, n_epochs):
    def kill(name, epoch, *args, **kwargs):
        if epoch == n_epochs:
            raise _Killed

    monkeypatch.setattr(module, "announce_epoch", kill)


@pytest.mark.parametrize("random_state", [0, None])
@pytest.mark.parametrize("n_made", [1, 7])
def test_a_killed_fit_goes_on_to_the_same_bits(iris, tmp_path, monkeypatch, n_made, random_state):
    path = tmp_path / "vae.npz"
    params = {"early_stopping": True, "kl_warmup": 9, "max_iter": 12, "checkpoint": path}
    params["n_iter_no_change"] = 12
    weight = np.linspace(0.5, 2.0, 150)
    if random_state is None:
        monkeypatch.setattr(module, "draw_seed", lambda _: 77)
    expected = _fit(_short(**params, random_state=random_state), iris, sample_weight=weight)
    assert not path.exists()

    _kill_after(monkeypatch, n_made)
    fresh = _short(**params, random_state=random_state)
    with pytest.raises(_Killed):
        fresh.fit(iris, sample_weight=weight)
    assert not hasattr(fresh, "elbo_")
    assert path.exists()
    monkeypatch.undo()

    epochs = []
    monkeypatch.setattr(module, "announce_epoch", lambda name, epoch, *a, **k: epochs.append(epoch))
    other = _short(**params, random_state=random_state, verbose=2)
    resumed = _fit(other, iris, sample_weight=weight)
    assert epochs[-1] == 12
    assert len(epochs) <= 11
    assert resumed.elbo_ == expected.elbo_
    assert resumed.elbo_history_ == expected.elbo_history_
    assert resumed.validation_elbo_history_ == expected.validation_elbo_history_
    for name, value in expected._model.weights.items():
        np.testing.assert_array_equal(resumed._model.weights[name], value)
    for one, two in zip(resumed._model.optimizer, expected._model.optimizer, strict=True):
        for name, value in two.items():
            np.testing.assert_array_equal(one[name], value)
    assert not path.exists()
    seed = 77 if random_state is None else random_state
    without = clone(expected).set_params(checkpoint=None, random_state=seed)
    assert _fit(without, iris, sample_weight=weight).elbo_ == expected.elbo_


def test_a_checkpoint_of_another_fit_is_refused_and_kept(iris, tmp_path, monkeypatch):
    path = tmp_path / "vae.npz"
    with monkeypatch.context() as patch:
        _kill_after(patch, 1)
        with pytest.raises(_Killed):
            _short(checkpoint=path).fit(iris)
    content = path.read_bytes()
    for params, X, weight, name in [
        ({"learning_rate_init": 0.01}, iris, None, "learning_rate_init differs"),
        ({"beta": 2.0, "hidden_layer_sizes": (7,)}, iris, None, "beta, hidden_layer_sizes differ"),
        ({"noise_std": np.ones(4)}, iris, None, "noise_std"),
        ({"random_state": 1}, iris, None, "random_state"),
        ({}, iris + 1e-9, None, "X differs"),
        ({}, iris, np.linspace(1.0, 2.0, 150), "sample_weight"),
    ]:
        with pytest.raises(ValueError, match=rf"another fit: {name}.*delete the file"):
            _short(checkpoint=path, **params).fit(X, sample_weight=weight)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a checkpoint"):
        _short(checkpoint=path).fit(iris)
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match="not a checkpoint"):
        _short(checkpoint=path).fit(iris)
    assert path.exists()
    with pytest.raises(ValueError, match="folder does not exist"):
        _short(checkpoint=tmp_path / "none" / "vae.npz").fit(iris)
    path.write_bytes(content)
    _fit(_short(checkpoint=str(path), n_mc=7), iris)
    assert list(tmp_path.iterdir()) == []


def test_parameters_have_the_same_description_in_every_process():
    one, two = np.random.RandomState(0), np.random.RandomState(0)
    assert module._described(one) == module._described(two)
    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1.0
    assert module._described(long) != module._described(other)
    assert module._described({"gaussian": ["a"]}) != module._described({"gaussian": ["b"]})


def test_a_fit_that_diverges_leaves_no_checkpoint(iris, tmp_path):
    with pytest.raises(ValueError, match="learning_rate_init"):
        _short(learning_rate_init=1e30, checkpoint=tmp_path / "vae.npz").fit(iris)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_whose_scores_are_not_finite_leaves_no_checkpoint(iris, tmp_path, monkeypatch):
    monkeypatch.setattr(VAETransformer, "_score_rows", lambda self, X, *_: np.full(len(X), np.inf))
    vae = _short(checkpoint=tmp_path / "vae.npz")
    with pytest.raises(ValueError, match="not finite"):
        vae.fit(iris)
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(vae, "_model")


def test_a_warm_start_is_part_of_a_checkpoint(iris, tmp_path, monkeypatch):
    path = tmp_path / "vae.npz"
    vae = _fit(_short(warm_start=True, checkpoint=path), iris)
    expected = _fit(copy.deepcopy(vae), iris)
    cut = copy.deepcopy(vae)
    with monkeypatch.context() as patch:
        _kill_after(patch, 2)
        with pytest.raises(_Killed):
            cut.fit(iris)
    with pytest.raises(ValueError, match="the fit before it differs"):
        copy.deepcopy(expected).fit(iris)
    with pytest.raises(ValueError, match="another fit"):
        _short(warm_start=True, checkpoint=path).fit(iris)
    assert _fit(cut, iris).elbo_ == expected.elbo_


# -- convergence ----------------------------------------------------------------------------------


def test_an_explicit_max_iter_that_is_reached_warns(iris):
    with pytest.warns(ConvergenceWarning, match="max_iter=3") as record:
        vae = _short().fit(iris)
    assert not vae.converged_
    assert record[0].filename == __file__


def test_early_stopping_ends_the_fit_at_its_best_epoch(iris):
    vae = _short(
        max_iter=2000, early_stopping=True, n_iter_no_change=5, learning_rate_init=0.02
    ).fit(iris)
    assert vae.converged_
    assert vae.n_iter_ < 2000
    assert int(np.argmax(vae.validation_elbo_history_)) == vae.n_iter_ - 6


def test_beta_presses_codes_to_the_prior(iris):
    vae = _short(beta=100.0, max_iter=300, learning_rate_init=0.03)
    with pytest.warns(ConvergenceWarning, match=r"No code is in use.*Lower beta"):
        vae.fit(iris)
    assert vae.elbo_terms(iris).kl.mean() < 0.05
    assert not vae.active_units_.any()


def test_free_nats_keep_codes_in_use_that_beta_would_give_up(iris):
    common = {"beta": 30.0, "max_iter": 200, "learning_rate_init": 0.01}
    free = _fit(_short(free_bits=0.5, **common), iris)
    terms = free.elbo_terms(iris)
    assert terms.kl.mean() == pytest.approx(2 * 0.5, abs=0.25)
    assert terms.kl.mean() > _fit(_short(**common), iris).elbo_terms(iris).kl.mean() + 0.2


def test_the_weight_of_the_kl_rises_over_the_warm_up_of_all_calls(iris, monkeypatch):
    betas = []
    training_loss = module.objective.training_loss

    def record(*args, beta, **options):
        betas.append(beta)
        return training_loss(*args, beta=beta, **options)

    monkeypatch.setattr(module.objective, "training_loss", record)
    vae = _short(kl_warmup=2, beta=3.0, batch_size=75, max_iter=3)
    _fit(vae, iris)
    np.testing.assert_allclose(betas, [0.6, 1.2, 1.8, 2.4, 3.0, 3.0])
    betas.clear()
    other = clone(vae)
    for _ in range(3):
        other.partial_fit(iris)
    np.testing.assert_allclose(betas, [0.6, 1.2, 1.8, 2.4, 3.0, 3.0])


@pytest.mark.parametrize(
    "likelihood",
    [
        "gaussian",
        "gaussian_heteroscedastic",
        {"gaussian_heteroscedastic": [0, 1, 2], "gaussian": [3, 4]},
    ],
    ids=str,
)
def test_features_on_the_noise_floor_are_named(iris, likelihood):
    X = np.c_[iris, iris[:, 2]]
    vae = _short(n_components=4, max_iter=None, learning_rate_init=0.005, likelihood=likelihood)
    with pytest.warns(ConvergenceWarning, match=r"\[2, 4\] is on its floor") as record:
        vae.fit(X)
    assert record[0].filename == __file__
    if likelihood == "gaussian":
        assert (vae.noise_std_ > vae.noise_floor_).all()


def test_a_failed_or_interrupted_fit_leaves_the_estimator_as_it_was(fitted, iris, monkeypatch):
    vae = copy.deepcopy(fitted)
    before = vae.score(iris)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "descend", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vae.fit(iris[:, :3])
    assert vae.score(iris) == before
    fresh = _short()
    with pytest.raises(KeyboardInterrupt):
        fresh.fit(iris)
    with pytest.raises(NotFittedError):
        fresh.transform(iris)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_an_interruption_between_two_steps_changes_nothing(iris, monkeypatch, method):
    vae = _fit(_short(warm_start=True), iris)
    before = copy.deepcopy(vae._model)
    training_loss = module.objective.training_loss
    n_steps = 0

    def interrupt_the_second(*args, **kwargs):
        nonlocal n_steps
        n_steps += 1
        if n_steps == 2:
            raise KeyboardInterrupt
        return training_loss(*args, **kwargs)

    monkeypatch.setattr(module.objective, "training_loss", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        getattr(vae, method)(iris)
    for name, value in before.weights.items():
        np.testing.assert_array_equal(vae._model.weights[name], value)
    for ours, expected in zip(vae._model.optimizer, before.optimizer, strict=True):
        for name, value in expected.items():
            np.testing.assert_array_equal(ours[name], value)


def test_a_diverging_fit_is_an_error_and_leaves_no_attributes(iris):
    vae = _short(learning_rate_init=1e30)
    with pytest.raises(ValueError, match="learning_rate_init"):
        vae.fit(iris)
    assert not hasattr(vae, "elbo_")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("kind", ["iris", "binary"])
def test_a_learning_rate_a_hundred_times_too_large_is_an_error_or_finite(
    iris, binary, kind, early_stopping, precision
):
    X = iris if kind == "iris" else binary
    vae = _short(
        learning_rate_init=0.3,
        hidden_layer_sizes=(64, 64),
        max_iter=30,
        early_stopping=early_stopping,
        precision=precision,
    )
    try:
        _fit(vae, X)
    except ValueError as error:
        if "learning_rate_init" not in str(error) or hasattr(vae, "elbo_"):
            raise
        return
    values = [vae.elbo_, *vae.elbo_history_, *vae.validation_elbo_history_]
    assert np.isfinite(values).all()
    for name, value in vae._model.weights.items():
        assert np.isfinite(value).all(), name
    assert np.isfinite(vae.transform(X)).all()
    assert np.isfinite(vae.log_predictive(X, 20)).all()


@pytest.mark.parametrize("learning_rate_init", [0.3, 1e3, 1e6])
@pytest.mark.parametrize("laws", [{}, {"prior": "vamp", "posterior_type": "flow"}], ids=str)
def test_no_rate_leaves_a_stream_with_numbers_that_are_not_finite(binary, learning_rate_init, laws):
    vae = _short(learning_rate_init=learning_rate_init, **laws)
    for _ in range(6):
        before = pickle.dumps(vae)
        try:
            vae.partial_fit(binary)
        except ValueError as error:
            if "learning_rate_init" not in str(error) or pickle.dumps(vae) != before:
                raise
            return
        assert np.isfinite([vae.elbo_, vae.score(binary), *vae.elbo_history_]).all()
        assert np.isfinite(vae.transform(binary)).all()


# -- bad input ------------------------------------------------------------------------------------


def _finite_or_value_error(X, **params):
    """Fit; the answer is finite, or it is a ValueError."""
    vae = _short(**params)
    try:
        _fit(vae, X)
    except ValueError:
        return None
    for value in (vae.elbo_, *vae.elbo_history_, vae.transform(X), vae.log_predictive(X, 5)):
        assert np.isfinite(value).all()
    return vae


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1.0, 1e30, 1e150])
def test_any_scale_of_float64(iris, scale):
    vae = _finite_or_value_error(iris * scale)
    expected = _fit(_short(), iris).score(iris) - 4 * math.log(scale)
    assert vae.score(iris * scale) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("offset", "dtype"), [(1e8, np.float64), (1e4, np.float32)])
def test_large_offsets(iris, offset, dtype):
    plain = _fit(_short(max_iter=30), iris)
    vae = _finite_or_value_error((iris + offset).astype(dtype), max_iter=30)
    assert vae.score((iris + offset).astype(dtype)) == pytest.approx(plain.score(iris), abs=0.1)


def test_constant_columns_have_unit_variance_and_do_no_harm(iris):
    X = np.c_[iris, np.full(150, 7.0)]
    vae = _finite_or_value_error(X, max_iter=30)
    assert vae.noise_std_[4] == pytest.approx(1.0, abs=1e-3)
    reference = _fit(_short(max_iter=30), iris).score(iris)
    assert vae.score(X) == pytest.approx(reference - 0.5 * math.log(2 * math.pi), abs=0.3)


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((5, 3)),
        np.ones((5, 3)) * 3.7,
        np.repeat([[1.0, 2.0, 4.0]], 6, axis=0),
        np.arange(12.0).reshape(6, 2)[:, [0, 0, 1]],
        np.array([[1.0, 2.0], [3.0, 5.0]]),
        np.arange(8.0).reshape(8, 1),
    ],
    ids=["zeros", "constant", "duplicates", "collinear", "two rows", "one column"],
)
def test_degenerate_data(X):
    assert _finite_or_value_error(X) is not None


def test_one_row_is_an_error_that_says_so(iris):
    with pytest.raises(ValueError, match="1 sample"):
        _short().fit(iris[:1])
    with pytest.raises(ValueError, match="1 sample"):
        _short().fit(iris, sample_weight=np.eye(150)[0])


@settings(max_examples=25)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 4),
    exponents=st.lists(st.floats(-150, 150), min_size=4, max_size=4),
    weight_exponent=st.floats(-300, 100),
    seed=st.integers(0, 2**16),
)
def test_extreme_columns_and_weights(n, d, exponents, weight_exponent, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * 10.0 ** np.array(exponents[:d])
    weight = np.ones(n)
    weight[0] = 10.0**weight_exponent
    vae = _short(max_iter=1, n_components=3)
    try:
        _fit(vae, X, sample_weight=weight)
    except ValueError as error:
        message = str(error)
        assert any(word in message for word in ("Column", "diverged", "bound"))
        return
    assert np.isfinite(vae.elbo_)


def test_rows_out_of_reach_are_an_error(fitted, iris):
    far = iris[:3].astype(np.float32)
    far[1, 2] = 1e30
    with pytest.raises(ValueError, match="Column 2"):
        fitted.score_samples(far)


@pytest.mark.parametrize(
    "params",
    [
        {"hidden_layer_sizes": (0,)},
        {"hidden_layer_sizes": (3.5,)},
        {"validation_fraction": 0.999, "early_stopping": True},
        {"device": "abacus"},
        {"n_mc": 0},
        {"activation": "identity"},
    ],
)
def test_wrong_parameters_are_errors_that_name_them(iris, params):
    with pytest.raises(ValueError, match=next(iter(params))):
        _short(**params).fit(iris)
    with pytest.raises(ValueError, match="n_importance"):
        _fit(_short(), iris).log_predictive(iris, n_importance=0)
    with pytest.raises(ValueError, match="n_mc=0 must be an integer"):
        _fit(_short(), iris).set_params(n_mc=0).score(iris)


@pytest.mark.parametrize(
    "params",
    [
        {"activation": "relu"},
        {"activation": "tanh"},
        {"activation": "logistic"},
        {"hidden_layer_sizes": 8},
        {"hidden_layer_sizes": [6, 4]},
        {"hidden_layer_sizes": ()},
        {"beta": 0.0},
        {"kl_warmup": 5},
        {"free_bits": 3.0},
        {"batch_size": 7},
        {"learning_rate_init": 0.01},
        {"validation_fraction": 0.4},
        {"n_components": 9},
        {"n_mc": 1},
    ],
    ids=str,
)
def test_every_option_reaches_the_fit(iris, params):
    common = {"max_iter": 20, "early_stopping": True, "hidden_layer_sizes": (5,)}
    plain, other = _fit(_short(**common), iris), _fit(_short(**common | params), iris)
    assert np.isfinite(other.elbo_)
    assert other.elbo_ != plain.elbo_
    assert other.log_predictive(iris, 100).mean() > -6.0


def test_batch_size_counts_rows_per_step(iris, steps):
    _fit(_short(batch_size=40, max_iter=1), iris)
    assert sorted(len(weight) for weight in steps) == [37, 37, 38, 38]


# -- containers and composition -------------------------------------------------------------------


def test_named_output(fitted, iris):
    frame = pd.DataFrame(iris, columns=list("abcd"))
    names = ["vaetransformer0", "vaetransformer1"]
    vae = _fit(_short(), frame)
    assert list(vae.get_feature_names_out()) == names
    assert list(vae.feature_names_in_) == list("abcd")
    Z = vae.transform(frame)
    assert list(vae.set_output(transform="pandas").transform(frame).columns) == names
    polars = vae.set_output(transform="polars").transform(frame)
    assert isinstance(polars, pl.DataFrame)
    np.testing.assert_array_equal(polars.to_numpy(), Z)
    np.testing.assert_array_equal(vae.reconstruct(frame), vae.inverse_transform(Z))


def test_pipeline_and_grid_search_rank_by_the_bound(iris):
    y = load_iris().target
    model = make_pipeline(StandardScaler(), _short(max_iter=100), LogisticRegression())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert model.fit(iris, y).score(iris, y) > 0.85
        search = GridSearchCV(_short(max_iter=50), {"n_components": [1, 2]}, cv=2).fit(iris)
    assert np.isfinite(search.best_score_)


def test_verbose_prints_one_line_an_epoch(iris, capsys):
    _fit(_short(verbose=2), iris)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("[VAETransformer] epoch 1: ELBO ")
    _fit(_short(verbose=1, max_iter=21, early_stopping=True, n_iter_no_change=21), iris)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "[VAETransformer] epoch 10",
        "[VAETransformer] epoch 20",
    ]
    assert all(", validation " in line for line in lines)


def test_every_device(device, iris, binary):
    for X in (iris, binary):
        vae = _fit(_short(device=device, max_iter=20, early_stopping=True), X)
        assert vae.elbo_ == pytest.approx(vae.score_samples(X).sum(), rel=1e-9)
        elsewhere = pickle.loads(pickle.dumps(vae)).set_params(device="cpu")
        np.testing.assert_allclose(elsewhere.score_samples(X), vae.score_samples(X), rtol=1e-6)
        np.testing.assert_allclose(elsewhere.transform(X), vae.transform(X), rtol=1e-6, atol=1e-9)
        drawn, there = (v.sample(3, random_state=0)[0] for v in (vae, elsewhere))
        np.testing.assert_allclose(there, drawn, rtol=1e-6, atol=1e-9)
        vae.partial_fit(X)


_RISE_OF_MEMORY = """
import resource
import numpy as np
from skvi import VAETransformer

rng = np.random.default_rng(0)
vae = VAETransformer(random_state=0, max_iter=2, device="cpu").fit(rng.normal(size=(500, 10)))
vae.score_samples(rng.normal(size=(500, 10)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vae.score_samples(rng.normal(size=(30_000, 10)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for the peak as Linux does")
def test_the_memory_of_scores_does_not_grow_with_the_rows():
    # In a process of its own, whose peak no other test has raised. 2.4 MB of rows: they took
    # half a gigabyte when the results of blocks lay between the arrays of the next ones.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RISE_OF_MEMORY],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert float(done.stdout) < 1.5
