r"""Stochastic natural-gradient steps: one batch speaks for all rows.

In the natural parameters of the posterior, prior plus statistics, a step of length

.. math::
    \rho_t = (t + \tau)^{-\kappa}

along the natural gradient blends statistics: :math:`S \leftarrow (1 - \rho_t) S +
\rho_t \tfrac{W}{W_b} S_b` for a batch of weight :math:`W_b` out of W. Source: Hoffman, Blei, Wang
& Paisley (2013), Stochastic variational inference, equations 26 and 34.
"""

import numpy as np

from skvi.models.mixture.bound import Posterior, Share, State, expectation, maximisation
from skvi.models.mixture.memoized import visit
from skvi.runtime.batches import Batches


class StochasticAscent:
    """Epochs of natural-gradient steps over batches in random order.

    Call it as a step: an epoch, or a full pass. The bound of an epoch is that of the posterior at
    its end and of the responsibilities that each batch had when it was visited, so it is exact,
    but it need not rise. The step of number `max_iter` is a full pass: coordinate ascent.

    Parameters
    ----------
    prior : Posterior
    batches : Batches
    rng : numpy.random.Generator
    offset : float
        tau, at least 1: damps the first steps.
    decay : float
        kappa in (0.5, 1].
    max_iter : int
    """

    rises = False

    def __init__(
        self,
        prior: Posterior,
        batches: Batches,
        rng: np.random.Generator,
        *,
        offset: float,
        decay: float,
        max_iter: int,
    ) -> None:
        self._prior = prior
        self._batches = batches
        self._rng = rng
        self._offset = offset
        self._decay = decay
        self._max_iter = max_iter
        self._n_visits = 0
        self._n_steps = 0
        self._full_next = False
        self.looked_at_everything = False

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""
        self._n_steps += 1
        self.looked_at_everything = self._full_next or self._n_steps == self._max_iter
        self._full_next = False
        if self.looked_at_everything:
            posterior = maximisation(self._prior, state.moments)
            moments, local = expectation(posterior, self._batches.rows)
            return State(posterior, moments), local - float(posterior.kl(self._prior))
        return self._epoch(state)

    def restart(self, max_iter: int) -> None:
        """Begin anew from another state; the step of number `max_iter` is a full pass."""
        self._n_steps = 0
        self._max_iter = max_iter
        self._full_next = False

    def look_at_everything(self) -> None:
        """Make the next step a full pass."""
        self._full_next = True

    def _epoch(self, state: State) -> tuple[State, float]:
        prior, shape = self._prior, type(self._prior.components)
        moments = prior.ordered(state.moments)
        seen: Share | None = None
        for b in self._rng.permutation(self._batches.n_batches).tolist():
            posterior = prior.update(moments)  # the order stays through the epoch
            share, _ = visit(posterior, self._batches, b)
            seen = share if seen is None else seen.merge(share, shape)
            step = (self._n_visits + self._offset) ** -self._decay
            self._n_visits += 1
            spoken = share.moments.scaled(step * self._batches.n_batches)
            moments = shape.merge(moments.scaled(1.0 - step), spoken)
        assert seen is not None  # there is a batch
        posterior = prior.update(moments)
        return State(posterior, moments), seen.bound(posterior, prior)
