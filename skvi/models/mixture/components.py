r"""Conjugate laws of the component parameters, one class per shape of the precision.

Every class holds ``q(mu_k, Lambda_k) = N(mu_k | m_k, (kappa_k Lambda_k)^-1) q(Lambda_k)``:

==========  ==========================================  ==================================
class       ``q(Lambda_k)``                             ``root``
==========  ==========================================  ==================================
Full        ``W(W_k, dof_k)``                           chol of ``W_k^-1`` (K, D, D)
Tied        ``W(W, dof)``, shared                       chol of ``W^-1`` (1, D, D)
Diag        ``lambda_kd ~ Gam(dof_k / 2, s_kd / 2)``    ``sqrt(s)`` (K, D)
Spherical   ``lambda_k ~ Gam(D dof_k / 2, t_k / 2)``    ``sqrt(t)`` (K,)
==========  ==========================================  ==================================

so ``root`` is always a factor of the inverse scale. Rows with missing cells inform Diag and
Spherical about each feature a different number of times: kappa is (K, D) then, and so is the dof
of Diag. A prior is a record of the same class with K = 1, which broadcasts. Sources: Bishop (2006),
section 10.2, equations 10.59-10.67 for Full; the others are the conjugate posteriors of their own
gamma or shared Wishart priors.

All that a pass needs of the rows goes through one number per row and component, the squared
distance ``|root^-1 (x - m)|^2``, and through weighted sums of the monomials of x. Both are matrix
products with the monomials; a component for which these products cancel is listed in ``ill`` and
takes the slower way through centred rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from skvi.distributions import gamma, student_t, wishart
from skvi.distributions.normal import LOG_2PI
from skvi.runtime.linalg import inv_chol, log_det_from_chol

# Expanding (x - m)' W (x - m) into monomials loses as many digits as this number has; at 1e7 the
# bound and the covariances keep nine.
_ILL = 1e7


class Moments(NamedTuple):
    """Sufficient statistics of the rows about one reference point per component.

    Attributes
    ----------
    reference : Tensor of shape (K, D)
    counts : Tensor of shape (K,)
        ``sum_n r_nk``.
    first : Tensor of shape (K, D)
        ``sum_n r_nk (x_n - reference_k)``.
    second : Tensor
        ``sum_n r_nk (x_n - reference_k)(x_n - reference_k)'`` in the shape of the class: Full
        (K, D, D), Tied (1, D, D) summed over k, Diag (K, D), Spherical (K,).
    cells : Tensor of shape (K, D), optional
        Counts of each feature's observed cells, where Diag and Spherical have seen rows with
        missing ones; None where every count is that of the rows.
    """

    reference: Tensor
    counts: Tensor
    first: Tensor
    second: Tensor
    cells: Tensor | None = None

    def reordered(self, order: Tensor) -> Moments:
        """Return the statistics in another order of the components."""
        reference, counts, first, second, cells = self
        shared = second.shape[0] == 1  # Tied: one scatter for all, which has no order
        return Moments(
            reference[order],
            counts[order],
            first[order],
            second if shared else second[order],
            None if cells is None else cells[order],
        )

    def map(self, function: Callable[[Any], Any]) -> Moments:
        """Apply `function` to every array."""
        reference, counts, first, second = (function(array) for array in self[:4])
        cells = None if self.cells is None else function(self.cells)
        return Moments(reference, counts, first, second, cells)

    @property
    def seen(self) -> Tensor:
        """Counts of (K, 1), or those of each feature's cells (K, D)."""
        return self.counts[:, None] if self.cells is None else self.cells

    def scaled(self, factor: float) -> Moments:
        """Return the statistics of the same rows with `factor` times their weight."""
        return self.map(lambda array: factor * array)._replace(reference=self.reference)

    def offset(self) -> Tensor:
        """Return means of the rows less the reference points, (K, D); zero without rows."""
        return self.first / self.seen.clamp_min(torch.finfo(self.counts.dtype).tiny)


