r"""Rows with missing cells (missing at random), for every shape of the precision.

**Diag and Spherical.** The missing cells integrate out of the likelihood, so every formula is the
sum over the observed cells, and the posterior stays conjugate: each feature has its own count.

**Full and Tied.** Integrating out would spoil the conjugacy. The bound is over
:math:`q(\theta) \prod_n q(z_n) q(x_{nm} | z_n)` instead, m the missing and o the observed
features of a row. With :math:`V = W^{-1}` the best :math:`q(x_m | z = k)` is normal with

.. math::
    \text{mean } m_m + V_{mo} V_{oo}^{-1} (x_o - m_o), \qquad
    \text{covariance } (\nu W_{mm})^{-1} = (V_{mm} - V_{mo} V_{oo}^{-1} V_{om}) / \nu,

and what it leaves of the row's bound is

.. math::
    \log\rho = E[\log\pi] + \tfrac12 E[\log|\Lambda|] - \tfrac{|o|}2 \log 2\pi
        - \tfrac{D}{2\kappa} - \tfrac{\nu}{2} (x_o - m_o)' V_{oo}^{-1} (x_o - m_o)
        - \tfrac12 \log|\nu W_{mm}|, \qquad |W_{mm}| = |V_{oo}| / |V|.

With the observed features put first, the Cholesky factor of V, ``L = [[L_oo, 0], [L_mo, L_mm]]``,
has it all: the distance is ``|y|^2`` of ``y = L_oo^-1 (x_o - m_o)``, the completed row deviates
from the mean by ``[L_oo; L_mo] y``, and ``V_mm - V_mo V_oo^-1 V_om = L_mm L_mm'``, without a
difference that could lose its sign. One factor serves all rows of a pattern of missing cells, and
patterns are worked on in batches.

A row with nothing observed says nothing: its labels are integrated out exactly, its bound is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.distributions import student_t
from skvi.distributions.normal import LOG_2PI
from skvi.models.mixture.components import (
    Components,
    Diag,
    Gamma,
    Moments,
    Spherical,
    Tied,
    Wishart,
    columns,
)
from skvi.runtime.blocks import Rows, block_rows
from skvi.runtime.linalg import inv_chol, log_det_from_chol

# Rows of one pattern beyond this many are cut, so that a batch is padded to this length at most.
_LONGEST_PIECE = 256


class Cells(NamedTuple):
    """Rows some of whose cells are missing.

    Attributes
    ----------
    x : Tensor of shape (B, D)
        Zero where missing.
    observed : Tensor of shape (B, D)
        Booleans.
    """

    x: Tensor
    observed: Tensor


class IncompleteRows(Rows):
    """Rows of an array with NaN for missing cells: like :class:`Rows`, but read as `Cells`."""

    def present(self, x: Tensor) -> Cells:
        """Return rows (B, D) with NaN as cells."""
        observed = ~x.isnan()
        return Cells(torch.where(observed, x, 0.0), observed)

    def log_abs_det(self) -> np.ndarray:
        """Return ``sum_j log scale_j`` over the observed cells of each row, shape (N,)."""
        log_scale = torch.from_numpy(np.log(self._affine.scale)).to(self.device)
        parts = [x.observed.double() @ log_scale for _, x, _ in self.blocks(3 * self.n_features)]
        return torch.cat(parts).cpu().numpy()


def has_missing(X: np.ndarray) -> bool:
    """Whether any cell is NaN, in one pass and without a mask."""
    return bool(np.isnan(X.min()))


def filled(x: Tensor | Cells) -> Tensor:
    """Return rows (B, D) with the mean of the data, zero in fitted units, for missing cells."""
    return x.x if isinstance(x, Cells) else x


def empty(x: Cells) -> Tensor:
    """Whether nothing is observed of a row, shape (B,)."""
    return ~x.observed.any(-1)


def moved(moments: Moments, reference: Tensor) -> Moments:
    """Return the same statistics of a Full or Tied mixture about another reference (K, D)."""
    step = moments.reference - reference  # (K, D)
    counts = moments.counts[:, None]
    first = moments.first + counts * step
    # x - r' = (x - r) + s: the second moments gain f s' + s f' + N s s'
    half = (moments.first + 0.5 * counts * step)[:, :, None] * step[:, None, :]  # (K, D, D)
    gain = half + half.mT
    if moments.second.shape[0] == 1:
        gain = gain.sum(0, keepdim=True)
    return Moments(reference, moments.counts, first, moments.second + gain)


def added(moments: Moments | None, more: Moments) -> Moments:
    """Sum of statistics about the same reference."""
    if moments is None:
        return more
    return Moments(
        moments.reference,
        moments.counts + more.counts,
        moments.first + more.first,
        moments.second + more.second,
        None if moments.cells is None or more.cells is None else moments.cells + more.cells,
    )


def around(
    shape: type[Components], centres: Tensor, covariance: Tensor | None = None
) -> Components:
    """Return components around centres (K, D), to complete rows with.

    Those of Full and Tied have the `covariance` (D, D), or the identity.
    """
    K, D = centres.shape
    one = torch.ones_like(centres[:, 0])
    if not issubclass(shape, Wishart):
        return shape(centres, one, one, torch.ones_like(centres) if shape is Diag else one)
    n_factors = 1 if shape is Tied else K
    root = torch.eye(D, dtype=centres.dtype, device=centres.device)
    if covariance is not None:
        root = torch.linalg.cholesky(covariance)
    return shape(centres, one, one[:n_factors], root.expand(n_factors, D, D))


class Batch(ABC):
    """Some rows of a block under some components.

    Attributes
    ----------
    rows : Tensor of shape (b,)
        Their indices in the block. Rows with nothing observed are among them.
    """

    rows: Tensor

    @abstractmethod
    def E_log_prob(self) -> Tensor:
        """Return the local bound of the observed cells given the component, shape (K, b)."""

    @abstractmethod
    def log_student(self) -> Tensor:
        """Return the log predictive density of the observed cells per component, (K, b)."""

    @abstractmethod
    def moments(self, resp: Tensor) -> Moments:
        """Return the statistics about the means under weighted responsibilities (K, b)."""

    @abstractmethod
    def completed(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each cell given the row's observed ones, (K, b, D).

        The variances are those under the expected precisions.
        """


