"""When to stop and what to say: the only code that prints."""

import math
from enum import Enum


class Status(Enum):
    """How a climb ended."""

    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    NON_FINITE = "non_finite"


class Monitor:
    """Record the bound after every pass and decide whether to go on.

    Parameters
    ----------
    tol : float
        Stop when a pass raises the bound by less than this, in nats per unit of `scale`.
    scale : float, default=1.0
        The total weight of the rows: makes `tol` a tolerance in nats per row.
    verbose : int, default=0
        0 is silent, 1 prints every tenth pass and the last one, 2 prints every pass.
    name : str, default=""
        What the printed lines begin with.
    """

    def __init__(self, tol: float, *, scale: float = 1.0, verbose: int = 0, name: str = "") -> None:
        self.tol = tol
        self.scale = scale
        self.verbose = verbose
        self.name = name
        self.history: list[float] = []

    def update(self, bound: float, *, last: bool = False) -> Status | None:
        """Take the bound (total nats) after a pass; return a status if it ends the climb.

        With ``last=True`` no pass can follow anyway.
        """
        previous = self.history[-1] if self.history else -math.inf
        if not math.isfinite(bound):
            # A non-finite bound belongs to no state worth keeping, so it is not recorded.
            self._say(bound, last=True)
            return Status.NON_FINITE
        self.history.append(bound)
        converged = bound - previous < self.threshold(bound)
        self._say(bound, last=last or converged)
        return Status.CONVERGED if converged else None

    @property
    def n_iter(self) -> int:
        """Number of passes recorded."""
        return len(self.history)

    def threshold(self, bound: float) -> float:
        """Total nats below which a change of `bound` is none.

        A change within the rounding of the sum is no change, whatever the tolerance.
        """
        return max(self.tol * self.scale, 1e-15 * abs(bound))

    def accept(self, bound: float) -> None:
        """Record the bound (total nats) of a pass that ends no climb."""
        self.history.append(bound)
        self._say(bound, last=False)

    def hold(self) -> None:
        """Record a pass that left the bound where it was."""
        self.accept(self.history[-1])

    def _say(self, bound: float, *, last: bool) -> None:
        n_iter = len(self.history)
        if self.verbose >= 2 or (self.verbose == 1 and (last or n_iter % 10 == 0)):
            print(f"[{self.name}] pass {n_iter}: ELBO {bound / self.scale:.6f} nats per row")


def announce_epoch(
    name: str, epoch: int, bound: float, validation: float | None, *, verbose: int
) -> None:
    """Print the bounds of an epoch, in nats per row: every tenth with verbose=1, all with 2."""
    if verbose >= 2 or (verbose == 1 and epoch % 10 == 0):
        held_out = "" if validation is None else f", validation {validation:.6f}"
        print(f"[{name}] epoch {epoch}: ELBO {bound:.6f}{held_out} nats per row")
