"""Laws of the mixing weights: a Dirichlet, or the stick-breaking of a Dirichlet process.

Both are conjugate to the categorical labels. A prior and a posterior are the same kind of record:
``posterior = prior.update(counts)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from skvi.distributions import dirichlet, stick_breaking


class Weights(Protocol):
    """What the mixture asks of a law of its weights."""

    def update(self, counts: Tensor) -> Self:
        """Return the posterior of this prior given expected `counts`, shape (K,)."""

    def E_log(self) -> Tensor:
        """``E[log pi_k]``, shape (K,)."""

    def log_mean(self) -> tuple[Tensor, Tensor]:
        """``log E[pi_k]``, shape (K,), and the log of the mass beyond the truncation, scalar."""

    def kl(self, prior: Self) -> Tensor:
        """``KL(self || prior)``, a scalar."""

    def log_evidence(self, counts: Tensor) -> Tensor:
        """Return ``E[log p(z, pi)] - E[log q(pi)]`` at the best q(pi); (..., K) -> (...), nats.

        What labels with these expected counts are worth under this prior.
        """

    def counts(self, prior: Self) -> Tensor:
        """Return the counts that led from `prior` to this posterior, shape (K,)."""

    def best_order(self, counts: Tensor) -> Tensor | None:
        """Return the order of components that raises the bound under this prior, if any does."""

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Apply `function` to every array."""


@dataclass(frozen=True)
class Dirichlet:
    """``pi ~ Dir(a)``; posterior ``a_k = a0_k + N_k``.

    Attributes
    ----------
    concentration : Tensor of shape (K,)
    """

    concentration: Tensor

    @classmethod
    def prior(cls, n_components: int, concentration: float, device: torch.device) -> Self:
        """Symmetric prior ``Dir(a0, ..., a0)``."""
        return cls(torch.full((n_components,), concentration, dtype=torch.float64, device=device))

    def update(self, counts: Tensor) -> Self:
        return type(self)(self.concentration + counts)

    def E_log(self) -> Tensor:
        return dirichlet.expected_log(self.concentration)

    def log_mean(self) -> tuple[Tensor, Tensor]:
        log_mean = dirichlet.mean(self.concentration).log()
        return log_mean, torch.full_like(log_mean[0], -torch.inf)

    def kl(self, prior: Self) -> Tensor:
        return dirichlet.kl(self.concentration, prior.concentration)

    def log_evidence(self, counts: Tensor) -> Tensor:
        return _log_evidence(self, counts)

    def counts(self, prior: Self) -> Tensor:
        return self.concentration - prior.concentration

    def best_order(self, counts: Tensor) -> None:
        """Return None: the symmetric prior does not see the order."""

    def map(self, function: Callable[[Any], Any]) -> Self:
        return type(self)(function(self.concentration))


@dataclass(frozen=True)
class StickBreaking:
    """``v_k ~ Beta(1, a0)``, ``pi_k = v_k prod_{j<k} (1 - v_j)``, nested truncation.

    Posterior ``Beta(1 + N_k, a0 + sum_{j>k} N_j)``; Blei & Jordan (2006), equations 18-19.

    Attributes
    ----------
    a, b : Tensor of shape (K,)
        The Beta parameters of each stick.
    """

    a: Tensor
    b: Tensor

    @classmethod
    def prior(cls, n_components: int, concentration: float, device: torch.device) -> Self:
        """Return the sticks of a Dirichlet process with concentration `a0`."""
        ones = torch.ones(n_components, dtype=torch.float64, device=device)
        return cls(ones, concentration * ones)

    def update(self, counts: Tensor) -> "StickBreaking":
        return StickBreaking(self.a + counts, self.b + self._later(counts))

    @staticmethod
    def _later(counts: Tensor) -> Tensor:
        """``sum_{j>k} N_j``, (..., K), summed from the end: an empty tail is exactly zero."""
        from_end = counts[..., 1:].flip(-1).cumsum(-1).flip(-1)
        return torch.cat([from_end, torch.zeros_like(counts[..., :1])], dim=-1)

    def log_evidence(self, counts: Tensor) -> Tensor:
        return _log_evidence(self, counts)

    def E_log(self) -> Tensor:
        return stick_breaking.expected_log(self.a, self.b)

    def log_mean(self) -> tuple[Tensor, Tensor]:
        return stick_breaking.log_mean(self.a, self.b)

    def kl(self, prior: Self) -> Tensor:
        return stick_breaking.kl(self.a, self.b, prior.a, prior.b)

    def counts(self, prior: Self) -> Tensor:
        return self.a - prior.a

    def best_order(self, counts: Tensor) -> Tensor | None:
        """Return the order of decreasing counts if it raises the bound, else None.

        Given the labels, the bound depends on the order of components through the sticks alone:
        ``sum_k N_k E[log pi_k] - KL(q || p)`` at the optimal sticks for that order.
        """
        if bool((counts[1:] <= counts[:-1]).all()):
            return None
        order = counts.argsort(descending=True, stable=True)
        gain = self.log_evidence(counts[order]) - self.log_evidence(counts)
        return order if bool(gain > 0.0) else None

    def map(self, function: Callable[[Any], Any]) -> Self:
        return type(self)(function(self.a), function(self.b))


class OrderedSticks(StickBreaking):
    """A prior of sticks whose components keep their order, whatever the bound would gain."""

    def best_order(self, counts: Tensor) -> None:
        """Return None."""


def _log_evidence(prior: Any, counts: Tensor) -> Tensor:
    # Not as a ratio of Beta functions, which a concentration of 1e16 rounds away.
    posterior = prior.update(counts)
    return (counts * posterior.E_log()).sum(-1) - posterior.kl(prior)


WEIGHTS: dict[str, type[Dirichlet] | type[StickBreaking]] = {
    "dirichlet_distribution": Dirichlet,
    "dirichlet_process": StickBreaking,
}
