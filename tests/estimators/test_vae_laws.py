"""VAETransformer with every prior, posterior and number of importance draws."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning

from skvi.estimators import vae as module
from skvi.estimators.vae import VAETransformer
from skvi.models.vae.posteriors import POSTERIORS
from skvi.models.vae.priors import PRIORS

BOX = math.sqrt(3.0)


def _short(**params):
    settings = {
        "hidden_layer_sizes": (8,),
        "max_iter": 20,
        "n_prior_components": 5,
        "random_state": 0,
    }
    return VAETransformer(**settings | params)


def _fit(estimator, X, **fit_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **fit_params)


@pytest.fixture(scope="module")
def iris():
    return load_iris().data


@pytest.fixture(scope="module", params=[(p, q) for p in sorted(PRIORS) for q in sorted(POSTERIORS)])
def fitted(request, iris):
    prior, posterior = request.param
    return _fit(_short(prior=prior, posterior_type=posterior), iris)


def test_every_pair_keeps_the_contract(fitted, iris):
    scores, terms = fitted.score_samples(iris), fitted.elbo_terms(iris)
    assert fitted.elbo_ == pytest.approx(scores.sum(), rel=1e-9)
    np.testing.assert_allclose(terms.reconstruction - terms.kl, scores, rtol=1e-9)
    np.testing.assert_allclose(terms.energy + terms.entropy, scores, rtol=1e-9, atol=1e-9)
    assert fitted.log_predictive(iris, 300).mean() > scores.mean()
    assert fitted.active_units_.any()
    assert scores.mean() > _fit(_short(max_iter=1), iris).score(iris)

    for method in (fitted.transform, fitted.score_samples):
        whole = method(iris)
        np.testing.assert_allclose(method(iris[::-1])[::-1], whole, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(method(iris[7:8]), whole[7:8], rtol=1e-9, atol=1e-9)

    means, stds = fitted.posterior(iris)
    np.testing.assert_array_equal(means, fitted.transform(iris))
    assert ((stds > 0) & (stds < 3)).all()
    assert ((fitted.reconstruct(iris) - iris) ** 2).mean() < 0.3 * iris.var(axis=0).mean()
    line = fitted.interpolate(iris[0], iris[100], 4)
    np.testing.assert_allclose(line[[0, -1]], fitted.reconstruct(iris[[0, 100]]), rtol=1e-9)

    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.score_samples(iris), scores)
    single = fitted.score_samples(iris.astype(np.float32))
    np.testing.assert_allclose(single.mean(), scores.mean(), atol=1e-2)


def test_draws_are_of_the_prior_and_means_go_through_the_decoder(fitted, iris):
    X, Z = fitted.sample(4000, random_state=1)
    rows, codes = fitted.sample(4000, random_state=1, mean=True)
    np.testing.assert_array_equal(codes, Z)
    np.testing.assert_array_equal(rows, fitted.inverse_transform(Z))
    assert not np.allclose(rows, X)
    # Five deviations: draws scatter about their means by the noise.
    error = fitted.noise_std_ / math.sqrt(4000)
    np.testing.assert_array_less(abs(X.mean(axis=0) - rows.mean(axis=0)), 5.0 * error)
    # In the units of the data; after so few steps a learned prior is not yet that of the rows.
    np.testing.assert_array_less(abs(rows.mean(axis=0) - iris.mean(axis=0)), iris.std(axis=0))
    if fitted.prior == "uniform":
        assert np.abs(Z).max() < BOX
        for code in Z.T:
            assert stats.kstest(code, stats.uniform(-BOX, 2 * BOX).cdf).pvalue > 1e-6
    if fitted.prior == "normal":
        for code in Z.T:
            assert stats.kstest(code, "norm").pvalue > 1e-6


def test_codes_of_a_uniform_prior_stay_in_the_box(iris):
    vae = _fit(_short(prior="uniform"), iris)
    means, stds = vae.posterior(np.r_[iris, 50.0 * iris])
    assert np.abs(means).max() <= BOX
    assert stds.max() <= 1.0 + 1e-9
    vae.inverse_transform(np.full((1, 2), BOX))
    with pytest.raises(ValueError, match=r"magnitude 1\.8, but the uniform prior ends"):
        vae.inverse_transform([[0.0, -1.8]])


@pytest.mark.parametrize("posterior_type", sorted(POSTERIORS))
@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_rows_with_holes_under_every_law(iris, prior, posterior_type):
    holed = np.where(np.random.default_rng(0).uniform(size=iris.shape) < 0.2, np.nan, iris)
    holed[3] = np.nan
    vae = _fit(_short(prior=prior, posterior_type=posterior_type, max_iter=5), holed)
    assert np.isfinite(vae.elbo_)
    assert np.isfinite(vae.impute(holed, 50)).all()
    nothing = vae.score_samples(holed)[3]
    tolerance = 1e-9 if prior in {"normal", "uniform"} else 1.0
    assert nothing == pytest.approx(0.0, abs=tolerance)


def test_a_mixture_prior_finds_clusters_that_a_normal_one_cannot_draw():
    """Held-out predictive density, where the codes of the rows are two tight clumps."""
    rng = np.random.default_rng(0)
    f = rng.choice([-1.0, 1.0], size=1000) + 0.05 * rng.normal(size=1000)
    X = f[:, None] * rng.normal(size=4) + 0.3 * rng.normal(size=(1000, 4))
    train, test = X[:700], X[700:]
    common = {"n_components": 1, "hidden_layer_sizes": (), "max_iter": 50}
    common |= {"learning_rate_init": 0.02, "early_stopping": False, "n_prior_components": 4}
    normal, mixture, vamp = (
        _fit(_short(prior=prior, **common), train).log_predictive(test, 300).mean()
        for prior in ("normal", "mixture", "vamp")
    )
    assert mixture > normal + 0.1
    assert vamp > normal + 0.1


def test_importance_weights_train_a_tighter_bound_and_leave_the_elbo_an_elbo(iris):
    X = np.tile(iris, (7, 1)) + np.random.default_rng(0).normal(size=(1050, 4)) * 0.1
    vae = _fit(_short(n_importance=8, max_iter=10), X)
    assert vae.elbo_ == pytest.approx(vae.score_samples(X).sum(), rel=1e-9)
    assert vae.score(X) < vae.log_predictive(X, 8).mean() < vae.log_predictive(X, 200).mean()
    # the running bound is the ELBO, the validated one the importance-weighted one
    assert vae.elbo_history_[-1] / len(X) == pytest.approx(vae.score(X), abs=0.1)
    assert vae.validation_elbo_history_[-1] > vae.elbo_history_[-1]


def test_averages_have_matched_draws_and_importance_weights_have_not(iris, monkeypatch):
    made = []
    for name in ("matched_noise", "shared_noise"):
        make = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, make=make: made.append(name) or make(*args)
        )

    def kinds(function, *args, **kwargs):
        made.clear()
        function(*args, **kwargs)
        return set(made)

    vae = _fit(_short(max_iter=1), iris)
    holed = iris.copy()
    holed[0, 0] = np.nan
    for function in (vae.score_samples, vae.elbo_terms, vae.score):
        assert kinds(function, iris) == {"matched_noise"}
    assert kinds(vae.score_samples, iris, refine=2) == {"matched_noise"}
    assert kinds(vae.log_predictive, iris, 10) == {"shared_noise"}
    assert kinds(vae.impute, holed, 10) == {"shared_noise"}
    # of early stopping alone: `_publish` has scores of its own
    monkeypatch.setattr(VAETransformer, "_publish", lambda *_: made.append("end"))
    for n_importance, kind in ((1, "matched_noise"), (4, "shared_noise")):
        vae = _short(n_importance=n_importance, early_stopping=True, max_iter=1)
        made.clear()
        with pytest.raises(AttributeError):  # nothing was published
            _fit(vae, iris)
        assert made[: made.index("end")] == [kind]


def test_posteriors_start_narrow_for_one_draw_only(iris, monkeypatch):
    narrow = []
    initialise = module.start.initialise

    def record(*args, one_draw):
        narrow.append(one_draw)
        initialise(*args, one_draw=one_draw)

    monkeypatch.setattr(module.start, "initialise", record)
    for n_importance in (1, 2):
        _fit(_short(n_importance=n_importance, max_iter=1), iris)
    assert narrow == [True, False]


def test_early_stopping_looks_at_the_bound_that_is_climbed(iris, monkeypatch):
    shapes = []
    mean_bound = module._mean_bound

    def record(net, cells, weight, rows, noise, floats_per_draw):
        shapes.append(tuple(noise.shape))
        return mean_bound(net, cells, weight, rows, noise, floats_per_draw)

    monkeypatch.setattr(module, "_mean_bound", record)
    for n_importance in (1, 3, 20):
        _fit(_short(n_importance=n_importance, early_stopping=True, max_iter=1), iris)
    # at the start, and after the epoch
    assert shapes == [shape for shape in [(8, 1, 2), (3, 3, 2), (1, 20, 2)] for _ in range(2)]


@pytest.mark.parametrize(
    "params",
    [
        {"prior": "uniform"},
        {"prior": "mixture"},
        {"prior": "mixture", "n_prior_components": 9},
        {"prior": "vamp"},
        {"posterior_type": "full"},
        {"posterior_type": "flow"},
        {"n_importance": 4},
        {"n_importance": 4, "beta": 0.5},
        {"n_importance": 4, "kl_warmup": 5},
        {"prior": "vamp", "free_bits": 2.0},
        {"prior": "vamp", "posterior_type": "flow", "n_importance": 2},
    ],
    ids=str,
)
def test_every_option_reaches_the_fit(iris, params):
    plain = _fit(_short(prior="mixture" if "n_prior_components" in params else "normal"), iris)
    other = _fit(_short(**params), iris)
    assert other.elbo_ != plain.elbo_
    assert other.log_predictive(iris, 100).mean() > -6.0
    assert _fit(clone(other), iris).elbo_ == other.elbo_


def test_wrong_combinations_are_errors(iris):
    with pytest.raises(ValueError, match="does not have; set free_bits=0"):
        _short(n_importance=2, free_bits=0.1).fit(iris)
    for name in ("prior", "posterior_type"):
        with pytest.raises(ValueError, match=name):
            _short(**{name: "cauchy"}).fit(iris)
    vae = _fit(_short(prior="mixture", warm_start=True), iris)
    for change in ({"prior": "normal"}, {"n_prior_components": 6}, {"posterior_type": "full"}):
        with pytest.raises(ValueError, match="cannot be continued"):
            copy.deepcopy(vae).set_params(**change).fit(iris)


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_learned_priors_continue_exactly(iris, prior):
    whole = _short(prior=prior, posterior_type="flow")
    for _ in range(3):
        whole.partial_fit(iris)
    parts = _short(prior=prior, posterior_type="flow").partial_fit(iris)
    for _ in range(2):
        parts = pickle.loads(pickle.dumps(parts)).partial_fit(iris)
    np.testing.assert_array_equal(parts.transform(iris), whole.transform(iris))


def test_more_components_than_rows(iris):
    for prior in ("mixture", "vamp"):
        assert np.isfinite(_fit(_short(prior=prior, n_prior_components=40), iris[:9]).elbo_)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_refined_posteriors_have_a_higher_bound(iris, mode):
    vae = _fit(_short(beta=0.0), iris)  # posteriors too narrow
    rows = iris[::10]
    with mode():
        plain, refined = (vae.score_samples(rows, refine=n) for n in (0, 40))
        gap = vae.amortisation_gap(rows, refine=40)
    assert (refined >= plain).all()
    np.testing.assert_allclose(gap, refined - plain, atol=1e-9)
    assert gap.mean() > 0.01
    assert refined.mean() < vae.log_predictive(rows, 5000).mean()
    terms = vae.elbo_terms(rows, refine=40)
    np.testing.assert_allclose(terms.reconstruction - terms.kl, refined, rtol=1e-9)
    np.testing.assert_allclose(vae.score_samples(rows[:1], refine=40), refined[:1], rtol=1e-8)
    np.testing.assert_array_equal(vae.posterior(rows, refine=0)[0], vae.transform(rows))
    assert not np.allclose(vae.posterior(rows, refine=40)[0], vae.transform(rows), atol=1e-3)
    for call in (vae.score_samples, vae.elbo_terms, vae.posterior):
        with pytest.raises(ValueError, match="refine=-1 must be an integer of at least 0"):
            call(rows, refine=-1)
    with pytest.raises(ValueError, match="refine=0"):
        vae.amortisation_gap(rows, refine=0)
    holed = rows.copy()
    holed[0], holed[1, 2] = np.nan, np.nan
    assert (vae.amortisation_gap(holed, refine=5) >= 0).all()


def test_a_posterior_is_refined_by_other_draws_than_those_of_its_score(iris, monkeypatch):
    vae = _fit(_short(max_iter=1, n_mc=24), iris)
    refine, seen = module.objective.refine, []

    def record(net, x, observed, n_steps, own_noise, noise, draws_per_block):
        seen.append((own_noise, noise))
        return refine(net, x, observed, n_steps, own_noise, noise, draws_per_block)

    monkeypatch.setattr(module.objective, "refine", record)
    vae.score_samples(iris[:2], refine=1)
    own, noise = seen[0]
    assert own.shape == (16, 2)
    assert noise.shape == (24, 2)
    assert float(torch.cdist(own, noise).min()) > 1e-6


def test_codes_are_in_use_relative_to_the_variance_of_their_prior(iris, monkeypatch):
    variances = np.array([1e9, 1e-9])
    monkeypatch.setattr(VAETransformer, "_prior_variance", lambda self: variances)
    assert _fit(_short(max_iter=1), iris).active_units_.tolist() == [False, True]


# -- checkpoints and precision ---------------------------------------------------------------------


class _Killed(BaseException):
    pass


def _fit_killed_after(estimator, X, n_epochs, monkeypatch):
    def kill(name, epoch, *args, **kwargs):
        if epoch == n_epochs:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "announce_epoch", kill)
        with pytest.raises(_Killed):
            estimator.fit(X)


def _assert_same_bits(one, two):
    assert one.elbo_ == two.elbo_
    assert one.elbo_history_ == two.elbo_history_
    assert one.validation_elbo_history_ == two.validation_elbo_history_
    assert one._model.weights.keys() == two._model.weights.keys()
    for name, value in one._model.weights.items():
        np.testing.assert_array_equal(value, two._model.weights[name])
    for ours, theirs in zip(one._model.optimizer, two._model.optimizer, strict=True):
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "laws",
    [
        {"prior": "vamp", "posterior_type": "flow", "n_importance": 3},
        {"prior": "mixture", "posterior_type": "full", "free_bits": 0.1},
    ],
)
def test_a_killed_fit_of_any_law_goes_on_to_the_same_bits(
    iris, tmp_path, monkeypatch, laws, precision
):
    X = iris.copy()
    X[::7, 1] = np.nan
    path = tmp_path / "vae.npz"
    params = laws | {"precision": precision, "early_stopping": True, "kl_warmup": 4, "max_iter": 6}
    expected = _fit(_short(**params, checkpoint=path), X)
    for n_made in (1, 4):
        _fit_killed_after(_short(**params, checkpoint=path), X, n_made, monkeypatch)
        assert path.exists()
        _assert_same_bits(_fit(_short(**params, checkpoint=path), X), expected)
        assert not path.exists()
    cut = _short(**params, checkpoint=path)
    _fit_killed_after(cut, X, 2, monkeypatch)
    for other in ({"n_prior_components": 6}, {"prior": "normal"}, {"posterior_type": "diag"}):
        with pytest.raises(ValueError, match=f"{next(iter(other))} differs"):
            clone(cut).set_params(**other).fit(X)
