r"""Moves: other responsibilities from which coordinate ascent may reach a higher bound.

With labels q(z) given, the best bound is

.. math::
    \sum_k \log Z_k + \log Z_\pi(N_1, \ldots, N_K) + H[q(z)],

the evidence of the rows of each component, that of the counts, and the entropy of the labels. A
merge adds responsibilities, so its first two terms follow from statistics and the third from one
pass; a split divides those of one component, so all that changes is the bound of a small mixture
of that component's rows. What these predict is what the next pass will find, or less: a
prediction that is exact costs one pass to carry out. Proposals are predicted on a sample where
the rows are many; the caller keeps what a pass over all rows finds better.

Where cells are missing, the statistics of Diag and Spherical count the cells of each feature, and
all this holds as it stands. Those of Full and Tied are of rows completed under their own component.
A merge that keeps the completions ``q(x_mis | z)`` makes one component's completion a mixture of
two, whose entropy is at least the mean of theirs: what is predicted without that rise is a lower
bound again.

References: Ueda & Ghahramani (2002), Bayesian model search for mixture models based on optimizing
variational bounds; Hughes & Sudderth (2013), Memoized online variational inference for Dirichlet
process mixture models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.models.mixture import missing
from skvi.models.mixture.bound import (
    Posterior,
    State,
    coordinate_ascent,
    expectation,
    floats_per_row,
    log_rho,
)
from skvi.models.mixture.components import Components, Moments, Tied, Wishart
from skvi.models.mixture.missing import Cells, IncompleteRows
from skvi.models.mixture.start import (
    choose_centres,
    nearest,
    one_hot,
    sample_rows,
    statistics,
)
from skvi.runtime.blocks import Affine, Rows
from skvi.runtime.linalg import inv_chol

MOVES = ("merge", "delete", "birth", "reorder")

# Proposals look at no more rows than fit into this many bytes with their responsibilities, or than
# so many a component: what is left of small ones decides whether they are found to be in the way.
# The last limit holds for those, too.
_SAMPLE_BYTES = 1 << 23
_ROWS_PER_COMPONENT = 250
_LARGEST_SAMPLE_BYTES = 1 << 26
# A component with less weight than this, in rows, is an empty slot.
EMPTY = 0.5
# Responsibilities below this do not take part in the split of a component.
_SMALL = 1e-3
# Partners of a component that its merges are looked for among.
_N_NEIGHBOURS = 10
# Passes over the rows of one component that a split may take, and the rise in nats per row, from
# one to the next, that is worth another.
_SPLIT_PASSES = 15
_SPLIT_TOL = 1e-3
_CUT_PASSES = 10
# Relative differences below this may be rounding: see docs/decisions/0003.
_ROUNDING = 1e-9
# What is predicted of a deletion leaves out that the neighbours adapt to the rows they get, and of
# many merges that all adapt: the best are tried though they look worse by this many nats.
_SLACK = 20.0
# Merges go on while they are predicted to lose less than this together, in nats.
_BARRIER = 200.0
# Counts of sets of moves whose evidence is computed at once.
_COUNTS_AT_ONCE = 1 << 18
# Single moves that are tried after the joint one failed.
_N_SINGLE = 3


class Move(NamedTuple):
    """Components that go, and what takes their rows.

    Attributes
    ----------
    gain : float
        Of the bound in nats, the part of the weights left out.
    old : tuple of int
        Components that go.
    new : Moments
        About their own means; none after a deletion. For Tied the second moment is what is added
        to the scatter that all share.
    doubt : float
        What `gain` may lack, in nats: where cells are missing, that of a merge is a lower bound.
    """

    gain: float
    old: tuple[int, ...]
    new: Moments
    doubt: float = 0.0


class Survey(NamedTuple):
    """What one pass over the sample says about every component.

    Attributes
    ----------
    x : Tensor of shape (M, D)
        NaN where cells are missing.
    weight : Tensor of shape (M,)
    members : list of (Tensor, Tensor)
        Per component the indices of its rows, and their responsibilities.
    mixing : Tensor of shape (P,)
        Entropy that would be lost if the two components of a pair were one, in nats.
    removal : Tensor of shape (K,)
        Loss of the local bound, in nats, if a component were not there.
    completed : Tensor of shape (K,)
        Weight of the cells that were completed under a component.
    """

    x: Tensor
    weight: Tensor
    members: list[tuple[Tensor, Tensor]]
    mixing: Tensor
    removal: Tensor
    completed: Tensor


class Proposals:
    """Find states that may lead to a higher bound.

    Call it with a state to get proposals, best first. Components whose split was found not to
    pay are remembered.

    Parameters
    ----------
    prior : Posterior
    rows : Rows
    kinds : collection of str
        Some of `MOVES`.
    rng : numpy.random.Generator
    """

    def __init__(
        self, prior: Posterior, rows: Rows, kinds: Collection[str], rng: np.random.Generator
    ) -> None:
        self._device = rows.device
        self._kind = type(rows)
        self._prior = prior.map(lambda array: array.cpu())
        self._kinds = frozenset(kinds)
        self._rng = rng
        K = len(prior.weights.E_log())
        size = 8 * (rows.n_features + K)
        of_components = min(_ROWS_PER_COMPONENT * K, _LARGEST_SAMPLE_BYTES // size)
        most = max(of_components, _SAMPLE_BYTES // size)
        x, weight = sample_rows(rows, rng, most)
        weight = np.where(np.isnan(x).all(axis=1), 0.0, weight)  # they say nothing
        self._x, self._weight = torch.from_numpy(x), torch.from_numpy(weight)
        self._indivisible: list[tuple[float, Tensor]] = []  # counts and means

    def __call__(self, state: State) -> Iterator[State]:
        """Yield states to try, best first."""
        posterior = state.posterior.map(lambda array: array.cpu())
        moments = centred(state.moments.map(lambda array: array.cpu()), type(posterior.components))
        full = (moments.counts >= EMPTY).nonzero()[:, 0]
        if not full.numel():
            return
        pairs = self._candidate_pairs(posterior.components, moments, full)
        survey = self._look(posterior, pairs)
        merges = self._merges(moments, pairs, survey)
        deletions = self._deletions(posterior, moments, full, survey)
        n_free = len(moments.counts) - full.numel()
        splits = self._splits(posterior, moments, full, survey, n_free)
        for chosen in self._choose(moments, merges, deletions, splits):
            proposal = combine(moments, chosen, type(posterior.components))
            yield State(state.posterior, proposal.map(lambda array: array.to(self._device)))
        gain, fewer = self._agglomerate(moments, pairs, survey)
        if gain > -_SLACK:
            yield State(state.posterior, fewer.map(lambda array: array.to(self._device)))

    # -- what is to be tried -------------------------------------------------------------------

    def _choose(
        self,
        moments: Moments,
        merges: list[Move],
        deletions: list[Move],
        splits: list[Move],
    ) -> Iterator[list[Move]]:
        """Yield sets of moves whose predicted gain is positive: all together, then one by one."""
        ranked = sorted(merges + deletions + splits, key=lambda move: -move.gain)
        gains = self.gains(moments, [[move] for move in ranked])
        single = [[move] for move, gain in zip(ranked, gains, strict=True) if gain > 0.0]
        joint = self._disjoint(moments, [move for (move,) in single])
        if joint and self.gain(moments, joint) > 0.0:
            yield joint
        fitting = [chosen for chosen in single if self._fits(moments, chosen)]
        alone = fitting[:_N_SINGLE] if len(joint) > 1 else []
        yield from alone
        # A split that pays more than it costs to make room for it.
        pairs = [
            [away, split]
            for split in splits
            for away in merges + deletions
            if not set(away.old) & set(split.old) and self._fits(moments, [away, split])
        ]
        gains = self.gains(moments, pairs)
        exchanges = [(gain, pair) for gain, pair in zip(gains, pairs, strict=True) if gain > 0.0]
        exchanges.sort(key=lambda exchange: -exchange[0])
        together = self._disjoint(moments, [m for _, pair in exchanges for m in pair], pairs=True)
        if len(together) > 2:
            yield together
        yield from (pair for _, pair in exchanges[:_N_SINGLE])
        # On a sample, splits promise too much: they must not take the others down with them.
        fewer = self._disjoint(moments, [m for (m,) in single if len(m.new.counts) < len(m.old)])
        splits_joined = any(len(move.new.counts) > 1 for move in joint)
        if splits_joined and fewer and fewer not in alone and self.gain(moments, fewer) > 0.0:
            yield fewer
        # Merges that may pay though a lower bound of their gain does not say so.
        gains = self.gains(moments, [[move] for move in merges])
        doubtful = [
            (gain + move.doubt, [move])
            for gain, move in zip(gains, merges, strict=True)
            if gain <= 0.0 < gain + move.doubt
        ]
        doubtful.sort(key=lambda pair: -pair[0])
        yield from (chosen for _, chosen in doubtful[:_N_SINGLE])
        if deletions and -_SLACK < deletions[0].gain <= 0.0:
            yield deletions[:1]

    def _disjoint(self, moments: Moments, ranked: list[Move], *, pairs: bool = False) -> list[Move]:
        """Take moves in turn, one by one or two by two, that touch nothing taken before."""
        chosen: list[Move] = []
        taken: set[int] = set()
        step = 2 if pairs else 1
        for i in range(0, len(ranked), step):
            some = ranked[i : i + step]
            if any(taken & set(move.old) for move in some):
                continue
            if self._fits(moments, chosen + some):
                chosen += some
                taken.update(k for move in some for k in move.old)
        return chosen

    def _fits(self, moments: Moments, moves: Sequence[Move]) -> bool:
        occupied = int((moments.counts >= EMPTY).sum())
        change = sum(len(move.new.counts) - len(move.old) for move in moves)
        return occupied + change <= len(moments.counts)

    def gain(self, moments: Moments, moves: Sequence[Move]) -> float:
        """Predicted gain of moves together, in nats."""
        return self.gains(moments, [moves])[0]

    def gains(self, moments: Moments, sets: Sequence[Sequence[Move]]) -> list[float]:
        """Predicted gain of each set of moves, in nats."""
        K = len(moments.counts)
        result: list[float] = []
        size = max(1, _COUNTS_AT_ONCE // K)
        for start in range(0, len(sets), size):
            some = sets[start : start + size]
            after = []
            for moves in some:
                # A deletion's rows stay in the counts: its gain includes what their labels cost.
                moving = [move for move in moves if len(move.new.counts)]
                counts = moments.counts.clone()
                counts[[k for move in moving for k in move.old]] = 0.0
                counts = torch.cat([counts, *(move.new.counts for move in moving)])
                after.append(counts.sort(descending=True).values[:K])
            rises = self._weights_gain(moments.counts, torch.stack(after)).tolist()
            totals = [sum(move.gain for move in moves) for moves in some]
            result += [rise + total for rise, total in zip(rises, totals, strict=True)]
        return result

    def _weights_gain(self, before: Tensor, after: Tensor) -> Tensor:
        """Gain of the evidence of counts (..., K) over others (K,), all in their best order."""
        evidence = self._prior.weights.log_evidence
        old, new = (counts.sort(descending=True).values for counts in (before, after))
        return evidence(new) - evidence(old)

    # -- one pass over the sample ----------------------------------------------------------------

    def _candidate_pairs(self, components: Components, moments: Moments, full: Tensor) -> Tensor:
        """Pairs (P, 2) of components that lie near each other."""
        if "merge" not in self._kinds or full.numel() < 2:
            return full.new_empty(0, 2)
        some = components.take(full)
        mean = moments.reference[full]  # (L, D)
        affinity = some.E_log_prob(some.centred_distance(mean - some.mean[:, None, :]))  # (L, L)
        affinity = torch.maximum(affinity, affinity.T).fill_diagonal_(-torch.inf)
        near = affinity.topk(min(_N_NEIGHBOURS, len(full) - 1)).indices  # (L, n)
        first = torch.arange(len(full))[:, None].expand_as(near)
        pairs = torch.stack([first.reshape(-1), near.reshape(-1)], 1).sort(1).values.unique(dim=0)
        return full[pairs]

    def _look(self, posterior: Posterior, pairs: Tensor) -> Survey:
        K = len(posterior.components.mean)
        i, j = pairs.T
        rows = self._rows(self._x, self._weight)
        mixing = torch.zeros(len(pairs), dtype=torch.float64)
        removal = torch.zeros(K, dtype=torch.float64)
        completed = torch.zeros(K, dtype=torch.float64)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for where, x, weight in rows.blocks(floats_per_row(posterior.components) + 3 * len(pairs)):
            rho = log_rho(posterior, x)  # (K, B)
            total = rho.logsumexp(0)
            resp = (rho - total).exp()
            each = torch.xlogy(resp, resp) @ weight  # (K,)
            merged = resp[i] + resp[j]  # (P, B)
            mixing += torch.xlogy(merged, merged) @ weight - each[i] - each[j]
            # log(1 - r); for the largest r of a row from what is left, which keeps its digits
            loss = torch.log1p(-resp.clamp_max(0.5))
            top = rho.argmax(0, keepdim=True)
            rest = rho.scatter(0, top, -torch.inf).logsumexp(0)
            loss.scatter_(0, top, (rest - total)[None])
            removal += loss @ weight
            if isinstance(x, Cells) and isinstance(posterior.components, Wishart):
                completed += resp @ (weight * (~x.observed).sum(-1))
            k, n = (resp > _SMALL).nonzero().T
            found.append((k, n + where.start, resp[k, n]))
        k, n, r = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = k.argsort(stable=True)
        sizes = torch.bincount(k, minlength=K).tolist()
        members = list(zip(n[order].split(sizes), r[order].split(sizes), strict=True))
        return Survey(self._x, self._weight, members, mixing, removal, completed)

    def _rows(self, x: Tensor, weight: Tensor) -> Rows:
        D = x.shape[-1]
        identity = Affine(np.zeros(D), np.ones(D))
        return self._kind(x.numpy(), identity, torch.device("cpu"), weight.numpy())

    # -- moves -----------------------------------------------------------------------------------

    def _merges(self, moments: Moments, pairs: Tensor, survey: Survey) -> list[Move]:
        if not len(pairs):
            return []
        i, j = pairs.T
        evidence, merged = merge_gains(self._prior.components, moments, i, j)
        gain: list[float] = (evidence - survey.mixing).tolist()
        best = sorted(range(len(pairs)), key=lambda p: -gain[p])[: len(moments.counts)]
        # Each row of a component that goes is completed anew: worth about a nat a cell.
        doubt = torch.minimum(survey.completed[i], survey.completed[j]).tolist()
        return [Move(gain[p], tuple(pairs[p].tolist()), _part(merged, p), doubt[p]) for p in best]

    def _agglomerate(
        self, moments: Moments, pairs: Tensor, survey: Survey
    ) -> tuple[float, Moments]:
        """Merge on past losses, the best pair each time; the best gain of several merges, in nats.

        Where rows are few, no two components may pay as one although many of them do. The entropy
        of rows that three components share is counted for each pair of them, which is too much,
        since ``h(r) = r log r`` has a falling second derivative: without missing cells what is
        predicted is a lower bound, as long as all pairs that share rows are among `pairs`. With
        more components than neighbours of each it may promise too much.
        """
        shape = type(self._prior.components)
        current, mixing, completed = moments, survey.mixing, survey.completed
        total, n_merges = 0.0, 0
        best, most, expected = moments, -torch.inf, 0.0
        while len(pairs) and expected > -_BARRIER:
            i, j = pairs.T
            evidence, merged = merge_gains(self._prior.components, current, i, j)
            gain = evidence - mixing
            p = int(gain.argmax())
            a, b = pairs[p].tolist()
            total += float(gain[p] + torch.minimum(completed[a], completed[b]))
            current = combine(current, [Move(0.0, (a, b), _part(merged, p))], shape)
            n_merges += 1
            expected = total + float(self._weights_gain(moments.counts, current.counts))
            if n_merges > 1 and expected > most:
                best, most = current, expected
            # What stays moves up, the new component comes after it.
            stay = [k for k in range(len(completed)) if k not in (a, b)]
            place = torch.full((len(completed),), len(stay))
            place[stay] = torch.arange(len(stay))
            completed = torch.cat([completed[stay], completed[[a, b]].sum(0, keepdim=True)])
            completed = torch.nn.functional.pad(completed, (0, 1))
            pairs, which = place[pairs].sort(1).values.unique(dim=0, return_inverse=True)
            mixing = torch.zeros(len(pairs), dtype=mixing.dtype).index_add(0, which, mixing)
            apart = pairs[:, 0] != pairs[:, 1]
            pairs, mixing = pairs[apart], mixing[apart]
        return most, best

    def _deletions(
        self, posterior: Posterior, moments: Moments, full: Tensor, survey: Survey
    ) -> list[Move]:
        if "delete" not in self._kinds or full.numel() < 2:
            return []
        prior, components = self._prior.components, posterior.components
        nothing = moments.map(lambda array: array[:0])
        moves = []
        for k in full.tolist():
            part = components.take(torch.tensor([k]))
            price = part.kl(prior)
            if isinstance(part, Tied) and isinstance(prior, Tied):
                price = price - part.kl_precision(prior)
                share = -moments.second * moments.counts[k] / moments.counts.sum()
                nothing = nothing._replace(second=share)
            moves.append(Move(float(survey.removal[k] + price), (k,), nothing))
        return sorted(moves, key=lambda move: -move.gain)[:_N_NEIGHBOURS]

    def _splits(
        self, posterior: Posterior, moments: Moments, full: Tensor, survey: Survey, n_free: int
    ) -> list[Move]:
        if "birth" not in self._kinds or len(moments.counts) < 2:
            return []
        n_parts = max(2, 1 + n_free // full.numel())
        moves = []
        for k in full.tolist():
            known = self._is_indivisible(posterior.components, moments, k)
            part = posterior.components.take(torch.tensor([k]))
            try:
                move = None if known else self._split(moments, survey, k, part, n_parts)
            except torch.linalg.LinAlgError:
                move = None  # one that cannot be fitted leaves the others alone
            if move is not None:
                moves.append(move)
            elif not known:
                self._indivisible.append((float(moments.counts[k]), moments.reference[k]))
        return moves

    def _is_indivisible(self, components: Components, moments: Moments, k: int) -> bool:
        """Whether a split of (nearly) the same rows has failed before."""
        part = components.take(torch.tensor([k]))
        count = float(moments.counts[k])
        for before, mean in self._indivisible:
            if abs(count - before) < 0.02 * count:
                distance = part.centred_distance((mean - moments.reference[k])[None, None])
                if float(part.precision_dof.max() * distance) < 0.01 * part.n_features:
                    return True
        return False

    def _split(
        self, moments: Moments, survey: Survey, k: int, part: Components, n_parts: int
    ) -> Move | None:
        """Fit a mixture to the rows of component k alone, if it pays to put it in its place.

        `part` is its posterior.
        """
        index, resp = survey.members[k]
        if not len(index):
            return None  # many rows, none of them with more than a trace
        weight = survey.weight[index] * resp
        rows = self._rows(survey.x[index], weight)
        shape = type(self._prior.components)
        prior = Posterior(self._prior.weights.map(lambda a: a[:n_parts]), self._prior.components)
        single = prior.weights.map(lambda a: a[:1])
        one, _ = expectation(Posterior(single, part), rows)
        if isinstance(prior.components, Tied):
            cavity = self._cavity(moments, one)
            if cavity is None:
                return None
            prior = prior._replace(components=cavity)
        alone = float(prior.components.log_evidence(prior.components.update(one)).sum())
        if isinstance(rows, IncompleteRows):
            # The evidence of completed rows lacks what their completion leaves open.
            alone, _ = _small_climb(Posterior(single, prior.components), rows, one)
        for first in self._first_parts(rows, part, n_parts, self._metric(moments, k)):
            found = _small_mixture(prior, rows, first)
            if found is None:
                continue
            bound, new = found
            if shape is Tied:
                new = new._replace(second=new.second - centred(one, shape).second)
            move = Move(bound - alone, (k,), new)
            if self.gain(moments, [move]) > 0.0:
                return move
        return None

    def _metric(self, moments: Moments, k: int) -> Tensor:
        """Mean covariance (D, D) of the components but one; the identity if there is no other."""
        D = moments.reference.shape[-1]
        counts, second = moments.counts.clone(), moments.second
        if len(second) > 1:
            counts[k] = 0.0
            second = second[counts >= EMPTY]
        total = moments.seen[counts >= EMPTY].sum(0)  # (1,) or (D,)
        scatter = second.sum(0)  # about the means
        if not bool((total > 0.0).any()) or not bool((scatter > 0.0).any()):
            return torch.eye(D, dtype=torch.float64)
        if scatter.ndim == 0:
            scatter, total = scatter / D, total.mean()
        covariance = scatter / total.clamp_min(torch.finfo(total.dtype).tiny)
        if covariance.ndim < 2:
            covariance = covariance * torch.eye(D, dtype=torch.float64)
        # Directions in which nothing varies stay harmless.
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(D, dtype=torch.float64)
        # Equal rows leave a scatter of rounding, of either sign.
        is_positive = not bool(torch.linalg.cholesky_ex(covariance).info)
        return covariance if is_positive else torch.eye(D, dtype=torch.float64)

    def _first_parts(
        self, rows: Rows, part: Components, n_parts: int, metric: Tensor
    ) -> Iterator[Moments]:
        """Statistics from which the mixture of one component's rows starts.

        Labels are found for rows that the component completes.
        """
        x, weight = rows[slice(None)]
        whole = missing.completed(part, x)[0][0] if isinstance(x, Cells) else x  # (B, D)
        centres = choose_centres("k-means++", self._rows(whole, weight), n_parts, self._rng)
        yield _of_labels(rows, type(part), n_parts, nearest(centres, whole), whole, metric)
        for labels in halves(whole, weight, metric):
            yield _of_labels(rows, type(part), n_parts, labels.long(), whole, metric)

    def _cavity(self, moments: Moments, one: Moments) -> Components | None:
        """Tied: the prior of the shared precision that the rows of other components make."""
        prior = self._prior.components
        everything = prior.update(moments)
        alone = prior.update(one)
        scale = everything.inverse_scale() - alone.inverse_scale() + prior.inverse_scale()
        root, info = torch.linalg.cholesky_ex(scale)
        dof = everything.dof - one.counts.sum()
        if bool(info.any()):
            return None  # a sample may see a wider component than all rows do
        return type(prior)(prior.mean, prior.kappa, dof, root)


def _of_labels(
    rows: Rows,
    shape: type[Components],
    n_parts: int,
    labels: Tensor,
    whole: Tensor,
    metric: Tensor,
) -> Moments:
    """Statistics of rows with hard labels (B,).

    Missing cells of Full and Tied are completed anew, as in components with the covariance
    `metric` around the mean cells of the parts; where a part has none, around those of the
    rows as they are completed in `whole` (B, D).
    """
    x, weight = rows[slice(None)]
    resp = one_hot(labels, n_parts)
    r = resp * weight
    tiny = torch.finfo(r.dtype).tiny
    mean = r @ whole / r.sum(-1, keepdim=True).clamp_min(tiny)
    if isinstance(x, Cells):
        seen = r @ x.observed.double()
        mean = torch.where(seen > 0.0, r @ x.x / seen.clamp_min(tiny), mean)
    return statistics(rows, missing.around(shape, mean, metric), lambda where, _: resp[:, where])


def _small_climb(prior: Posterior, rows: Rows, first: Moments) -> tuple[float, Moments]:
    """Climb for a few passes; the bound without its weights, and the statistics."""
    state = State(prior, first)
    step = coordinate_ascent(prior, rows)
    total, before = float(first.counts.sum()), -np.inf
    for _ in range(_SPLIT_PASSES):
        state, bound = step(state)
        if not bound - before > _SPLIT_TOL * total:
            break
        before = bound
    weights = state.posterior.weights
    bound -= float(state.moments.counts @ weights.E_log() - weights.kl(prior.weights))
    return bound, state.moments


def _small_mixture(prior: Posterior, rows: Rows, first: Moments) -> tuple[float, Moments] | None:
    """Fit the mixture; its bound, and the statistics of the parts if they are more than one.

    The weights of all components together are judged elsewhere.
    """
    bound, moments = _small_climb(prior, rows, first)
    new = centred(moments, type(prior.components))
    kept = (new.counts >= EMPTY).nonzero()[:, 0]
    return (bound, new.reordered(kept)) if len(kept) > 1 else None


def halves(x: Tensor, weight: Tensor, metric: Tensor) -> Iterator[Tensor]:
    r"""Cut weighted rows (B, D) in two across directions in which they look like two; masks (B,).

    First the direction of the largest variance relative to `metric`, (D, D): two clusters are
    wide where one is narrow. Then those of extreme kurtosis, the extreme eigenvectors of
    ``sum w |z|^2 z z'`` for whitened rows z: two clusters of like size have a low kurtosis along
    the line between their centres, a small and a large one a high one (Tyler et al. 2009,
    Invariant co-ordinate selection). Neither depends on units and correlations of the features.
    """
    total = weight.sum()
    diff = x - (weight @ x) / total
    covariance = (weight[:, None] * diff).T @ diff / total
    spread, axes = torch.linalg.eigh(covariance)
    # Directions without spread tell nothing.
    used = spread > 1e-10 * spread[-1]
    if not bool(used.any()):
        return
    unit = inv_chol(torch.linalg.cholesky(metric))
    towards = torch.from_numpy(np.random.default_rng(0).standard_normal(x.shape[-1]))
    _, widest = _extreme_directions(unit @ covariance @ unit.mT, towards)
    yield _cut(diff @ (unit.mT @ widest), weight)
    whitener = axes[:, used] / spread[used].sqrt()  # (D, <= D)
    z = diff @ whitener
    fourth = (weight * z.square().sum(-1))[:, None] * z
    for direction in _extreme_directions(fourth.T @ z, whitener.T @ towards):
        yield _cut(z @ direction, weight)


def _extreme_directions(matrix: Tensor, towards: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (D,) of the least and the largest eigenvalue of a symmetric matrix (D, D).

    Signs, and the basis where several eigenvalues are the same, are a matter of rounding. So it
    is the projection of `towards` (D,) on the eigenspace.
    """
    values, vectors = torch.linalg.eigh(matrix)
    same = _ROUNDING * values.abs().max()
    least = vectors[:, values <= values[0] + same]
    largest = vectors[:, values >= values[-1] - same]
    return least @ (least.T @ towards), largest @ (largest.T @ towards)


