"""Memoized laps, stochastic steps and the statistics they stand on, against slow references."""

import math

import numpy as np
import pytest
import torch

from skvi.models.mixture import bound, start
from skvi.models.mixture.bound import Posterior, State
from skvi.models.mixture.components import COMPONENTS, Moments
from skvi.models.mixture.memoized import MemoizedAscent
from skvi.models.mixture.stochastic import StochasticAscent
from skvi.runtime.batches import Batches
from skvi.runtime.blocks import Affine, Rows

from . import by_row
from .test_mixture import (
    _bound_at,
    _ill_conditioned,
    _problem,
    _reference_bound,
    _t,
    _update,
    every_law,
    every_shape,
)


def _moments(cls, X, resp, reference):
    """Statistics (K, ...) about any references, by a loop over rows and components."""
    K, D = reference.shape
    counts, first = resp.sum(0), np.zeros((K, D))
    matrix = np.zeros((K, D, D))
    for k in range(K):
        for x, r in zip(X, resp[:, k], strict=True):
            first[k] += r * (x - reference[k])
            matrix[k] += r * np.outer(x - reference[k], x - reference[k])
    second = {
        "full": matrix,
        "tied": matrix.sum(0, keepdims=True),
        "diag": np.einsum("kii->ki", matrix),
        "spherical": np.einsum("kii->k", matrix),
    }[cls.covariance_shape]
    return Moments(_t(reference), _t(counts), _t(first), _t(second))


def _problem_of_batches(problem, batches):
    """The same problem with every batch's rows written out: a row on a border appears twice."""
    xs, weights, owner = [], [], []
    for b in range(batches.n_batches):
        for x, weight in batches.blocks(b, 1):
            xs.append(x.numpy())
            weights.append(weight.numpy())
            owner.append(np.full(len(x), b))
    expanded = _problem(problem.shape, problem.law, D=problem.D, K=problem.K)
    expanded.hyper, expanded.prior = problem.hyper, problem.prior
    expanded.X, expanded.weight = np.concatenate(xs), np.concatenate(weights)
    expanded.N = len(expanded.X)
    return expanded, np.concatenate(owner)


def _clustered(shape, law, *, seed):
    """A problem whose rows form clusters, so that ascent settles within tens of passes."""
    problem = _problem(shape, law, K=4, N=60, seed=seed, weighted=True)
    centres = 8.0 * np.random.default_rng(seed).normal(size=(3, problem.D))
    problem.X = problem.X + centres[np.arange(60) % 3]
    affine = Affine(np.zeros(problem.D), np.ones(problem.D))
    problem.rows = Rows(problem.X, affine, torch.device("cpu"), problem.weight)
    return problem


def _settle(step, state):
    """Ascend until no mean moves by more than rounding; return the state and all bounds."""
    values = []
    for _ in range(500):
        before = state.posterior.components.mean
        state, value = step(state)
        values.append(value)
        if before.shape == state.posterior.components.mean.shape and torch.allclose(
            before, state.posterior.components.mean, rtol=0.0, atol=1e-10
        ):
            return state, values
    raise AssertionError("not settled")


def _started(problem, seed=0):
    moments = start.start(
        "k-means++", problem.rows, problem.cls, problem.K, np.random.default_rng(seed)
    )
    return State(problem.prior, moments)


# -- statistics ----------------------------------------------------------------------------------


@every_shape
def test_merged_statistics_equal_those_of_all_rows(shape, rng):
    cls, K, D = COMPONENTS[shape], 3, 2
    X, resp = rng.normal(size=(15, D)), rng.dirichlet(np.ones(K), size=15)
    resp[:6, 2] = 0.0  # a component without rows in the first set
    parts = [
        _moments(cls, X[rows], resp[rows], rng.normal(size=(K, D)))
        for rows in (slice(0, 6), slice(6, 15))
    ]
    merged = cls.merge(*parts)
    mean = (resp.T @ X) / resp.sum(0)[:, None]
    expected = _moments(cls, X, resp, mean)
    for value, oracle in zip(merged, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-12, atol=1e-12)
    twice = cls.merge(parts[0].scaled(2.0), parts[1].scaled(0.0))
    expected = _moments(cls, X[:6], 2.0 * resp[:6], np.zeros((K, D)))
    prior = _problem(shape, "dirichlet_process", D=D, K=K).prior.components
    for value, oracle in zip(
        vars(prior.update(twice)).values(), vars(prior.update(expected)).values(), strict=True
    ):
        torch.testing.assert_close(value, oracle, rtol=1e-12, atol=1e-12)


