r"""The mixture as a whole: coordinate ascent, the bound row by row, the posterior predictive.

With the global posterior ``q(pi) prod_k q(mu_k, Lambda_k)`` held fixed, the best ``q(z_n)`` is

.. math::
    \log\rho_{nk} = E[\log\pi_k] + E[\log N(x_n|\mu_k, \Lambda_k^{-1})], \quad
    r_{nk} = \rho_{nk} / \sum_j \rho_{nj},

and the bound of row n is ``log sum_k rho_nk``; Bishop (2006), equations 10.46-10.49. Tensors of
rows run (K, B): components first, so that every reduction over K reads contiguous rows.

Rows are tensors (B, D), or `Cells` where some are missing; see :mod:`skvi.models.mixture.missing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.models.mixture import missing
from skvi.models.mixture.components import Components, Gamma, Moments, add_to
from skvi.models.mixture.missing import Cells
from skvi.models.mixture.weights import Weights
from skvi.models.terms import ElboTerms
from skvi.runtime.blocks import Rows, Workspace


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

    def update(self, moments: Moments) -> Posterior:
        """Return the optimal posterior of this prior, with the components in the given order."""
        return Posterior(self.weights.update(moments.counts), self.components.update(moments))

    def ordered(self, moments: Moments) -> Moments:
        """Return statistics in the order of components that raises the bound under this prior.

        Labels are exchangeable, but not for the sticks of a Dirichlet process.
        """
        order = self.weights.best_order(moments.counts)
        return moments if order is None else moments.reordered(order)

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
    # Diag multiplies univariate densities, so it cannot do without each difference; nor can
    # Spherical where features have been seen a different number of times.
    return floats_per_row(components) + (4 * K * D if isinstance(components, Gamma) else 0)


def conditional_floats_per_row(components: Components) -> int:
    """Workspace of :func:`conditional`, in float64 numbers a row."""
    K, D = components.mean.shape
    return predictive_floats_per_row(components) + 4 * K * D


class LogRho:
    """``log rho_nk`` of rows under a posterior.

    Parameters
    ----------
    posterior : Posterior
    """

    def __init__(self, posterior: Posterior) -> None:
        self.E_log_pi = posterior.weights.E_log()  # (K,)
        self._components = components = posterior.components
        self._ill = components.take(components.ill) if components.ill.numel() else None
        self._form = components.linear_form(self.E_log_pi)  # (K, F)

    def __call__(self, x: Tensor, monomials: Tensor, out: Tensor | None = None) -> Tensor:
        """Return it for rows (B, D) and their monomials (F, B), shape (K, B); in `out` if given."""
        result = torch.mm(self._form, monomials, out=out)
        common = self._components.common(x)
        if common is not None:
            result.add_(common)
        if self._ill is not None:
            some, index = self._ill, self._components.ill
            centred = some.E_log_prob(some.centred_distance(x - some.mean[:, None, :]))
            result[index] = centred.add_(self.E_log_pi[index, None])
        return result

    def within(self, workspace: Workspace, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return monomials (F, B) and log rho (K, B) of rows (B, D) in a workspace."""
        monomials = monomials_within(workspace, self._components, x)
        out = workspace.take("resp", x, len(self._form), len(x))
        return monomials, self(x, monomials, out)


def monomials_within(workspace: Workspace, components: Components, x: Tensor) -> Tensor:
    """Return the monomials of rows (B, D) in a workspace, shape (F, B)."""
    B, D = x.shape
    out = workspace.take("monomials", x, components.n_monomials(D), B)
    return components.monomials(x, out=out)


def log_rho(posterior: Posterior, x: Tensor | Cells) -> Tensor:
    """``log rho_nk`` of rows (B, D), shape (K, B); ``log E[pi_k]`` where nothing is observed."""
    components = posterior.components
    if isinstance(x, Cells):
        log_prob = missing.E_log_prob(components, x).add_(posterior.weights.E_log()[:, None])
        # Nothing seen: the label is integrated out, and the bound is log 1.
        log_mean = posterior.weights.log_mean()[0].log_softmax(0)
        return torch.where(missing.empty(x), log_mean[:, None], log_prob)
    return LogRho(posterior)(x, components.monomials(x))


# Rounding of log rho, relative and for each term of the sums that it is made of.
_ROUNDING = 16 * torch.finfo(torch.float64).eps


