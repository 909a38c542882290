"""Moves of VariationalGMM: what they repair, and what they may never do."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import gammaln
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from skvi import VariationalGMM
from skvi.estimators import gmm
from skvi.inference.monitor import Status
from skvi.models.mixture import missing, start
from skvi.models.mixture.moves import MOVES, Move

SHAPES = ["full", "tied", "diag", "spherical"]
LAWS = ["dirichlet_process", "dirichlet_distribution"]
STARTS = ["k-means++", "kmeans", "random_from_data", "random"]

every_shape = pytest.mark.parametrize("covariance_type", SHAPES)
every_law = pytest.mark.parametrize("law", LAWS)

CENTRES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])


def _planted(sizes=(60, 60, 60, 60), *, n_noise=0):
    """Four round clusters in the plane, with features that say nothing about them."""
    truth = np.repeat(np.arange(4), sizes)
    X = np.random.default_rng(0).normal(size=(len(truth), 2 + n_noise))
    X[:, :2] += CENTRES[truth]
    return X, truth


def _holed(X, share=0.15):
    """Remove cells at random; one of each row stays, and all of the first two rows."""
    rng = np.random.default_rng(1)
    holes = rng.uniform(size=X.shape) < share
    holes[np.arange(len(X)), rng.integers(X.shape[1], size=len(X))] = False
    holes[:2] = False
    return np.where(holes, np.nan, X)


def _fit(X, **params):
    sample_weight = params.pop("sample_weight", None)
    defaults = {"n_components": 6, "random_state": 0, "device": "cpu"}
    return VariationalGMM(**{**defaults, **params}).fit(X, sample_weight=sample_weight)


def _check(model, X, weight=1.0):
    """The bound is exact and never fell."""
    local = np.sum(weight * model.score_samples(X))
    assert_allclose(model.elbo_, local - model.kl_, rtol=1e-9)
    assert model.elbo_ == model.elbo_history_[-1]
    assert len(model.elbo_history_) == model.n_iter_ <= model.max_iter
    assert np.diff(model.elbo_history_).min(initial=0.0) > -1e-11 * abs(model.elbo_)


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_never_below_plain_ascent_and_exact(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    N, D = data.draw(st.integers(5, 80)), data.draw(st.integers(1, 4))
    centres = 5.0 * rng.normal(size=(data.draw(st.integers(1, 5)), D))
    X = centres[rng.integers(len(centres), size=N)] + rng.normal(size=(N, D))
    X = _holed(X, data.draw(st.sampled_from([0.0, 0.3])))
    weight = rng.uniform(0.1, 3.0, size=N) if data.draw(st.booleans()) else np.ones(N)
    params = {
        "n_components": data.draw(st.integers(1, 8)),
        "covariance_type": data.draw(st.sampled_from(SHAPES)),
        "weight_concentration_prior_type": data.draw(st.sampled_from(LAWS)),
        "init_params": data.draw(st.sampled_from(STARTS)),
        "n_init": data.draw(st.integers(1, 2)),
        "sample_weight": weight,
        "tol": 1e-4,
    }
    kinds = data.draw(st.sampled_from(["auto", *([kind] for kind in MOVES), ("merge", "birth")]))
    plain, moved = _fit(X, moves=None, **params), _fit(X, moves=kinds, **params)
    assert moved.elbo_ >= plain.elbo_
    _check(plain, X, weight)
    _check(moved, X, weight)


def _halved(truth, X):
    """The first cluster has two components."""
    return np.where((truth == 0) & (X[:, 1] > 0.0), 4, truth)


def _joined(truth, X):
    """The first two clusters have one component."""
    return np.where(truth == 1, 0, truth)


def _exchanged(truth, X):
    """Two clusters share a component, another has two: no component is empty."""
    return np.where((truth == 3) & (X[:, 1] > 10.0), 1, _joined(truth, X))


def _one(truth, X):
    return np.zeros_like(truth)


def _start_from(monkeypatch, labels):
    """Let fits of all rows start from these labels; others, of parts, start as usual."""
    usual = start.start

    def given(kind, rows, shape, n_components, rng):
        if rows.n_rows != len(labels):
            return usual(kind, rows, shape, n_components, rng)
        x, weight = rows[slice(None)]
        resp = weight * torch.nn.functional.one_hot(torch.as_tensor(labels), n_components).T
        if isinstance(x, missing.Cells):
            seen = (resp @ x.observed.double()).clamp_min(1e-300)
            around = missing.around(shape, resp @ x.x / seen)
            return start.statistics(rows, around, lambda where, _: (resp > 0.0).double()[:, where])
        reference = torch.zeros(n_components, rows.n_features, dtype=torch.float64)
        return shape.unpack(reference, shape.sums(x, shape.monomials(x), resp))

    monkeypatch.setattr(start, "start", given)


@every_law
@pytest.mark.parametrize(
    ("covariance_type", "labels", "n_components", "kinds"),
    [
        ("full", _halved, 6, ["merge"]),
        ("full", _joined, 6, ["birth"]),
        ("diag", _joined, 6, ["birth"]),
        ("full", _one, 6, "auto"),
        ("diag", _one, 6, "auto"),
        ("full", _exchanged, 4, ["merge", "birth"]),
        ("diag", _exchanged, 4, ["merge", "birth"]),
    ],
)
def test_a_bad_start_is_repaired(covariance_type, law, labels, n_components, kinds, monkeypatch):
    X, truth = _planted((80, 80, 80, 80), n_noise=6)
    params = {
        "n_components": n_components,
        "covariance_type": covariance_type,
        "weight_concentration_prior_type": law,
    }
    _start_from(monkeypatch, labels(truth, X))
    plain, moved = _fit(X, moves=None, **params), _fit(X, moves=kinds, **params)
    assert adjusted_rand_score(truth, plain.predict(X)) < 0.99
    assert adjusted_rand_score(truth, moved.predict(X)) == 1.0
    assert moved.n_active_components_ == 4
    assert moved.elbo_ > plain.elbo_ + 10.0
    _check(moved, X)


@every_shape
@pytest.mark.parametrize(
    ("labels", "n_components", "kinds"),
    [
        (_joined, 6, ["birth", "reorder"]),
        (_one, 6, "auto"),
        (_exchanged, 4, ["merge", "birth", "reorder"]),
    ],
)
def test_a_bad_start_is_repaired_in_spite_of_holes(
    covariance_type, labels, n_components, kinds, monkeypatch
):
    X, truth = _planted((80, 80, 80, 80), n_noise=2)
    holed = _holed(X)
    params = {"n_components": n_components, "covariance_type": covariance_type}
    _start_from(monkeypatch, labels(truth, X))
    plain = _fit(holed, moves=["reorder"], **params)
    moved = _fit(holed, moves=kinds, **params)
    _start_from(monkeypatch, truth)
    ideal = _fit(holed, moves=["reorder"], **params)
    # Whole rows say where they belong.
    assert adjusted_rand_score(truth, plain.predict(X)) < 0.99
    assert adjusted_rand_score(truth, moved.predict(X)) == 1.0
    assert moved.n_active_components_ == 4
    assert moved.elbo_ > plain.elbo_ + 10.0
    assert moved.elbo_ > ideal.elbo_ - 1.0
    _check(moved, holed)


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
@pytest.mark.parametrize("share", [0.0, 0.15])
def test_components_of_equal_rows_do_not_hide_a_split(covariance_type, share, monkeypatch):
    """What is left of their scatter is rounding of either sign, which measures nothing."""
    X, truth = _planted(n_noise=2)
    X = np.where((truth >= 2)[:, None], X[np.repeat([0, 60, 120, 180], 60)], X)
    _start_from(monkeypatch, _joined(truth, X))
    moved = _fit(_holed(X, share), moves=["birth"], covariance_type=covariance_type)
    assert adjusted_rand_score(truth, moved.predict(X)) == 1.0
    assert moved.n_active_components_ == 4


@every_law
@pytest.mark.parametrize("seed", [2, 3])
def test_many_components_of_few_rows_become_one(seed, law):
    """Where no merge of two pays but all together do."""
    X = np.random.default_rng(seed).normal(size=(90, 13))
    X[np.random.default_rng(seed + 50).uniform(size=X.shape) < 0.3] = 0.0
    params = {"weight_concentration_prior_type": law, "weight_concentration_prior": 0.1}
    one = _fit(X, n_components=1, **params)
    moved = _fit(X, n_components=10, random_state=seed, **params)
    # What the counts cost if there are nine more components that might have had the rows.
    prior = np.r_[1.0, 0.1] if law == "dirichlet_process" else np.full(10, 0.1)
    counts = np.zeros(len(prior))
    counts[0] = len(X)
    cost = (gammaln(prior + counts) - gammaln(prior)).sum()
    cost += gammaln(prior.sum()) - gammaln(prior.sum() + len(X))
    assert moved.elbo_ >= one.elbo_ + cost - 1e-3 * len(X)
    _check(moved, X)


def test_halves_of_a_cluster_are_merged_in_spite_of_holes(monkeypatch):
    X, truth = _planted((80, 80, 80, 80), n_noise=6)
    holed = _holed(X)
    _start_from(monkeypatch, _halved(truth, X))
    plain, moved = _fit(holed, moves=None), _fit(holed, moves=["merge"])
    assert plain.n_active_components_ == 5
    assert moved.n_active_components_ == 4
    assert moved.elbo_ > plain.elbo_ + 1.0
    _check(moved, holed)


def test_merges_are_tried_that_look_too_dear_with_many_holes(monkeypatch):
    """The predicted gain is a lower bound, and far below zero here."""
    X, truth = _planted((80, 80, 80, 80), n_noise=6)
    holed = _holed(X, 0.3)
    _start_from(monkeypatch, _halved(truth, X))
    params = {"moves": ["merge", "reorder"]}
    moved = _fit(holed, **params)
    monkeypatch.setattr(Move, "doubt", 0.0)
    trusting = _fit(holed, **params)
    assert trusting.n_active_components_ == 5
    assert moved.n_active_components_ == 4
    assert moved.elbo_ > trusting.elbo_ + 10.0
    _check(moved, holed)


def test_a_component_of_few_rows_is_deleted(monkeypatch):
    X, truth = _planted(n_noise=6)
    # A tight group at the rim of the first cluster, just too small to pay for its own component.
    group = 0.3 * np.random.default_rng(5).normal(size=(8, 8))
    group[:, :2] += 2.5 / np.sqrt(2.0)
    X, labels = np.vstack([X, group]), np.append(truth, np.full(8, 4))
    _start_from(monkeypatch, labels)
    plain, moved = _fit(X, moves=None), _fit(X, moves=["delete"])
    assert plain.n_active_components_ == 5
    assert moved.n_active_components_ == 4
    assert moved.elbo_ > plain.elbo_ + 1.0
    _check(moved, X)


def test_large_components_come_first(monkeypatch):
    X, truth = _planted((20, 40, 60, 120))
    _start_from(monkeypatch, truth)
    plain, moved = _fit(X, moves=None), _fit(X, moves=["reorder"])
    assert (np.diff(plain.weights_[:4]) > 0.0).all()
    assert (np.diff(moved.weights_) <= 0.0).all()
    assert moved.elbo_ > plain.elbo_ + 1.0
    _check(moved, X)
    symmetric = {"weight_concentration_prior_type": "dirichlet_distribution"}
    plain, moved = _fit(X, moves=None, **symmetric), _fit(X, moves=["reorder"], **symmetric)
    assert_array_equal(moved.weights_, plain.weights_)


@every_shape
@every_law
def test_integer_weights_equal_repeated_rows_with_moves(covariance_type, law):
    holed = law == "dirichlet_process"
    X = _holed(_planted((40, 30, 20, 10))[0], 0.15 if holed else 0.0)
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 4, size=len(X))
    shuffled = rng.permutation(len(X))
    params = {
        "covariance_type": covariance_type,
        "weight_concentration_prior_type": law,
        "init_params": "random",
    }
    weighted = _fit(X[shuffled], sample_weight=weight[shuffled], **params)
    repeated = _fit(np.repeat(X, weight, axis=0), **params)
    assert weighted.n_iter_ == repeated.n_iter_
    assert_allclose(weighted.elbo_, repeated.elbo_, rtol=1e-9)
    assert_allclose(weighted.means_, repeated.means_, rtol=1e-4, atol=1e-4)
    plain = _fit(X[shuffled], sample_weight=weight[shuffled], moves=["reorder"], **params)
    assert weighted.n_iter_ > plain.n_iter_


@pytest.mark.parametrize("algorithm", ["cavi", "memoized"])
def test_the_order_of_few_rows_in_many_dimensions_does_not_matter(algorithm):
    """Rows no more than directions are all alike: what tells them apart must not be rounding."""
    X = np.random.RandomState(42).rand(15, 30)  # of scikit-learn's check of weights
    weight = np.array([3, 3, 4, 0, 0, 2, 4, 3, 0, 3, 0, 0, 0, 4, 1])
    params = {"algorithm": algorithm, "batch_size": 10, "n_components": 10}
    first = _fit(X, sample_weight=weight, **params)
    rng = np.random.default_rng(0)
    for _ in range(8):
        order = rng.permutation(15)
        near = X[order] * (1.0 + 1e-15 * rng.normal(size=X.shape))
        second = _fit(near, sample_weight=weight[order], **params)
        assert_allclose(second.predict_proba(X), first.predict_proba(X), rtol=1e-6, atol=1e-9)


def test_same_seed_same_bits():
    X, _ = _planted()
    first, second = _fit(X, init_params="random"), _fit(X, init_params="random")
    for name in ("means_", "covariances_", "elbo_history_"):
        assert_array_equal(getattr(first, name), getattr(second, name))


def test_warm_fits_move_too(monkeypatch):
    X, truth = _planted()
    _start_from(monkeypatch, _joined(truth, X))
    model = _fit(X, moves=None, warm_start=True)
    assert model.n_active_components_ == 3
    model.set_params(moves="auto").fit(X)
    assert model.n_active_components_ == 4
    assert adjusted_rand_score(truth, model.predict(X)) == 1.0


@pytest.mark.parametrize("long", [False, True])
def test_max_iter_limits_moves_too(long, monkeypatch):
    """At every limit the state is whole, with passes over active pairs or without."""
    if long:
        monkeypatch.setattr("skvi.models.mixture.active._LONG_PRODUCT", 1)
    X, truth = _planted()
    _start_from(monkeypatch, _exchanged(truth, X))
    n_iter = _fit(X, n_components=4).n_iter_
    assert n_iter > _fit(X, n_components=4, moves=None).n_iter_ + 3
    before = -np.inf
    for max_iter in range(1, n_iter + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = _fit(X, n_components=4, max_iter=max_iter)
        _check(model, X)
        assert model.elbo_ >= before - 1e-9 * abs(before)
        before = model.elbo_


@pytest.mark.parametrize("ending", ["error", "non-finite", "summit"])
def test_what_an_ascent_between_moves_ends_with_harms_nothing(ending, monkeypatch):
    X, _ = _planted()
    plain = _fit(X, moves=["reorder"], tol=1e-5)
    climb, asked = gmm.climb, []

    def ends(step, state, *, max_iter, monitor):
        asked.append(monitor.tol)
        solution = climb(step, state, max_iter=max_iter, monitor=monitor)
        if ending == "error":
            raise torch.linalg.LinAlgError("not positive definite")
        return solution._replace(status=Status.NON_FINITE) if ending == "non-finite" else solution

    def search(solution, propose, step, ascend, *, max_iter, monitor):
        assert monitor.tol == 1e-5
        n_kept = len(monitor.history)
        with monkeypatch.context() as patch:
            patch.setattr(gmm, "climb", ends)
            found = ascend(solution.state)
        assert asked == [1e-3]  # rough
        assert monitor.tol == 1e-5
        assert found.status is Status.CONVERGED
        assert (len(monitor.history) == n_kept) is (ending == "error")
        return found

    monkeypatch.setattr(gmm, "search", search)
    model = _fit(X, tol=1e-5)
    assert model.converged_
    assert model.elbo_ >= plain.elbo_
    _check(model, X)


@pytest.mark.parametrize("ending", ["error", "non-finite"])
def test_a_last_ascent_that_fails_leaves_the_state_before_it_unconverged(ending, monkeypatch):
    X, truth = _planted()
    _start_from(monkeypatch, _exchanged(truth, X))
    whole = _fit(X, n_components=4)
    climb, asked = gmm.climb, []

    def ends(step, state, *, max_iter, monitor):
        asked.append(monitor.tol)
        solution = climb(step, state, max_iter=max_iter, monitor=monitor)
        if asked[-1] == whole.tol and 1e-3 in asked:
            if ending == "error":
                raise torch.linalg.LinAlgError("not positive definite")
            return solution._replace(status=Status.NON_FINITE)
        return solution

    monkeypatch.setattr(gmm, "climb", ends)
    with pytest.warns(ConvergenceWarning, match="had not converged"):
        cut = _fit(X, n_components=4)
    assert not cut.converged_
    assert cut.elbo_ == pytest.approx(whole.elbo_, abs=1.0)
    _check(cut, X)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("tol", [1e-7, 1e-2])
def test_a_fit_that_ends_between_moves_has_converged_if_it_reached_tol(tol):
    """The ascents between moves are rough, but `converged_` speaks of `tol`."""
    rng = np.random.default_rng(1)
    X = 2.0 * rng.normal(size=(4, 2))[rng.integers(4, size=100)] + rng.normal(size=(100, 2))
    params = {"tol": tol, "random_state": 1}
    last = _fit(X, **params).n_iter_
    said = []
    for max_iter in range(max(1, last - 8), last + 1):
        model = _fit(X, **params, max_iter=max_iter)
        said.append(model.converged_)
        before = model.elbo_
        model.set_params(moves=["reorder"], warm_start=True, max_iter=1).fit(X)
        if said[-1]:
            assert model.elbo_ - before <= tol * len(X)
    assert said[-1]
    if tol < 1e-3:  # on the summit of the start, and on that of the moves
        assert said[:-1].count(True) > 0
        assert said[said.index(True) :].count(False) > 0


def test_every_pass_is_announced(capsys, monkeypatch):
    X, truth = _planted()
    _start_from(monkeypatch, _joined(truth, X))
    model = _fit(X, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == model.n_iter_
    assert f"{model.elbo_ / len(X):.6f}" in lines[-1]


def test_large_data_are_searched_on_a_sample(monkeypatch):
    X, truth = _planted((300, 300, 300, 300))
    monkeypatch.setattr("skvi.models.mixture.moves._SAMPLE_BYTES", 0)
    monkeypatch.setattr("skvi.models.mixture.moves._ROWS_PER_COMPONENT", 50)
    for shape in SHAPES:
        _start_from(monkeypatch, _exchanged(truth, X))
        moved = _fit(X, n_components=4, covariance_type=shape)
        assert adjusted_rand_score(truth, moved.predict(X)) == 1.0
        _check(moved, X)
        moved = _fit(_holed(X), n_components=4, covariance_type=shape)
        assert adjusted_rand_score(truth, moved.predict(X)) == 1.0


def test_active_components_hold_more_than_half_a_row():
    X, _ = _planted()
    model = _fit(X, n_components=20)
    counts = model.transform(X).sum(0)
    assert model.n_active_components_ == (counts > 0.5).sum() == 4
    assert model.weights_.shape == (20,)


def test_iris_has_a_higher_bound():
    X = load_iris().data
    for seed in range(3):
        params = {"n_components": 8, "random_state": seed, "init_params": "random_from_data"}
        assert _fit(X, **params).elbo_ >= _fit(X, moves=None, **params).elbo_


@pytest.mark.parametrize("value", ["merge", ["merge", "grow"], [1], 3, {"merge": True}])
def test_unknown_moves_are_an_error(value):
    with pytest.raises(ValueError, match="moves"):
        _fit(_planted()[0], moves=value)


@pytest.mark.parametrize("value", [None, [], ()])
def test_no_moves(value):
    X, _ = _planted()
    assert_array_equal(_fit(X, moves=value).elbo_history_, _fit(X, moves=None).elbo_history_)


@pytest.mark.parametrize("kinds", [["merge"], ["birth", "reorder"]])
def test_moves_that_cannot_be_made_are_refused(kinds):
    """After "svi" there is no summit: "auto" reorders alone, and what was asked for is an error."""
    X, _ = _planted()
    params = {"algorithm": "svi", "max_iter": 5}
    for data in (X, _holed(X)):
        with pytest.raises(ValueError, match="svi"):
            _fit(data, moves=kinds, **params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            auto = _fit(data, **params)
            assert auto.elbo_history_ == _fit(data, moves=["reorder"], **params).elbo_history_


@every_shape
@pytest.mark.parametrize(
    ("algorithm", "share"), [("cavi", 0.0), ("memoized", 0.0), ("memoized", 0.15)]
)
def test_every_algorithm_moves_and_ends_with_its_exact_bound(algorithm, covariance_type, share):
    X = _holed(_planted((40, 30, 20, 10))[0], share)
    params = {"covariance_type": covariance_type, "init_params": "random", "algorithm": algorithm}
    params |= {"batch_size": 30} if algorithm == "memoized" else {}
    plain, moved = _fit(X, moves=["reorder"], **params), _fit(X, **params)
    assert moved.elbo_ >= plain.elbo_
    assert_allclose(moved.elbo_, moved.score_samples(X).sum() - moved.kl_, rtol=1e-10)
    assert np.diff(moved.elbo_history_).min() > -1e-9 * abs(moved.elbo_)
