"""VariationalGMM over batches, on streams of blocks, and scoring rows without copies."""

import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from skvi import VariationalGMM

from .test_gmm import _fit, every_law, every_shape

every_algorithm = pytest.mark.parametrize("algorithm", ["cavi", "memoized", "svi"])
batched = pytest.mark.parametrize("algorithm", ["memoized", "svi"])


@pytest.fixture(scope="module")
def X():
    return load_iris().data


@pytest.fixture(scope="module")
def blobs():
    return make_blobs(1200, 3, centers=5, cluster_std=0.4, center_box=(-15, 15), random_state=1)


# -- algorithms ------------------------------------------------------------------------------------


@every_shape
@every_law
@batched
def test_elbo_is_the_sum_of_scores_minus_the_kl(X, covariance_type, law, algorithm):
    weight = np.random.default_rng(0).integers(0, 4, size=len(X))
    for max_iter in (1, 2, 7, 300):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = _fit(
                X,
                covariance_type=covariance_type,
                weight_concentration_prior_type=law,
                sample_weight=weight,
                algorithm=algorithm,
                batch_size=60,
                max_iter=max_iter,
                tol=1e-3,
            )
        assert_allclose(model.elbo_, weight @ model.score_samples(X) - model.kl_, rtol=1e-11)
        assert model.elbo_ == model.elbo_history_[-1]
        assert len(model.elbo_history_) == model.n_iter_ <= max_iter
        if algorithm == "memoized":
            steps = np.diff(model.elbo_history_)
            assert steps.min(initial=0.0) > -1e-12 * abs(model.elbo_)
    assert model.converged_


@every_shape
@every_algorithm
def test_integer_weights_equal_repeated_rows_and_zero_equals_removal(X, covariance_type, algorithm):
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 4, size=len(X))
    copies = rng.permutation(np.repeat(X, weight, axis=0))
    params = {
        "covariance_type": covariance_type, "algorithm": algorithm, "batch_size": 50,
        "max_iter": 6, "tol": 0.0,
    }  # fmt: skip
    with pytest.warns(ConvergenceWarning):
        weighted = _fit(X, sample_weight=weight, **params)
    with pytest.warns(ConvergenceWarning):
        repeated = _fit(copies, **params)
    assert_allclose(weighted.elbo_history_, repeated.elbo_history_, rtol=1e-10)
    assert_allclose(weighted.means_, repeated.means_, rtol=1e-8)


@every_algorithm
def test_planted_clusters_are_found_and_the_bounds_agree(blobs, algorithm):
    rows, labels = blobs
    model = _fit(rows, n_components=8, algorithm=algorithm, batch_size=100)
    assert adjusted_rand_score(labels, model.predict(rows)) > 0.99
    best = _fit(rows, n_components=8, algorithm="cavi", tol=1e-9)
    assert model.elbo_ > best.elbo_ - 0.02 * len(rows)


@every_shape
def test_one_batch_of_memoized_is_cavi(X, covariance_type):
    params = {"covariance_type": covariance_type, "n_components": 3}
    one = _fit(X, algorithm="memoized", batch_size=len(X), **params)
    plain = _fit(X, algorithm="cavi", **params)
    assert_array_equal(one.means_, plain.means_)
    assert one.n_iter_ <= plain.n_iter_ + 1
    assert_allclose(one.elbo_history_[: plain.n_iter_], plain.elbo_history_, rtol=1e-12)


def test_warm_starts_change_the_algorithm(X):
    """What memoized settles on, coordinate ascent leaves alone, and the reverse."""
    for first, second in (("memoized", "cavi"), ("cavi", "memoized")):
        model = _fit(X, algorithm=first, batch_size=30, tol=1e-12, warm_start=True, n_components=3)
        means, elbo = model.means_.copy(), model.elbo_
        model.set_params(algorithm=second).fit(X)
        assert_allclose(model.elbo_, elbo, rtol=1e-10)
        assert_allclose(model.means_, means, rtol=1e-4)