@every_shape
def test_merging_tight_clusters_far_away_costs_no_digits(shape, rng):
    """Spread 1e-6 at a distance of 1e3: the raw second moments would keep no digit."""
    cls, K, D = COMPONENTS[shape], 2, 2
    centre = 1e3 * rng.normal(size=(K, D))
    noise = rng.integers(-8, 9, size=(40, D)) * 2.0**-20  # exact in float64, as the centre is
    centre = np.round(centre * 2.0**20) * 2.0**-20
    owner = np.arange(40) % K
    X, resp = centre[owner] + noise, np.eye(K)[owner]
    near = centre + 1e-6 * rng.normal(size=(K, D))
    merged = cls.merge(
        _moments(cls, X[:25], resp[:25], near),
        _moments(cls, X[25:], resp[25:], near + 1e-7),
    )
    mean = np.stack([noise[owner == k].mean(0) for k in range(K)])
    expected = _moments(cls, noise, resp, mean)
    torch.testing.assert_close(merged.second, expected.second, rtol=1e-7, atol=0.0)
    zero = np.zeros((K, D))
    raw = cls.merge(*(_moments(cls, X[s], resp[s], zero) for s in (slice(0, 25), slice(25, 40))))
    error = (raw.second - expected.second).abs() / expected.second.abs()
    assert error.max() > 1e-4  # from the origin they are lost: this check can fail


@every_shape
@every_law
def test_energy_is_linear_in_the_statistics(shape, law, rng):
    problem = _problem(shape, law, D=3, weighted=True)
    posterior = _update(problem)
    resp = problem.weight[:, None] * rng.dirichlet(np.ones(problem.K), size=problem.N)
    moments = _moments(problem.cls, problem.X, resp, rng.normal(size=(problem.K, problem.D)))
    log_rho = bound.log_rho(posterior, _t(problem.X))  # (K, N)
    expected = float((_t(resp.T) * log_rho).sum())
    assert bound.energy(posterior, moments) == pytest.approx(expected, rel=1e-12)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batches", [1, 2, 7, 30])
def test_batches_have_equal_weight_and_hold_every_row_as_often_as_it_counts(rng, n_batches):
    X = rng.normal(size=(50, 3))
    weight = rng.uniform(0.1, 4.0, size=50)
    rows = Rows(X, Affine(np.zeros(3), np.ones(3)), torch.device("cpu"), weight)
    batches = Batches(rows, n_batches, rng)
    found = np.zeros(50)
    for b in range(n_batches):
        total = 0.0
        for x, w in batches.blocks(b, 1 << 18):  # blocks of 64 rows or fewer
            assert float(w.min()) > 0.0
            where = [int(np.flatnonzero((row == X).all(1))[0]) for row in x.numpy()]
            np.add.at(found, where, w.numpy())
            total += float(w.sum())
        assert total == pytest.approx(weight.sum() / n_batches, rel=1e-12)
    np.testing.assert_allclose(found, weight, rtol=1e-12)


