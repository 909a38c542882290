"""What moves predict, against the term-by-term bound, and what they then find."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln

from skvi.inference import search
from skvi.models.mixture import bound, missing, moves, start
from skvi.models.mixture.bound import Posterior, State
from skvi.models.mixture.components import Moments
from skvi.models.mixture.missing import IncompleteRows
from skvi.models.mixture.moves import Move, Proposals, centred, combine
from skvi.models.mixture.weights import WEIGHTS

from . import by_row
from .test_mixture import (
    _problem,
    _reference_bound,
    _reference_weights,
    _t,
    _update,
    every_law,
    every_shape,
)

holes = pytest.mark.parametrize("share", [0.0, 0.15])

_NONE = 1e-290  # a responsibility of nothing whose logarithm is finite


def _statistics(p):
    """Statistics of the problem's responsibilities."""
    x, resp = _t(p.X), _t((p.weight[:, None] * p.resp).T)
    reference = torch.zeros(p.K, p.D, dtype=torch.float64)
    return p.cls.unpack(reference, p.cls.sums(x, p.cls.monomials(x), resp))


def _largest_first(p):
    p.resp = p.resp[:, np.argsort(-(p.weight @ p.resp), kind="stable")]
    return p


def _own_responsibilities(p):
    """Give the problem responsibilities that belong to a posterior; return that state."""
    posterior = _update(_largest_first(p))
    p.resp = by_row.responsibilities(posterior, _t(p.X)).T.numpy()
    _largest_first(p)
    return State(posterior, _statistics(p))


@every_shape
@every_law
def test_evidences_and_the_entropy_of_labels_are_the_bound(shape, law):
    p = _problem(shape, law, D=3, weighted=True)
    statistics = _statistics(p)
    posterior = _update(p)
    entropy = -(p.weight @ (p.resp * np.log(p.resp)).sum(1))
    total = (
        float(p.prior.components.log_evidence(posterior.components).sum())
        + float(p.prior.weights.log_evidence(statistics.counts))
        + entropy
    )
    np.testing.assert_allclose(total, _reference_bound(p), rtol=1e-11)


@every_law
def test_evidence_of_counts_takes_batches(law):
    prior = _problem("diag", law).prior.weights
    counts = _t([[3.0, 2.0, 0.0], [1.0, 5.0, 0.5]])
    each = [float(prior.log_evidence(row)) for row in counts]
    np.testing.assert_allclose(prior.log_evidence(counts), each, rtol=1e-13)
    np.testing.assert_allclose(prior.update(counts[1]).counts(prior), counts[1], rtol=1e-13)


@every_shape
def test_centring_changes_no_update(shape):
    p = _problem(shape, "dirichlet_process", D=3, weighted=True)
    statistics = _statistics(p)
    before = p.prior.components.update(statistics)
    after = p.prior.components.update(centred(statistics, p.cls))
    np.testing.assert_allclose(after.mean, before.mean, rtol=1e-11)
    np.testing.assert_allclose(after.root, before.root, rtol=1e-11, atol=1e-13)


@every_shape
@every_law
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gain_of_a_merge_is_the_difference_of_two_bounds(shape, law, seed):
    p = _problem(shape, law, D=3, N=20, K=4, seed=seed, weighted=True)
    state = _own_responsibilities(p)
    before = _reference_bound(p)
    statistics = centred(state.moments, p.cls)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    # The survey sees the posterior's own order of components, the statistics the sorted one.
    pairs = torch.tensor(list(itertools.combinations(range(p.K), 2)))
    resp = p.resp.copy()
    for (i, j), k in zip(pairs.tolist(), range(len(pairs)), strict=True):
        gain, merged = moves.merge_gains(
            p.prior.components, statistics, pairs[k : k + 1, 0], pairs[k : k + 1, 1]
        )
        both = resp[:, i] + resp[:, j]
        mixing = p.weight @ (
            both * np.log(both) - resp[:, i] * np.log(resp[:, i]) - resp[:, j] * np.log(resp[:, j])
        )
        move = Move(float(gain[0]) - mixing, (i, j), merged)
        p.resp = np.column_stack(
            [both, np.full(p.N, _NONE), *(resp[:, m] for m in range(p.K) if m not in {i, j})]
        )
        after = _reference_bound(_largest_first(p))
        np.testing.assert_allclose(
            propose.gain(statistics, [move]), after - before, rtol=1e-8, atol=1e-9
        )
        # The statistics of the proposal are those of the added responsibilities.
        proposal = combine(statistics, [move], p.cls)
        proposal = proposal.reordered(proposal.counts.argsort(descending=True))
        expected, found = _update(p), p.prior.components.update(proposal)
        np.testing.assert_allclose(found.mean[:3], expected.components.mean[:3], rtol=1e-9)
        np.testing.assert_allclose(
            found.inverse_scale()[:3], expected.components.inverse_scale()[:3], rtol=1e-8, atol=1e-9
        )
        p.resp = resp


def _cell_counts(p):
    """Weights of the observed cells (N, K, D), their counts (K, D) and means (K, D)."""
    r = (p.weight[:, None] * p.resp)[:, :, None] * ~np.isnan(p.X)[:, None, :]
    n = r.sum(0)
    return r, n, (r * np.nan_to_num(p.X)[:, None, :]).sum(0) / n