def _cut(along: Tensor, weight: Tensor) -> Tensor:
    """Two means on a line: whether each row (B,) belongs to the higher one."""
    total = weight.sum()
    # Rows on a cut are found on the same side whatever their rounding.
    margin = _ROUNDING * along.abs().max()
    cut = torch.zeros((), dtype=torch.float64)
    for _ in range(_CUT_PASSES):
        high = along > cut + margin
        share = weight @ high.double()
        if not 0.0 < float(share) < float(total):
            break
        mean_high = weight @ (along * high) / share
        mean_low = weight @ (along * ~high) / (total - share)
        cut = 0.5 * (mean_high + mean_low)
    return along > cut + margin


def centred(moments: Moments, shape: type[Components]) -> Moments:
    """Return the same statistics about the mean of each component."""
    offset = moments.offset()
    return moments._replace(
        reference=moments.reference + offset,
        first=torch.zeros_like(offset),
        second=moments.second + shape.lever(offset, -moments.seen),
    )


def merge_gains(
    prior: Components, moments: Moments, i: Tensor, j: Tensor
) -> tuple[Tensor, Moments]:
    """Gain of the evidence of components i, j (P,) as one, (P,), and its centred statistics.

    For Tied the second moments are what each merge adds to the shared scatter, (P, D, D).
    """
    shape = type(prior)
    reference, counts, second = moments.reference, moments.counts, moments.second
    n_i, n_j = moments.seen[i], moments.seen[j]  # (P, 1), or (P, D) of the cells
    n = n_i + n_j
    share = n_j / n.clamp_min(torch.finfo(n.dtype).tiny)
    apart = reference[j] - reference[i]  # (P, D)
    mean = reference[i] + share * apart
    between = share * n_i
    if isinstance(prior, Tied):
        added = between[:, :, None] * apart[:, :, None] * apart[:, None, :]
    else:
        added = second[i] + second[j] + shape.lever(apart, between)
    cells = None if moments.cells is None else n
    merged = Moments(mean, counts[i] + counts[j], torch.zeros_like(mean), added, cells)
    if isinstance(prior, Tied):
        return _tied_gains(prior, moments, i, j), merged
    each = prior.log_evidence(prior.update(moments))  # (K,)
    together = prior.log_evidence(prior.update(merged))  # (P,)
    return together - each[i] - each[j], merged


