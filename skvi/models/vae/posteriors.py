"""Approximate posteriors q(z|x): what the encoder's output means.

A family is a module that turns the encoder's output into a law, one per row. Every law offers

* ``draw(noise)`` and ``draw_with_density(noise)``: reparameterised draws, and ``log q`` of them;
* ``log_prob(z)``: ``log q(z|x)`` of any codes;
* ``log_prob_pairs(z)``: that of every draw under every law, which takes ``floats_per_draw(B, k)``
  numbers of workspace for each draw;
* ``entropy()`` and ``kl_standard()``: exact, or None where no closed form exists;
* ``moments()``: mean and variance of every code, or None likewise;
* ``detach()``: the same law with parameters that carry no gradient;
* ``select(index)``: the laws of some of the rows.

Noise and codes have shape (..., B, k) for the laws of B rows.
"""

import math
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from skvi.distributions import normal
from skvi.models.vae.likelihoods.base import bend

# log var of q(z|x) stays between -21 and 3: far below any useful precision, and not so far
# above the prior's variance that a stray row could throw its draws out of the decoder's reach.
_LOG_VAR_CENTRE, _LOG_VAR_RADIUS = -9.0, 12.0
# Correlations of a full covariance saturate well beyond 0.99.
_LARGEST_SLOPE = 10.0
_N_COUPLINGS = 4
_COUPLING_WIDTH = 32
# One coupling stretches or shrinks a code at most by exp of this.
_LARGEST_LOG_STRETCH = 2.0


def bounded_log_var(raw: Tensor) -> Tensor:
    """Map any number into the range of log variances, smoothly."""
    return _LOG_VAR_CENTRE + _LOG_VAR_RADIUS * torch.tanh((raw - _LOG_VAR_CENTRE) / _LOG_VAR_RADIUS)


def unbounded_log_var(log_var: Tensor) -> Tensor:
    """Invert `bounded_log_var`; values at or beyond its limits are moved just inside."""
    ratio = ((log_var - _LOG_VAR_CENTRE) / _LOG_VAR_RADIUS).clamp(-0.99, 0.99)
    return _LOG_VAR_CENTRE + _LOG_VAR_RADIUS * torch.atanh(ratio)


class Diagonal(NamedTuple):
    """``q(z|x) = N(mean, diag exp(log_var))``; both of shape (B, k)."""

    mean: Tensor
    log_var: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``."""
        return torch.addcmul(self.mean, (0.5 * self.log_var).exp(), noise)

    def draw_with_density(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws and ``log q`` of them, (..., B, k) and (..., B)."""
        return self.draw(noise), _log_density_of_draw(self.log_var, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z|x)`` -> (..., B)."""
        return normal.log_density(z, self.mean, self.log_var).sum(-1)

    def log_prob_pairs(self, z: Tensor) -> Tensor:
        r"""``log q(z_s|x_n)``, (S, k) -> (S, B), as one matrix product.

        .. math:: -\tfrac12 z^2 / v + z\, \mu / v - \tfrac12 (\mu^2 / v + \log 2 \pi v)

        The terms of narrow laws are larger than their sum, by the squared distance from the centre
        in units of v; hence float64. That of the likeliest law, which is all that matters where
        laws are narrow, is then taken from the difference.
        """
        centre = self.mean.detach().mean(0).double()
        shifted, mean, log_var = z.double() - centre, self.mean.double() - centre, self.log_var
        precision = (-log_var.double()).exp()
        constant = -0.5 * (normal.LOG_2PI + log_var + mean.square() * precision).sum(-1)  # (B,)
        columns = torch.cat([mean * precision, -0.5 * precision], -1)  # (B, 2k)
        products = torch.addmm(constant, torch.cat([shifted, shifted.square()], -1), columns.T)
        values = products.to(self.mean.dtype)
        likeliest = values.detach().argmax(-1, keepdim=True)  # (S, 1)
        return values.scatter(-1, likeliest, self.select(likeliest).log_prob(z[:, None]))

    @staticmethod
    def floats_per_draw(n_laws: int, n_components: int) -> int:
        """Numbers of workspace that the densities of a draw under all laws take."""
        return 3 * n_laws + 8 * n_components

    def entropy(self) -> Tensor | None:
        """Exact, (B,)."""
        return normal.entropy(self.log_var)

    def kl_standard(self) -> Tensor | None:
        """``KL(q || N(0, I))`` of every code, (B, k)."""
        return normal.kl_standard(self.mean, self.log_var)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and variance, (B, k) each."""
        return self.mean, self.log_var.exp()

    def detach(self) -> "Diagonal":
        """Return the law without gradient."""
        return Diagonal(self.mean.detach(), self.log_var.detach())

    def select(self, index: Tensor) -> "Diagonal":
        """Return the laws of some rows."""
        return Diagonal(self.mean[index], self.log_var[index])


