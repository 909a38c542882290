r"""Incremental passes: the posterior is updated after each batch, and no bound is ever lost.

Every batch keeps its share: its statistics and the entropy of its responsibilities from its last
visit. A visit maximises over the posterior, then over the responsibilities of one batch:

.. math::
    L(q, r) = \sum_b \left(\langle E_q[\eta], S_b(r_b) \rangle + H(r_b)\right) - KL(q || p),

which is the exact bound of what is held, so it rises at every visit, and its fixed points are
those of coordinate ascent. Sources: Neal & Hinton (1998), A view of the EM algorithm that
justifies incremental, sparse, and other variants; Hughes & Sudderth (2013), Memoized online
variational inference for Dirichlet process mixture models.

Shares are only ever added, never subtracted: at the start of a lap the cache becomes its own
sums from the end, so that the rows still to come are one share, and so are those visited.
"""

from collections.abc import Iterator

from skvi.models.mixture.bound import (
    Posterior,
    Share,
    State,
    Totals,
    floats_per_row,
    maximisation,
    share,
)
from skvi.runtime.batches import Batches


def visit(posterior: Posterior, batches: Batches, batch: int) -> tuple[Share, float]:
    """Return the share of a batch under `posterior`, and its local bound in nats."""
    totals = Totals(posterior, batches.rows.device, batches.rows.workspace)
    for x, weight in batches.blocks(batch, floats_per_row(posterior.components)):
        totals.add(x, weight)
    moments, local = totals.result()
    return share(posterior, moments, local), local


class MemoizedAscent:
    """Laps over batches, with an update of the posterior before each batch.

    Call it as a step: a lap, or a full pass under one posterior. The first step and the one of
    number `max_iter` are full passes, and with one batch all are; `looked_at_everything` says
    whether the last step was one, so that its bound is that of the best responsibilities of all
    rows.

    Parameters
    ----------
    prior : Posterior
    batches : Batches
    max_iter : int
    """

    rises = True

    def __init__(self, prior: Posterior, batches: Batches, *, max_iter: int) -> None:
        self._prior = prior
        self._shape = type(prior.components)
        self._batches = batches
        self._max_iter = max_iter
        self._shares: list[Share] = []
        self._n_steps = 0
        self._full_next = True
        self.looked_at_everything = False

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""
        self._n_steps += 1
        order = self._prior.weights.best_order(state.moments.counts)
        if order is not None:
            state = state._replace(moments=state.moments.reordered(order))
            self._shares = [s._replace(moments=s.moments.reordered(order)) for s in self._shares]
        self.looked_at_everything = (
            self._full_next or self._n_steps == self._max_iter or self._batches.n_batches == 1
        )
        self._full_next = False
        if self.looked_at_everything:
            return self._full_pass(maximisation(self._prior, state.moments))
        for posterior, total in self.lap():  # noqa: B007
            pass
        return State(posterior, total.moments), total.bound(posterior, self._prior)

    def restart(self, max_iter: int) -> None:
        """Begin anew from another state; the step of number `max_iter` is a full pass."""
        self._n_steps = 0
        self._max_iter = max_iter
        self._full_next = True

    def look_at_everything(self) -> None:
        """Make the next step a full pass."""
        self._full_next = True

    def _full_pass(self, posterior: Posterior) -> tuple[State, float]:
        """Visit every batch under the same posterior."""
        n_batches = self._batches.n_batches
        visits = [visit(posterior, self._batches, b) for b in range(n_batches)]
        self._shares = [share for share, _ in visits]
        total = self._shares[0]
        for other in self._shares[1:]:
            total = total.merge(other, self._shape)
        local = sum(local for _, local in visits)
        return State(posterior, total.moments), local - float(posterior.kl(self._prior))

    def lap(self) -> Iterator[tuple[Posterior, Share]]:
        """Visit every batch once; yield the posterior of each visit and all rows' share after."""
        shares, last = self._shares, self._batches.n_batches - 1
        for b in reversed(range(last)):
            shares[b] = shares[b].merge(shares[b + 1], self._shape)
        total, done = shares[0], None
        for b in range(last + 1):
            posterior = self._prior.update(total.moments)  # the order stays through the lap
            shares[b], _ = visit(posterior, self._batches, b)
            done = shares[b] if done is None else done.merge(shares[b], self._shape)
            total = done if b == last else done.merge(shares[b + 1], self._shape)
            yield posterior, total