def _tied_gains(prior: Tied, moments: Moments, i: Tensor, j: Tensor) -> Tensor:
    r"""Gain of the evidence of merges under a shared precision, (P,).

    A merge changes the inverse scale ``W^-1`` by ``A Q A'`` with two columns ``A``, the means of
    the two relative to m0, so that its determinant changes by ``det(I + Q A' W A)``.
    """
    posterior = prior.update(moments)
    n_i, n_j = moments.counts[i], moments.counts[j]
    n = n_i + n_j
    white = (moments.reference - prior.mean) @ posterior.whitener[0]  # (K, D)
    gram = white @ white.T
    G = torch.stack([gram[i, i], gram[i, j], gram[j, i], gram[j, j]], -1).reshape(-1, 2, 2)
    between = n_i * n_j / n
    share = torch.stack([n_i, n_j], -1) / n[:, None]  # (P, 2)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    kappa0 = prior.kappa

    def pull(counts: Tensor) -> Tensor:
        return kappa0 * counts / (kappa0 + counts)

    Q = between[:, None, None] * sign[:, None] * sign
    Q = Q + pull(n)[:, None, None] * share[:, :, None] * share[:, None, :]
    Q = Q - torch.diag_embed(torch.stack([pull(n_i), pull(n_j)], -1))
    log_det = torch.linalg.slogdet(torch.eye(2, dtype=torch.float64) + Q @ G)[1]
    kappa = ((kappa0 + n_i) * (kappa0 + n_j) / (kappa0 + n) / kappa0).log()
    return 0.5 * (prior.n_features * kappa - posterior.dof * log_det)


