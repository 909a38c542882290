"""VariationalGMM as its users meet it."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score

from skvi import VariationalGMM

from .strategies import awkward_data, awkward_weights

SHAPES = ["full", "tied", "diag", "spherical"]
LAWS = ["dirichlet_process", "dirichlet_distribution"]
STARTS = ["k-means++", "kmeans", "random_from_data", "random"]

every_shape = pytest.mark.parametrize("covariance_type", SHAPES)
every_law = pytest.mark.parametrize("law", LAWS)
every_start = pytest.mark.parametrize("init_params", STARTS)


@pytest.fixture(scope="module")
def X():
    return load_iris().data


def _fit(X, **params):
    sample_weight = params.pop("sample_weight", None)
    defaults = {"n_components": 4, "random_state": 0, "device": "cpu"}
    return VariationalGMM(**{**defaults, **params}).fit(X, sample_weight=sample_weight)


@every_shape
@every_law
def test_elbo_is_the_sum_of_scores_minus_the_kl(X, covariance_type, law, device):
    weight = np.random.default_rng(0).integers(0, 4, size=len(X))
    model = _fit(
        X,
        covariance_type=covariance_type,
        weight_concentration_prior_type=law,
        sample_weight=weight,
        device=device,
    )
    local = model.score_samples(X)
    assert_allclose(model.elbo_, weight @ local - model.kl_, rtol=1e-9)
    assert model.elbo_ == model.elbo_history_[-1]
    assert len(model.elbo_history_) == model.n_iter_
    assert np.diff(model.elbo_history_).min() > -1e-12 * abs(model.elbo_)
    assert_allclose(model.score(X, sample_weight=weight), np.average(local, weights=weight))
    terms = model.elbo_terms(X)
    assert_allclose(terms.reconstruction - terms.kl, local, rtol=1e-11)
    assert_allclose(terms.energy + terms.entropy, local, rtol=1e-11)
    assert (model.log_predictive(X) >= local).all()
    assert isinstance(model.score(X), float)


@every_shape
def test_published_parameters_describe_the_fit(X, covariance_type):
    model = _fit(X, covariance_type=covariance_type)
    K, D = 4, 4
    shapes = {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}
    for name in ("covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(model, name).shape == shapes[covariance_type]
    if covariance_type in {"full", "tied"}:
        eye = model.covariances_ @ model.precisions_
        assert_allclose(eye, np.broadcast_to(np.eye(D), eye.shape), atol=1e-9)
        assert_allclose(np.tril(model.precisions_cholesky_, -1), 0.0)
        factor = model.precisions_cholesky_
        assert_allclose(factor @ np.swapaxes(factor, -1, -2), model.precisions_, rtol=1e-12)
    else:
        assert_allclose(model.covariances_ * model.precisions_, 1.0)
        assert_allclose(model.precisions_cholesky_**2, model.precisions_)
    assert_allclose(model.weights_.sum(), 1.0)
    resp = model.transform(X)
    assert_allclose(resp.sum(1), 1.0)
    counts = resp.sum(0)
    tolerance = {"rtol": 2e-2, "atol": 2e-2}  # the last responsibilities moved by less than tol
    assert_allclose(model.mean_precision_, 1.0 + counts, **tolerance)
    expected_dof = 4 + (len(X) if covariance_type == "tied" else counts)
    assert_allclose(model.degrees_of_freedom_, expected_dof, **tolerance)
    means = (resp.T @ X + X.mean(0)) / (counts + 1.0)[:, None]
    assert_allclose(model.means_, means, **tolerance)
    assert_array_equal(model.predict(X), resp.argmax(1))
    assert_array_equal(model.predict_proba(X), resp)
    assert_array_equal(clone(model).fit_predict(X), model.predict(X))


def test_default_priors_are_scikit_learns(X):
    from sklearn.mixture import BayesianGaussianMixture

    for covariance_type in SHAPES:
        ours = _fit(X, covariance_type=covariance_type, max_iter=500)
        peer = BayesianGaussianMixture(n_components=4, covariance_type=covariance_type)
        peer._check_parameters(X)
        for name in (
            "weight_concentration_prior_",
            "mean_precision_prior_",
            "mean_prior_",
            "degrees_of_freedom_prior_",
            "covariance_prior_",
        ):
            assert_allclose(getattr(ours, name), getattr(peer, name), rtol=1e-12, err_msg=name)


@every_shape
def test_given_priors_are_used(X, covariance_type):
    D = X.shape[1]
    covariance = {
        "full": np.diag([1.0, 2.0, 3.0, 4.0]) + 0.1,
        "tied": np.diag([1.0, 2.0, 3.0, 4.0]) + 0.1,
        "diag": np.array([1.0, 2.0, 3.0, 4.0]),
        "spherical": 2.5,
    }[covariance_type]
    params = {
        "weight_concentration_prior": 3.0,
        "mean_precision_prior": 1e9,
        "mean_prior": np.arange(D),
        "degrees_of_freedom_prior": 1e9,
        "covariance_prior": 1e9 * covariance,
    }
    model = _fit(X, covariance_type=covariance_type, **params)
    # Priors worth 1e9 rows decide everything.
    assert_allclose(model.means_, np.tile(np.arange(D), (4, 1)), atol=1e-5)
    expected = np.broadcast_to(covariance, model.covariances_.shape)
    assert_allclose(model.covariances_, expected, rtol=1e-4, atol=1e-5)
    assert model.weight_concentration_prior_ == 3.0
    assert_allclose(model.covariance_prior_, params["covariance_prior"])


@every_shape
@every_start
def test_integer_weights_equal_repeated_rows_and_zero_equals_removal(
    X, covariance_type, init_params
):
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 4, size=len(X))
    shuffled = rng.permutation(len(X))
    params = {"covariance_type": covariance_type, "init_params": init_params, "max_iter": 5}
    with pytest.warns(ConvergenceWarning):
        weighted = _fit(X[shuffled], sample_weight=weight[shuffled], tol=0.0, **params)
    with pytest.warns(ConvergenceWarning):
        repeated = _fit(np.repeat(X, weight, axis=0), tol=0.0, **params)
    assert_allclose(weighted.elbo_history_, repeated.elbo_history_, rtol=1e-10)
    assert_allclose(weighted.means_, repeated.means_, rtol=1e-8)


def test_large_weights_seed_like_repeated_rows():
    """Past the size where seeding samples the rows, too."""
    X = make_blobs(300, 2, centers=4, random_state=0)[0]
    weight = np.random.default_rng(0).integers(1, 200, size=300)
    weighted = _fit(X, sample_weight=weight)
    repeated = _fit(np.repeat(X, weight, axis=0))
    assert weight.sum() > 20_000
    assert_allclose(weighted.elbo_, repeated.elbo_, rtol=1e-9)


@every_start
def test_the_order_of_rows_does_not_matter(X, init_params):
    order = np.random.default_rng(0).permutation(len(X))
    first, second = _fit(X, init_params=init_params), _fit(X[order], init_params=init_params)
    assert_allclose(first.elbo_, second.elbo_, rtol=1e-10)


@every_start
def test_same_seed_same_bits_and_global_generators_untouched(X, init_params):
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, second = _fit(X, init_params=init_params), _fit(X, init_params=init_params)
    for name in ("means_", "covariances_", "weights_", "elbo_history_"):
        assert_array_equal(getattr(first, name), getattr(second, name))
    assert_array_equal(first.sample(9)[0], second.sample(9)[0])
    VariationalGMM(2, init_params=init_params, device="cpu").fit(X).sample(3)
    assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_random_state_instances_are_advanced(X):
    state = np.random.RandomState(0)
    draws = [_fit(X, random_state=state, init_params="random").elbo_history_[0] for _ in range(2)]
    assert draws[0] != draws[1]


@every_shape
def test_scores_do_not_depend_on_company(X, covariance_type):
    model = _fit(X, covariance_type=covariance_type)
    order = np.random.default_rng(0).permutation(len(X))
    for method in ("score_samples", "log_predictive", "transform"):
        whole = getattr(model, method)(X)
        assert_allclose(getattr(model, method)(X[order]), whole[order], rtol=1e-11, atol=1e-14)
        single = np.concatenate([getattr(model, method)(X[i : i + 1]) for i in range(9)])
        assert_allclose(single, whole[:9], rtol=1e-11, atol=1e-14)


@every_shape
def test_change_of_units_changes_the_bound_by_the_jacobian(X, covariance_type):
    unit = 7.3 if covariance_type == "spherical" else np.array([1e-3, 0.2, 5.0, 1e6])
    first = _fit(X, covariance_type=covariance_type)
    second = _fit(X * unit + 3.0, covariance_type=covariance_type)
    jacobian = np.log(np.broadcast_to(unit, 4)).sum()
    assert_allclose(second.score(X * unit + 3.0), first.score(X) - jacobian, rtol=1e-5)


@every_shape
def test_offset_costs_no_digits(X, covariance_type):
    near = _fit(X, covariance_type=covariance_type)
    far = _fit(X + 1e6, covariance_type=covariance_type)
    assert_allclose(far.elbo_, near.elbo_, rtol=1e-7)
    moved = (X.astype(np.float32) + np.float32(1e4)).astype(np.float32)
    assert_allclose(
        _fit(moved, covariance_type=covariance_type, max_iter=2000).elbo_,
        _fit(moved.astype(float), covariance_type=covariance_type, max_iter=2000).elbo_,
        rtol=1e-9,
    )


def test_finds_planted_clusters():
    X, labels = make_blobs(600, 5, centers=6, cluster_std=0.5, random_state=0)
    model = _fit(X, n_components=6, n_init=5)
    assert adjusted_rand_score(labels, model.predict(X)) > 0.99


def test_n_init_keeps_the_highest_bound(X):
    # The starts share one generator, so the first of many is the only one of one.
    one = _fit(X, init_params="random_from_data", n_components=6)
    many = _fit(X, init_params="random_from_data", n_components=6, n_init=8)
    assert many.elbo_ >= one.elbo_


def test_warm_start_continues_with_the_same_priors(X):
    model = VariationalGMM(4, random_state=0, warm_start=True, max_iter=3, tol=0.0, device="cpu")
    with pytest.warns(ConvergenceWarning):
        model.fit(X)
    prior = model.covariance_prior_.copy()
    with pytest.warns(ConvergenceWarning):
        model.fit(X)
    with pytest.warns(ConvergenceWarning):
        whole = _fit(X, max_iter=6, tol=0.0)
    assert_allclose(model.elbo_, whole.elbo_, rtol=1e-12)
    model.set_params(max_iter=500, tol=1e-3).fit(X[:40])
    assert_array_equal(model.covariance_prior_, prior)
    # Priors that are given are used; the others stay.
    model.set_params(mean_precision_prior=7.0).fit(X)
    assert model.mean_precision_prior_ == 7.0
    assert_array_equal(model.covariance_prior_, prior)
    counts = model.transform(X).sum(0)
    assert_allclose(model.mean_precision_, 7.0 + counts, rtol=1e-2)
    model.set_params(n_components=5)
    with pytest.raises(ValueError, match="warm_start"):
        model.fit(X)


def test_one_failing_start_does_not_spoil_the_others(X, monkeypatch):
    n_calls = 0
    climb = VariationalGMM._climb

    def flaky(self, *args):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise ValueError("this start failed")
        return climb(self, *args)

    monkeypatch.setattr(VariationalGMM, "_climb", flaky)
    assert np.isfinite(_fit(X, n_init=3).elbo_)
    assert n_calls == 3
    n_calls = 1
    with pytest.raises(ValueError, match="orders of magnitude"):
        _fit(X)


@pytest.mark.parametrize("a0", [1e-300, 1e-16, 1e-10, 1e8, 1e16, 1e30])
def test_extreme_concentrations_keep_the_bound_right(a0):
    X = np.random.default_rng(0).normal(size=(100, 3))
    X[:40] += 6.0
    model = _fit(X, weight_concentration_prior=a0, tol=1e-9, n_components=5)
    assert np.diff(model.elbo_history_).min(initial=0.0) > -1e-9
    assert (model.log_predictive(X) >= model.score_samples(X) - 1e-9).all()
    # No more than the evidence of the best labelling allows: far from rounding up to the sky.
    assert model.elbo_ < _fit(X, weight_concentration_prior=0.5, n_components=5).elbo_ + 20.0


def test_tiny_priors_on_large_data_are_a_clear_error(X):
    for covariance_type in ("full", "tied"):
        with pytest.raises(ValueError, match=r"orders of magnitude|rescale"):
            _fit(X * 1e100, covariance_prior=1e-300 * np.eye(4), covariance_type=covariance_type)


def test_half_precision_tensors(X):
    low = torch.from_numpy(X).bfloat16()
    assert_allclose(_fit(low).elbo_, _fit(low.float()).elbo_, rtol=1e-12)


def test_max_iter_warns_and_a_converged_fit_does_not(X):
    with pytest.warns(ConvergenceWarning, match="increase max_iter"):
        model = _fit(X, max_iter=2)
    assert not model.converged_
    assert model.n_iter_ == 2
    assert _fit(X).converged_


def test_verbose_speaks_and_silence_is_the_default(X, capsys):
    _fit(X)
    assert capsys.readouterr().out == ""
    model = _fit(X, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == model.n_iter_
    assert f"{model.elbo_ / len(X):.6f}" in lines[-1]
    _fit(X, verbose=1)
    assert 0 < len(capsys.readouterr().out.splitlines()) < model.n_iter_


@every_shape
@every_law
def test_sample_has_the_moments_of_the_predictive(X, covariance_type, law):
    model = _fit(X, covariance_type=covariance_type, weight_concentration_prior_type=law)
    draws, labels = model.sample(50_000, random_state=1)
    assert draws.shape == (50_000, 4)
    assert labels.shape == (50_000,)
    error = draws.std(0) / np.sqrt(len(draws))
    expected = model.weights_ @ model.means_
    assert (np.abs(draws.mean(0) - expected) < 5.5 * error + 0.01).all()
    share = np.bincount(labels, minlength=5)[:4] / len(labels)
    assert_allclose(share, model.weights_, atol=0.015)


def test_predictive_beats_the_bound_and_scores_held_out_rows(X):
    train, test = X[::2], X[1::2]
    model = _fit(train)
    assert model.log_predictive(test).mean() > model.score(test)
    assert np.isfinite(model.score(test))


def test_dtype_follows_the_input(X):
    model = _fit(X.astype(np.float32))
    assert model.transform(X.astype(np.float32)).dtype == np.float32
    assert model.transform(X).dtype == np.float64
    assert model.score_samples(X.astype(np.float32)).dtype == np.float64


def test_read_only_memmap_is_accepted(X, tmp_path):
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert_allclose(_fit(mapped).elbo_, _fit(X).elbo_, rtol=1e-12)


def test_tensors_are_accepted(X):
    assert_allclose(_fit(torch.from_numpy(X)).elbo_, _fit(X).elbo_, rtol=1e-12)


def test_pickle_holds_numpy_only_and_predicts_the_same(X):
    model = _fit(X)
    payload = pickle.dumps(model)
    assert b"torch" not in payload
    assert_array_equal(pickle.loads(payload).score_samples(X), model.score_samples(X))


@every_shape
def test_more_components_than_rows(covariance_type):
    X = np.random.default_rng(0).normal(size=(6, 2))
    model = _fit(X, covariance_type=covariance_type, n_components=20)
    assert np.isfinite(model.elbo_)
    assert np.isfinite(model.score(X))


@every_start
def test_fewer_distinct_rows_than_components(init_params):
    X = np.repeat(np.array([[0.0, 1.0], [2.0, 0.0], [5.0, 5.0]]), 5, axis=0)
    model = _fit(X, n_components=8, init_params=init_params)
    assert np.isfinite(model.elbo_)


def test_singular_covariances_are_shrunk(X):
    collinear = np.column_stack([X, X[:, 0] + X[:, 1]])
    few = np.random.default_rng(0).normal(size=(4, 6))
    for data in (collinear, few):
        model = _fit(data)
        assert np.isfinite(model.score(data))
        covariance = np.cov(data.T)
        expected = 0.9 * covariance + 0.1 * np.diag(covariance.diagonal())
        assert_allclose(model.covariance_prior_, expected, atol=1e-12)
    nearly = np.column_stack([X, X[:, 0] + X[:, 1] + 1e-3 * X[:, 2]])[:, :4]
    assert_allclose(_fit(nearly).covariance_prior_, np.cov(nearly.T), rtol=1e-10)


class TestErrors:
    @pytest.mark.parametrize(
        ("params", "match"),
        [
            ({"n_components": 0}, "n_components"),
            ({"covariance_type": "round"}, "covariance_type"),
            ({"weight_concentration_prior": -1.0}, "weight_concentration_prior"),
            ({"weight_concentration_prior": np.nan}, "weight_concentration_prior"),
            ({"mean_prior": [0.0, 1.0]}, r"mean_prior has shape \(2,\)"),
            ({"mean_prior": [0.0, np.nan, 0.0, 0.0]}, "mean_prior"),
            ({"degrees_of_freedom_prior": 2.5}, "must exceed n_features - 1 = 3"),
            ({"covariance_prior": np.eye(3)}, r"covariance_prior has shape \(3, 3\)"),
            ({"mean_prior": np.full(4, 1e200)}, "mean_prior contains values beyond"),
            ({"covariance_prior": 1e308 * np.eye(4)}, "covariance_prior contains values beyond"),
            ({"covariance_prior": True, "covariance_type": "spherical"}, "positive number"),
            ({"covariance_prior": np.ones((4, 4))}, "positive definite"),
            ({"covariance_prior": -np.eye(4)}, "positive definite"),
            ({"covariance_prior": np.triu(np.ones((4, 4)))}, "symmetric"),
            ({"covariance_prior": 1.0}, "covariance_prior has shape"),
            ({"covariance_prior": np.eye(4), "covariance_type": "diag"}, "covariance_prior has"),
            ({"covariance_prior": -np.ones(4), "covariance_type": "diag"}, "positive variances"),
            ({"covariance_prior": np.ones(4), "covariance_type": "spherical"}, "positive number"),
            ({"device": "nowhere"}, "not a device"),
            ({"device": "meta"}, "not supported"),
            ({"random_state": -1}, "random_state"),
            ({"init_params": "magic"}, "init_params"),
            ({"tol": -1.0}, "tol"),
        ],
    )
    def test_parameters(self, X, params, match):
        with pytest.raises(ValueError, match=match):
            _fit(X, **params)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_missing_cuda_is_named(self, X):
        with pytest.raises(ValueError, match="torch sees 0 CUDA"):
            _fit(X, device="cuda")

    def test_constant_features(self, X):
        bad = X.copy()
        bad[:, 2] = 7.0
        with pytest.raises(ValueError, match=r"Features \[2\].*constant.*VarianceThreshold"):
            _fit(bad)
        with pytest.raises(ValueError, match="constant"):
            _fit(np.ones((5, 2)), covariance_type="spherical")
        bad = np.column_stack([X[:, :3], np.full(150, 1e-3)])
        with pytest.raises(ValueError, match="constant"):
            _fit(bad, covariance_type="diag")
        assert np.isfinite(_fit(bad, covariance_prior=np.eye(4)).elbo_)

    def test_infinite_rows(self, X):
        bad = X.copy()
        bad[3, 1] = np.inf
        with pytest.raises(ValueError, match="infinity"):
            _fit(bad)
        with pytest.raises(ValueError, match="infinity"):
            _fit(X).score_samples(bad)

    def test_too_large_numbers(self, X):
        with pytest.raises(ValueError, match="1e\\+152"):
            _fit(X * 1e155)
        with pytest.raises(ValueError, match="spread of the training data"):
            _fit(X * 1e-100).score_samples(X * 1e100)
        # Each feature has its own reach: what is far for the first is near for the second.
        unlike = _fit(X * [1e-100, 1e100, 1.0, 1.0], covariance_type="diag")
        assert np.isfinite(unlike.score_samples([[0.0, 1e101, 0.0, 0.0]])).all()
        with pytest.raises(ValueError, match=r"Features \[0\] of X lie more"):
            unlike.score_samples([[1e60, 0.0, 0.0, 0.0], [0.0, 1e101, np.nan, 0.0]])
        with pytest.raises(ValueError, match="less than 1e-153"):
            _fit(X * 1e-160)

    def test_weights(self, X):
        for weight, match in [
            (np.zeros(150), "weight.*zero"),
            (-np.ones(150), "Negative values"),
            (np.ones(3), "shape"),
            (np.full(150, np.nan), "NaN"),
            (np.full(150, 1e299), "too large"),
        ]:
            with pytest.raises(ValueError, match=match):
                _fit(X, sample_weight=weight)
        with pytest.raises(ValueError, match=r"weight.*zero"):
            _fit(X).score(X, sample_weight=np.zeros(150))

    def test_unfitted_and_wrong_sample(self, X):
        with pytest.raises(NotFittedError):
            VariationalGMM().sample()
        with pytest.raises(ValueError, match="n_samples=0"):
            _fit(X).sample(0)

    def test_a_failed_fit_changes_nothing(self, X):
        model = _fit(X)
        before = model.score_samples(X)
        model.set_params(covariance_prior=-np.eye(3))
        with pytest.raises(ValueError, match="covariance_prior"):
            model.fit(X[:, :3])
        assert model.n_features_in_ == 4
        assert_array_equal(model.score_samples(X), before)
        fresh = VariationalGMM(device="cpu")
        with pytest.raises(ValueError, match="constant"):
            fresh.fit(np.ones((5, 2)))
        assert not hasattr(fresh, "n_features_in_")


@settings(max_examples=2 * settings().max_examples)  # cheap, and the many options need it
@given(data=st.data())
def test_awkward_data_get_a_finite_answer_or_a_clear_error(data):
    X, _ = data.draw(awkward_data())
    weight = data.draw(awkward_weights(len(X)))
    model = VariationalGMM(
        data.draw(st.integers(1, 6)),
        covariance_type=data.draw(st.sampled_from(SHAPES)),
        weight_concentration_prior_type=data.draw(st.sampled_from(LAWS)),
        init_params=data.draw(st.sampled_from(STARTS)),
        moves=data.draw(st.sampled_from([None, "auto"])),
        random_state=0,
        max_iter=500,
        tol=1e-4,
        device="cpu",
    )
    try:
        model.fit(X, sample_weight=weight)
    except ValueError as error:
        if not any(word in str(error) for word in ("constant", "weight", "rescale")):
            raise
        return
    weight = np.ones(len(X)) if weight is None else weight
    for name in ("weights_", "means_", "covariances_", "precisions_", "elbo_history_"):
        assert np.isfinite(getattr(model, name)).all(), name
    history = np.array(model.elbo_history_)
    # Rounding: of the covariance's logarithm times the total weight, and of the sums. (Under tiny
    # weights the bound itself is the rounding of a KL between equal laws.)
    condition = 1.0
    if model.covariance_type in {"full", "tied"}:
        spread = np.sqrt(np.diagonal(model.covariances_, axis1=-2, axis2=-1))
        correlation = model.covariances_ / spread[..., None] / spread[..., None, :]
        condition = np.linalg.cond(correlation).max()
    rounding = 1e-15 * weight.sum() * condition + 1e-13 * np.abs(history).max() + 1e-13
    assert (np.diff(history) > -10.0 * rounding).all()
    local = model.score_samples(X)
    assert np.isfinite(local).all()
    total = weight @ local - model.kl_
    assert_allclose(model.elbo_, total, rtol=1e-9, atol=1e-9 * (weight @ np.abs(local)))
    assert np.isfinite(model.log_predictive(X)).all()
    assert_allclose(model.transform(X).sum(1), 1.0, rtol=1e-5)
    assert np.isfinite(model.sample(5)[0]).all()


@every_shape
@pytest.mark.parametrize("max_iter", [5, 1000])
@pytest.mark.parametrize("long_product", [1, 10**9])
def test_fits_over_active_components_end_with_a_full_pass(
    X, covariance_type, max_iter, long_product, monkeypatch
):
    params = {"covariance_type": covariance_type, "n_components": 6, "max_iter": max_iter}
    monkeypatch.setattr("skvi.models.mixture.active._LONG_PRODUCT", long_product)
    monkeypatch.setattr("skvi.models.mixture.active._WORTHWHILE_PRODUCT", 1)
    monkeypatch.setattr("skvi.models.mixture.active._FEWEST_ROWS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        restricted = _fit(X, **params)
        monkeypatch.setattr("skvi.models.mixture.active.pays", lambda *_: False)
        plain = _fit(X, **params)
    # The last pass looks at everything, so the identity is exact however the fit ended.
    assert_allclose(
        restricted.elbo_, restricted.score_samples(X).sum() - restricted.kl_, rtol=1e-12
    )
    assert_allclose(restricted.elbo_, plain.elbo_, rtol=1e-5)
    assert restricted.converged_ == plain.converged_
    assert np.diff(restricted.elbo_history_).min() > -1e-6


def test_memory_decides_whether_rows_are_kept(X, monkeypatch):
    monkeypatch.setattr("skvi.models.mixture.active._WORTHWHILE_PRODUCT", 1)
    monkeypatch.setattr("skvi.models.mixture.active._FEWEST_ROWS", 1)
    monkeypatch.setattr("skvi.runtime.blocks._RESIDENT_BYTES", 100)
    monkeypatch.setattr("skvi.models.mixture.active.AlternatingAscent", None)
    assert _fit(X).converged_
