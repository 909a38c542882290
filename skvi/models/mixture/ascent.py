"""What every way of climbing offers to the loop that drives it, and how batches are sized."""

import math
from typing import Protocol

from skvi.models.mixture.bound import Posterior, State, coordinate_ascent
from skvi.models.mixture.components import Components
from skvi.runtime.batches import stay_resident
from skvi.runtime.blocks import Rows

# What memoized laps keep of all batches may take this many bytes by default, and at most.
_CACHE_BYTES = 1 << 26
_LARGEST_CACHE_BYTES = 1 << 30
# More batches bring nothing, and smaller ones are dominated by the update after each.
_MOST_BATCHES = 20
_FEWEST_ROWS = 5000
# With fewer batches laps save too few passes to pay for their updates.
_WORTH_BATCHES = 10


class Ascent(Protocol):
    """Steps that climb.

    Attributes
    ----------
    rises : bool
        Whether no step lowers the bound.
    looked_at_everything : bool
        Whether the last step ended with responsibilities of all rows under the posterior that it
        returned, which the last step of a climb must.
    """

    @property
    def rises(self) -> bool:
        """See the class."""

    @property
    def looked_at_everything(self) -> bool:
        """See the class."""

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""

    def restart(self, max_iter: int) -> None:
        """Begin anew from another state; the step of number `max_iter` looks at everything."""

    def look_at_everything(self) -> None:
        """Make the next step look at everything."""


class CoordinateAscent:
    """Full passes: the posterior from the statistics, the statistics under the posterior.

    Parameters
    ----------
    prior : Posterior
    rows : Rows
    """

    rises = True
    looked_at_everything = True

    def __init__(self, prior: Posterior, rows: Rows) -> None:
        self._step = coordinate_ascent(prior, rows)

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""
        return self._step(state)

    def restart(self, max_iter: int) -> None:
        """Nothing is remembered."""

    def look_at_everything(self) -> None:
        """Every step does."""


def _share_bytes(shape: type[Components], n_components: int, n_features: int) -> int:
    """Size of the share of one batch."""
    second = {"full": n_features**2, "tied": 1 + n_features**2 // n_components, "diag": n_features}
    return 8 * n_components * (1 + 2 * n_features + second.get(shape.covariance_shape, 1))


def count_batches(
    batch_size: int | str,
    total: float,
    shape: type[Components],
    n_components: int,
    n_features: int,
    *,
    cached: bool = True,
) -> int:
    """Return into how many batches rows of weight `total` are split.

    Parameters
    ----------
    batch_size : int or "auto"
        Weight of a batch: rows, if every row counts once. "auto": twenty batches, fewer where
        they would hold less than 5000 or their statistics would need more than 64 MB.
    total : float
    shape : type of Components
    n_components, n_features : int
    cached : bool, default=True
        Whether statistics of every batch are kept, or nothing but its borders.

    Raises
    ------
    ValueError
        If so many batches would need more than 1 GB.
    """
    size = _share_bytes(shape, n_components, n_features) if cached else 8
    if batch_size == "auto":
        most = min(_MOST_BATCHES, _CACHE_BYTES // size, total // _FEWEST_ROWS)
        return max(1, int(most))
    n_batches = max(1.0, math.ceil(total / float(batch_size)))
    if n_batches * size > _LARGEST_CACHE_BYTES:
        raise ValueError(
            f"batch_size={batch_size} splits rows of total weight {total:g} into {n_batches:.3g} "
            f"batches, which would need {n_batches * size / 1e9:.3g} GB; give a larger "
            "batch_size."
        )
    return int(n_batches)


def laps_pay(rows: Rows, total: float, shape: type[Components], n_components: int) -> bool:
    """Whether memoized laps are expected to reach a bound earlier than full passes.

    They need about half as many passes where clusters overlap; that pays where a batch takes
    longer than an update of the posterior, and no visit has to gather its rows.
    """
    n_batches = count_batches("auto", total, shape, n_components, rows.n_features)
    # On a GPU fewer and larger products win.
    return n_batches >= _WORTH_BATCHES and stay_resident(rows) and rows.device.type == "cpu"