def test_blocks_of_a_batch_continue_where_the_last_one_stopped(rng):
    X, weight = rng.normal(size=(500, 2)), rng.uniform(0.5, 1.5, size=500)
    rows = Rows(X, Affine(np.zeros(2), np.ones(2)), torch.device("cpu"), weight)
    batches = Batches(rows, 2, rng)
    small = [torch.cat(part) for part in zip(*batches.blocks(1, 1 << 20), strict=True)]
    large = [torch.cat(part) for part in zip(*batches.blocks(1, 1), strict=True)]
    assert len(list(batches.blocks(1, 1 << 20))) > 2
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_batches_of_weighted_rows_are_those_of_repeated_rows(rng):
    X = rng.normal(size=(40, 3))
    weight = rng.integers(1, 5, size=40)
    shuffled = rng.permutation(weight.sum())
    affine = Affine(np.zeros(3), np.ones(3))

    def contents(X, weight):
        rows = Rows(X, affine, torch.device("cpu"), weight.astype(float))
        batches = Batches(rows, 6, np.random.default_rng(0))
        result = []
        for b in range(6):
            found = {}
            for x, w in batches.blocks(b, 1):
                for row, share in zip(x.numpy(), w.tolist(), strict=True):
                    found[tuple(row)] = found.get(tuple(row), 0.0) + share
            result.append({row: share for row, share in found.items() if share > 1e-9})
        return result

    weighted = contents(X, weight)
    repeated = contents(np.repeat(X, weight, axis=0)[shuffled], np.ones(weight.sum()))
    for first, second in zip(weighted, repeated, strict=True):
        assert first.keys() == second.keys()
        assert all(first[row] == pytest.approx(second[row]) for row in first)


def test_batches_look_like_the_whole():
    """Sorted rows, as many data sets have them, are dealt out evenly."""
    rng = np.random.default_rng(0)
    X = np.sort(rng.normal(size=(4000, 1)), axis=0)
    rows = Rows(X, Affine(np.zeros(1), np.ones(1)), torch.device("cpu"))
    batches = Batches(rows, 10, rng)
    means = [float(torch.cat([x for x, _ in batches.blocks(b, 1)]).mean()) for b in range(10)]
    # ten means of 400 rows: standard error 0.05, and a normal deviate beyond 5 once in 2e6
    assert np.abs(np.array(means) - X.mean()).max() < 5 * 0.05


# -- memoized ------------------------------------------------------------------------------------


@every_shape
@every_law
def test_one_batch_is_coordinate_ascent(shape, law, rng):
    problem = _problem(shape, law, N=60, weighted=True)
    plain = bound.coordinate_ascent(problem.prior, problem.rows)
    memoized = MemoizedAscent(problem.prior, Batches(problem.rows, 1, rng), max_iter=100)
    first = second = _started(problem)
    for _ in range(8):
        first, one = plain(first)
        second, other = memoized(second)
        assert other == pytest.approx(one, rel=1e-13)
        assert torch.equal(second.posterior.components.mean, first.posterior.components.mean)
        assert torch.equal(second.moments.second, first.moments.second)


@every_shape
@every_law
def test_bound_of_a_visit_is_that_of_the_responsibilities_held(shape, law):
    """Against responsibilities kept for every row, and the bound summed row by row."""
    problem = _problem(shape, law, N=25, weighted=True)
    batches = Batches(problem.rows, 4, np.random.default_rng(0))
    expanded, owner = _problem_of_batches(problem, batches)
    memoized = MemoizedAscent(problem.prior, batches, max_iter=100)
    state, value = memoized(_started(problem))
    x = _t(expanded.X)
    resp = by_row.responsibilities(state.posterior, x)  # (K, N)
    assert value == pytest.approx(float(_bound_at(expanded, state.posterior, resp)), rel=1e-11)
    values, order_changed = [value], 0
    for _ in range(5):
        order = problem.prior.weights.best_order(state.moments.counts)
        if order is not None:  # a lap begins with the order that the weights like best
            order_changed += 1
            resp = resp[order]
            state = state._replace(moments=state.moments.reordered(order))
            memoized._shares = [
                s._replace(moments=s.moments.reordered(order)) for s in memoized._shares
            ]
        expanded.resp = resp.T.numpy()
        for b, (posterior, total) in enumerate(memoized.lap()):
            # before the visit: the textbook posterior of all the responsibilities held
            expected = _update(expanded)
            torch.testing.assert_close(posterior.components.mean, expected.components.mean)
            mine = torch.as_tensor(owner == b)
            resp[:, mine] = by_row.responsibilities(posterior, x[mine])
            expected_value = float(_bound_at(expanded, posterior, resp))
            values.append(total.bound(posterior, problem.prior))
            assert values[-1] == pytest.approx(expected_value, rel=1e-11)
            expanded.resp = resp.T.numpy()
        state = State(posterior, total.moments)
    assert np.diff(values).min() > -1e-11 * abs(values[-1])
    # and at the posterior of what is held, Bishop's sum term by term
    final = problem.prior.update(total.moments)
    assert total.bound(final, problem.prior) == pytest.approx(_reference_bound(expanded), rel=1e-10)


