"""One driver for every deterministic ascent: step, monitor, stop."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from skvi.inference.monitor import Monitor, Status

State = TypeVar("State")


class Solution(NamedTuple, Generic[State]):
    """What a climb found.

    Attributes
    ----------
    state : State
        The last state whose bound was finite.
    history : list of float
        The bound in nats after each pass; the last entry belongs to `state`.
    status : Status
    """

    state: State
    history: list[float]
    status: Status

    @property
    def n_iter(self) -> int:
        """Number of passes made."""
        return len(self.history)

    @property
    def bound(self) -> float:
        """The bound of `state`."""
        return self.history[-1]


def climb(
    step: Callable[[State], tuple[State, float]],
    state: State,
    *,
    max_iter: int,
    monitor: Monitor,
) -> Solution[State]:
    """Apply `step` until the monitor stops it or `max_iter` passes are made.

    Parameters
    ----------
    step : callable
        Maps a state to the next state and *its* bound in nats.
    state : State
        Where to start.
    max_iter : int
        At least 1.
    monitor : Monitor
        Fresh; receives every bound.

    Returns
    -------
    Solution
        A non-finite bound is a status, not an exception: the caller knows what it means.
    """
    for i in range(max_iter):
        candidate, bound = step(state)
        status = monitor.update(bound, last=i == max_iter - 1)
        if status is Status.NON_FINITE:
            return Solution(state, monitor.history, status)
        state = candidate
        if status is Status.CONVERGED:
            return Solution(state, monitor.history, status)
    return Solution(state, monitor.history, Status.MAX_ITER)
