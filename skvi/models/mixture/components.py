r"""Conjugate laws of the component parameters, one class per shape of the precision.

Every class holds ``q(mu_k, Lambda_k) = N(mu_k | m_k, (kappa_k Lambda_k)^-1) q(Lambda_k)``:

==========  ==========================================================  ======================
class       ``q(Lambda_k)``                                             ``root``
==========  ==========================================================  ======================
Full        ``W(W_k, dof_k)``                                           chol of ``W_k^-1`` (K, D, D)
Tied        ``W(W, dof)``, shared                                       chol of ``W^-1`` (1, D, D)
Diag        ``lambda_kd ~ Gam(dof_k / 2, s_kd / 2)``                    ``sqrt(s)`` (K, D)
Spherical   ``lambda_k ~ Gam(D dof_k / 2, t_k / 2)``                    ``sqrt(t)`` (K,)
==========  ==========================================================  ======================

so ``root`` is always a factor of the inverse scale. A prior is a record of the same class with
K = 1, which broadcasts. Sources: Bishop (2006), section 10.2, equations 10.59-10.67 for Full; the
others are the conjugate posteriors of their own gamma or shared Wishart priors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from skvi.distributions import gamma, student_t, wishart
from skvi.distributions.normal import LOG_2PI
from skvi.runtime.linalg import inv_chol, log_det_from_chol


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
        (K, D, D), Tied (K, D, D) summed over k as (1, D, D), Diag (K, D), Spherical (K,).
    """

    reference: Tensor
    counts: Tensor
    first: Tensor
    second: Tensor

    def reordered(self, order: Tensor) -> Moments:
        """Return the statistics in another order of the components."""
        reference, counts, first, second = self
        shared = second.shape[0] == 1  # Tied: one scatter for all, which has no order
        return Moments(
            reference[order], counts[order], first[order], second if shared else second[order]
        )

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        """Add the statistics of other rows about the same reference."""
        return Moments(
            self.reference,
            self.counts + other.counts,
            self.first + other.first,
            self.second + other.second,
        )