class Full(NamedTuple):
    r"""``q(z|x) = N(mean, L L')`` with ``L = diag(d) (I + slope)``.

    .. math:: z_i = \mu_i + d_i (\epsilon_i + \sum_{j<i} s_{ij} \epsilon_j)

    Attributes
    ----------
    mean, log_var : Tensor of shape (B, k)
        `log_var` is ``2 log d``: of a code given the ones before it.
    slope : Tensor of shape (B, k, k)
        Strictly lower triangular.
    """

    mean: Tensor
    log_var: Tensor
    slope: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """``mean + L noise``."""
        mixed = noise + torch.einsum("bij,...bj->...bi", self.slope, noise)
        return torch.addcmul(self.mean, (0.5 * self.log_var).exp(), mixed)

    def draw_with_density(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws and ``log q`` of them, (..., B, k) and (..., B)."""
        return self.draw(noise), _log_density_of_draw(self.log_var, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z|x)`` -> (..., B); solves ``L noise = z - mean``."""
        scaled = (z - self.mean) * (-0.5 * self.log_var).exp()  # (..., B, k)
        columns = scaled.reshape(-1, *self.mean.shape).permute(1, 2, 0)  # (B, k, S)
        # unitriangular: the diagonal of `slope` is never read
        noise = torch.linalg.solve_triangular(
            self.slope, columns, upper=False, unitriangular=True
        ).permute(2, 0, 1)
        return _log_density_of_draw(self.log_var, noise.reshape(scaled.shape))

    def log_prob_pairs(self, z: Tensor) -> Tensor:
        """``log q(z_s|x_n)``, (S, k) -> (S, B)."""
        return self.log_prob(z[:, None])

    @staticmethod
    def floats_per_draw(n_laws: int, n_components: int) -> int:
        """Numbers of workspace that the densities of a draw under all laws take."""
        return 3 * n_laws * n_components

    def entropy(self) -> Tensor | None:
        """Exact, (B,)."""
        return normal.entropy(self.log_var)

    def kl_standard(self) -> Tensor | None:
        """``KL(q || N(0, I))`` by the chain rule, (B, k): of each code given the ones before it.

        ``1/2 (mean^2 + (L L')_ii - 1 - log d^2)``.
        """
        explained = self.log_var.exp() * self.slope.square().sum(-1)
        return normal.kl_standard(self.mean, self.log_var) + 0.5 * explained

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and marginal variance, (B, k) each."""
        return self.mean, self.log_var.exp() * (1.0 + self.slope.square().sum(-1))

    def detach(self) -> "Full":
        """Return the law without gradient."""
        return Full(*(value.detach() for value in self))

    def select(self, index: Tensor) -> "Full":
        """Return the laws of some rows."""
        return Full(*(value[index] for value in self))


class Coupling(nn.Module):
    r"""Stretch and shift every other code as a function of those between and of the row.

    .. math:: z_b \leftarrow z_b \exp(s(z_a, c)) + t(z_a, c), \qquad
        \log|\det J| = \sum s(z_a, c)

    Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, section 3.3: exact in both directions.

    Parameters
    ----------
    n_components : int
    odd : bool
        Whether codes 1, 3, ... are moved, or 0, 2, ...; there must be one to move.
    """

    def __init__(self, n_components: int, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        n_moved = n_components // 2 if odd else (n_components + 1) // 2
        self.first = nn.Linear(2 * n_components - n_moved, _COUPLING_WIDTH)
        self.last = nn.Linear(_COUPLING_WIDTH, 2 * n_moved)

    def stretch_and_shift(
        self, fixed: Tensor, context: Tensor, gate: Tensor | None, frozen: bool
    ) -> tuple[Tensor, Tensor]:
        """Return s and t; with `frozen`, no gradient reaches the weights."""
        context = context.expand(*fixed.shape[:-1], -1)
        weights = [self.first.weight, self.first.bias, self.last.weight, self.last.bias]
        if frozen:
            weights = [w.detach() for w in weights]
        hidden = nn.functional.linear(torch.cat([fixed, context], -1), *weights[:2]).tanh()
        stretch, shift = nn.functional.linear(hidden, *weights[2:]).chunk(2, -1)
        stretch = bend(stretch, _LARGEST_LOG_STRETCH)
        return (stretch, shift) if gate is None else (stretch * gate, shift * gate)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes that stay and those that are moved."""
        even, odd = z[..., ::2], z[..., 1::2]
        return (even, odd) if self.odd else (odd, even)

    def join(self, fixed: Tensor, moved: Tensor) -> Tensor:
        """Invert `split`."""
        even, odd = (fixed, moved) if self.odd else (moved, fixed)
        z = even.new_empty(*even.shape[:-1], even.shape[-1] + odd.shape[-1])
        z[..., ::2], z[..., 1::2] = even, odd
        return z


class Flow(NamedTuple):
    """A diagonal normal pushed through couplings, which also read a context of the row.

    Attributes
    ----------
    base : Diagonal
    context : Tensor of shape (B, k)
    couplings : tuple of Coupling
    gate : Tensor of shape (B, 1) or None
        Zero where the couplings do nothing: rows without any observed cell.
    frozen : bool
        Whether the couplings' weights carry no gradient.
    """

    base: Diagonal
    context: Tensor
    couplings: tuple[Coupling, ...]
    gate: Tensor | None = None
    frozen: bool = False

    @property
    def mean(self) -> Tensor:
        """Mean of the base; not that of the codes."""
        return self.base.mean

    def _stretch_and_shift(self, layer: Coupling, fixed: Tensor) -> tuple[Tensor, Tensor]:
        return layer.stretch_and_shift(fixed, self.context, self.gate, self.frozen)

    def draw(self, noise: Tensor) -> Tensor:
        """Return reparameterised draws."""
        return self.draw_with_density(noise)[0]

    def draw_with_density(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws and ``log q`` of them, (..., B, k) and (..., B)."""
        z, log_q = self.base.draw_with_density(noise)
        for layer in self.couplings:
            fixed, moved = layer.split(z)
            stretch, shift = self._stretch_and_shift(layer, fixed)
            z = layer.join(fixed, moved * stretch.exp() + shift)
            log_q = log_q - stretch.sum(-1)
        return z, log_q

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z|x)`` -> (..., B), by the inverse couplings."""
        # Codes of a mixture come as (..., 1, k); `join` needs the laws' own shape.
        z = z.expand(*torch.broadcast_shapes(z.shape, self.context.shape))
        log_det = z.new_zeros(z.shape[:-1])
        for layer in reversed(self.couplings):
            fixed, moved = layer.split(z)
            stretch, shift = self._stretch_and_shift(layer, fixed)
            z = layer.join(fixed, (moved - shift) * (-stretch).exp())
            log_det = log_det + stretch.sum(-1)
        return self.base.log_prob(z) - log_det

    def log_prob_pairs(self, z: Tensor) -> Tensor:
        """``log q(z_s|x_n)``, (S, k) -> (S, B)."""
        return self.log_prob(z[:, None])

    @staticmethod
    def floats_per_draw(n_laws: int, n_components: int) -> int:
        """Numbers of workspace that the densities of a draw under all laws take."""
        return n_laws * (2 * n_components + 2 * _COUPLING_WIDTH)

    def entropy(self) -> Tensor | None:
        """None: it has no closed form."""
        return None

    def kl_standard(self) -> Tensor | None:
        """None: it has no closed form."""
        return None

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """None: they have no closed form."""
        return None

    def detach(self) -> "Flow":
        """Return the law without gradient."""
        return self._replace(base=self.base.detach(), context=self.context.detach(), frozen=True)

    def select(self, index: Tensor) -> "Flow":
        """Return the laws of some rows."""
        gate = None if self.gate is None else self.gate[index]
        return self._replace(base=self.base.select(index), context=self.context[index], gate=gate)


Posterior: TypeAlias = Diagonal | Full | Flow


def _log_density_of_draw(log_var: Tensor, noise: Tensor) -> Tensor:
    """``log N(noise | 0, I) - sum log d``: the density of ``mean + L noise``, (..., B)."""
    return -0.5 * (normal.LOG_2PI + log_var + noise.square()).sum(-1)


class DiagonalFamily(nn.Module):
    """Mean and log variance of every code: 2k outputs of the encoder.

    Parameters
    ----------
    n_components : int
        k.

    Attributes
    ----------
    law : type
        Of the laws that it makes.
    """

    law: ClassVar[type[Posterior]] = Diagonal

    def __init__(self, n_components: int) -> None:
        super().__init__()
        self.n_components = n_components
        self.n_outputs = 2 * n_components

    def forward(
        self,
        output: Tensor,
        known: Tensor | None = None,
        prior_moments: tuple[Tensor, Tensor] | None = None,
    ) -> Posterior:
        """Return the laws of B rows.

        Parameters
        ----------
        output : Tensor of shape (B, n_outputs)
            Of the encoder.
        known : Tensor of bool, shape (B, 1), or None
            Which rows have any observed cell; None: all.
        prior_moments : tuple of two Tensors of shape (k,)
            Mean and variance of the prior, which the other rows have.
        """
        return self._diagonal(output, known, prior_moments)

    def _diagonal(
        self,
        output: Tensor,
        known: Tensor | None,
        prior_moments: tuple[Tensor, Tensor] | None,
    ) -> Diagonal:
        k = self.n_components
        # One split: its way back is one operation, that of two slices five.
        mean, raw, _ = output.split([k, k, output.shape[-1] - 2 * k], -1)
        log_var = bounded_log_var(raw)
        if known is not None and prior_moments is not None:
            mean = torch.where(known, mean, prior_moments[0])
            log_var = torch.where(known, log_var, prior_moments[1].log())
        return Diagonal(mean, log_var)

    def start(self, linear: nn.Linear) -> None:
        """Complete a linear start whose means and log variances are set; diagonal, as it is."""

    def initialise(self, generator: torch.Generator) -> None:
        """Set the family's own weights so that it is the diagonal one."""

    def curvature_weights(self) -> list[Tensor]:
        """Return the family's weights that bend the law."""
        return []


class FullFamily(DiagonalFamily):
    """Also the slopes of every code on the ones before it: k (k - 1) / 2 more outputs."""

    law: ClassVar[type[Posterior]] = Full

    def __init__(self, n_components: int) -> None:
        super().__init__(n_components)
        self.n_outputs = 2 * n_components + n_components * (n_components - 1) // 2

    def forward(
        self,
        output: Tensor,
        known: Tensor | None = None,
        prior_moments: tuple[Tensor, Tensor] | None = None,
    ) -> Posterior:
        """Return the laws of B rows; see :class:`DiagonalFamily`."""
        mean, log_var = self._diagonal(output, known, prior_moments)
        k = self.n_components
        slopes = bend(output[..., 2 * k :], _LARGEST_SLOPE)
        if known is not None:
            slopes = slopes * known
        slope = output.new_zeros(*output.shape[:-1], k, k)
        row, column = torch.tril_indices(k, k, -1, device=output.device)
        slope[..., row, column] = slopes
        return Full(mean, log_var, slope)


class FlowFamily(DiagonalFamily):
    """A diagonal normal, a context of k numbers, and couplings that all rows share.

    Parameters
    ----------
    n_components : int
        k. One code alone has nothing to be coupled with: its law stays normal.
    """

    law: ClassVar[type[Posterior]] = Flow

    def __init__(self, n_components: int) -> None:
        super().__init__(n_components)
        self.n_outputs = 3 * n_components
        self.couplings = nn.ModuleList(
            Coupling(n_components, odd=i % 2 == 1 and n_components > 1) for i in range(_N_COUPLINGS)
        )

    def _layers(self) -> tuple[Coupling, ...]:
        return tuple(layer for layer in self.couplings if isinstance(layer, Coupling))

    def forward(
        self,
        output: Tensor,
        known: Tensor | None = None,
        prior_moments: tuple[Tensor, Tensor] | None = None,
    ) -> Posterior:
        """Return the laws of B rows; see :class:`DiagonalFamily`."""
        base = self._diagonal(output, known, prior_moments)
        gate = None if known is None else known.to(output.dtype)
        return Flow(base, output[..., 2 * self.n_components :], self._layers(), gate)

    def start(self, linear: nn.Linear) -> None:
        """Let the context begin as the means."""
        k = self.n_components
        linear.weight[2 * k :] = linear.weight[:k]
        linear.bias[2 * k :] = linear.bias[:k]

    def initialise(self, generator: torch.Generator) -> None:
        """Begin at the identity: the last layers give nothing."""
        for layer in self._layers():
            std = math.sqrt(1.0 / layer.first.in_features)
            layer.first.weight.normal_(0.0, std, generator=generator)
            for value in (layer.first.bias, layer.last.weight, layer.last.bias):
                value.zero_()

    def curvature_weights(self) -> list[Tensor]:
        """Return the weights of the couplings."""
        return [w for layer in self._layers() for w in (layer.first.weight, layer.last.weight)]


POSTERIORS: dict[str, type[DiagonalFamily]] = {
    "diag": DiagonalFamily,
    "full": FullFamily,
    "flow": FlowFamily,
}
