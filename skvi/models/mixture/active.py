"""Passes that leave out negligible responsibilities.

Once clusters have formed, a row shares its responsibility among few components; all others get
zero to working precision. A full pass notes which pairs of row and component matter. The next
passes visit these pairs only, component by component and through centred rows, until another full
pass looks at everything again.

A pass over active pairs maximises the same bound over a smaller family (labels that may only be
active), so what it returns is a lower bound still, and it rises by itself. What it gives away is
below `negligible` nats for each pair left out.
"""

import torch
from torch import Tensor

from skvi.models.mixture.bound import Posterior, State, Totals, floats_per_row, maximisation
from skvi.models.mixture.components import Components, Moments
from skvi.runtime.blocks import Rows

# Restricted passes between two full ones.
_PERIOD = 7
# A pair costs about twice as much as an element of the full pass's products, and its gathering.
_LARGEST_SHARE = 0.2
# The resident copy of the rows, and the table of pairs, may take this many bytes.
_RESIDENT_BYTES = 1 << 27
# Below this many multiplications a row, the two products of a full pass cost less than choosing.
_LONG_PRODUCT = 5000
_CHUNK_ROWS = 4096


def pays(rows: Rows, shape: type[Components], n_components: int) -> bool:
    """Whether keeping pairs of these rows is possible within bounded memory, and worth it."""
    fits = rows.n_rows * max(8 * rows.n_features, 8 * n_components) <= _RESIDENT_BYTES
    long = n_components * shape.n_monomials(rows.n_features) >= _LONG_PRODUCT
    # On a GPU many small products are slower than one large one.
    return fits and long and rows.device.type == "cpu"


class AlternatingAscent:
    """Steps of coordinate ascent, most of them over active pairs only.

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
        self._x, self._weight = rows[slice(None)]  # (N, D), (N,)
        self._active: list[Tensor] = []  # rows of each component
        self._n_steps = 0
        self._n_restricted = _PERIOD  # begin with a full pass
        self.looked_at_everything = False

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""
        self._n_steps += 1
        full = self._n_restricted >= _PERIOD or self._n_steps == self._max_iter
        if not full and not self._active:
            self._active = [column.nonzero()[:, 0] for column in self._needed.T]
            n_pairs = sum(index.numel() for index in self._active)
            full = n_pairs > _LARGEST_SHARE * self._needed.numel()
        posterior = maximisation(self._prior, state.moments)
        moments, local = self._full_pass(posterior) if full else self._restricted_pass(posterior)
        self._n_restricted = 0 if full else self._n_restricted + 1
        self.looked_at_everything = full
        return State(posterior, moments), local - float(posterior.kl(self._prior))

    def restart(self, max_iter: int) -> None:
        """Begin with a full pass from another state; the step of number `max_iter` is full too."""
        self._n_steps = 0
        self._max_iter = max_iter
        self.look_at_everything()

    def look_at_everything(self) -> None:
        """Make the next step a full pass."""
        self._n_restricted = _PERIOD

    def _full_pass(self, posterior: Posterior) -> tuple[Moments, float]:
        """Visit everything, and note which components each row needs."""
        self._active = []
        totals = Totals(posterior, self._rows.device)
        for where, x, weight in self._rows.blocks(floats_per_row(posterior.components)):
            resp = totals.add(x, weight)  # (K, B), times weight
            self._needed[where] = (resp > self._negligible * weight).T
        return totals.result()

    def _restricted_pass(self, posterior: Posterior) -> tuple[Moments, float]:
        """Visit the active pairs: P of them, one component after another."""
        components, E_log_pi = posterior.components, posterior.weights.E_log()
        _ = components.log_prob_constant  # computed here, once, it is inherited by each part
        parts = [components.take(torch.tensor([k])) for k in range(len(self._active))]
        rows = torch.cat(self._active)  # (P,)
        log_rho = torch.cat(
            [
                part.E_log_prob(part.centred_distance(self._x.index_select(0, chunk) - part.mean))[
                    0
                ]
                + E_log_pi[k]
                for k, part in enumerate(parts)
                for chunk in self._active[k].split(_CHUNK_ROWS)
            ]
        )  # (P,)
        largest = log_rho.new_full(self._weight.shape, -torch.inf)
        largest.scatter_reduce_(0, rows, log_rho, "amax")  # (N,)
        resp = log_rho.sub_(largest[rows]).exp_()
        total = torch.zeros_like(self._weight).index_add_(0, rows, resp)
        bound = self._weight @ (largest + total.log())
        resp.mul_((self._weight / total)[rows])

        counts = torch.zeros_like(E_log_pi)
        first = torch.zeros_like(components.mean)
        second = torch.zeros_like(components.root)
        start = 0
        for k, part in enumerate(parts):
            into = second[k % len(second)]  # Tied: one scatter for all
            for chunk in self._active[k].split(_CHUNK_ROWS):
                r = resp[start : start + len(chunk)]
                start += len(chunk)
                diff = self._x.index_select(0, chunk) - part.mean  # (B, D)
                counts[k] += r.sum()
                first[k] += r @ diff
                into += part.scatter(diff[None], r[None])[0]
        return Moments(components.mean, counts, first, second), float(bound)