def _part(merged: Moments, p: int) -> Moments:
    return merged.map(lambda array: array[p : p + 1])


def combine(moments: Moments, moves: Sequence[Move], shape: type[Components]) -> Moments:
    """Carry out disjoint moves on centred statistics; what is new follows what stays."""
    K = len(moments.counts)
    old = {k for move in moves for k in move.old}
    stay = torch.tensor([k for k in range(K) if k not in old], dtype=torch.long)
    new = [move.new for move in moves if len(move.new.counts)]

    def joined(array: Tensor, more: list[Tensor]) -> Tensor:
        array = torch.cat([array[stay], *more])
        return torch.cat([array, array.new_zeros(max(0, K - len(array)), *array.shape[1:])])

    counts = joined(moments.counts, [part.counts for part in new])
    # What does not fit are empty slots.
    order = counts.argsort(descending=True, stable=True)[:K].sort().values
    if shape is Tied:
        second = moments.second + sum(move.new.second.sum(0, keepdim=True) for move in moves)
    else:
        second = joined(moments.second, [part.second for part in new])[order]
    reference = joined(moments.reference, [part.reference for part in new])[order]
    first = joined(moments.first, [part.first for part in new])[order]
    cells = None
    if moments.cells is not None:
        cells = joined(moments.cells, [part.seen for part in new])[order]
    return Moments(reference, counts[order], first, second, cells)