@dataclass(frozen=True)
class Components(ABC):
    """Shared formulas; see the module docstring for the classes.

    Attributes
    ----------
    mean : Tensor of shape (K, D)
    kappa : Tensor of shape (K,)
    dof : Tensor of shape (K,), or (1,) for Tied
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

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Apply `function` to every array."""
        return replace(
            self,
            mean=function(self.mean),
            kappa=function(self.kappa),
            dof=function(self.dof),
            root=function(self.root),
        )

    # -- what a shape of the precision defines ------------------------------------------------

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

    @abstractmethod
    def E_mahalanobis(self, diff: Tensor) -> Tensor:
        """``E[d' Lambda_k d]`` of `diff` (K, B, D); shape (K, B)."""

    @staticmethod
    @abstractmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        """Weighted second moments of `diff` (K, B, D) under `resp` (K, B), in this shape."""

    @abstractmethod
    def kl_precision(self, prior: Self) -> Tensor:
        """``sum_k KL(q(Lambda_k) || p(Lambda_k))``; a shared precision counts once."""

    @abstractmethod
    def dof_update(self, counts: Tensor) -> Tensor:
        """Degrees of freedom after seeing `counts`."""

    @abstractmethod
    def log_student(self, diff: Tensor) -> Tensor:
        """Log posterior predictive density at ``mean + diff``; (K, B, D) -> (K, B)."""

    @abstractmethod
    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw ``root g^-1/2 z`` with z normal and g chi-square; (n,) labels -> (n, D).

        Times ``sqrt(1 + 1/kappa)`` this is the deviation of a predictive draw from its mean.
        """

    # -- what follows ---------------------------------------------------------------------------

    def centred(self, x: Tensor) -> Tensor:
        """Return ``x_n - m_k`` for rows (B, D), shape (K, B, D)."""
        return x[None, :, :] - self.mean[:, None, :]

    def E_log_prob(self, diff: Tensor) -> Tensor:
        r"""Return the expected log density of rows given their component, from centred rows.

        .. math::
            \tfrac12 E[\log|\Lambda_k|] - \tfrac D2 \log 2\pi
            - \tfrac12 (D / \kappa_k + E[(x - m_k)' \Lambda_k (x - m_k)])

        Bishop (2006), equations 10.64-10.65.

        Parameters
        ----------
        diff : Tensor of shape (K, B, D)

        Returns
        -------
        Tensor of shape (K, B)
        """
        D = self.n_features
        constant = 0.5 * (self.E_log_det - D * LOG_2PI - D / self.kappa)  # (K,)
        return constant[:, None] - 0.5 * self.E_mahalanobis(diff)

    @classmethod
    def moments(cls, reference: Tensor, diff: Tensor, resp: Tensor) -> Moments:
        """Statistics of rows given as ``diff = x - reference`` (K, B, D) under `resp` (K, B)."""
        first = torch.matmul(resp[:, None, :], diff)[:, 0, :]  # (K, D)
        return Moments(reference, resp.sum(-1), first, cls.scatter(diff, resp))

    def update(self, moments: Moments) -> Self:
        r"""Return the posterior of this prior.

        .. math::
            \kappa_k = \kappa_0 + N_k,\quad m_k = (\kappa_0 m_0 + N_k \bar x_k) / \kappa_k,\quad
            W_k^{-1} = W_0^{-1} + N_k S_k
                + \tfrac{\kappa_0 N_k}{\kappa_k} (\bar x_k - m_0)(\bar x_k - m_0)'

        with the second moments taken about a point near ``xbar_k``, never about the origin.
        """
        reference, counts, first, second = moments
        kappa = self.kappa + counts  # (K,)
        # (kappa0 m0 + N reference + first) / kappa, without leaving the reference
        mean = reference + (first + self.kappa[:, None] * (self.mean - reference)) / kappa[:, None]
        offset = first / counts.clamp_min(torch.finfo(counts.dtype).tiny)[:, None]  # xbar - ref
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
        ratio = prior.kappa / self.kappa
        pull = self.E_mahalanobis((self.mean - prior.mean)[:, None, :])[:, 0]  # (K,)
        normal = 0.5 * (self.n_features * (ratio - 1.0 - ratio.log()) + prior.kappa * pull)
        return normal.sum() + self.kl_precision(prior)

    def covariances(self) -> Tensor:
        """``E[Lambda_k]^-1`` in the shape of the class (Tied without its leading one)."""
        dof = self.dof.reshape(-1, *[1] * (self.root.ndim - 1))
        return self.inverse_scale() / dof


class _Wishart(Components):
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
    def _whitener(self) -> Tensor:
        """``L^-T``: rows times this have unit inverse scale."""
        return inv_chol(self.root).mT

    def _whitened_square(self, diff: Tensor) -> Tensor:
        return torch.matmul(diff, self._whitener).square().sum(-1)  # (K, B)

    def E_mahalanobis(self, diff: Tensor) -> Tensor:
        return self.dof[:, None] * self._whitened_square(diff)

    def kl_precision(self, prior: Self) -> Tensor:
        return wishart.kl(self.dof, self.root, prior.dof, prior.root).sum()

    def log_student(self, diff: Tensor) -> Tensor:
        D = self.n_features
        dof = self.dof + 1.0 - D  # (K,) or (1,)
        # scale matrix (1 + 1/kappa) / dof * W^-1
        factor = (1.0 + 1.0 / self.kappa) / dof  # (K,)
        log_det = D * factor.log() + log_det_from_chol(self.root)
        square = self._whitened_square(diff) / factor[:, None]
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


class Full(_Wishart):
    """One Wishart precision per component."""

    covariance_shape = "full"

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        return torch.matmul((resp[:, :, None] * diff).mT, diff)  # (K, D, D)

    def dof_update(self, counts: Tensor) -> Tensor:
        return self.dof + counts


class Tied(_Wishart):
    """One Wishart precision that all components share."""

    covariance_shape = "tied"

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        D = diff.shape[-1]
        weighted = (resp[:, :, None] * diff).reshape(-1, D)
        return (weighted.mT @ diff.reshape(-1, D))[None]  # (1, D, D)

    def dof_update(self, counts: Tensor) -> Tensor:
        return self.dof + counts.sum(0, keepdim=True)


class _Gamma(Components):
    """Precisions without off-diagonal elements."""

    @staticmethod
    def factor(inverse_scale: Tensor) -> Tensor:
        return inverse_scale.sqrt()

    def inverse_scale(self) -> Tensor:
        return self.root.square()

    def dof_update(self, counts: Tensor) -> Tensor:
        return self.dof + counts


class Diag(_Gamma):
    """An independent gamma precision per component and feature."""

    covariance_shape = "diag"

    @classmethod
    def prior_inverse_scale(cls, covariance: Tensor, n_features: int) -> Tensor:
        return covariance[None]

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        return torch.matmul(resp[:, None, :], diff.square())[:, 0, :]  # (K, D)

    def _gamma(self) -> tuple[Tensor, Tensor]:
        return 0.5 * self.dof[:, None].expand_as(self.root), 0.5 * self.root.square()

    @cached_property
    def E_log_det(self) -> Tensor:
        return gamma.expected_log(*self._gamma()).sum(-1)

    def E_mahalanobis(self, diff: Tensor) -> Tensor:
        return self.dof[:, None] * (diff / self.root[:, None, :]).square().sum(-1)

    def kl_precision(self, prior: Self) -> Tensor:
        return gamma.kl(*self._gamma(), *prior._gamma()).sum()

    def log_student(self, diff: Tensor) -> Tensor:
        # a product of univariate t with scale^2 (1 + 1/kappa) s / dof
        factor = (1.0 + 1.0 / self.kappa) / self.dof  # (K,)
        log_det = factor.log()[:, None] + 2.0 * self.root.log()  # (K, D)
        square = (diff / self.root[:, None, :]).square() / factor[:, None, None]  # (K, B, D)
        dof = self.dof[:, None, None]
        return student_t.log_density(square, log_det[:, None, :], dof, 1).sum(-1)

    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        dof, root = np.asarray(self.dof), np.asarray(self.root)
        normal = rng.standard_normal((labels.size, self.n_features))
        return root[labels] * normal / np.sqrt(rng.chisquare(dof[labels, None], normal.shape))


class Spherical(_Gamma):
    """One gamma precision per component, the same for every feature."""

    covariance_shape = "spherical"

    @classmethod
    def prior_inverse_scale(cls, covariance: Tensor, n_features: int) -> Tensor:
        return n_features * covariance.reshape(1)

    @staticmethod
    def scatter(diff: Tensor, resp: Tensor) -> Tensor:
        return (resp * diff.square().sum(-1)).sum(-1)  # (K,)

    def _gamma(self) -> tuple[Tensor, Tensor]:
        return 0.5 * self.n_features * self.dof, 0.5 * self.root.square()

    @cached_property
    def E_log_det(self) -> Tensor:
        return self.n_features * gamma.expected_log(*self._gamma())

    def E_mahalanobis(self, diff: Tensor) -> Tensor:
        square = (diff / self.root[:, None, None]).square().sum(-1)  # (K, B)
        return self.n_features * self.dof[:, None] * square

    def kl_precision(self, prior: Self) -> Tensor:
        return gamma.kl(*self._gamma(), *prior._gamma()).sum()

    def log_student(self, diff: Tensor) -> Tensor:
        D = self.n_features
        dof = D * self.dof  # (K,)
        factor = (1.0 + 1.0 / self.kappa) / dof
        log_det = D * (factor.log() + 2.0 * self.root.log())  # (K,)
        square = (diff / self.root[:, None, None]).square().sum(-1) / factor[:, None]
        return student_t.log_density(square, log_det[:, None], dof[:, None], D)

    def draw_noise(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        dof, root = self.n_features * np.asarray(self.dof), np.asarray(self.root)
        normal = rng.standard_normal((labels.size, self.n_features))
        return (root[labels] / np.sqrt(rng.chisquare(dof[labels])))[:, None] * normal

    def covariances(self) -> Tensor:
        return super().covariances() / self.n_features


COMPONENTS: dict[str, type[Components]] = {
    cls.covariance_shape: cls for cls in (Full, Tied, Diag, Spherical)
}