def _statistics_of_cells(p):
    """Statistics of the problem's responsibilities over the observed cells, about their means."""
    r, n, mean = _cell_counts(p)
    square = (r * np.square(np.nan_to_num(p.X)[:, None, :] - mean)).sum(0)  # (K, D)
    second = square if p.shape == "diag" else square.sum(1)
    counts = p.weight @ p.resp
    return Moments(_t(mean), _t(counts), torch.zeros(p.K, p.D).double(), _t(second), _t(n))


def _reference_bound_of_cells(p):
    """The bound of Diag or Spherical over the observed cells, term by term."""
    h, D = p.hyper, p.D
    E_log_pi, kl = _reference_weights(p, p.weight @ p.resp)
    r, n, mean = _cell_counts(p)
    total = -kl
    for k in range(p.K):
        square = (r[:, k] * np.square(np.nan_to_num(p.X) - mean[k])).sum(0)
        square += h.kappa0 * n[k] / (h.kappa0 + n[k]) * np.square(mean[k] - h.m0)  # (D,)
        if p.shape == "diag":
            shape0, rate0 = np.full(D, h.nu0 / 2), h.covariance / 2
            shape, rate = shape0 + n[k] / 2, rate0 + square / 2
        else:
            shape0, rate0 = np.full(1, D * h.nu0 / 2), np.full(1, D * h.covariance / 2)
            shape, rate = shape0 + n[k].sum() / 2, rate0 + square.sum() / 2
        total -= (
            shape * np.log(rate) - gammaln(shape) - shape0 * np.log(rate0) + gammaln(shape0)
            + (shape - shape0) * (digamma(shape) - np.log(rate)) - shape + shape * rate0 / rate
        ).sum()  # fmt: skip
        E = np.broadcast_to(shape / rate, D)
        E_log = np.broadcast_to(digamma(shape) - np.log(rate), D)
        kappa = h.kappa0 + n[k]
        m = (h.kappa0 * h.m0 + n[k] * mean[k]) / kappa
        ratio = h.kappa0 / kappa
        total -= 0.5 * (ratio - 1 - np.log(ratio) + h.kappa0 * E * np.square(m - h.m0)).sum()
        for row in range(p.N):
            seen = ~np.isnan(p.X[row])
            d = (p.X[row] - m)[seen]
            E_log_lik = (
                0.5 * (E_log[seen] - np.log(2 * np.pi) - 1 / kappa[seen] - E[seen] * d * d).sum()
            )
            q = p.resp[row, k]
            total += p.weight[row] * q * (E_log_lik + E_log_pi[k] - np.log(q))
    return total


def _with_holes(X, share):
    rng = np.random.default_rng(11)
    holed = rng.uniform(size=X.shape) < share
    holed[np.arange(len(X)), rng.integers(X.shape[1], size=len(X))] = False
    return np.where(holed, np.nan, X)


@pytest.mark.parametrize("shape", ["diag", "spherical"])
@every_law
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gain_of_a_merge_over_observed_cells_is_the_difference_of_two_bounds(shape, law, seed):
    p = _problem(shape, law, D=3, N=20, K=4, seed=seed, weighted=True)
    p.X = _with_holes(p.X, 0.3)
    p.rows = IncompleteRows(p.X, p.rows._affine, torch.device("cpu"), p.weight)
    _largest_first(p)
    statistics, before, resp = _statistics_of_cells(p), _reference_bound_of_cells(p), p.resp
    # The reference is the bound of the code under test.
    posterior = p.prior.update(statistics)
    log_rho = bound.log_rho(posterior, p.rows[slice(None)][0]).numpy()
    ours = p.weight @ (p.resp * (log_rho.T - np.log(p.resp))).sum(1)
    np.testing.assert_allclose(ours - float(posterior.kl(p.prior)), before, rtol=1e-11)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    for i, j in itertools.combinations(range(p.K), 2):
        gain, merged = moves.merge_gains(
            p.prior.components, statistics, torch.tensor([i]), torch.tensor([j])
        )
        both = resp[:, i] + resp[:, j]
        mixing = p.weight @ sum(np.log(both / r) * r for r in (resp[:, i], resp[:, j]))
        move = Move(float(gain[0] - mixing), (i, j), merged)
        rest = [resp[:, m] for m in range(p.K) if m not in {i, j}]
        p.resp = np.column_stack([both, np.full(p.N, _NONE), *rest])
        after = _reference_bound_of_cells(_largest_first(p))
        np.testing.assert_allclose(
            propose.gain(statistics, [move]), after - before, rtol=1e-8, atol=1e-9
        )
        # The statistics of the proposal are those of the added responsibilities.
        proposal = combine(statistics, [move], p.cls)
        proposal = proposal.reordered(proposal.counts.argsort(descending=True))
        expected = _statistics_of_cells(p)
        for name in ("reference", "counts", "second", "cells"):
            np.testing.assert_allclose(
                getattr(proposal, name)[:3], getattr(expected, name)[:3], rtol=1e-8, atol=1e-9
            )
        assert (proposal.cells[3] == 0.0).all()


