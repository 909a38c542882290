"""The driver and its monitor, on toy ascents."""

import math

import pytest

from skvi.inference.loop import climb
from skvi.inference.monitor import Monitor, Status


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