@every_shape
@every_law
def test_the_memoized_bound_never_falls_and_ends_where_coordinate_ascent_ends(shape, law):
    for seed in range(2):
        problem = _clustered(shape, law, seed=seed)
        plain = bound.coordinate_ascent(problem.prior, problem.rows)
        memoized = MemoizedAscent(
            problem.prior, Batches(problem.rows, 5, np.random.default_rng(seed)), max_iter=10_000
        )
        state, values = _settle(memoized, _started(problem, seed))
        assert np.diff(values).min() > -1e-12 * abs(values[-1])
        memoized.look_at_everything()
        state, value = memoized(state)
        assert memoized.looked_at_everything
        local = by_row.local_bound(state.posterior, _t(problem.X)) @ _t(problem.weight)
        exact = float(local - state.posterior.kl(problem.prior))
        assert value == pytest.approx(exact, rel=1e-12)
        # a fixed point of one is a fixed point of the other
        settled, _ = plain(state)
        torch.testing.assert_close(
            settled.posterior.components.mean, state.posterior.components.mean, rtol=0, atol=1e-8
        )
        torch.testing.assert_close(settled.moments.counts, state.moments.counts, rtol=0, atol=1e-7)
        settled, values = _settle(plain, settled)
        again = MemoizedAscent(
            problem.prior, Batches(problem.rows, 7, np.random.default_rng(9)), max_iter=10_000
        )
        back = settled
        for _ in range(4):
            back, value = again(back)
        assert value == pytest.approx(values[-1], rel=1e-11)
        torch.testing.assert_close(
            back.posterior.components.mean, settled.posterior.components.mean, rtol=0, atol=1e-8
        )


@every_shape
def test_ill_conditioned_components_keep_their_bound(shape):
    """Shares about different references, at covariances from 1 to 1e-12."""
    prior, rows, moments = _ill_conditioned(shape)
    memoized = MemoizedAscent(prior, Batches(rows, 5, np.random.default_rng(0)), max_iter=1000)
    state, values = State(prior, moments), []
    for _ in range(4):
        state, value = memoized(state)
        values.append(value)
    assert state.posterior.components.ill.numel() == (4 if shape == "tied" else 3)
    before = values[-1]
    memoized.look_at_everything()
    state, after = memoized(state)
    # The rows say the same as the shares did, which are settled by now.
    assert after == pytest.approx(before, rel=1e-7)
    assert np.diff(values).min() > -1e-8 * abs(after)


# -- stochastic ------------------------------------------------------------------------------------


@every_shape
@every_law
def test_a_whole_step_over_all_rows_is_coordinate_ascent(shape, law, rng):
    problem = _problem(shape, law, N=40, weighted=True)
    plain = bound.coordinate_ascent(problem.prior, problem.rows)
    stochastic = StochasticAscent(
        problem.prior, Batches(problem.rows, 1, rng), rng, offset=1.0, decay=0.7, max_iter=100
    )
    state = _started(problem)
    expected, _ = plain(state)
    found, _ = stochastic(state)
    torch.testing.assert_close(found.moments.counts, expected.moments.counts)
    updated = problem.prior.update(expected.moments).components
    torch.testing.assert_close(found.posterior.components.root, updated.root)
    # rho_1 = 2^-0.7 is no whole step any more
    second, _ = stochastic(found)
    other, _ = plain(expected)
    assert not torch.allclose(second.moments.counts, other.moments.counts)