@pytest.mark.parametrize("shape", ["diag", "spherical"])
def test_centring_statistics_of_cells_changes_no_update(shape):
    p = _problem(shape, "dirichlet_process", D=3, N=20, weighted=True)
    p.X = _with_holes(p.X, 0.3)
    about_means = _statistics_of_cells(p)
    rows = IncompleteRows(p.X, p.rows._affine, torch.device("cpu"), p.weight)
    around = missing.around(p.cls, torch.ones(p.K, p.D).double())
    elsewhere = start.statistics(rows, around, lambda where, _: _t(p.resp.T)[:, where])
    found = centred(elsewhere, p.cls)
    order = about_means.counts.argsort(descending=True)
    for ours, expected in zip(found, about_means.reordered(order), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["diag", "spherical"])
def test_statistics_of_cells_may_be_about_any_point(shape):
    """Energy and sums of two sets of rows, against the rows themselves."""
    p = _problem(shape, "dirichlet_process", D=3, N=20, weighted=True)
    rows = IncompleteRows(_with_holes(p.X, 0.3), p.rows._affine, torch.device("cpu"), p.weight)
    resp = _t(p.resp.T) * _t(p.weight)

    def statistics(some, point):
        around = missing.around(p.cls, _t(np.full((p.K, p.D), point)))
        (batch,) = missing.batches(around, rows[some][0])
        return batch.moments(resp[:, some])

    whole = statistics(slice(None), 0.0)
    posterior = p.prior.components.update(whole)
    expected = (resp * missing.E_log_prob(posterior, rows[slice(None)][0])).sum()
    for point in (0.0, -1.5):
        energy = posterior.energy(statistics(slice(None), point))
        np.testing.assert_allclose(float(energy), float(expected), rtol=1e-10)
    both = p.cls.merge(statistics(slice(7), 2.0), statistics(slice(7, None), -1.5))
    found = p.prior.components.update(both)
    for name in ("mean", "kappa", "dof", "root"):
        ours, theirs = getattr(found, name), getattr(posterior, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@every_shape
def test_survey_sums_over_rows(shape):
    """Lost entropy and loss of removal, by loops over rows."""
    p = _problem(shape, "dirichlet_process", D=2, N=15, K=3, weighted=True)
    posterior = _update(p)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    survey = propose._look(posterior, torch.tensor([[0, 2], [1, 2]]))
    rho = bound.log_rho(posterior, _t(p.X)).T.numpy()
    resp = np.exp(rho - np.logaddexp.reduce(rho, axis=1)[:, None])
    for pair, mixing in zip([(0, 2), (1, 2)], survey.mixing, strict=True):
        r = resp[:, pair]
        both = r.sum(1)
        share = r / both[:, None]
        expected = p.weight @ (both * -(share * np.log(share)).sum(1))
        np.testing.assert_allclose(float(mixing), expected, rtol=1e-10)
    for k in range(3):
        rest = np.logaddexp.reduce(np.delete(rho, k, axis=1), axis=1)
        expected = p.weight @ (rest - np.logaddexp.reduce(rho, axis=1))
        np.testing.assert_allclose(float(survey.removal[k]), expected, rtol=1e-9)
    total = sum(float((survey.weight[n] * r).sum()) for n, r in survey.members)
    np.testing.assert_allclose(total, p.weight.sum(), rtol=1e-2)


@every_shape
def test_survey_counts_completed_cells_and_no_empty_rows(shape):
    """Rows with nothing observed say nothing, whatever their weight."""
    p = _problem(shape, "dirichlet_process", D=3, N=15, K=3, weighted=True)
    p.X = _with_holes(p.X, 0.3)
    posterior, pairs = _update(_problem(shape, "dirichlet_process", D=3)), torch.tensor([[0, 2]])

    def rows_of(X, weight):
        return IncompleteRows(X, p.rows._affine, torch.device("cpu"), weight)

    def survey(X, weight):
        propose = Proposals(p.prior, rows_of(X, weight), moves.MOVES, np.random.default_rng(0))
        return propose._look(posterior, pairs)

    found = survey(p.X, p.weight)
    resp = by_row.responsibilities(posterior, rows_of(p.X, p.weight)[slice(None)][0])
    cells = resp.numpy() @ (p.weight * np.isnan(p.X).sum(1))
    expected = cells if shape in {"full", "tied"} else np.zeros(3)
    np.testing.assert_allclose(found.completed, expected, rtol=1e-10)
    more = survey(np.r_[p.X, np.full((2, 3), np.nan)], np.r_[p.weight, 50.0, 7.0])
    for name in ("mixing", "removal", "completed"):
        np.testing.assert_allclose(getattr(more, name), getattr(found, name), rtol=1e-10)


def _clusters(shape, law, labels, *, K, share=0.0):
    """Four clusters in the plane under given first labels, after two passes."""
    rng = np.random.default_rng(3)
    truth = np.repeat(np.arange(4), 60)
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    X = centres[truth] + rng.normal(size=(240, 2))
    p = _problem(shape, law, K=K, N=240)
    p.X, p.N, p.weight = X, 240, np.ones(240)
    # The estimator's default prior.
    covariance = {"diag": X.var(0), "spherical": X.var(0).mean()}.get(shape, np.cov(X.T))
    factor = p.cls.factor(p.cls.prior_inverse_scale(_t(covariance), 2))
    p.prior = Posterior(
        WEIGHTS[law].prior(K, 1.0 / K, torch.device("cpu")),
        p.cls(_t(X.mean(0))[None], _t([1.0]), _t([2.0]), factor),
    )
    p.rows = moves.Rows(X, p.rows._affine, torch.device("cpu"))
    p.resp = np.eye(K)[labels(truth, X)]
    state = State(p.prior, _statistics(p))
    if share:  # statistics of the whole rows are where the ascent starts
        p.X = _with_holes(X, share)
        p.rows = IncompleteRows(p.X, p.rows._affine, torch.device("cpu"))
    step = bound.coordinate_ascent(p.prior, p.rows)
    for _ in range(2):
        state, value = step(state)
    return p, state, value, step


def _halved(truth, X):
    """The first cluster in two halves."""
    return np.where((truth == 0) & (X[:, 1] > 0.0), 4, truth)


def _joined(truth, X):
    """The first two clusters in one component."""
    return np.where(truth == 1, 0, truth)


def _joined_and_halved(truth, X):
    return np.where((truth == 3) & (X[:, 1] > 9.0), 1, _joined(truth, X))


@every_shape
@every_law
@pytest.mark.parametrize(
    ("labels", "K", "kinds"),
    [
        (_halved, 6, ("merge",)),
        (_joined, 6, ("birth",)),
        (_joined_and_halved, 4, ("merge", "birth")),
    ],
)
@holes
def test_the_next_pass_finds_what_was_predicted_or_more(
    shape, law, labels, K, kinds, share, monkeypatch
):
    p, state, before, step = _clusters(shape, law, labels, K=K, share=share)
    propose = Proposals(p.prior, p.rows, (*kinds, "reorder"), np.random.default_rng(0))
    carried_out = []

    def noted(statistics, chosen, *args, **kwargs):
        carried_out.append(propose.gain(statistics, chosen))
        return combine(statistics, chosen, *args, **kwargs)

    monkeypatch.setattr(moves, "combine", noted)
    _, after = step(next(propose(state)))
    (predicted,) = carried_out
    assert predicted > 10.0
    # Responsibilities below a thousandth take no part in a split.
    assert after - before >= predicted - 0.1


@every_shape
@holes
def test_a_deletion_finds_what_was_predicted_or_more(shape, share):
    def crumbs(truth, X):
        labels = truth.copy()
        labels[:3] = 4
        return labels

    p, state, before, step = _clusters(shape, "dirichlet_process", crumbs, K=6, share=share)
    propose = Proposals(p.prior, p.rows, ("delete",), np.random.default_rng(0))
    statistics = centred(state.moments, p.cls)
    full = (statistics.counts >= moves.EMPTY).nonzero()[:, 0]
    pairs = torch.empty(0, 2, dtype=torch.long)
    survey = propose._look(state.posterior, pairs)
    move = propose._deletions(state.posterior, statistics, full, survey)[0]
    found = State(state.posterior, combine(statistics, [move], p.cls))
    for _ in range(3):  # the first update of the weights lacks the rows that went
        found, after = step(found)
    assert after - before >= move.gain - 0.1


@every_shape
@every_law
def test_gain_of_many_merges_of_whole_rows_is_the_difference_of_two_bounds(shape, law, monkeypatch):
    monkeypatch.setattr(moves, "_BARRIER", np.inf)
    p = _problem(shape, law, D=3, N=31, K=5)
    labels = np.repeat(np.arange(5), [16, 8, 4, 2, 1])  # counts tell who is in a group
    p.resp = np.maximum(np.eye(5)[labels], _NONE)
    statistics, before = centred(_statistics(p), p.cls), _reference_bound(p)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    pairs = torch.tensor(list(itertools.combinations(range(5), 2)))
    nothing = torch.zeros(10).double()
    survey = moves.Survey(_t(p.X), _t(p.weight), [], nothing, nothing[:5], nothing[:5])
    gain, merged = propose._agglomerate(statistics, pairs, survey)
    groups = merged.counts.round().int().tolist()
    assert sum(groups) == 31
    assert 1 <= np.count_nonzero(groups) <= 3
    members = np.array([[count & size > 0 for size in (16, 8, 4, 2, 1)] for count in groups])
    p.resp = np.maximum(np.eye(5)[labels] @ members.T, _NONE)
    np.testing.assert_allclose(gain, _reference_bound(_largest_first(p)) - before, rtol=1e-8)
    found = p.prior.components.update(merged.reordered(merged.counts.argsort(descending=True)))
    expected = _update(p).components
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
    np.testing.assert_allclose(
        found.inverse_scale(), expected.inverse_scale(), rtol=1e-8, atol=1e-9
    )


@every_shape
@every_law
def test_many_merges_find_what_was_predicted_or_more(shape, law, monkeypatch):
    monkeypatch.setattr(moves, "_BARRIER", np.inf)
    p = _problem(shape, law, D=3, N=40, K=5, weighted=True)
    step = bound.coordinate_ascent(p.prior, p.rows)
    state, before = step(State(p.prior, _statistics(p)))
    statistics = centred(state.moments, p.cls)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    pairs = torch.tensor(list(itertools.combinations(range(5), 2)))
    survey = propose._look(state.posterior, pairs)
    gain, merged = propose._agglomerate(statistics, pairs, survey)
    _, after = step(State(state.posterior, merged))
    assert after - before >= gain - 1e-9
    # Without the entropy of shared rows it would promise too much.
    careless = survey._replace(mixing=torch.zeros(10).double())
    gain, merged = propose._agglomerate(statistics, pairs, careless)
    _, after = step(State(state.posterior, merged))
    assert after - before < gain - 1.0


def _far_twins(shape, n_twins=3):
    """Statistics of pairs of equal components, the twins k and k + n_twins, far from the others."""
    p = _problem(shape, "dirichlet_process", D=3, N=200 * n_twins, K=2 * n_twins)
    pair = np.arange(p.N) % n_twins
    p.X = np.random.default_rng(0).normal(size=p.X.shape) + 300.0 * np.eye(3)[pair]
    p.resp = np.maximum(np.eye(p.K)[pair + n_twins * (np.arange(p.N) // n_twins % 2)], _NONE)
    pairs = torch.tensor(list(itertools.combinations(range(p.K), 2)))
    nothing = torch.zeros(len(pairs)).double()
    survey = moves.Survey(
        _t(p.X), _t(p.weight), [], nothing, nothing[: p.K], torch.zeros(p.K).double()
    )
    return p, centred(_statistics(p), p.cls), pairs, survey


@every_shape
def test_many_merges_take_the_best_pair_first_and_end_at_the_barrier(shape, monkeypatch):
    monkeypatch.setattr(moves, "_BARRIER", 10.0)
    p, statistics, pairs, survey = _far_twins(shape)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    n_calls = 0

    def counted(*args):
        nonlocal n_calls
        n_calls += 1
        return moves_of_two(*args)

    moves_of_two = moves.merge_gains
    monkeypatch.setattr(moves, "merge_gains", counted)
    gain, merged = propose._agglomerate(statistics, pairs, survey)
    assert gain > 0.0
    assert sorted(merged.counts.round().tolist()) == [0.0, 0.0, 0.0, 200.0, 200.0, 200.0]
    assert n_calls == 4  # the fourth merge, of two clusters, is the last one looked at


def test_one_merge_alone_is_not_many():
    p, statistics, pairs, survey = _far_twins("full", n_twins=1)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    assert propose._agglomerate(statistics, pairs, survey)[0] == -np.inf


def test_many_merges_count_the_cells_that_are_completed_anew(monkeypatch):
    """Of the smaller component in each merge, with those that it took over."""
    monkeypatch.setattr(moves, "_BARRIER", np.inf)
    p, statistics, pairs, survey = _far_twins("full", n_twins=2)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    gain, _ = propose._agglomerate(statistics, pairs, survey)
    found, merged = propose._agglomerate(
        statistics, pairs, survey._replace(completed=_t([100.0, 7.0, 300.0, 20.0]))
    )
    assert sorted(merged.counts.round().tolist()) == [0.0, 0.0, 200.0, 200.0]
    np.testing.assert_allclose(found - gain, 100.0 + 7.0)
    # With enough cells even the clusters are tried as one.
    cells = _t([1e5, 7e4, 3e5, 2e4])
    found, merged = propose._agglomerate(statistics, pairs, survey._replace(completed=cells))
    one, _ = propose._agglomerate(statistics, pairs, survey._replace(completed=2.0 * cells))
    assert sorted(merged.counts.round().tolist()) == [0.0, 0.0, 0.0, 400.0]
    np.testing.assert_allclose(one - found, 1e5 + 2e4 + (7e4 + 2e4))


@pytest.mark.parametrize(("gain", "is_tried"), [(-19.9, True), (-20.1, False)])
def test_many_merges_are_tried_though_they_look_a_little_worse(gain, is_tried, monkeypatch):
    p = _problem("full", "dirichlet_process", K=4, N=40)
    step = bound.coordinate_ascent(p.prior, p.rows)
    state, _ = step(State(p.prior, _statistics(p)))
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    monkeypatch.setattr(Proposals, "_choose", lambda *_: iter(()))
    monkeypatch.setattr(Proposals, "_agglomerate", lambda self, moments, *_: (gain, moments))
    assert len(list(propose(state))) == is_tried


def test_gains_of_many_sets_are_those_of_each(monkeypatch):
    p = _problem("diag", "dirichlet_process", K=5, N=40)
    statistics = centred(_statistics(p), p.cls)
    pairs = torch.tensor(list(itertools.combinations(range(5), 2)))
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    nothing = torch.zeros(10).double()
    survey = moves.Survey(_t(p.X), _t(p.weight), [], nothing, nothing[:5], nothing[:5])
    sets = [[move] for move in propose._merges(statistics, pairs, survey)]
    assert len(sets) == 5
    together = propose.gains(statistics, sets)
    monkeypatch.setattr(moves, "_COUNTS_AT_ONCE", 2 * 5)
    np.testing.assert_allclose(propose.gains(statistics, sets), together, rtol=1e-14)
    assert len(set(together)) == 5


def test_a_split_that_fails_hides_no_other_and_is_not_tried_again(monkeypatch):
    p = _problem("diag", "dirichlet_process", K=4, N=60)
    step = bound.coordinate_ascent(p.prior, p.rows)
    state, _ = step(State(p.prior, _statistics(p)))
    statistics = centred(state.moments, p.cls)
    full = torch.arange(4)
    tried = []

    def split(self, moments, survey, k, part, n_parts):
        tried.append(k)
        if k == 1:
            raise torch.linalg.LinAlgError("not positive definite")
        return Move(1.0, (k,), moments.map(lambda array: array[:2]))

    monkeypatch.setattr(Proposals, "_split", split)
    propose = Proposals(p.prior, p.rows, ("birth",), np.random.default_rng(0))
    survey = propose._look(state.posterior, torch.empty(0, 2, dtype=torch.long))
    for expected in ([0, 1, 2, 3], [0, 2, 3]):
        tried.clear()
        found = propose._splits(state.posterior, statistics, full, survey, 1)
        assert [move.old for move in found] == [(0,), (2,), (3,)]
        assert tried == expected


def test_the_check_of_predictions_can_fail():
    """Leaving out the entropy of the labels is seen."""
    p = _problem("full", "dirichlet_process", D=3, N=20, K=4, weighted=True)
    state = _own_responsibilities(p)
    statistics = centred(state.moments, p.cls)
    i, j = torch.tensor([0]), torch.tensor([1])
    gain, merged = moves.merge_gains(p.prior.components, statistics, i, j)
    propose = Proposals(p.prior, p.rows, ("merge",), np.random.default_rng(0))
    before = _reference_bound(p)
    careless = propose.gain(statistics, [Move(float(gain[0]), (0, 1), merged)])
    both = p.resp[:, 0] + p.resp[:, 1]
    p.resp = np.column_stack([both, p.resp[:, 2:], np.full(p.N, _NONE)])
    assert careless > _reference_bound(_largest_first(p)) - before + 0.5


@every_law
def test_gain_of_several_moves_counts_the_parts_of_each(law):
    p = _problem("diag", law, K=6, N=40)
    statistics = centred(_statistics(p), p.cls)
    counts = _t([4.0, 9.0, 7.0, 12.0, 2.0, 6.0])  # not in order
    statistics = statistics._replace(counts=counts)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))

    def parts(*of_each):
        n = len(of_each)
        return statistics.map(lambda array: array[:n])._replace(counts=_t(of_each))

    merge, another = Move(3.0, (0, 1), parts(13.0)), Move(-1.0, (4, 5), parts(8.0))
    split, deletion = Move(8.0, (3,), parts(5.0, 7.0)), Move(2.0, (2,), parts())
    evidence = p.prior.weights.log_evidence
    before = float(evidence(_t([12.0, 9.0, 7.0, 6.0, 4.0, 2.0])))
    for chosen, gain, after in (
        ([], 0.0, [12.0, 9.0, 7.0, 6.0, 4.0, 2.0]),
        ([merge], 3.0, [13.0, 12.0, 7.0, 6.0, 2.0, 0.0]),
        ([merge, another], 2.0, [13.0, 12.0, 8.0, 7.0, 0.0, 0.0]),
        ([merge, split], 11.0, [13.0, 7.0, 7.0, 6.0, 5.0, 2.0]),
        # The rows of a deletion are still to be counted, though it is not known where.
        ([deletion, another], 1.0, [12.0, 9.0, 8.0, 7.0, 4.0, 0.0]),
        ([split, deletion, merge, another], 12.0, [13.0, 8.0, 7.0, 7.0, 5.0, 0.0]),
    ):
        expected = gain + float(evidence(_t(after))) - before
        np.testing.assert_allclose(propose.gain(statistics, chosen), expected, rtol=1e-12)
    assert statistics.counts is counts
    assert counts.tolist() == [4.0, 9.0, 7.0, 12.0, 2.0, 6.0]


@every_shape
@every_law
def test_gain_of_a_deletion_is_that_of_all_other_factors_as_they_are(shape, law):
    """The bound without a component, whose rows get new labels, before anything adapts."""
    p = _problem(shape, law, D=2, N=20, K=4, weighted=True)
    state = _own_responsibilities(p)
    statistics, components = centred(state.moments, p.cls), state.posterior.components
    propose = Proposals(p.prior, p.rows, ("delete",), np.random.default_rng(0))
    survey = propose._look(state.posterior, torch.empty(0, 2, dtype=torch.long))
    found = propose._deletions(state.posterior, statistics, torch.arange(4), survey)
    assert sorted(move.old for move in found) == [(0,), (1,), (2,), (3,)]
    log_rho = bound.log_rho(state.posterior, _t(p.X))  # (K, N)
    for move in found:
        (k,) = move.old
        rest = torch.tensor([j for j in range(4) if j != k])
        local = log_rho[rest].logsumexp(0) - log_rho.logsumexp(0)
        kl = components.take(rest).kl(p.prior.components) - components.kl(p.prior.components)
        np.testing.assert_allclose(move.gain, float(_t(p.weight) @ local - kl), rtol=1e-9)
        after = combine(statistics, [move], p.cls)
        assert after.counts.tolist() == [*statistics.counts[rest], 0.0]
        if shape == "tied":  # the rows that are left keep the covariance of all
            np.testing.assert_allclose(
                after.second / after.counts.sum(),
                statistics.second / statistics.counts.sum(),
                rtol=1e-12,
            )


def test_merges_are_doubted_by_the_cells_of_the_smaller_component():
    p = _problem("full", "dirichlet_process", K=4, N=20)
    statistics = centred(_statistics(p), p.cls)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    completed = _t([5.0, 2.0, 9.0, 3.0])
    survey = moves.Survey(
        _t(p.X), _t(p.weight), [], torch.zeros(6).double(), torch.zeros(4).double(), completed
    )
    merges = propose._merges(statistics, pairs, survey)
    assert len(merges) == 4
    for move in merges:
        assert move.doubt == float(completed[list(move.old)].min())

    # Those that would pay if what is in doubt were gained, the most promising ones first.
    def merge(gain, doubt):
        move = merges[0]._replace(gain=0.0)
        return move._replace(gain=gain - propose.gain(statistics, [move]), doubt=doubt)

    first, second, third, fourth = (
        merge(-5.0, 20.0),
        merge(-3.0, 10.0),
        merge(-1.0, 2.0),
        merge(-2.0, 2.5),
    )
    hopeless = merge(-9.0, 8.0)
    tried = list(propose._choose(statistics, [hopeless, third, fourth, second, first], [], []))
    assert [move.gain for (move,) in tried] == [first.gain, second.gain, third.gain]


def test_tied_cavity_and_the_rows_of_a_component_make_the_posterior():
    p = _problem("tied", "dirichlet_process", D=3, N=20, K=4, weighted=True)
    statistics = centred(_statistics(p), p.cls)
    everything = p.prior.components.update(statistics)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    for k in range(4):
        point, r = torch.ones(1, 3).double(), _t(p.weight * p.resp[:, k])[None]
        diff = _t(p.X) - point
        one = p.cls.unpack(point, p.cls.sums(diff, p.cls.monomials(diff), r))
        found = propose._cavity(statistics, one).update(one)
        np.testing.assert_allclose(found.mean[0], everything.mean[k], rtol=1e-10)
        np.testing.assert_allclose(found.kappa[0], everything.kappa[k], rtol=1e-12)
        np.testing.assert_allclose(found.dof, everything.dof, rtol=1e-12)
        np.testing.assert_allclose(found.root, everything.root, rtol=1e-10, atol=1e-12)


def test_a_tied_split_takes_what_lies_between_its_parts_from_the_scatter():
    p, state, _, _ = _clusters("tied", "dirichlet_process", _joined, K=6)
    statistics = centred(state.moments, p.cls)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    survey = propose._look(state.posterior, torch.empty(0, 2, dtype=torch.long))
    k = int(statistics.counts.argmax())
    part = state.posterior.components.take(torch.tensor([k]))
    new = propose._split(statistics, survey, k, part, 2).new
    np.testing.assert_allclose(new.counts, [60.0, 60.0], rtol=1e-3)
    mean = new.counts @ new.reference / new.counts.sum()
    between = p.cls.scatter((new.reference - mean)[:, None], new.counts[:, None])
    np.testing.assert_allclose(new.second, -between, rtol=1e-6, atol=1e-6 * between.max())


@every_shape
def test_a_split_with_holes_is_compared_with_one_component_under_its_prior(shape, monkeypatch):
    """With holes the evidence of completed rows will not do: one component has to climb too."""
    p, state, _, _ = _clusters(shape, "dirichlet_process", _joined, K=6, share=0.15)
    statistics = centred(state.moments, p.cls)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    survey = propose._look(state.posterior, torch.empty(0, 2, dtype=torch.long))
    usual, climbs = moves._small_climb, []

    def noted(prior, rows, first):
        result = usual(prior, rows, first)
        climbs.append((prior.components, len(first.counts), result[0]))
        return result

    monkeypatch.setattr(moves, "_small_climb", noted)
    k = int(statistics.counts.argmax())
    part = state.posterior.components.take(torch.tensor([k]))
    move = propose._split(statistics, survey, k, part, 2)
    (prior, n_alone, alone), (law, n_parts, both) = climbs
    assert (n_alone, n_parts) == (1, 2)
    assert prior is law
    np.testing.assert_allclose(move.gain, both - alone, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(100, 100), (190, 10)])
def test_halves_are_the_clusters_in_any_units(sizes):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], sizes)
    X = rng.normal(size=(200, 5))
    X[:, 0] += 9.0 * labels
    mixing = rng.normal(size=(5, 5))
    X = X @ mixing  # the cut does not depend on units and correlations
    metric = _t(mixing.T @ mixing)  # the covariance of either cluster
    found = [mask.numpy() for mask in moves.halves(_t(X), _t(np.ones(200)), metric)]
    agreement = [max((mask == labels).mean(), (mask != labels).mean()) for mask in found]
    assert agreement[0] == 1.0
    assert max(agreement[1:]) >= 0.98  # without knowing what one cluster looks like
    weight = rng.integers(1, 4, size=200)
    weighted = moves.halves(_t(X), _t(weight), metric)
    repeated = moves.halves(_t(np.repeat(X, weight, axis=0)), _t(np.ones(weight.sum())), metric)
    for one, two in zip(weighted, repeated, strict=True):
        assert (two.numpy() == np.repeat(one.numpy(), weight)).all()