@dataclass(frozen=True)
class Components(ABC):
    """Shared formulas; see the module docstring for the classes.

    Attributes
    ----------
    mean : Tensor of shape (K, D)
    kappa : Tensor of shape (K,), or (K, D)
    dof : Tensor of shape (K,), or (1,) for Tied, or (K, D)
    root : Tensor
        Factor of the inverse scale, see the module docstring.
    """

    mean: Tensor
    kappa: Tensor
    dof: Tensor
    root: Tensor

    covariance_shape: ClassVar[str]

    @property
    def n_features(self) -> int:
        """Number of features D."""
        return self.mean.shape[-1]

    @property
    def kappa_columns(self) -> Tensor:
        """Kappa of shape (K, 1), or (K, D) where features differ."""
        return columns(self.kappa)

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Apply `function` to every array."""
        return type(self)(*(function(getattr(self, field.name)) for field in fields(self)))

    # -- what a shape of the precision defines ---------------------------------------------------

    @staticmethod
    @abstractmethod
    def factor(inverse_scale: Tensor) -> Tensor:
        """Return the ``root`` of an inverse scale of this shape."""

    @classmethod
    @abstractmethod
    def prior_inverse_scale(cls, covariance: Tensor, n_features: int) -> Tensor:
        """Inverse scale, with a leading K = 1, of a ``covariance_prior`` of this shape."""

    @abstractmethod
    def inverse_scale(self) -> Tensor:
        """Return the inverse scale that `root` is a factor of."""

    @cached_property
    @abstractmethod
    def E_log_det(self) -> Tensor:
        """``E[log|Lambda_k|]``, shape (K,) or (1,)."""

    @property
    def precision_dof(self) -> Tensor:
        """Factor from a squared distance to ``E[(x - m)' Lambda (x - m)]``, (K,) or (1,)."""
        return self.dof

    @abstractmethod
    def centred_distance(self, diff: Tensor) -> Tensor:
        """``|root_k^-1 d|^2`` of `diff` (K, B, D); shape (K, B)."""

    @staticmethod
    @abstractmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        """Weighted second moments of `diff` (K, B, D) under `resp` (K, B), in this shape."""

    @abstractmethod
    def scaled_trace(self, second: Tensor) -> Tensor:
        """``trace(W_k S_k)`` of second moments S in this shape, (K,) or for Tied (1,)."""

    @staticmethod
    @abstractmethod
    def n_monomials(n_features: int) -> int:
        """Return F."""

    @staticmethod
    @abstractmethod
    def fill_monomials(columns: Tensor, quadratic: Tensor) -> None:
        """Write what the shape has of ``x x'`` into `quadratic`, from `columns` (D, B) of x."""

    @cached_property
    @abstractmethod
    def coefficients(self) -> Tensor:
        """Squared distances as a linear form in the monomials, shape (K, F)."""

    @cached_property
    @abstractmethod
    def amplification(self) -> Tensor:
        """Ratio of the largest terms of that linear form to its value, shape (K,)."""

    @classmethod
    def monomials(cls, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Monomials of rows (B, D), shape (F, B): 1, x, and what the shape has of ``x x'``.

        Written to `out` if it is given.
        """
        B, D = x.shape
        result = x.new_empty(cls.n_monomials(D), B) if out is None else out
        result[0] = 1.0
        columns = result[1 : 1 + D].copy_(x.T)
        cls.fill_monomials(columns, result[1 + D :])
        return result

    @classmethod
    def sums(cls, x: Tensor, monomials: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """Weighted sums over rows from which :meth:`unpack` makes statistics; additive."""
        return (resp @ monomials.T,)  # (K, F)

    @classmethod
    @abstractmethod
    def unpack(cls, reference: Tensor, sums: tuple[Tensor, ...]) -> Moments:
        """Return the statistics about `reference` of rows that were given relative to it."""

    @abstractmethod
    def log_normaliser(self) -> Tensor:
        """Log of what normalises ``q(Lambda_k)``, shape (K,) or (1,)."""

    @abstractmethod
    def kl_precision(self, prior: Self) -> Tensor:
        """``sum_k KL(q(Lambda_k) || p(Lambda_k))``; a shared precision counts once."""

    def dof_update(self, counts: Tensor) -> Tensor:
        """Degrees of freedom after seeing `counts`."""
        return self.dof + counts

    @abstractmethod
    def log_student(self, x: Tensor) -> Tensor:
        """Log posterior predictive density of rows (B, D) per component, shape (K, B)."""

    @abstractmethod
    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw ``root g^-1/2 z`` with z normal and g chi-square; (n,) labels -> (n, D).

        Times ``sqrt(1 + 1/kappa)`` this is the deviation of a predictive draw from its mean.
        """

    # -- what follows ------------------------------------------------------------------------------

    @cached_property
    def ill(self) -> Tensor:
        """Indices of the components that the monomials cannot serve, shape (K_ill,)."""
        return (~(self.amplification < _ILL)).nonzero()[:, 0]

    def take(self, index: Tensor) -> Self:
        """Return the components of an index; what they share stays shared.

        What has been computed for the whole is kept for the part.
        """

        def part(array: Tensor) -> Tensor:
            return array[index] if array.shape[0] > 1 else array

        result = self.map(part)
        for name in ("log_prob_constant", "coefficients", "amplification", "whitener"):
            if name in self.__dict__:
                result.__dict__[name] = part(self.__dict__[name])
        return result

    def squared_distance(self, x: Tensor, monomials: Tensor) -> Tensor:
        """``|root_k^-1 (x_n - m_k)|^2`` of rows (B, D) and their monomials, shape (K, B)."""
        if self.ill.numel() == self.mean.shape[0]:
            return self.centred_distance(x - self.mean[:, None, :])
        distance = self.coefficients @ monomials
        if self.ill.numel():
            some = self.take(self.ill)
            distance[self.ill] = some.centred_distance(x - some.mean[:, None, :])
        return distance

    def E_log_prob(self, distance: Tensor) -> Tensor:
        r"""Return the expected log density of rows given their component, (K, B) -> (K, B).

        .. math::
            \tfrac12 E[\log|\Lambda_k|] - \tfrac D2 \log 2\pi
            - \tfrac12 (D / \kappa_k + E[(x - m_k)' \Lambda_k (x - m_k)])

        Bishop (2006), equations 10.64-10.65.
        """
        return distance * (-0.5 * self.precision_dof[:, None]) + self.log_prob_constant[:, None]

    def linear_form(self, offset: Tensor) -> Tensor:
        """:meth:`E_log_prob` plus an offset (K,) as a linear form in the monomials, (K, F)."""
        form = self.coefficients * (-0.5 * self.precision_dof[:, None])
        form[:, 0] += self.log_prob_constant + offset  # the first monomial is 1
        return form

    def common(self, x: Tensor) -> Tensor | None:
        """Return what the linear form leaves out, the same for every component: (B,), or None."""
        return None

    @cached_property
    def log_prob_constant(self) -> Tensor:
        """What :meth:`E_log_prob` has besides the distance, shape (K,)."""
        D = self.n_features
        # The mean over features of something that all share is just that.
        return 0.5 * (self.E_log_det - D * LOG_2PI - D * (1.0 / self.kappa_columns).mean(-1))

    def update(self, moments: Moments) -> Self:
        r"""Return the posterior of this prior.

        .. math::
            \kappa_k = \kappa_0 + N_k,\quad m_k = (\kappa_0 m_0 + N_k \bar x_k) / \kappa_k,\quad
            W_k^{-1} = W_0^{-1} + N_k S_k
                + \tfrac{\kappa_0 N_k}{\kappa_k} (\bar x_k - m_0)(\bar x_k - m_0)'
        """
        reference, counts, first, second, _ = moments
        kappa = self.kappa + counts  # (K,)
        # (kappa0 m0 + N reference + first) / kappa, without leaving the reference
        mean = reference + (first + self.kappa[:, None] * (self.mean - reference)) / kappa[:, None]
        offset = moments.offset()  # xbar - reference
        # Two weighted points per component: the correction to S, and the pull to the prior mean.
        points = torch.stack([offset, reference + offset - self.mean], dim=1)  # (K, 2, D)
        point_weights = torch.stack([-counts, self.kappa * counts / kappa], dim=1)  # (K, 2)
        scale = self.inverse_scale() + second + self.scatter(points, point_weights)
        return type(self)(mean, kappa, self.dof_update(counts), self.factor(scale))

    def kl(self, prior: Self) -> Tensor:
        r"""``sum_k KL(q(mu_k, Lambda_k) || p(mu_k, Lambda_k))`` in nats.

        The Normal part given the precision is
        ``1/2 [D log(kappa/kappa0) + D kappa0/kappa - D + kappa0 E (m - m0)'Lambda(m - m0)]``.
        """
        ratio = prior.kappa_columns / self.kappa_columns  # (K, 1) or (K, D)
        spread = (ratio - 1.0 - ratio.log()).mean(-1)  # (K,), of each feature
        offset = prior.kappa_columns.sqrt() * (self.mean - prior.mean)
        pull = self.precision_dof * self.centred_distance(offset[:, None, :])[:, 0]
        normal = 0.5 * (self.n_features * spread + pull)
        return normal.sum() + self.kl_precision(prior)

    @classmethod
    def lever(cls, step: Tensor, seen: Tensor) -> Tensor:
        """Second moments of weights `seen` at `step` (K, D) from the references, in this shape.

        The weights are those of `Moments.seen`, (K, 1) or for Diag and Spherical (K, D).
        """
        return cls.scatter(step[:, None, :], seen)

    @classmethod
    def merge(cls, first: Moments, second: Moments) -> Moments:
        r"""Return the statistics of both sets of rows, about their common means.

        .. math::
            N = N_1 + N_2, \quad d = \bar x_2 - \bar x_1, \quad
            C = C_1 + C_2 + \tfrac{N_1 N_2}{N} d d'

        with C the second moments about the mean: no difference of large numbers, wherever the
        references are. Chan, Golub & LeVeque (1983), equation 2.1.
        """
        counts = first.counts + second.counts  # (K,)
        share = second.counts / counts.clamp_min(torch.finfo(counts.dtype).tiny)
        here, there = first.offset(), second.offset()  # (K, D)
        gap = (second.reference - first.reference) + (there - here)
        step = share[:, None] * gap  # from the first mean to the common one
        # Each set moves from its reference to its mean, and from there to the common mean.
        points = torch.stack([here, there, step, step - gap], dim=1)  # (K, 4, D)
        point_weights = torch.stack(
            [-first.counts, -second.counts, first.counts, second.counts], dim=1
        )
        scatter = first.second + second.second + cls.scatter(points, point_weights)
        mean = first.reference + (here + step)
        return Moments(mean, counts, torch.zeros_like(mean), scatter)

    def energy(self, moments: Moments) -> Tensor:
        r"""``sum_nk r_nk E[log N(x_n | mu_k, Lambda_k^-1)]`` in nats, from the statistics alone.

        .. math::
            \sum_k N_k c_k - \tfrac12 \nu_k \mathrm{tr}\, W_k
            \textstyle\sum_n r_{nk} (x_n - m_k)(x_n - m_k)'

        with the constants c of :meth:`E_log_prob`.
        """
        offset = moments.offset()
        points = torch.stack([offset, moments.reference - self.mean + offset], dim=1)  # (K, 2, D)
        point_weights = torch.stack([-moments.counts, moments.counts], dim=1)
        about_mean = moments.second + self.scatter(points, point_weights)
        spread = self.precision_dof * self.scaled_trace(about_mean)
        return moments.counts @ self.log_prob_constant - 0.5 * spread.sum()

    def log_evidence(self, posterior: Self) -> Tensor:
        r"""Log density of the rows that led from this prior to `posterior`, in nats.

        .. math::
            \log Z(q(\Lambda_k)) - \log Z(p(\Lambda_k))
            + \tfrac D2 \log(\kappa_0 / \kappa_k) - \tfrac{N_k D}2 \log 2\pi

        which equals the components' part of the bound at the best posterior. Where features have
        their own counts of cells, the terms of kappa and N are the means over the features.

        Returns
        -------
        Tensor of shape (K,), or (1,) for Tied: one number for all.
        """
        kappa0, kappa = self.kappa_columns, posterior.kappa_columns  # (K, 1) or (K, D)
        each = (kappa0 / kappa).log() - (kappa - kappa0) * LOG_2PI
        mean = 0.5 * self.n_features * each.mean(-1)
        precision = posterior.log_normaliser() - self.log_normaliser()
        return precision + (mean if len(precision) == len(mean) else mean.sum(0, keepdim=True))

    def covariances(self) -> Tensor:
        """``E[Lambda_k]^-1`` in the shape of `root`."""
        return self.inverse_scale() / self.precision_dof.reshape(-1, *[1] * (self.root.ndim - 1))


class Wishart(Components):
    """Full precision matrices; Tied shares one."""

    @staticmethod
    def factor(inverse_scale: Tensor) -> Tensor:
        return torch.linalg.cholesky(inverse_scale)

    @classmethod
    def prior_inverse_scale(cls, covariance: Tensor, n_features: int) -> Tensor:
        return covariance[None]

    def inverse_scale(self) -> Tensor:
        return self.root @ self.root.mT

    @cached_property
    def E_log_det(self) -> Tensor:
        return wishart.expected_log_det(self.dof, self.root)

    @cached_property
    def whitener(self) -> Tensor:
        """``L^-T``: rows times this have unit inverse scale; (K, D, D) or (1, D, D)."""
        return inv_chol(self.root).mT

    @cached_property
    def amplification(self) -> Tensor:
        # dof |L^-1|_F^2 bounds the largest precision; rows have unit spread around the origin.
        precision = self.dof * self.whitener.square().sum((-2, -1))
        return precision * (self.mean.square().sum(-1) + self.n_features)

    def centred_distance(self, diff: Tensor) -> Tensor:
        return torch.matmul(diff, self.whitener).square().sum(-1)  # (K, B)

    def scaled_trace(self, second: Tensor) -> Tensor:
        return (self.whitener * torch.matmul(second, self.whitener)).sum((-2, -1))

    def log_normaliser(self) -> Tensor:
        return wishart.log_normaliser(self.dof, self.root)

    def kl_precision(self, prior: Self) -> Tensor:
        return wishart.kl(self.dof, self.root, prior.dof, prior.root).sum()

    def log_student(self, x: Tensor) -> Tensor:
        D = self.n_features
        dof = self.dof + 1.0 - D  # (K,) or (1,)
        # scale matrix (1 + 1/kappa) / dof * W^-1
        factor = (1.0 + 1.0 / self.kappa) / dof  # (K,)
        log_det = D * factor.log() + log_det_from_chol(self.root)
        square = self.squared_distance(x, self.monomials(x)) / factor[:, None]
        return student_t.log_density(square, log_det[:, None], dof[:, None], D)

    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        roots = np.asarray(self.root)
        owner = labels % len(roots)  # Tied: every label is served by the one precision
        normal = rng.standard_normal((labels.size, self.n_features))
        dof = np.asarray(self.dof)[owner] + 1.0 - self.n_features
        normal /= np.sqrt(rng.chisquare(dof))[:, None]
        for k, root in enumerate(roots):
            normal[owner == k] @= root.T
        return normal


class Full(Wishart):
    """One Wishart precision per component."""

    covariance_shape = "full"

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        return torch.matmul((resp[:, :, None] * diff).mT, diff)  # (K, D, D)

    @staticmethod
    def n_monomials(n_features: int) -> int:
        return 1 + n_features + n_features * (n_features + 1) // 2

    @staticmethod
    def fill_monomials(columns: Tensor, quadratic: Tensor) -> None:
        start = 0
        for i in range(len(columns)):  # row i of the upper triangle of x x'
            stop = start + len(columns) - i
            torch.mul(columns[i], columns[i:], out=quadratic[start:stop])
            start = stop

    @cached_property
    def coefficients(self) -> Tensor:
        W = self.whitener @ self.whitener.mT  # (K, D, D)
        linear = torch.matmul(W, self.mean[:, :, None])  # (K, D, 1)
        constant = torch.matmul(self.mean[:, None, :], linear)[:, 0]  # (K, 1)
        i, j = _upper_triangle(self.n_features, W.device)
        quadratic = W[:, i, j] * torch.where(i == j, 1.0, 2.0)
        return torch.cat([constant, -2.0 * linear[:, :, 0], quadratic], dim=1)

    @classmethod
    def unpack(cls, reference: Tensor, sums: tuple[Tensor, ...]) -> Moments:
        (table,) = sums
        K, D = reference.shape
        i, j = _upper_triangle(D, table.device)
        second = table.new_empty(K, D, D)
        second[:, i, j] = table[:, 1 + D :]
        second[:, j, i] = table[:, 1 + D :]
        return Moments(reference, table[:, 0], table[:, 1 : 1 + D], second)


class Tied(Wishart):
    """One Wishart precision that all components share."""

    covariance_shape = "tied"

    @cached_property
    def ill(self) -> Tensor:
        # The scatter is one sum over all components: the worst decides for all.
        K = self.mean.shape[0]
        return torch.arange(K if bool((~(self.amplification < _ILL)).any()) else 0)

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        D = diff.shape[-1]
        weighted = (resp[:, :, None] * diff).reshape(-1, D)
        return (weighted.mT @ diff.reshape(-1, D))[None]  # (1, D, D)

    @staticmethod
    def n_monomials(n_features: int) -> int:
        return 1 + n_features

    @staticmethod
    def fill_monomials(columns: Tensor, quadratic: Tensor) -> None:
        """Nothing to write: what is quadratic is the same for all components."""

    @cached_property
    def coefficients(self) -> Tensor:
        white = self.mean @ self.whitener[0]  # (K, D)
        constant = white.square().sum(-1, keepdim=True)
        return torch.cat([constant, -2.0 * white @ self.whitener[0].T], dim=1)

    def squared_distance(self, x: Tensor, monomials: Tensor) -> Tensor:
        if self.ill.numel():
            return self.centred_distance(x - self.mean[:, None, :])
        return (self.coefficients @ monomials).add_(self._square(x))

    def common(self, x: Tensor) -> Tensor:
        return -0.5 * self.dof * self._square(x)

    def _square(self, x: Tensor) -> Tensor:
        """``x' W x`` of rows (B, D), the same for every component; shape (B,)."""
        return (x @ self.whitener[0]).square_().sum(-1)

    @classmethod
    def sums(cls, x: Tensor, monomials: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        return resp @ monomials.T, x.T @ (resp.sum(0)[:, None] * x)  # (K, 1 + D), (D, D)

    @classmethod
    def unpack(cls, reference: Tensor, sums: tuple[Tensor, ...]) -> Moments:
        table, second = sums
        return Moments(reference, table[:, 0], table[:, 1:], second[None])

    def dof_update(self, counts: Tensor) -> Tensor:
        return self.dof + counts.sum(0, keepdim=True)


class Gamma(Components):
    """Precisions without off-diagonal elements."""

    @staticmethod
    def factor(inverse_scale: Tensor) -> Tensor:
        return inverse_scale.sqrt()

    def inverse_scale(self) -> Tensor:
        return self.root.square()

    @abstractmethod
    def gamma(self) -> tuple[Tensor, Tensor]:
        """Shape and rate of the precisions, each in the shape of `root`."""

    def log_normaliser(self) -> Tensor:
        each = gamma.log_normaliser(*self.gamma())
        return each.reshape(len(each), -1).sum(-1)

    def kl_precision(self, prior: Self) -> Tensor:
        return gamma.kl(*self.gamma(), *prior.gamma()).sum()

    @classmethod
    @abstractmethod
    def pooled(cls, cells: Tensor) -> Tensor:
        """Add up a quantity per feature, (K, D), over the features that share a precision."""

    @classmethod
    def lever(cls, step: Tensor, seen: Tensor) -> Tensor:
        return cls.pooled(seen * step.square())

    @abstractmethod
    def dof_update_of_cells(self, cells: Tensor) -> Tensor:
        """Degrees of freedom after seeing `cells` (K, D) of the features."""

    def update(self, moments: Moments) -> Self:
        """Return the posterior; each feature by the count of its observed cells."""
        reference, _, first, second, cells = moments
        if cells is None:
            return super().update(moments)
        kappa0 = self.kappa_columns
        kappa = kappa0 + cells  # (K, D)
        mean = reference + (first + kappa0 * (self.mean - reference)) / kappa
        offset = moments.offset()  # xbar - reference
        pull = reference + offset - self.mean
        square = kappa0 * cells / kappa * pull.square() - cells * offset.square()
        scale = self.inverse_scale() + second + self.pooled(square)
        return type(self)(mean, kappa, self.dof_update_of_cells(cells), self.factor(scale))

    @classmethod
    def merge(cls, first: Moments, second: Moments) -> Moments:
        """Return the statistics of both sets of rows; each feature by its own counts."""
        if first.cells is None and second.cells is None:
            return super().merge(first, second)
        n1, n2 = (moments.seen.expand_as(moments.first) for moments in (first, second))
        cells = n1 + n2  # (K, D)
        here, there = first.offset(), second.offset()
        gap = (second.reference - first.reference) + (there - here)
        step = n2 / cells.clamp_min(torch.finfo(cells.dtype).tiny) * gap
        square = n1 * (step.square() - here.square()) + n2 * (
            (step - gap).square() - there.square()
        )
        mean = first.reference + (here + step)
        scatter = first.second + second.second + cls.pooled(square)
        counts = first.counts + second.counts
        return Moments(mean, counts, torch.zeros_like(mean), scatter, cells)

    @cached_property
    def cell_constant(self) -> Tensor:
        """What the expected log density of a cell has besides its distance, (K, D)."""
        shape, rate = (columns(parameter) for parameter in self.gamma())
        constant = gamma.expected_log(shape, rate) - LOG_2PI - 1.0 / self.kappa_columns
        return 0.5 * constant.expand_as(self.mean)

    def energy(self, moments: Moments) -> Tensor:
        """Sum over observed cells, in nats, from the statistics alone."""
        if moments.cells is None and self.kappa.ndim == 1:
            return super().energy(moments)
        seen, offset = moments.seen.expand_as(self.mean), moments.offset()
        away = moments.reference - self.mean + offset
        about_mean = moments.second + self.pooled(seen * (away.square() - offset.square()))
        shape, rate = self.gamma()
        return (seen * self.cell_constant).sum() - 0.5 * (shape / rate * about_mean).sum()


class Diag(Gamma):
    """An independent gamma precision per component and feature."""

    covariance_shape = "diag"

    @classmethod
    def prior_inverse_scale(cls, covariance: Tensor, n_features: int) -> Tensor:
        return covariance[None]

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        return torch.matmul(resp[:, None, :], diff.square())[:, 0, :]  # (K, D)

    @classmethod
    def pooled(cls, cells: Tensor) -> Tensor:
        return cells

    def dof_update_of_cells(self, cells: Tensor) -> Tensor:
        return columns(self.dof) + cells

    def gamma(self) -> tuple[Tensor, Tensor]:
        return 0.5 * columns(self.dof).expand_as(self.root), 0.5 * self.root.square()

    @property
    def precision_dof(self) -> Tensor:
        return self.dof if self.dof.ndim == 1 else torch.ones_like(self.dof[:, 0])

    @cached_property
    def unit(self) -> Tensor:
        """What distances are measured in, (K, D): `root`, with the dof of features if they vary."""
        return self.root if self.dof.ndim == 1 else self.root / self.dof.sqrt()

    def covariances(self) -> Tensor:
        return self.unit.square() / self.precision_dof[:, None]

    @cached_property
    def E_log_det(self) -> Tensor:
        return gamma.expected_log(*self.gamma()).sum(-1)

    def centred_distance(self, diff: Tensor) -> Tensor:
        return (diff / self.unit[:, None, :]).square().sum(-1)

    def scaled_trace(self, second: Tensor) -> Tensor:
        return (second / self.root.square()).sum(-1)

    @staticmethod
    def n_monomials(n_features: int) -> int:
        return 1 + 2 * n_features

    @staticmethod
    def fill_monomials(columns: Tensor, quadratic: Tensor) -> None:
        torch.square(columns, out=quadratic)

    @cached_property
    def coefficients(self) -> Tensor:
        scaled = self.mean / self.unit  # (K, D)
        constant = scaled.square().sum(-1, keepdim=True)
        return torch.cat([constant, -2.0 * scaled / self.unit, self.unit.square().reciprocal()], 1)

    @cached_property
    def amplification(self) -> Tensor:
        return self.precision_dof * ((self.mean.square() + 1.0) / self.unit.square()).sum(-1)

    @classmethod
    def unpack(cls, reference: Tensor, sums: tuple[Tensor, ...]) -> Moments:
        (table,) = sums
        D = reference.shape[-1]
        return Moments(reference, table[:, 0], table[:, 1 : 1 + D], table[:, 1 + D :])

    def log_student(self, x: Tensor) -> Tensor:
        # A product of univariate t with scale^2 (1 + 1/kappa) s / dof.
        return self.log_student_of_cells(x).sum(-1)

    def log_student_of_cells(self, x: Tensor) -> Tensor:
        """Log density of each cell of rows (B, D), shape (K, B, D)."""
        dof = columns(self.dof)  # (K, 1) or (K, D)
        factor = (1.0 + 1.0 / self.kappa_columns) / dof
        log_det = factor.log() + 2.0 * self.root.log()  # (K, D)
        white = (x - self.mean[:, None, :]) / self.root[:, None, :]  # (K, B, D)
        square = white.square() / factor[:, None, :]
        return student_t.log_density(square, log_det[:, None, :], dof[:, None, :], 1)

    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        dof, root = np.asarray(columns(self.dof)), np.asarray(self.root)
        normal = rng.standard_normal((labels.size, self.n_features))
        return root[labels] * normal / np.sqrt(rng.chisquare(dof[labels], normal.shape))


class Spherical(Gamma):
    """One gamma precision per component, the same for every feature."""

    covariance_shape = "spherical"

    @classmethod
    def prior_inverse_scale(cls, covariance: Tensor, n_features: int) -> Tensor:
        return n_features * covariance.reshape(1)

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        return (resp * diff.square().sum(-1)).sum(-1)  # (K,)

    @classmethod
    def pooled(cls, cells: Tensor) -> Tensor:
        return cells.sum(-1)

    def dof_update_of_cells(self, cells: Tensor) -> Tensor:
        return self.dof + cells.mean(-1)

    def gamma(self) -> tuple[Tensor, Tensor]:
        return 0.5 * self.precision_dof, 0.5 * self.root.square()

    @property
    def precision_dof(self) -> Tensor:
        return self.n_features * self.dof

    @cached_property
    def E_log_det(self) -> Tensor:
        return self.n_features * gamma.expected_log(*self.gamma())

    def centred_distance(self, diff: Tensor) -> Tensor:
        return (diff / self.root[:, None, None]).square().sum(-1)

    def scaled_trace(self, second: Tensor) -> Tensor:
        return second / self.root.square()

    @staticmethod
    def n_monomials(n_features: int) -> int:
        return 2 + n_features

    @staticmethod
    def fill_monomials(columns: Tensor, quadratic: Tensor) -> None:
        torch.linalg.vecdot(columns, columns, dim=0, out=quadratic[0])

    @cached_property
    def coefficients(self) -> Tensor:
        scaled = self.mean / self.root[:, None]  # (K, D)
        constant = scaled.square().sum(-1, keepdim=True)
        unit = self.root.square().reciprocal()[:, None]
        return torch.cat([constant, -2.0 * scaled / self.root[:, None], unit], 1)

    @cached_property
    def amplification(self) -> Tensor:
        spread = self.mean.square().sum(-1) + self.n_features
        return self.precision_dof * spread / self.root.square()

    @classmethod
    def unpack(cls, reference: Tensor, sums: tuple[Tensor, ...]) -> Moments:
        (table,) = sums
        return Moments(reference, table[:, 0], table[:, 1:-1], table[:, -1])

    def log_student(self, x: Tensor) -> Tensor:
        if self.kappa.ndim > 1:
            return self.log_student_of_some(x, torch.ones_like(x))
        D, dof = self.n_features, self.precision_dof  # (K,)
        factor = (1.0 + 1.0 / self.kappa) / dof
        log_det = D * (factor.log() + 2.0 * self.root.log())  # (K,)
        square = self.squared_distance(x, self.monomials(x)) / factor[:, None]
        return student_t.log_density(square, log_det[:, None], dof[:, None], D)

    def log_student_of_some(self, x: Tensor, observed: Tensor) -> Tensor:
        """Log density of the cells of rows (B, D) where `observed` is 1 and not 0, (K, B)."""
        dof = self.precision_dof[:, None]  # (K, 1)
        variance = (1.0 + 1.0 / self.kappa_columns) / dof * self.root.square()[:, None]
        variance = variance.expand_as(self.mean)  # (K, D)
        diff = (x - self.mean[:, None, :]).mul_(observed)  # (K, B, D)
        square = diff.square_().div_(variance[:, None, :]).sum(-1)
        log_det = variance.log() @ observed.T  # (K, B)
        return student_t.log_density(square, log_det, dof, observed.sum(-1))

    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        dof, root = np.asarray(self.precision_dof), np.asarray(self.root)
        normal = rng.standard_normal((labels.size, self.n_features))
        return (root[labels] / np.sqrt(rng.chisquare(dof[labels])))[:, None] * normal


def add_to(total: tuple[Tensor, ...] | None, block: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Add the sums of a block to `total` in place, or begin with them."""
    if total is None:
        return block
    for into, value in zip(total, block, strict=True):
        into.add_(value)
    return total


def columns(per_component: Tensor) -> Tensor:
    """Numbers per component (K,) as (K, 1); those that vary over features (K, D) as they are."""
    return per_component if per_component.ndim == 2 else per_component[:, None]


def _upper_triangle(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each element of an upper triangle, row by row."""
    i, j = torch.triu_indices(dim, dim, device=device)
    return i, j


COMPONENTS: dict[str, type[Components]] = {
    cls.covariance_shape: cls for cls in (Full, Tied, Diag, Spherical)
}