def batches(components: Components, x: Cells) -> Iterator[Batch]:
    """Yield the rows of a block, but for those in :func:`complete`."""
    if isinstance(components, Gamma):
        yield _GammaBatch(components, x)
    else:
        assert isinstance(components, Wishart)
        yield from _pattern_batches(components, x)


def complete(components: Components, x: Cells) -> Tensor:
    """Return the indices of the rows that need no formula of this module."""
    # The statistics of Diag and Spherical count cells, those of complete rows too.
    none = torch.empty(0, dtype=torch.long, device=x.x.device)
    return none if isinstance(components, Gamma) else x.observed.all(-1).nonzero()[:, 0]


class _GammaBatch(Batch):
    """All rows of a block under Diag or Spherical: sums over the observed cells.

    As for complete rows, these are matrix products with monomials, here (observed, x, x^2) of
    each feature, and centred rows for the components where the products cancel.
    """

    def __init__(self, components: Gamma, x: Cells) -> None:
        self.rows = torch.arange(len(x.x), device=x.x.device)
        self._components = components
        self._x = x.x
        self._observed = x.observed.double()
        shape, rate = (columns(parameter) for parameter in components.gamma())
        self._precision = (shape / rate).expand_as(components.mean)  # (K, D)
        self._constant = components.cell_constant
        self._monomials = torch.cat([self._observed, self._x, self._x.square()], dim=1).T

    def _ill_deviations(self) -> Tensor:
        diff = self._x - self._components.mean[self._components.ill][:, None, :]
        return diff.mul_(self._observed)  # (K_ill, B, D)

    def E_log_prob(self) -> Tensor:
        mean, ill = self._components.mean, self._components.ill
        scaled = self._precision * mean
        constant = self._constant - 0.5 * scaled * mean
        result = torch.cat([constant, scaled, -0.5 * self._precision], 1) @ self._monomials
        if ill.numel():
            square = self._ill_deviations().square_()
            distance = torch.matmul(square, self._precision[ill][:, :, None])[:, :, 0]
            result[ill] = self._constant[ill] @ self._observed.T - 0.5 * distance
        return result

    def log_student(self) -> Tensor:
        if isinstance(self._components, Diag):
            density = self._components.log_student_of_cells(self._x)  # (K, B, D)
            return density.mul_(self._observed).sum(-1)
        assert isinstance(self._components, Spherical)
        return self._components.log_student_of_some(self._x, self._observed)

    def moments(self, resp: Tensor) -> Moments:
        mean, ill = self._components.mean, self._components.ill
        cells, first, second = (resp @ self._monomials.T).chunk(3, dim=1)  # (K, D) each
        second = second - mean * (2.0 * first - cells * mean)
        first = first - cells * mean
        if ill.numel():
            diff, r = self._ill_deviations(), resp[ill][:, None, :]
            first[ill] = torch.matmul(r, diff)[:, 0]
            second[ill] = torch.matmul(r, diff.square_())[:, 0]
        return Moments(mean, resp.sum(-1), first, self._components.pooled(second), cells)

    def completed(self) -> tuple[Tensor, Tensor]:
        mean = self._components.mean[:, None, :]
        shape = (-1, len(self._x), -1)
        return mean.expand(shape), self._precision.reciprocal()[:, None, :].expand(shape)


