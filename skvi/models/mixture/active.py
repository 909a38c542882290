"""Passes that leave out components with negligible responsibility.

Once clusters have formed, nearly all responsibilities are zero to working precision. Rows are
sorted by their two most probable components, so that each block of rows needs few of them; the
others are left out until the next full pass looks at everything again.

A pass over active components maximises the same bound over a smaller family (labels that may only
be active), so it is a lower bound still and rises by itself; what it gives away is below
`negligible` nats a row for each component left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from skvi.models.mixture.bound import Posterior, State, Totals, floats_per_row, maximisation
from skvi.models.mixture.components import Components
from skvi.runtime.blocks import Rows, row_slices

# Restricted passes between two full ones.
_PERIOD = 7
# The sorted copy of the rows may take this many bytes.
_RESIDENT_BYTES = 1 << 27
_BLOCK_ROWS = 1024
# Below this many multiplications a row, the two products of a full pass cost less than choosing.
_LONG_PRODUCT = 5000


class ActiveBlock(NamedTuple):
    """Rows and the components that may be responsible for them.

    Attributes
    ----------
    x : Tensor of shape (B, D)
    weight : Tensor of shape (B,)
    active : Tensor of shape (A,)
    """

    x: Tensor
    weight: Tensor
    active: Tensor


def pays(rows: Rows, shape: type[Components], n_components: int) -> bool:
    """Whether sorting these rows is possible within bounded memory, and worth it."""
    fits = rows.n_rows * max(rows.n_features, n_components) * 8 <= _RESIDENT_BYTES
    long = n_components * shape.n_monomials(rows.n_features) >= _LONG_PRODUCT
    # On a GPU many small products are slower than one large one.
    return fits and long and n_components > 1 and rows.device.type == "cpu"


class AlternatingAscent:
    """Steps of coordinate ascent, most of them over active components only.

    Call it as a step; `looked_at_everything` says whether the last step was a full pass, which
    the last step of a climb should be.

    Parameters
    ----------
    prior : Posterior
    rows : Rows
    max_iter : int
        The step of this number is a full one.
    negligible : float
        Responsibilities below this are left out.
    """

    def __init__(self, prior: Posterior, rows: Rows, *, max_iter: int, negligible: float) -> None:
        K = prior.weights.E_log().shape[0]
        self._prior = prior
        self._rows = rows
        self._max_iter = max_iter
        self._negligible = negligible
        self._needed = torch.empty(rows.n_rows, K, dtype=torch.bool)
        self._key = torch.empty(rows.n_rows, dtype=torch.int64)
        self._blocks: list[ActiveBlock] = []
        self._n_steps = 0
        self._n_restricted = _PERIOD  # begin with a full pass
        self.looked_at_everything = False

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""
        self._n_steps += 1
        full = self._n_restricted >= _PERIOD or self._n_steps == self._max_iter
        if not full and not self._blocks:
            self._sort()
        order = self._prior.weights.best_order(state.moments.counts)
        if order is not None:
            state = state._replace(moments=state.moments.reordered(order))
            self._blocks = [b._replace(active=order.argsort()[b.active]) for b in self._blocks]
        posterior = maximisation(self._prior, state.moments)
        totals = Totals(posterior, self._rows.device)
        if full:
            self._look_at_everything(totals)
        else:
            for x, weight, active in self._blocks:
                totals.add(x, weight, active)
        self._n_restricted = 0 if full else self._n_restricted + 1
        self.looked_at_everything = full
        moments, local = totals.result()
        return State(posterior, moments), local - float(posterior.kl(self._prior))

    def _look_at_everything(self, totals: Totals) -> None:
        """Make a full pass and note which components each row needs."""
        components = totals.posterior.components
        self._blocks = []
        for where, x, weight in self._rows.blocks(floats_per_row(components)):
            resp = totals.add(x, weight)  # (K, B), times weight
            first, second = resp.topk(2, dim=0).indices
            self._key[where] = first * len(resp) + second
            self._needed[where] = (resp > self._negligible * weight).T

    def _sort(self) -> None:
        """Gather rows by their two most probable components, and list what each block needs."""
        order = self._key.argsort()
        x, weight = self._rows[order.numpy()]
        needed = self._needed[order]
        self._blocks = [
            ActiveBlock(x[block], weight[block], needed[block].any(0).nonzero()[:, 0])
            for block in row_slices(self._rows.n_rows, _BLOCK_ROWS)
        ]

    def look_at_everything(self) -> None:
        """Make the next step a full pass."""
        self._n_restricted = _PERIOD
