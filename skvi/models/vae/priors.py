r"""Priors p(z) of the codes.

All laws are written for z in :math:`R^k`. A uniform prior on a box is a standard normal one whose
codes are squashed by the normal distribution function before the decoder reads them:

.. math:: u = \sqrt 3\,(2 \Phi(z) - 1), \quad z \sim N(0, I)
    \iff u \sim \mathrm{Uniform}(-\sqrt 3, \sqrt 3)^k.

A posterior of z is thereby a posterior of u inside the box, and since divergences do not change
under one-to-one maps, ``KL(q(u|x) || Uniform) = KL(q(z|x) || N(0, I))``, in closed form.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from skvi.distributions import normal
from skvi.models.vae.posteriors import Diagonal, Posterior, bounded_log_var, unbounded_log_var
from skvi.runtime.blocks import block_rows
from skvi.runtime.random import matched_noise

# Of the box: a uniform law on (-b, b) then has unit variance, like the standard normal.
HALF_WIDTH = math.sqrt(3.0)
# Draws for the moments of laws that have none in closed form, and the seed of these draws.
MOMENT_DRAWS, _MOMENT_SEED = 256, 0
# CUDA's batched triangular solves have been wrong for twice as many right-hand sides
# (pytorch/pytorch#187717).
_MOST_DRAWS = 1 << 18
# A mixture starts with this share of the variance of codes between its means.
_SHARE_BETWEEN = 0.5
# Nodes and weights on (-1, 1) for Owen's function.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


class StandardNormal(NamedTuple):
    """``N(0, I)``; `like` gives k as its length, dtype and device."""

    like: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p(z)``, (..., k) -> (...)."""
        return -0.5 * (normal.LOG_2PI + z.square()).sum(-1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (k,) each."""
        return torch.zeros_like(self.like), torch.ones_like(self.like)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n draws, (n, k)."""
        return self.like.new_empty(n, len(self.like)).normal_(generator=generator)


class Mixture(NamedTuple):
    """``sum_j exp(log_weight_j) p_j(z)``.

    Attributes
    ----------
    log_weight : Tensor of shape (J,)
        Normalised.
    components : Posterior
        Laws of J rows.
    """

    log_weight: Tensor
    components: Posterior

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p(z)``, (..., k) -> (...); in blocks, since every pair of z and j is visited."""
        floats = self.components.floats_per_draw(*self.components.mean.shape)
        size = min(block_rows(floats, z.device), _MOST_DRAWS)
        values = [
            (self.log_weight + self.components.log_prob_pairs(block)).logsumexp(-1)
            for block in z.reshape(-1, z.shape[-1]).split(size)
        ]
        return torch.cat(values).reshape(z.shape[:-1])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (k,) each."""
        means, variances = moments(self.components)
        weight = self.log_weight.exp()
        mean = weight @ means
        return mean, weight @ (variances + (means - mean).square())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n draws, (n, k)."""
        index = self.log_weight.exp().multinomial(n, replacement=True, generator=generator)
        components = self.components.select(index)
        return components.draw(
            components.mean.new_empty(components.mean.shape).normal_(generator=generator)
        )


Law: TypeAlias = StandardNormal | Mixture
# From what the encoder reads, (J, n_inputs), and which rows have any observed cell, (J, 1).
Encode: TypeAlias = Callable[[Tensor, Tensor], Posterior]


def moments(q: Posterior) -> tuple[Tensor, Tensor]:
    """Return mean and variance of B laws, (B, k) each: exact, or of 256 fixed draws."""
    exact = q.moments()
    return _moments_of_draws(_draws(q)) if exact is None else exact


def _draws(q: Posterior) -> Tensor:
    """Return draws by noise that is the same for all rows and calls, (S, B, k)."""
    return q.draw(_moment_noise(q.mean.shape[-1], q.mean.dtype, q.mean.device)[:, None, :])


@functools.cache  # for recorded steps, which may not make it anew and do not keep it alive
@torch.inference_mode(False)
def _moment_noise(n_components: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return matched_noise(MOMENT_DRAWS, n_components, _MOMENT_SEED).to(device, dtype)


def _moments_of_draws(draws: Tensor) -> tuple[Tensor, Tensor]:
    return draws.mean(0), draws.var(0, unbiased=False)


def squash(z: Tensor) -> Tensor:
    """Map N(0, 1) to the uniform law on ``(-sqrt 3, sqrt 3)``."""
    return HALF_WIDTH * torch.erf(z / math.sqrt(2.0))


def squashed_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return mean and variance of ``squash(z)`` for ``z ~ N(mean, var)``, exactly.

    .. math::
        E\,\Phi(z) = \Phi(h), \quad E\,\Phi(z)^2 = \Phi(h) - 2 T(h, (1 + 2 v)^{-1/2}), \quad
        h = \mu / \sqrt{1 + v}

    with Owen's function T. Source: Owen (1980), A table of normal integrals, 10,010.8 and 20,010.4.
    """
    h = mean / (1.0 + var).sqrt()
    slope = (1.0 + 2.0 * var).rsqrt()
    # T(h, 1) = Phi(h) (1 - Phi(h)) / 2: the variance of Phi(z) is 2 (T(h, 1) - T(h, slope)),
    # an integral of exp(-h^2 (1 + a^2) / 2) / (2 pi (1 + a^2)) over a, without cancellation.
    nodes, weights = (mean.new_tensor(v) for v in (_NODES, _WEIGHTS))
    half = 0.5 * _one_minus_slope(var, slope)
    a = slope[..., None] + half[..., None] * (1.0 + nodes)
    squares = 1.0 + a.square()
    integrand = (-0.5 * h.square()[..., None] * squares).exp() / squares
    missing = half * (integrand @ weights) / (2.0 * math.pi)  # T(h, 1) - T(h, slope)
    return squash(h), 2.0 * missing * (2.0 * HALF_WIDTH) ** 2


def _one_minus_slope(var: Tensor, slope: Tensor) -> Tensor:
    """``1 - (1 + 2 var)^{-1/2}`` without cancellation."""
    return 2.0 * var * slope.square() / (1.0 + slope)


class NormalPrior(nn.Module):
    """``N(0, I)``: the divergence from a normal posterior is exact.

    Parameters
    ----------
    n_components : int
        k.
    n_prior_components : int
        Of mixtures.
    n_inputs : int
        What the encoder reads.
    """

    standard = True

    def __init__(self, n_components: int, n_prior_components: int, n_inputs: int) -> None:
        super().__init__()
        self.n_components, self.n_prior_components = n_components, n_prior_components

    def law(self, encode: Encode, like: Tensor) -> Law:
        """Return p(z), in the dtype and on the device of `like`.

        Parameters
        ----------
        encode : callable
            From inputs of the encoder, (J, n_inputs), and a mask of rows, (J, 1), to posteriors;
            rows outside the mask have the standard normal.
        like : Tensor
        """
        return StandardNormal(like.new_empty(self.n_components))

    def code(self, z: Tensor) -> Tensor:
        """Return what the decoder reads of z: z itself."""
        return z

    def code_moments(self, q: Posterior) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the codes of B rows, (B, k) each."""
        return moments(q)

    def initialise(self, inputs: Tensor, codes: Tensor) -> None:
        """Set own parameters from what the encoder reads of some training rows, and their codes.

        Parameters
        ----------
        inputs : Tensor of shape (n_prior_components, n_inputs)
        codes : Tensor of shape (n_prior_components, k)
            Their posterior means.
        """


class UniformPrior(NormalPrior):
    """Uniform codes on ``(-sqrt 3, sqrt 3)^k``: standard normal z, squashed.

    The divergence is that to N(0, I); see the head of this file.
    """

    def code(self, z: Tensor) -> Tensor:
        """``sqrt 3 (2 Phi(z) - 1)``."""
        return squash(z)

    def code_moments(self, q: Posterior) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the codes of B rows, (B, k) each."""
        exact = q.moments()
        return _moments_of_draws(squash(_draws(q))) if exact is None else squashed_moments(*exact)


class MixturePrior(NormalPrior):
    """Learned mixture of normals with diagonal covariances and learned weights."""

    standard = False

    def __init__(self, n_components: int, n_prior_components: int, n_inputs: int) -> None:
        super().__init__(n_components, n_prior_components, n_inputs)
        shape = (n_prior_components, n_components)
        self.logits = nn.Parameter(torch.empty(n_prior_components))
        self.mean = nn.Parameter(torch.empty(shape))
        self.raw_log_var = nn.Parameter(torch.empty(shape))

    def law(self, encode: Encode, like: Tensor) -> Law:
        """Return p(z)."""
        components = Diagonal(self.mean, bounded_log_var(self.raw_log_var))
        return Mixture(self.logits.log_softmax(-1), components)

    def initialise(self, inputs: Tensor, codes: Tensor) -> None:
        """Begin near N(0, I): equal weights, means at shrunken codes, the rest of the variance.

        Mean zero, variance one; one component is N(0, I).
        """
        self.logits.zero_()
        self.mean.copy_(math.sqrt(_SHARE_BETWEEN) * (codes - codes.mean(0)))
        between = self.mean.square().mean(0)
        # of codes that are far apart, a total above one
        self.raw_log_var.copy_((1.0 - between).clamp_min(1.0 - _SHARE_BETWEEN).log())
        self.raw_log_var.copy_(unbounded_log_var(self.raw_log_var))


class VampPrior(NormalPrior):
    r"""``pi_0 N(0, I) + sum_j pi_j q(z | u_j)`` with learned pseudo-inputs u_j and weights.

    Tomczak & Welling (2018), VAE with a VampPrior, arXiv:1705.07120, equation 9, plus the standard
    normal: the posteriors of a few rows are narrow and cover few codes when training begins.
    Pseudo-inputs are what the encoder reads, so that they are real numbers whatever the likelihood.
    """

    standard = False

    def __init__(self, n_components: int, n_prior_components: int, n_inputs: int) -> None:
        super().__init__(n_components, n_prior_components, n_inputs)
        self.pseudo_inputs = nn.Parameter(torch.empty(n_prior_components, n_inputs))
        self.logits = nn.Parameter(torch.empty(n_prior_components + 1))

    def law(self, encode: Encode, like: Tensor) -> Law:
        """Return p(z); its last component is the standard normal."""
        inputs = nn.functional.pad(self.pseudo_inputs, (0, 0, 0, 1))
        known = torch.ones_like(inputs[:, :1], dtype=torch.bool)
        known[-1:].zero_()
        return Mixture(self.logits.log_softmax(-1), encode(inputs, known))

    def initialise(self, inputs: Tensor, codes: Tensor) -> None:
        """Begin at training rows, with half the weight on the standard normal."""
        self.pseudo_inputs.copy_(inputs)
        self.logits.zero_()
        self.logits[-1] = math.log(len(inputs))


PRIORS: dict[str, type[NormalPrior]] = {
    "normal": NormalPrior,
    "uniform": UniformPrior,
    "mixture": MixturePrior,
    "vamp": VampPrior,
}