def _pattern_batches(components: Wishart, x: Cells) -> Iterator[Batch]:
    """Yield the incomplete rows of a block under Full or Tied, by patterns of missing cells.

    The rows of a pattern are cut into pieces; pieces of similar length make a batch.
    """
    some = (~x.observed.all(-1)).nonzero()[:, 0]
    if not some.numel():
        return
    device = x.x.device
    K, D = components.mean.shape
    observed = x.observed[some].cpu().numpy()
    _, example, owner, counts = np.unique(
        np.packbits(observed, axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    order = np.argsort(owner.reshape(-1), kind="stable")  # rows of a pattern side by side
    n_pieces = -(-counts // _LONGEST_PIECE)
    pattern = np.repeat(np.arange(counts.size), n_pieces)
    number = np.arange(pattern.size) - np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)
    end = counts.cumsum()
    start = (end - counts)[pattern] + _LONGEST_PIECE * number
    length = np.minimum(end[pattern] - start, _LONGEST_PIECE)
    by_length = np.argsort(-length, kind="stable")
    pattern, start, length = pattern[by_length], start[by_length], length[by_length]

    inverse_scale = components.inverse_scale()
    done = 0
    while done < length.size:
        longest = length[done]
        similar = np.searchsorted(-length, -longest / 2)  # those of more than half the length
        room = block_rows(int(4 * K * D * (D + longest)), device, at_least=1)
        piece = slice(done, min(similar, done + room))
        done = piece.stop
        place = start[piece, None] + np.arange(longest)  # (P, R)
        filled_place = place < (start + length)[piece, None]
        rows = order[np.where(filled_place, place, start[piece, None])]
        yield _PatternBatch(
            components,
            inverse_scale,
            x.x,
            some[torch.from_numpy(rows).to(device)],
            torch.from_numpy(filled_place).to(device),
            torch.from_numpy(observed[example[pattern[piece]]]).to(device),
        )


class _PatternBatch(Batch):
    """P patterns with up to R rows each, under Full or Tied.

    Features are put in another order for each pattern, the observed ones first. What is shaped
    (K, ...) below is (1, ...) for the factors of Tied.

    Parameters
    ----------
    components : Wishart
    inverse_scale : Tensor of shape (K, D, D)
    x : Tensor of shape (B, D)
    index : Tensor of shape (P, R)
        Rows of `x`; any row where a place is not filled.
    is_filled : Tensor of shape (P, R)
    observed : Tensor of shape (P, D)
    """

    def __init__(
        self,
        components: Wishart,
        inverse_scale: Tensor,
        x: Tensor,
        index: Tensor,
        is_filled: Tensor,
        observed: Tensor,
    ) -> None:
        self.rows = index[is_filled]
        self._components = components
        self._is_filled = is_filled
        order = (~observed).long().argsort(dim=-1, stable=True)  # (P, D)
        self._rank = order.argsort(dim=-1)
        self._n_observed = observed.sum(-1, dtype=x.dtype)  # (P,); an integer times pi is float32
        D = components.n_features
        first = torch.arange(D, device=x.device) < self._n_observed[:, None]  # (P, D)
        chol = torch.linalg.cholesky(inverse_scale[:, order[:, :, None], order[:, None, :]])
        # Columns of the observed features, [L_oo; L_mo], and of the missing ones.
        self._L_o = chol * first[:, None, :]  # (K, P, D, D)
        self._L_m = chol * ~first[:, None, :]
        whitener = (inv_chol(chol) * first[:, :, None]).mT  # L_oo^-T, zero beyond
        row = x[index].gather(-1, order[:, None, :].expand(*index.shape, D))  # (P, R, D)
        diff = row - components.mean[:, order][:, :, None, :]
        self._y = torch.matmul(diff, whitener)  # (K, P, R, D)
        self._distance = self._y.square().sum(-1)  # (K, P, R)
        diagonal = torch.where(first, chol.diagonal(dim1=-2, dim2=-1), 1.0)
        self._log_det = 2.0 * diagonal.log().sum(-1)  # log|V_oo|, (K, P)

    def _flat(self, padded: Tensor) -> Tensor:
        """(K, P, R, ...) -> (K, b, ...)."""
        return padded[:, self._is_filled]

    def E_log_prob(self) -> Tensor:
        components, n = self._components, self._n_observed
        D, dof = components.n_features, components.dof[:, None]
        log_det = log_det_from_chol(components.root)[:, None]
        constant = 0.5 * (
            components.E_log_det[:, None]
            + log_det
            - self._log_det
            - (D - n) * dof.log()
            - n * LOG_2PI
            - D / components.kappa_columns
        )  # (K, P); fmt: skip
        return self._flat(constant[:, :, None] - 0.5 * dof[:, :, None] * self._distance)

    def log_student(self) -> Tensor:
        components, n = self._components, self._n_observed
        # A margin of the predictive keeps its degrees of freedom.
        dof = (components.dof + 1.0 - components.n_features)[:, None]  # (K, 1)
        factor = (1.0 + 1.0 / components.kappa_columns) / dof
        log_det = n * factor.log() + self._log_det  # (K, P)
        square = self._distance / factor[:, :, None]
        return self._flat(
            student_t.log_density(square, log_det[:, :, None], dof[:, :, None], n[:, None])
        )

    def moments(self, resp: Tensor) -> Moments:
        components = self._components
        padded = resp.new_zeros(len(resp), *self._is_filled.shape)  # (K, P, R)
        padded[:, self._is_filled] = resp
        weighted = padded[:, :, :, None] * self._y
        counts = padded.sum(-1)  # (K, P)
        scatter = torch.matmul(weighted.mT, self._y)  # (K, P, D, D)
        first = torch.matmul(self._L_o, weighted.sum(-2)[:, :, :, None])[:, :, :, 0]
        shared = len(self._L_o) == 1  # Tied: one scatter for all
        seen = counts
        if shared:
            scatter, seen = scatter.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        spread = (seen / components.dof[:, None])[:, :, None, None] * (self._L_m @ self._L_m.mT)
        second = self._L_o @ scatter @ self._L_o.mT + spread
        # Back to the order of the features, and over all patterns.
        P, rank = torch.arange(len(self._rank), device=resp.device), self._rank
        first = first[:, P[:, None], rank].sum(1)
        second = second[:, P[:, None, None], rank[:, :, None], rank[:, None, :]].sum(1)
        return Moments(components.mean, counts.sum(-1), first, second)

    def completed(self) -> tuple[Tensor, Tensor]:
        rank, mean = self._rank, self._components.mean
        P = torch.arange(len(rank), device=rank.device)
        diff = torch.matmul(self._y, self._L_o.mT)  # (K, P, R, D)
        back = rank[:, None, :].expand(*diff.shape[1:]).expand_as(diff)
        location = self._flat(diff.gather(-1, back) + mean[:, None, None, :])
        variance = self._L_m.square().sum(-1) / self._components.dof[:, None, None]  # (K, P, D)
        variance = variance[:, P[:, None], rank][:, :, None, :].expand_as(diff)
        return location, self._flat(variance)


def E_log_prob(components: Components, x: Cells) -> Tensor:
    """Local bound of the observed cells given each component, shape (K, B).

    Rows with nothing observed get numbers without meaning.
    """
    result = x.x.new_zeros(len(components.mean), len(x.x))
    whole = complete(components, x)
    if whole.numel():
        rows = x.x[whole]
        distance = components.squared_distance(rows, components.monomials(rows))
        result[:, whole] = components.E_log_prob(distance)
    for batch in batches(components, x):
        result[:, batch.rows] = batch.E_log_prob()
    return result


def log_student(components: Components, x: Cells) -> Tensor:
    """Log predictive density of the observed cells of rows, shape (K, B); 0 where none is."""
    result = x.x.new_zeros(len(components.mean), len(x.x))
    whole = complete(components, x)
    if whole.numel():
        result[:, whole] = components.log_student(x.x[whole])
    for batch in batches(components, x):
        result[:, batch.rows] = batch.log_student()
    return result


def completed(components: Components, x: Cells) -> tuple[Tensor, Tensor]:
    """Mean and variance of each cell given the observed ones of its row, (K, B, D).

    Observed cells are what they are; the variances are those under the expected precisions.
    """
    shape = (len(components.mean), *x.x.shape)
    location, variance = x.x.expand(shape).clone(), x.x.new_zeros(shape)
    for batch in batches(components, x):
        missing = ~x.observed[batch.rows]  # (b, D)
        for into, values in zip((location, variance), batch.completed(), strict=True):
            into[:, batch.rows] = torch.where(missing, values, into[:, batch.rows])
    return location, variance