def test_halves_of_rows_that_are_all_alike_do_not_depend_on_rounding():
    """Each of seven rows in nine dimensions is as extreme as any other of its weight."""
    rng = np.random.default_rng(0)
    X, weight, metric = rng.normal(size=(7, 9)), np.array([3.0, 3, 3, 4, 4, 4, 4]), np.eye(9)
    expected = [mask.numpy() for mask in moves.halves(_t(X), _t(weight), _t(metric))]
    assert all(0 < mask.sum() < 7 for mask in expected)
    for _ in range(20):
        order = rng.permutation(7)
        near = X[order] * (1.0 + 1e-15 * rng.normal(size=X.shape))
        found = moves.halves(_t(near), _t(weight[order]), _t(metric))
        for one, two in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one[order], two.numpy())


def test_rows_on_a_cut_are_on_one_side_whatever_their_rounding():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, weight = rng.integers(0, 8, size=7).astype(float), rng.integers(1, 4, size=7)
        along = x - weight @ x / weight.sum()
        if not along.any():
            continue
        expected = moves._cut(_t(along), _t(weight)).numpy()
        for order in (rng.permutation(7) for _ in range(5)):
            near = along[order] * (1.0 + 1e-15 * rng.normal(size=7))
            found = moves._cut(_t(near), _t(weight[order])).numpy()
            np.testing.assert_array_equal(found, expected[order])