@every_law
def test_steps_blend_natural_parameters(law):
    """Hoffman et al.'s update written in the natural parameters of the Normal-Wishart."""
    problem = _problem("full", law, N=30, weighted=True)
    offset, decay, n_batches = 3.0, 0.6, 3
    batches = Batches(problem.rows, n_batches, np.random.default_rng(0))
    expanded, owner = _problem_of_batches(problem, batches)
    stochastic = StochasticAscent(
        problem.prior, batches, np.random.default_rng(5), offset=offset, decay=decay, max_iter=9
    )

    def natural(posterior):
        q, K = posterior.components, problem.K
        kappa, mean = q.kappa.numpy()[:, None], q.mean.numpy()
        outer = kappa[:, :, None] * mean[:, :, None] * mean[:, None, :]
        scale = q.inverse_scale().numpy() + outer
        dof = q.dof.numpy()
        broadcast = [np.broadcast_to(a, (K, *a.shape[1:])) for a in (kappa, kappa * mean, scale)]
        return [
            *broadcast,
            np.broadcast_to(dof, (K,)),
            *map(np.asarray, vars(posterior.weights).values()),
        ]

    state = _started(problem)
    order = problem.prior.weights.best_order(state.moments.counts)
    moments = state.moments if order is None else state.moments.reordered(order)
    eta0, posterior = natural(problem.prior), problem.prior.update(moments)
    eta = natural(posterior)
    x = _t(expanded.X)
    resp = np.zeros((problem.K, expanded.N))
    for t, b in enumerate(np.random.default_rng(5).permutation(n_batches)):
        mine = owner == b
        r = by_row.responsibilities(posterior, x[mine]).numpy()
        resp[:, mine] = r
        r = n_batches * r * expanded.weight[mine]
        rows = expanded.X[mine]
        statistics = [
            r.sum(1)[:, None],
            r @ rows,
            np.einsum("kn,ni,nj->kij", r, rows, rows),
            r.sum(1),
        ]
        counts = r.sum(1)
        if law == "dirichlet_process":
            statistics += [counts, counts.sum() - counts.cumsum()]
        else:
            statistics += [counts]
        rho = (t + offset) ** -decay
        eta = [
            (1.0 - rho) * a + rho * (a0 + s) for a, a0, s in zip(eta, eta0, statistics, strict=True)
        ]
        kappa, linear, scale, dof = eta[:4]
        mean = linear / kappa
        inverse_scale = scale - kappa[:, :, None] * mean[:, :, None] * mean[:, None, :]
        posterior = Posterior(
            type(posterior.weights)(*map(_t, eta[4:])),
            problem.cls(
                _t(mean), _t(kappa[:, 0]), _t(dof), torch.linalg.cholesky(_t(inverse_scale))
            ),
        )
    found, value = stochastic(state)
    for a, b in zip(natural(found.posterior), eta, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    # The bound of the epoch belongs to the new posterior and to the responsibilities used.
    assert value == pytest.approx(float(_bound_at(expanded, posterior, _t(resp))), rel=1e-10)
    exact = by_row.local_bound(posterior, x) @ _t(expanded.weight) - posterior.kl(problem.prior)
    assert value < float(exact)


@every_shape
@every_law
def test_the_last_step_looks_at_everything(shape, law):
    problem = _problem(shape, law, N=200, weighted=True)
    rng = np.random.default_rng(0)
    stochastic = StochasticAscent(
        problem.prior, Batches(problem.rows, 5, rng), rng, offset=10.0, decay=0.7, max_iter=30
    )
    state, values = _started(problem), []
    for _ in range(30):
        state, value = stochastic(state)
        values.append(value)
    assert stochastic.looked_at_everything
    local = by_row.local_bound(state.posterior, _t(problem.X)) @ _t(problem.weight)
    assert value == pytest.approx(float(local - state.posterior.kl(problem.prior)), rel=1e-12)
    assert values[-1] > values[0]
    assert math.isfinite(values[0])
