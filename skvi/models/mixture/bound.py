r"""The mixture as a whole: coordinate ascent, the bound row by row, the posterior predictive.

With the global posterior ``q(pi) prod_k q(mu_k, Lambda_k)`` held fixed, the best ``q(z_n)`` is

.. math::
    \log\rho_{nk} = E[\log\pi_k] + E[\log N(x_n|\mu_k, \Lambda_k^{-1})], \quad
    r_{nk} = \rho_{nk} / \sum_j \rho_{nj},

and the bound of row n is ``log sum_k rho_nk``; Bishop (2006), equations 10.46-10.49. Tensors of
rows run (K, B): components first, so that every reduction over K reads contiguous rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.models.mixture.components import Components, Diag, Moments, add_to
from skvi.models.mixture.weights import Weights
from skvi.models.terms import ElboTerms
from skvi.runtime.blocks import Rows


class Posterior(NamedTuple):
    """``q(pi) prod_k q(mu_k, Lambda_k)``; a prior is the same record with one component.

    Attributes
    ----------
    weights : Weights
    components : Components
    """

    weights: Weights
    components: Components

    def map(self, function: Callable[[Any], Any]) -> Posterior:
        """Apply `function` to every array."""
        return Posterior(self.weights.map(function), self.components.map(function))

    def kl(self, prior: Posterior) -> Tensor:
        """``KL(q || p)`` of everything that rows share, in nats."""
        return self.weights.kl(prior.weights) + self.components.kl(prior.components)


class State(NamedTuple):
    """A posterior and the statistics of the rows under it."""

    posterior: Posterior
    moments: Moments


def floats_per_row(components: Components) -> int:
    """Workspace of the functions of the bound, in float64 numbers a row."""
    K, D = components.mean.shape
    return components.n_monomials(D) + D + 4 * K + 3 * D * components.ill.numel()


def predictive_floats_per_row(components: Components) -> int:
    """Workspace of :func:`log_predictive`, in float64 numbers a row."""
    K, D = components.mean.shape
    # Diag multiplies univariate densities, so it cannot do without each difference.
    return floats_per_row(components) + (4 * K * D if isinstance(components, Diag) else 0)


def log_rho(posterior: Posterior, x: Tensor) -> Tensor:
    """``log rho_nk`` of rows (B, D), shape (K, B)."""
    components = posterior.components
    distance = components.squared_distance(x, components.monomials(x))
    return components.E_log_prob(distance).add_(posterior.weights.E_log()[:, None])


def local_bound(posterior: Posterior, x: Tensor) -> Tensor:
    """``log sum_k rho_nk`` of rows (B, D), shape (B,): the local bound in nats."""
    return log_rho(posterior, x).logsumexp(0)


def responsibilities(posterior: Posterior, x: Tensor) -> Tensor:
    """``r_nk`` of rows (B, D), shape (K, B)."""
    return log_rho(posterior, x).softmax(0)


def elbo_terms(posterior: Posterior, x: Tensor) -> ElboTerms[Tensor]:
    """Return the terms of the local bound of rows (B, D), each of shape (B,)."""
    E_log_pi = posterior.weights.E_log()[:, None]  # (K, 1)
    log_joint = log_rho(posterior, x)  # (K, B)
    log_resp = log_joint.log_softmax(0)
    resp = log_resp.exp()
    # 0 log 0 = 0: a responsibility that underflowed must not turn -inf into NaN.
    log_resp = log_resp.clamp_min(torch.finfo(log_resp.dtype).min)
    return ElboTerms(
        reconstruction=(resp * (log_joint - E_log_pi)).sum(0),
        kl=(resp * (log_resp - E_log_pi)).sum(0),
        energy=(resp * log_joint).sum(0),
        entropy=-(resp * log_resp).sum(0),
    )


def log_predictive(posterior: Posterior, prior: Posterior, x: Tensor) -> Tensor:
    """Log posterior predictive density of rows (B, D), shape (B,).

    ``log sum_k E[pi_k] t_k(x)`` with the Student-t of each component; under a Dirichlet process
    the mass beyond the truncation goes to the prior predictive.
    """
    log_weight, log_rest = posterior.weights.log_mean()
    components, new = posterior.components, prior.components
    inside = log_weight[:, None] + components.log_student(x)  # (K, B)
    beyond = log_rest + new.log_student(x)  # (1, B)
    return torch.cat([inside, beyond]).logsumexp(0)


class Totals:
    """Statistics and local bound of rows under a posterior, added up block by block.

    Parameters
    ----------
    posterior : Posterior
    device : torch.device
    """

    def __init__(self, posterior: Posterior, device: torch.device) -> None:
        self.posterior = posterior
        self._E_log_pi = posterior.weights.E_log()  # (K,)
        ill = posterior.components.ill
        self._ill = posterior.components.take(ill) if ill.numel() else None
        self._bound = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: tuple[Tensor, ...] | None = None  # of monomials
        self._ill_sums: tuple[Tensor, ...] | None = None  # of centred rows

    def add(self, x: Tensor, weight: Tensor) -> Tensor:
        """Add rows (B, D) with weights (B,); return responsibilities times weights, (K, B)."""
        components = self.posterior.components
        monomials = components.monomials(x)  # (F, B)
        resp = components.E_log_prob(components.squared_distance(x, monomials))
        resp.add_(self._E_log_pi[:, None])  # log rho until normalised
        # One exponential serves both. Responsibilities are normalised explicitly: a row 1e10
        # spreads away has log rho of 1e19, where log sum exp cannot hold the log 2 of a tie.
        largest = resp.amax(0)  # (B,)
        resp.sub_(largest).exp_()
        total = resp.sum(0)
        self._bound += weight @ (largest + total.log())
        resp.mul_(weight / total)
        self._sums = add_to(self._sums, components.sums(x, monomials, resp))
        if self._ill is not None:
            r = resp[components.ill]
            diff = x - self._ill.mean[:, None, :]  # (K_ill, B, D)
            first = torch.matmul(r[:, None, :], diff)[:, 0, :]
            self._ill_sums = add_to(self._ill_sums, (first, self._ill.scatter(diff, r)))
        return resp

    def result(self) -> tuple[Moments, float]:
        """Return the statistics of all rows and their weighted local bound in nats."""
        components = self.posterior.components
        reference = torch.zeros_like(components.mean)
        assert self._sums is not None  # rows are never empty
        moments = components.unpack(reference, self._sums)
        if self._ill is not None and self._ill_sums is not None:
            # About their own means; a shared scatter is replaced as a whole.
            reference[components.ill] = self._ill.mean
            first, second = self._ill_sums
            moments.first[components.ill] = first
            moments.second[components.ill if len(moments.second) > 1 else slice(None)] = second
        return moments, float(self._bound)


def expectation(posterior: Posterior, rows: Rows) -> tuple[Moments, float]:
    """One pass over the rows: their statistics and their weighted local bound.

    Returns
    -------
    moments : Moments
        Under the responsibilities of `posterior`.
    bound : float
        ``sum_n s_n log sum_k rho_nk`` in nats.
    """
    totals = Totals(posterior, rows.device)
    for _, x, weight in rows.blocks(floats_per_row(posterior.components)):
        totals.add(x, weight)
    return totals.result()


def maximisation(prior: Posterior, moments: Moments) -> Posterior:
    """Return the optimal global posterior given the statistics of the rows."""
    return Posterior(prior.weights.update(moments.counts), prior.components.update(moments))


def coordinate_ascent(prior: Posterior, rows: Rows) -> Callable[[State], tuple[State, float]]:
    """Return the step of coordinate ascent: the next state and its bound in nats."""

    def step(state: State) -> tuple[State, float]:
        posterior = maximisation(prior, state.moments)
        moments, local = expectation(posterior, rows)
        return State(posterior, moments), local - float(posterior.kl(prior))

    return step


def sample(
    posterior: Posterior, prior: Posterior, n_samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw from the posterior predictive; arrays of the records are NumPy.

    Parameters
    ----------
    posterior, prior : Posterior
        On the host.
    n_samples : int
    rng : numpy.random.Generator

    Returns
    -------
    x : ndarray of shape (n_samples, D)
    labels : ndarray of shape (n_samples,)
        K stands for a component beyond the truncation, drawn from the prior predictive.
    """
    posterior, prior = posterior.map(torch.as_tensor), prior.map(torch.as_tensor)
    log_weight, log_rest = posterior.weights.log_mean()
    mass = torch.cat([log_weight, log_rest[None]]).exp().numpy()
    K = mass.size - 1
    labels = rng.choice(K + 1, size=n_samples, p=mass / mass.sum())
    x = np.empty((n_samples, prior.components.n_features))
    for law, chosen, owner in (
        (posterior.components, labels < K, labels[labels < K]),
        (prior.components, labels == K, np.zeros((labels == K).sum(), dtype=int)),
    ):
        if owner.size:
            mean, kappa = law.mean.numpy()[owner], law.kappa.numpy()[owner]
            x[chosen] = mean + np.sqrt(1.0 + 1.0 / kappa)[:, None] * law.draw_noise(owner, rng)
    return x, labels