def test_different_eigenvalues_are_not_taken_for_the_same():
    matrix = torch.diag(_t([1.0, 1.001, 2.0, 2.001]))
    least, largest = moves._extreme_directions(matrix, torch.ones(4).double())
    np.testing.assert_allclose(least, [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(largest, [0.0, 0.0, 0.0, 1.0])


def test_moves_on_the_same_components_are_not_combined():
    p = _problem("diag", "dirichlet_process", K=4, N=20)
    statistics = centred(_statistics(p), p.cls)
    one = Move(3.0, (0, 1), moves._part(statistics, 0))
    two = Move(2.0, (1, 2), moves._part(statistics, 1))
    three = Move(1.0, (3,), moves._part(statistics, 3))
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    assert propose._disjoint(statistics, [one, two, three]) == [one, three]
    many = Move(1.0, (3,), statistics)  # one component into four: no room
    assert propose._disjoint(statistics, [many]) == []
    assert propose._disjoint(statistics, [one, many]) == [one]


def test_a_split_that_promises_too_much_does_not_hide_the_merges():
    p, *_ = _clusters("full", "dirichlet_process", _joined, K=6)
    statistics = centred(_statistics(p), p.cls)
    halves = statistics.map(lambda array: array[:2])
    merge = Move(2000.0, (0, 1), moves._part(statistics, 0))
    splits = [Move(9000.0 + k, (k,), halves) for k in (5, 4, 3, 2)]
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    tried = list(propose._choose(statistics, [merge], [], splits))
    assert len(tried[0]) > 1
    assert tried[-1] == [merge]
    assert list(propose._choose(statistics, [merge], [], [])) == [[merge]]


def test_splits_that_promise_too_much_do_not_hide_as_many_merges():
    p, *_ = _clusters("full", "dirichlet_process", _joined, K=6)
    statistics = centred(_statistics(p), p.cls)
    halves = statistics.map(lambda array: array[:2])
    merges = [Move(2000.0 - k, (k, k + 1), moves._part(statistics, 0)) for k in (0, 2, 4)]
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    for n in (1, 2, 3):
        splits = [Move(9000.0 - k, (k,), halves) for k in (0, 2, 4)[:n]]
        tried = list(propose._choose(statistics, merges[:n], [], splits))
        assert tried[0] == splits
        assert tried[-1] == merges[:n]


@every_shape
@holes
def test_a_sample_of_the_rows_is_enough_to_find_a_move(shape, share, monkeypatch):
    p, state, before, step = _clusters(shape, "dirichlet_process", _joined, K=6, share=share)
    monkeypatch.setattr(moves, "_ROWS_PER_COMPONENT", 20)
    monkeypatch.setattr(moves, "_SAMPLE_BYTES", 0)
    propose = Proposals(p.prior, p.rows, moves.MOVES, np.random.default_rng(0))
    assert len(propose._x) == 6 * 20
    np.testing.assert_allclose(float(propose._weight.sum()), 240.0)
    best = -np.inf
    for proposal in propose(state):
        for _ in range(search._TRIAL_PASSES):
            proposal, after = step(proposal)
        best = max(best, after)
    assert best > before + 1.0