def test_learning_rates_are_used(X):
    def elbo(**params):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return _fit(X, algorithm="svi", batch_size=50, max_iter=4, **params).elbo_

    base = elbo()
    assert elbo(learning_offset=1.0) != base
    assert elbo(learning_decay=0.9) != base
    for wrong in ({"learning_offset": 0.5}, {"learning_decay": 0.5}, {"learning_decay": 1.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            elbo(**wrong)


def test_steps_that_max_iter_cut_short_have_not_converged(X):
    """The full pass that ends them raises the bound little, since it keeps their posterior."""
    params = {"algorithm": "svi", "batch_size": 30, "n_components": 3, "tol": 1e-4}
    with pytest.warns(ConvergenceWarning):
        cut = _fit(X, max_iter=20, **params)
    *_, step, last = np.diff(cut.elbo_history_) / len(X)
    assert step > params["tol"] > last  # else the case shows nothing
    assert not cut.converged_
    whole = _fit(X, **params)
    assert whole.converged_
    assert whole.n_iter_ < whole.max_iter


def test_auto_takes_laps_where_they_pay(X, monkeypatch):
    def fit(algorithm="auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return _fit(X, algorithm=algorithm, max_iter=6)

    plain = fit()
    assert_array_equal(plain.elbo_history_, fit("cavi").elbo_history_)
    monkeypatch.setattr("skvi.models.mixture.ascent._FEWEST_ROWS", 10)
    laps = fit()
    assert_array_equal(laps.elbo_history_, fit("memoized").elbo_history_)
    assert laps.elbo_history_[1] != plain.elbo_history_[1]
    monkeypatch.setattr("skvi.runtime.batches._COPY_BYTES", 100)
    assert_array_equal(fit().elbo_history_, plain.elbo_history_)
    gathered = fit("memoized")  # rows that have no copy say the same
    assert_array_equal(gathered.elbo_history_, laps.elbo_history_)
    monkeypatch.undo()
    monkeypatch.setattr("skvi.models.mixture.ascent._FEWEST_ROWS", 10)
    monkeypatch.setattr("skvi.models.mixture.active._WORTHWHILE_PRODUCT", 1)
    monkeypatch.setattr("skvi.models.mixture.active._FEWEST_ROWS", 1)
    assert_array_equal(fit().elbo_history_, fit("cavi").elbo_history_)


def test_a_cache_beyond_measure_is_refused(X):
    monster = np.full(len(X), 1e9)
    with pytest.raises(ValueError, match=r"batch_size=1 .* larger batch_size"):
        _fit(X, algorithm="memoized", batch_size=1, sample_weight=monster)


# -- partial_fit ----------------------------------------------------------------------------------


def _stream(blocks, weights=None, **params):
    defaults = {"n_components": 8, "random_state": 0, "device": "cpu"}
    model = VariationalGMM(**{**defaults, **params})
    for i, block in enumerate(blocks):
        model.partial_fit(block, sample_weight=None if weights is None else weights[i])
    return model


def _attributes(model):
    return {name: value for name, value in vars(model).items() if name.endswith("_")}


@every_shape
def test_one_block_is_a_fit(X, covariance_type):
    streamed = _attributes(_stream([X], n_components=4, covariance_type=covariance_type))
    fitted = _attributes(_fit(X, covariance_type=covariance_type))
    assert streamed.keys() == fitted.keys()
    for name, value in fitted.items():
        assert_array_equal(streamed[name], value, err_msg=name)


@every_shape
@every_law
def test_a_block_adds_its_statistics_and_the_bound_is_that_of_all_rows(X, covariance_type, law):
    """Against responsibilities kept for every row, by public methods alone."""
    rng = np.random.default_rng(0)
    blocks = np.split(rng.permutation(X), [60, 110])
    weights = [rng.integers(1, 4, size=len(block)).astype(float) for block in blocks]
    model = VariationalGMM(
        4, covariance_type=covariance_type, weight_concentration_prior_type=law,
        random_state=0, device="cpu",
    )  # fmt: skip
    seen = np.empty((0, 4))
    for i, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        if i > 0:
            mine = model.transform(block)
        model.partial_fit(block, sample_weight=weight)
        if i == 0:
            mine = model.transform(block)
        seen = np.concatenate([seen, mine])
        rows, s = np.concatenate(blocks[: i + 1]), np.concatenate(weights[: i + 1])
        counts = s @ seen
        if i > 0:  # components may have changed their order, whichever the sticks like best
            order = np.empty(4, dtype=int)
            order[np.argsort(model.mean_precision_)] = np.argsort(counts)
            seen, counts = seen[:, order], counts[order]
            assert_allclose(model.mean_precision_, 1.0 + counts, rtol=1e-12)
            means = (model.mean_prior_ + (s[:, None] * seen).T @ rows) / (1.0 + counts)[:, None]
            assert_allclose(model.means_, means, rtol=1e-10)
            if law == "dirichlet_distribution":
                assert_allclose(model.weight_concentration_, 0.25 + counts, rtol=1e-12)
        log_rho = model.score_samples(rows)[:, None] + np.log(model.transform(rows))
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(seen > 0, seen * (log_rho - np.log(seen)), 0.0)
        assert_allclose(model.elbo_, s @ terms.sum(1) - model.kl_, rtol=1e-10)
        assert model.elbo_ <= s @ model.score_samples(rows) - model.kl_ + 1e-9
        assert model.elbo_history_[-1] == model.elbo_
        assert model.n_iter_ == len(model.elbo_history_)
        assert model.n_samples_seen_ == s.sum()
    assert not model.converged_


def test_the_order_of_blocks_does_not_matter_once_clusters_are_known(blobs):
    rows, labels = blobs
    blocks = np.split(rows, 8)
    law = {"weight_concentration_prior_type": "dirichlet_distribution"}  # sticks have an order
    one = _stream(blocks, **law)
    other = _stream([blocks[0], *blocks[:0:-1]], **law)
    assert_allclose(other.means_, one.means_, rtol=1e-6, atol=1e-6)
    assert_allclose(other.elbo_, one.elbo_, rtol=1e-6)
    assert adjusted_rand_score(labels, one.predict(rows)) > 0.99
    # and the stream is as good as the fit of all rows under the same priors
    priors = {"mean_prior": one.mean_prior_, "covariance_prior": one.covariance_prior_, **law}
    whole = _fit(rows, n_components=8, **priors)
    assert whole.elbo_ - 5.0 < one.elbo_ < whole.elbo_ + 5.0
    # a hundred visits leave the bound exact
    many = _stream([blocks[0], *np.array_split(rows[150:], 100)], **law)
    assert_allclose(many.elbo_, one.elbo_, rtol=1e-3)
    gap = many.score_samples(rows).sum() - many.kl_ - many.elbo_
    assert 0.0 <= gap < 5.0


@every_algorithm
def test_weighted_blocks_equal_repeated_rows(blobs, algorithm):
    blocks = np.split(blobs[0], 4)
    rng = np.random.default_rng(0)
    weights = [rng.integers(0, 3, size=len(block)) for block in blocks]
    params = {"algorithm": algorithm, "batch_size": 100}
    weighted = _stream(blocks, weights, **params)
    copies = [np.repeat(b, w, axis=0) for b, w in zip(blocks, weights, strict=True)]
    repeated = _stream(copies, **params)
    assert_allclose(weighted.elbo_history_, repeated.elbo_history_, rtol=1e-9)
    assert_allclose(weighted.means_, repeated.means_, rtol=1e-7)
    assert weighted.n_samples_seen_ == repeated.n_samples_seen_


def test_partial_fit_continues_a_fit_and_fit_starts_anew(X):
    first, second = X[::2], X[1::2]
    streamed = _stream([first, second], n_components=4)
    continued = _fit(first).partial_fit(second)
    assert_allclose(continued.elbo_history_, streamed.elbo_history_)
    again = continued.fit(first)
    assert_array_equal(again.elbo_history_, _fit(first).elbo_history_)
    assert again.n_samples_seen_ == len(first)
    payload = pickle.dumps(_fit(first))
    assert b"torch" not in payload
    restored = pickle.loads(payload).partial_fit(second)
    assert_array_equal(restored.means_, streamed.means_)
    assert not hasattr(clone(restored), "means_")
    # given priors replace those of the first block
    streamed.set_params(mean_precision_prior=5.0).partial_fit(first[:1])
    assert streamed.mean_precision_prior_ == 5.0
    assert_allclose(streamed.mean_precision_.sum(), 4 * 5.0 + len(X) + 1)


def test_a_refused_block_changes_nothing(X):
    model = _stream([X[:100]], n_components=4)
    before = pickle.dumps(model)
    for block, message in [
        (X[:5, :3], "features"),
        (X[:5] + np.inf, "infinity"),
        (X[:5] * 1e151, "spread of the training data"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.partial_fit(block)
        assert pickle.dumps(model) == before
    with pytest.raises(ValueError, match="zero"):
        model.partial_fit(X[:5], sample_weight=np.zeros(5))
    with pytest.raises(ValueError, match="partial_fit cannot continue"):
        model.set_params(n_components=5).partial_fit(X[:5])
    unfitted = VariationalGMM(device="cpu")
    with pytest.raises(ValueError, match="constant"):
        unfitted.partial_fit(np.ones((5, 2)))
    assert not hasattr(unfitted, "n_features_in_")
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        VariationalGMM(2, max_iter=1, device="cpu", random_state=0).partial_fit(X)


# -- scoring many rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["predict", "score_samples", "transform", "log_predictive"])
def test_scores_need_no_memory_beside_their_result(method, tmp_path):
    """The output alone grows with the rows, from memory-mapped input too."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600_000, 2)).astype(np.float32)
    np.save(tmp_path / "X.npy", X)
    stored = np.load(tmp_path / "X.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = _fit(X[:500], n_components=3, max_iter=3)
    score = getattr(model, method)
    expected = score(X[:1000])
    tracemalloc.start()
    try:
        result = score(stored)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_allclose(result[:1000], expected, rtol=1e-6)
    assert result.flags.c_contiguous
    assert peak < result.nbytes + 4e6  # a block, and what it becomes


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_a_stream_that_drifts_beyond_the_digits_is_refused(X, covariance_type):
    """Against the exact evidence of one component: right to six digits, or an error."""

    def stream(shift):
        model = VariationalGMM(
            1,
            covariance_type=covariance_type,
            weight_concentration_prior_type="dirichlet_distribution",
            covariance_prior=np.eye(X.shape[1]),
            random_state=0,
            device="cpu",
        )
        return model.fit(X).partial_fit(X + shift)

    near = stream(1e3)
    scores = near.score_samples(np.concatenate([X, X + 1e3])).sum() - near.kl_
    assert near.elbo_ == pytest.approx(scores, abs=1e-6)
    with pytest.raises(ValueError, match="so far from the rows before"):
        stream(3e6)


def test_published_weights_are_copies(X):
    model = _fit(X)
    before = model.score_samples(X)
    for array in model.weight_concentration_:
        array[:] = 1.0
    assert_array_equal(model.score_samples(X), before)