class Scores:
    """What one posterior says of rows, block after block: at the speed of a pass.

    The linear form is made once, and the memory of a block serves the next one: what is returned
    may lie there, and holds until the next call.

    Parameters
    ----------
    posterior : Posterior
    workspace : Workspace
    """

    def __init__(self, posterior: Posterior, workspace: Workspace) -> None:
        self._posterior = posterior
        self._log_rho = LogRho(posterior)
        self._workspace = workspace

    def log_rho(self, x: Tensor | Cells) -> Tensor:
        """As the function of this name."""
        if isinstance(x, Cells):
            return log_rho(self._posterior, x)
        return self._log_rho.within(self._workspace, x)[1]

    def local_bound(self, x: Tensor | Cells) -> Tensor:
        """``log sum_k rho_nk`` of rows (B, D), shape (B,): the local bound in nats."""
        _, largest, total = _exponentials(self.log_rho(x))
        return total.log_().add_(largest)

    def responsibilities(self, x: Tensor | Cells) -> Tensor:
        """``r_nk`` of rows (B, D), shape (K, B)."""
        resp, _, total = _exponentials(self.log_rho(x))
        return resp.div_(total)

    def labels(self, x: Tensor | Cells) -> Tensor:
        """Return the most probable component of each row, the first of equals; shape (B,)."""
        log_rho = self.log_rho(x)
        largest = log_rho.amax(0)
        # Empty components of a symmetric prior are equal, but for the rounding of the products.
        D = self._posterior.components.n_features
        tie = _ROUNDING * (D + self._posterior.components.n_monomials(D))
        first = log_rho >= largest - tie * (1.0 + largest.abs())
        # Along this dimension max is several times faster than argmax.
        return first.byte().max(0).indices


