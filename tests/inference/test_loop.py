"""The driver and its monitor, on toy ascents."""

import math

import numpy as np
import pytest

from skvi.inference.loop import climb
from skvi.inference.monitor import Monitor, Status
from skvi.inference.search import search


def _halve(x):
    """Approach zero from below: the gain halves in every pass."""
    return x / 2, x / 2


def test_stops_when_the_gain_per_unit_falls_below_tol():
    solution = climb(_halve, -1.0, max_iter=100, monitor=Monitor(1e-3))
    assert solution.status is Status.CONVERGED
    assert solution.bound == solution.state == solution.history[-1]
    gains = [b - a for a, b in zip(solution.history, solution.history[1:], strict=False)]
    assert gains[-1] < 1e-3 <= gains[-2]
    scaled = climb(_halve, -1.0, max_iter=100, monitor=Monitor(1e-3, scale=100.0))
    assert scaled.n_iter < solution.n_iter


def test_stops_at_max_iter():
    solution = climb(_halve, -1.0, max_iter=3, monitor=Monitor(0.0))
    assert solution.status is Status.MAX_ITER
    assert solution.n_iter == 3
    assert solution.state == -1 / 8


def test_a_gain_within_rounding_ends_even_a_zero_tolerance():
    solution = climb(lambda x: (x, 1.0), 0, max_iter=10, monitor=Monitor(0.0))
    assert solution.status is Status.CONVERGED
    assert solution.n_iter == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_bound_keeps_the_last_good_state(bad):
    bounds = iter([-3.0, -2.0, bad])
    solution = climb(lambda x: (x + 1, next(bounds)), 0, max_iter=10, monitor=Monitor(0.0))
    assert solution.status is Status.NON_FINITE
    assert solution.state == 2
    assert solution.history == [-3.0, -2.0]


def test_only_the_monitor_speaks(capsys):
    climb(_halve, -1.0, max_iter=25, monitor=Monitor(0.0))
    assert capsys.readouterr().out == ""
    climb(_halve, -1.0, max_iter=25, monitor=Monitor(0.0, verbose=1, name="toy"))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "[toy] pass 10",
        "[toy] pass 20",
        "[toy] pass 25",
    ]
    climb(_halve, -1.0, max_iter=25, monitor=Monitor(0.0, verbose=2))
    assert len(capsys.readouterr().out.splitlines()) == 25


class TestSearch:
    """Summits at whole numbers: a pass climbs half of the way that is left."""

    @staticmethod
    def _step(x):
        x = x + 0.5 * (np.ceil(x) - x)
        return x, float(x)

    def _search(self, propose, start=0.2, *, max_iter=200, tol=1e-6):
        monitor = Monitor(tol)
        n_calls = 0

        def step(x):
            nonlocal n_calls
            n_calls += 1
            return self._step(x)

        def ascend(x):
            return climb(step, x, max_iter=max_iter - monitor.n_iter, monitor=monitor)

        found = search(ascend(start), propose, step, ascend, max_iter=max_iter, monitor=monitor)
        n_rounds = found.n_iter - n_calls
        return found, n_rounds

    def test_climbs_from_summit_to_summit_until_a_round_fails(self):
        found, n_rounds = self._search(lambda x: [x + 0.3] if x < 3.9 else [x - 0.5])
        assert found.bound == pytest.approx(4.0, abs=1e-4)
        assert found.status is Status.CONVERGED
        assert np.diff(found.history).min() >= 0.0
        assert n_rounds >= 4

    def test_worse_proposals_change_nothing_but_the_count_of_passes(self):
        plain, _ = self._search(lambda x: [])
        found, n_rounds = self._search(lambda x: [x - 3.0, math.nan, x - 0.5])
        assert n_rounds == 1
        assert found.state == plain.state
        assert found.bound == plain.bound
        assert found.n_iter > plain.n_iter
        assert set(found.history[plain.n_iter :]) == {plain.bound}

    def test_a_later_proposal_is_tried_when_the_first_fails(self):
        found, _ = self._search(lambda x: [x - 3.0, x + 0.3] if x < 1.5 else [])
        assert found.bound == pytest.approx(2.0, abs=1e-4)

    def test_max_iter_limits_all_passes(self):
        for max_iter in range(1, 60):
            found, _ = self._search(lambda x: [x - 0.5, x + 0.3], max_iter=max_iter)
            assert found.n_iter <= max_iter
            assert found.bound == max(found.history)

    def test_no_search_from_an_unfinished_climb(self):
        found, _ = self._search(lambda x: [x + 5.0], max_iter=3)
        assert found.status is Status.MAX_ITER
        assert found.bound < 1.0
