"""Leave a summit: try proposals, keep those that lead higher, climb on."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from skvi.inference.loop import Solution
from skvi.inference.monitor import Monitor, Status

State = TypeVar("State")

# A proposal that has not passed the kept bound after this many passes is dropped.
_TRIAL_PASSES = 4


def search(
    solution: Solution[State],
    propose: Callable[[State], Iterable[State]],
    step: Callable[[State], tuple[State, float]],
    ascend: Callable[[State], Solution[State]],
    *,
    max_iter: int,
    monitor: Monitor,
) -> Solution[State]:
    """Move from summit to higher summit until a whole round of proposals fails.

    Parameters
    ----------
    solution : Solution
        A summit, whose bounds `monitor` has received.
    propose : callable
        Returns the states to try from a state, best first. A round of proposals counts as one
        pass over the rows, since finding them takes one.
    step : callable
        Maps a state to the next state and *its* bound in nats; NaN for a state that has none.
    ascend : callable
        Climbs from a state with the same `monitor`.
    max_iter : int
        Limit of all passes together.
    monitor : Monitor
        A pass that does not lead above the kept bound is recorded as a repetition of it.

    Returns
    -------
    Solution
        Its bound is never below that of `solution`.
    """
    improved = True
    # A round takes a pass to look for proposals, and one at least to try them.
    while improved and monitor.n_iter + 1 < max_iter and solution.status is Status.CONVERGED:
        improved = False
        monitor.hold()
        for proposal in propose(solution.state):
            found = _trial(proposal, step, max_iter=max_iter, monitor=monitor)
            if found is None:
                continue
            improved = True
            solution = Solution(found, monitor.history, Status.MAX_ITER)
            if monitor.n_iter < max_iter:
                solution = ascend(found)
            break
    return solution


def _trial(
    state: State,
    step: Callable[[State], tuple[State, float]],
    *,
    max_iter: int,
    monitor: Monitor,
) -> State | None:
    """Return the state that passed the kept bound, if one did."""
    kept, before = monitor.history[-1], -math.inf
    for n_left in reversed(range(_TRIAL_PASSES)):
        if monitor.n_iter == max_iter:
            return None
        state, bound = step(state)
        if bound > kept + monitor.threshold(kept):
            monitor.accept(bound)
            return state
        monitor.hold()
        # Rises shrink from pass to pass: it will not get there.
        if not bound + n_left * (bound - before) > kept:
            return None
        before = bound
    return None