def _exponentials(log_rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``rho / rho_max`` in place of log rho (K, B), ``log rho_max``, and the sum; (B,)."""
    # One exponential serves bound and responsibilities. These are normalised explicitly: a row
    # 1e10 spreads away has log rho of 1e19, where log sum exp cannot hold the log 2 of a tie.
    largest = log_rho.amax(0)
    rho = log_rho.sub_(largest).exp_()
    return rho, largest, rho.sum(0)


def elbo_terms(posterior: Posterior, x: Tensor | Cells) -> ElboTerms[Tensor]:
    """Return the terms of the local bound of rows (B, D), each of shape (B,).

    All are zero for a row with nothing observed.
    """
    E_log_pi = posterior.weights.E_log()[:, None]  # (K, 1)
    log_joint = log_rho(posterior, x)  # (K, B)
    log_resp = log_joint.log_softmax(0)
    resp = log_resp.exp()
    # 0 log 0 = 0: a responsibility that underflowed must not turn -inf into NaN.
    log_resp = log_resp.clamp_min(torch.finfo(log_resp.dtype).min)
    terms = ElboTerms(
        reconstruction=(resp * (log_joint - E_log_pi)).sum(0),
        kl=(resp * (log_resp - E_log_pi)).sum(0),
        energy=(resp * log_joint).sum(0),
        entropy=-(resp * log_resp).sum(0),
    )
    if isinstance(x, Cells):
        terms = ElboTerms(*(torch.where(missing.empty(x), 0.0, term) for term in terms))
    return terms


def log_predictive(posterior: Posterior, prior: Posterior, x: Tensor | Cells) -> Tensor:
    """Log posterior predictive density of rows (B, D), shape (B,).

    ``log sum_k E[pi_k] t_k(x)`` with the Student-t of each component; under a Dirichlet process
    the mass beyond the truncation goes to the prior predictive.
    """
    return _log_predictive_parts(posterior, prior, x).logsumexp(0)


def _log_predictive_parts(posterior: Posterior, prior: Posterior, x: Tensor | Cells) -> Tensor:
    """Terms of that sum, shape (K + 1, B): the last is the mass beyond the truncation."""
    log_weight, log_rest = posterior.weights.log_mean()
    components, new = posterior.components, prior.components
    if isinstance(x, Cells):
        inside, beyond = missing.log_student(components, x), missing.log_student(new, x)
    else:
        inside, beyond = components.log_student(x), new.log_student(x)
    return torch.cat([log_weight[:, None] + inside, log_rest + beyond])


def conditional(posterior: Posterior, prior: Posterior, x: Cells) -> tuple[Tensor, Tensor]:
    r"""Return mean and variance of each cell given the observed ones of its row, (B, D) both.

    .. math::
        E[x_m | x_o] = \sum_k w_k \hat x_k, \quad
        \mathrm{Var} = \sum_k w_k (v_k + (\hat x_k - E[x_m | x_o])^2), \quad
        w_k \propto E[\pi_k] t_k(x_o)

    The mean is that of the posterior predictive, exactly. Within a component the variance is
    taken under the expected precision: the Student-t of a component without rows has none.
    """
    weight = _log_predictive_parts(posterior, prior, x).softmax(0)[:, :, None]  # (K + 1, B, 1)
    parts = (missing.completed(law.components, x) for law in (posterior, prior))
    location, variance = (torch.cat(pair) for pair in zip(*parts, strict=True))  # (K + 1, B, D)
    mean = torch.where(x.observed, x.x, (weight * location).sum(0))
    var = (weight * (variance + (location - mean).square())).sum(0)
    return mean, var


class Totals:
    """Statistics and local bound of rows under a posterior, added up block by block.

    Parameters
    ----------
    posterior : Posterior
    device : torch.device
    workspace : Workspace, optional
        Memory to work in, kept from pass to pass.
    """

    def __init__(
        self, posterior: Posterior, device: torch.device, workspace: Workspace | None = None
    ) -> None:
        self.posterior = posterior
        self._log_rho = LogRho(posterior)
        self._workspace = Workspace() if workspace is None else workspace
        ill = posterior.components.ill
        self._ill = posterior.components.take(ill) if ill.numel() else None
        self._bound = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: tuple[Tensor, ...] | None = None  # of monomials
        self._ill_sums: tuple[Tensor, ...] | None = None  # of centred rows
        self._incomplete: Moments | None = None  # of rows with missing cells, about the means

    def add(self, x: Tensor | Cells, weight: Tensor) -> Tensor:
        """Add rows (B, D) with weights (B,); return responsibilities times weights, (K, B).

        What is returned may lie in the workspace: it holds until the next call.
        """
        if isinstance(x, Cells):
            return self._add_cells(x, weight)
        components = self.posterior.components
        monomials, resp = self._log_rho.within(self._workspace, x)
        self._share_out(resp, weight)
        self._sums = add_to(self._sums, components.sums(x, monomials, resp))
        if self._ill is not None:
            r = resp[components.ill]
            diff = x - self._ill.mean[:, None, :]  # (K_ill, B, D)
            first = torch.matmul(r[:, None, :], diff)[:, 0, :]
            self._ill_sums = add_to(self._ill_sums, (first, self._ill.scatter(diff, r)))
        return resp

    def _share_out(self, log_rho: Tensor, weight: Tensor) -> Tensor:
        """Turn log rho (K, B) into weighted responsibilities, in place; add the bound."""
        resp, largest, total = _exponentials(log_rho)
        self._bound += weight @ (largest + total.log())
        return resp.mul_(weight / total)

    def _add_cells(self, x: Cells, weight: Tensor) -> Tensor:
        components = self.posterior.components
        weight = torch.where(missing.empty(x), 0.0, weight)  # they say nothing
        resp = weight.new_zeros(len(components.mean), len(weight))
        whole = missing.complete(components, x)
        if whole.numel():
            resp[:, whole] = self.add(x.x[whole], weight[whole])
        for batch in missing.batches(components, x):
            log_rho = batch.E_log_prob().add_(self._log_rho.E_log_pi[:, None])
            part = self._share_out(log_rho, weight[batch.rows])
            self._incomplete = missing.added(self._incomplete, batch.moments(part))
            resp[:, batch.rows] = part
        return resp

    def result(self) -> tuple[Moments, float]:
        """Return the statistics of all rows and their weighted local bound in nats."""
        if self._incomplete is None:
            return self._complete_moments(), float(self._bound)
        moments = self._incomplete
        if self._sums is not None:
            more = missing.moved(self._complete_moments(), moments.reference)
            moments = missing.added(moments, more)
        return moments, float(self._bound)

    def _complete_moments(self) -> Moments:
        """Return the statistics of the rows without missing cells."""
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
        return moments


def expectation(posterior: Posterior, rows: Rows) -> tuple[Moments, float]:
    """One pass over the rows: their statistics and their weighted local bound.

    Returns
    -------
    moments : Moments
        Under the responsibilities of `posterior`.
    bound : float
        ``sum_n s_n log sum_k rho_nk`` in nats.
    """
    totals = Totals(posterior, rows.device, rows.workspace)
    for _, x, weight in rows.blocks(floats_per_row(posterior.components)):
        totals.add(x, weight)
    return totals.result()


def energy(posterior: Posterior, moments: Moments) -> float:
    """``E_q[log p(X, z | theta)]`` in nats of the rows that left `moments`, linear in them."""
    log_weights = moments.counts @ posterior.weights.E_log()
    return float(log_weights + posterior.components.energy(moments))


class Share(NamedTuple):
    """What a set of rows leaves behind: enough for its bound under any posterior.

    Attributes
    ----------
    moments : Moments
        Under responsibilities of whatever posterior the rows were last visited with.
    entropy : float
        Of those responsibilities, in nats.
    """

    moments: Moments
    entropy: float

    def map(self, function: Callable[[Any], Any]) -> Share:
        """Apply `function` to every array."""
        return Share(self.moments.map(function), self.entropy)

    def merge(self, other: Share, shape: type[Components]) -> Share:
        """Return what both sets of rows leave behind."""
        moments = shape.merge(self.moments, other.moments)
        return Share(moments, self.entropy + other.entropy)

    def bound(self, posterior: Posterior, prior: Posterior) -> float:
        """Return the exact bound of these responsibilities and `posterior`, in nats."""
        return energy(posterior, self.moments) + self.entropy - float(posterior.kl(prior))


def share(posterior: Posterior, moments: Moments, local: float) -> Share:
    """Return the share of rows from their statistics and their `local` bound, in nats.

    The best responsibilities have ``local = energy + entropy``.
    """
    return Share(moments, local - energy(posterior, moments))


def maximisation(prior: Posterior, moments: Moments) -> Posterior:
    """Return the optimal global posterior given the statistics of the rows, in the best order."""
    return prior.update(prior.ordered(moments))


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
            mean, kappa = law.mean.numpy()[owner], law.kappa_columns.numpy()[owner]
            x[chosen] = mean + np.sqrt(1.0 + 1.0 / kappa) * law.draw_noise(owner, rng)
    return x, labels
