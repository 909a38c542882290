"""Passes that leave out negligible responsibilities.

Once clusters have formed, most responsibilities are zero to working precision. A full pass notes
where they matter. The next passes look there only, until another full pass looks at everything:

* a row that one component has to itself is *settled*. What all settled rows leave behind, their
  statistics, does not change until the next full pass, and says all about their bound;
* the rest is visited row by row; where one visit of a row is long, in pairs of row and component
  that matter, component by component.

Such a pass maximises the same bound over a smaller family (labels that may only be active), so
what it returns is a lower bound still, and it rises by itself. What it gives away is below
`negligible` nats for each pair left out.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from skvi.models.mixture.bound import (
    Posterior,
    State,
    Totals,
    energy,
    floats_per_row,
    maximisation,
    monomials_within,
)
from skvi.models.mixture.components import Components, Moments, add_to
from skvi.models.mixture.missing import IncompleteRows
from skvi.runtime.blocks import Rows, block_rows

# Restricted passes between two full ones, which begin when a pass raises the bound by less than so
# many nats per row: responsibilities of clusters that still form are one-hot too, in many features,
# and those that are left out then would freeze what has to move.
_PERIOD = 7
_STEADY = 1e-2
# A pair costs about twice as much as an element of the full pass's products, and its gathering.
_LARGEST_SHARE_OF_PAIRS = 0.2
# A row that is visited costs a little more than in a full pass.
_LARGEST_SHARE_OF_ROWS = 0.8
# From this many multiplications a row in a product, leaving out rows is worth the noting; and
# from so many, choosing pairs costs less than the products of all.
_WORTHWHILE_PRODUCT = 1000
_FEWEST_ROWS = 10_000
_LONG_PRODUCT = 5000
# The table of pairs and their lists may take this many bytes.
_PAIRS_BYTES = 1 << 26
_CHUNK_ROWS = 4096


def layout(
    shape: type[Components], n_components: int, n_features: int
) -> Literal["rows", "columns"]:
    """How :class:`Rows` should keep what passes read: pairs are gathered from rows."""
    return "rows" if _product(shape, n_components, n_features) >= _LONG_PRODUCT else "columns"


def pays(rows: Rows, shape: type[Components], n_components: int) -> bool:
    """Whether leaving out is worth it: not where rows are converted anew in every pass.

    Nor with missing cells; nor on a GPU, where many small products are slower than one large one.
    """
    if isinstance(rows, IncompleteRows):
        return False
    long = _product(shape, n_components, rows.n_features) >= _WORTHWHILE_PRODUCT
    return long and rows.n_rows >= _FEWEST_ROWS and rows.kept and rows.device.type == "cpu"


def _product(shape: type[Components], n_components: int, n_features: int) -> int:
    """Multiplications a row in each of the two products of a full pass."""
    return n_components * shape.n_monomials(n_features)


class _Focus(NamedTuple):
    """Where the passes between two full ones look.

    Attributes
    ----------
    settled : Moments
        Statistics of the rows that one component has to itself.
    visited : Tensor of shape (R,)
        The other rows.
    pairs : list of Tensor or None
        For each component the places in `visited` of the rows that it matters to; None stands
        for all.
    """

    settled: Moments
    visited: Tensor
    pairs: list[Tensor] | None

    def reordered(self, order: Tensor) -> "_Focus":
        """Return the same under another order of the components."""
        settled, visited, pairs = self
        return _Focus(
            settled.reordered(order), visited, pairs and [pairs[k] for k in order.tolist()]
        )


class AlternatingAscent:
    """Steps of coordinate ascent, most of them over active rows and pairs only.

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

    rises = True

    def __init__(self, prior: Posterior, rows: Rows, *, max_iter: int, negligible: float) -> None:
        K, N = prior.weights.E_log().shape[0], rows.n_rows
        self._prior = prior
        self._rows = rows
        self._max_iter = max_iter
        self._negligible = negligible
        self._owner = torch.empty(N, dtype=torch.int64)  # of settled rows; -1 for the others
        # A pair is a byte of the table, and at most a fifth of all are listed in eight bytes.
        in_pairs = (
            _product(type(prior.components), K, rows.n_features) >= _LONG_PRODUCT
            and 3 * N * K <= _PAIRS_BYTES
        )
        self._needed = torch.empty(N, K, dtype=torch.bool) if in_pairs else None
        self._x, self._weight = rows[slice(None)]  # (N, D), (N,)
        self._focus: _Focus | None = None
        self._steady = _STEADY * float(self._weight.sum())
        self._bound = -math.inf
        self._n_steps = 0
        self._n_restricted = _PERIOD  # begin with a full pass
        self.looked_at_everything = False

    def __call__(self, state: State) -> tuple[State, float]:
        """Return the next state and its bound in nats."""
        self._n_steps += 1
        full = self._n_restricted >= _PERIOD or self._n_steps == self._max_iter
        if not full and self._focus is None:
            self._focus = self._choose(state.posterior)
            full = self._focus is None
        order = self._prior.weights.best_order(state.moments.counts)
        if order is not None:
            state = state._replace(moments=state.moments.reordered(order))
            self._focus = self._focus and self._focus.reordered(order)
        posterior = maximisation(self._prior, state.moments)
        if not full and self._focus is not None:
            # A component that has become ill since the full pass: see `_full_pass`.
            full = bool(self._focus.settled.counts[posterior.components.ill].any())
        if full or self._focus is None:
            moments, local = self._full_pass(posterior)
        else:
            moments, local = self._restricted_pass(posterior, self._focus)
        bound = local - float(posterior.kl(self._prior))
        self._n_restricted = 0 if full else self._n_restricted + 1
        if not bound - self._bound < self._steady:
            self._n_restricted = _PERIOD  # the next one is full
        self._bound = bound
        self.looked_at_everything = full
        return State(posterior, moments), bound

    def restart(self, max_iter: int) -> None:
        """Begin with a full pass from another state; the step of number `max_iter` is full too."""
        self._n_steps = 0
        self._max_iter = max_iter
        self._bound = -math.inf
        self.look_at_everything()

    def look_at_everything(self) -> None:
        """Make the next step a full pass."""
        self._n_restricted = _PERIOD

    def _full_pass(self, posterior: Posterior) -> tuple[Moments, float]:
        """Visit everything, and note which components each row needs."""
        self._focus = None
        totals = Totals(posterior, self._rows.device, self._rows.workspace)
        for where, x, weight in self._rows.blocks(floats_per_row(posterior.components)):
            resp = totals.add(x, weight)  # (K, B), times weight
            largest, owner = resp.max(0)  # (B,)
            others_matter = weight - largest > self._negligible * weight
            self._owner[where] = owner.masked_fill_(others_matter, -1)
            if self._needed is not None:
                self._needed[where] = (resp > self._negligible * weight).T
        # Statistics know a bound to the digits that the monomials keep: see `ill`.
        for k in posterior.components.ill.tolist():
            self._owner[self._owner == k] = -1
        return totals.result()

    def _choose(self, posterior: Posterior) -> _Focus | None:
        """Return where to look, or None if it is nearly everywhere.

        `posterior` is that of the full pass.
        """
        components, N = posterior.components, self._rows.n_rows
        K = components.mean.shape[0]
        visited = (self._owner < 0).nonzero()[:, 0]  # (R,)
        pairs = None
        if self._needed is not None:
            pairs = [column.nonzero()[:, 0] for column in self._needed[visited].T]
            if sum(index.numel() for index in pairs) > _LARGEST_SHARE_OF_PAIRS * N * K:
                return None
        elif len(visited) > _LARGEST_SHARE_OF_ROWS * N:
            return None
        return _Focus(self._settled_moments(components), visited, pairs)

    def _settled_moments(self, components: Components) -> Moments:
        """Return the statistics of the settled rows, each under its owner.

        They are taken about the mean of the owner: clusters may shrink before the next full pass.
        """
        settled = (self._owner >= 0).nonzero()[:, 0]
        if self._x.is_contiguous():
            return self._moments_by_owner(components, settled)
        # Gathering columns in another order takes longer than a product with all components.
        K, sums, workspace = len(components.mean), None, self._rows.workspace
        size = block_rows(floats_per_row(components), self._rows.device)
        for index in settled.split(size):
            owner = self._owner[index]  # (B,)
            diff = self._gather(index).sub_(components.mean[owner])  # (B, D)
            monomials = monomials_within(workspace, components, diff)
            resp = workspace.take("resp", diff, K, len(diff)).zero_()
            resp.scatter_(0, owner[None], self._weight[index][None])
            sums = add_to(sums, components.sums(diff, monomials, resp))
        assert sums is not None  # an empty index has one empty part
        return components.unpack(components.mean, sums)

    def _moments_by_owner(self, components: Components, settled: Tensor) -> Moments:
        """One product over the rows of each component: K times less than one with all."""
        owner = self._owner[settled]
        n_rows = owner.bincount(minlength=len(components.mean)).tolist()
        rows = settled[owner.argsort(stable=True)]
        return self._moments(components, rows.split(n_rows), self._weight[rows].split(n_rows))

    def _moments(
        self, components: Components, rows: Sequence[Tensor], resp: Sequence[Tensor]
    ) -> Moments:
        """Return the statistics of each component's own rows under `resp`, about the means."""
        counts = torch.stack([r.sum() for r in resp])
        first = torch.zeros_like(components.mean)
        second = torch.zeros_like(components.root)
        for k, pair in enumerate(zip(rows, resp, strict=True)):
            into = second[k % len(second)]  # Tied: one scatter for all
            for index, r in zip(*(part.split(_CHUNK_ROWS) for part in pair), strict=True):
                diff = self._gather(index).sub_(components.mean[k])  # (B, D)
                first[k] += r @ diff
                into += components.scatter(diff[None], r[None])[0]
        return Moments(components.mean, counts, first, second)

    def _gather(self, index: Tensor) -> Tensor:
        """Return rows (B, D), read as they are kept."""
        if self._x.is_contiguous():
            return self._x.index_select(0, index)
        return self._x.T.index_select(1, index).T

    def _restricted_pass(self, posterior: Posterior, focus: _Focus) -> tuple[Moments, float]:
        """Visit active rows or pairs; settled rows are known from their statistics."""
        settled, visited, pairs = focus
        if not len(visited):
            return settled, energy(posterior, settled)
        if pairs is None:
            moments, local = self._visit(posterior, visited)
        else:
            moments, local = self._visit_pairs(posterior, visited, pairs)
        # A settled responsibility is one: its entropy is zero, and its energy is its bound.
        return posterior.components.merge(settled, moments), energy(posterior, settled) + local

    def _visit(self, posterior: Posterior, visited: Tensor) -> tuple[Moments, float]:
        """Visit rows as a full pass does."""
        totals = Totals(posterior, self._rows.device, self._rows.workspace)
        size = block_rows(floats_per_row(posterior.components), self._rows.device)
        for index in visited.split(size):
            totals.add(self._gather(index), self._weight[index])
        return totals.result()

    def _visit_pairs(
        self, posterior: Posterior, visited: Tensor, pairs: list[Tensor]
    ) -> tuple[Moments, float]:
        """Visit active pairs: P of them, one component after another."""
        components, E_log_pi = posterior.components, posterior.weights.E_log()
        _ = components.log_prob_constant  # computed here, once, it is inherited by each part
        parts = [components.take(torch.tensor([k])) for k in range(len(pairs))]
        weight = self._weight[visited]  # (R,)
        rows = torch.cat(pairs)  # (P,), places in `visited`
        own = [visited[index] for index in pairs]  # rows of each component
        log_rho = torch.cat(
            [
                part.E_log_prob(part.centred_distance(self._gather(chunk) - part.mean))[0]
                + E_log_pi[k]
                for k, part in enumerate(parts)
                for chunk in own[k].split(_CHUNK_ROWS)
            ]
        )  # (P,)
        largest = log_rho.new_full(weight.shape, -torch.inf)
        largest.scatter_reduce_(0, rows, log_rho, "amax")  # (R,)
        resp = log_rho.sub_(largest[rows]).exp_()
        total = torch.zeros_like(weight).index_add_(0, rows, resp)
        bound = weight @ (largest + total.log())
        resp.mul_((weight / total)[rows])
        shares = resp.split([len(index) for index in pairs])
        return self._moments(components, own, shares), float(bound)
