"""What every likelihood p(x|z) offers to the objective, the start and the estimator."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Marginals(NamedTuple):
    """What a likelihood may know of its columns before training; float64.

    Attributes
    ----------
    mean, var : Tensor of shape (D,)
        Weighted moments of x, in fitted units.
    feature_mean : Tensor of shape (n_inputs,)
        Weighted mean of ``features(x)``.
    loadings : Tensor of shape (n_inputs, k)
        Factor analysis of ``features(x)``.
    noise : Tensor of shape (n_inputs,)
        Its residual variances.
    floor : Tensor of shape (D,)
        Lower limits of noise variances; the variance itself where it is fixed.
    """

    mean: Tensor
    var: Tensor
    feature_mean: Tensor
    loadings: Tensor
    noise: Tensor
    floor: Tensor


class Likelihood(nn.Module):
    """Base class: D columns of one kind, independent given the decoder's output.

    All functions take x of shape (..., D) and an output of shape (..., n_outputs), in fitted units.

    Attributes
    ----------
    support : str
        The values that x may take: a key of ``SUPPORTS`` in :mod:`skvi.estimators._columns`.
    standardised : bool
        Whether fitted units have zero mean and unit variance, or are those of the data.
    widens : bool
        Whether outputs with fewer digits than x are welcome in densities.
    outputs_per_feature : int
        Of the decoder; codes have one per level instead.
    n_features, n_inputs, n_outputs : int
        D, the width of ``features(x)``, and the width of the decoder's output.
    """

    support: ClassVar[str]
    standardised: ClassVar[bool] = False
    widens: ClassVar[bool] = False
    outputs_per_feature: ClassVar[int] = 1

    def __init__(self, n_features: int, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        self.n_features, self.n_inputs, self.n_outputs = n_features, n_inputs, n_outputs

    def features(self, x: Tensor) -> Tensor:
        """Return what the encoder reads of x, shape (..., n_inputs)."""
        return x

    def per_feature(self, cells: Tensor) -> Tensor:
        """Repeat one value per column, (..., D), over its features -> (..., n_inputs)."""
        return cells

    def least_noise(self, floor: Tensor) -> Tensor:
        """Return the share of variance that the linear start must call noise, (n_inputs,).

        `floor` is that of :class:`Marginals`, of shape (D,).
        """
        return floor.new_full((self.n_inputs,), 1e-4)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        """``log p(x_j|z)`` of each cell -> (..., D)."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """``log p(x|z)``, summed over columns -> (...)."""
        return self.cells(x, output).sum(-1)

    def log_prob_observed(self, x: Tensor, output: Tensor, observed: Tensor | None) -> Tensor:
        """``log p(x|z)``, summed over the cells that are `observed`; None: over all -> (...)."""
        if observed is None:
            return self.log_prob(x, output)
        return (self.cells(x, output) * observed).sum(-1)

    def statistics(self, output: Tensor) -> Tensor:
        """Return what averages over draws of z keep of ``p(x|z)``: first and second moments."""
        mean = self.mean(output)
        return torch.cat([mean, self.variance(output) + mean.square()], -1)

    @property
    def n_statistics(self) -> int:
        """Width of :meth:`statistics`."""
        return 2 * self.n_features

    def summarise(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        """Turn averaged statistics into the mean and the variance of each cell, (..., D) each."""
        mean, second = averages.chunk(2, -1)
        return mean, (second - mean.square()).clamp_min(0.0)

    def mean(self, output: Tensor) -> Tensor:
        """``E[x|z]`` -> (..., D); for codes the most probable one."""
        raise NotImplementedError

    def variance(self, output: Tensor) -> Tensor:
        """``Var[x|z]`` -> (..., D); for codes that of the indicator of the most probable one."""
        raise NotImplementedError

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw x given the output -> (..., D)."""
        raise NotImplementedError

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        """Set own parameters; return bias (n_outputs,) and weight (n_outputs, k) of the decoder."""
        raise NotImplementedError

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the linear model that a decoder ``bias + weight z`` amounts to near the prior.

        .. math:: \mathrm{features}(x) | z \approx N(c + L z, \mathrm{diag}(\psi)), \qquad
            L = \frac{\partial E[\mathrm{features}(x) | z]}{\partial z}

        with :math:`\psi` such that :math:`L' \Psi^{-1} L` is the Fisher information of x about z at
        ``z = 0``, of counts where their mean over codes is. Where the score of z is linear in the
        features (normal, binary and share columns, codes), the posterior of that model is one step
        of Fisher scoring from the prior's mean; for other columns it is that to first order. Of
        variances that are learned :math:`\psi` is the least that they may be: factor analysis knows
        what the rows leave of them.

        Parameters
        ----------
        bias : Tensor of shape (n_outputs,)
        weight : Tensor of shape (n_outputs, k)

        Returns
        -------
        loadings : Tensor of shape (n_inputs, k)
        noise : Tensor of shape (n_inputs,)
        """
        raise NotImplementedError

    def learned(self) -> dict[str, Tensor]:
        """Return what the user may see of the parameters, each of shape (D,)."""
        return {}


def bend(output: Tensor, largest: float) -> Tensor:
    """Map any number into ``(-largest, largest)``, smoothly, and almost to itself near zero."""
    return largest * torch.tanh(output / largest)


def bend_slope(output: Tensor, largest: float) -> Tensor:
    """Return the derivative of `bend`."""
    return 1.0 - torch.tanh(output / largest).square()


def unbend(bias: Tensor, weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return what `bend` turns into ``bias + weight z``, to first order around ``z = 0``.

    Biases at or beyond the limits are moved just inside. Shapes (D,) and (D, k).
    """
    ratio = (bias / largest).clamp(-0.99, 0.99)
    return largest * torch.atanh(ratio), weight / (1.0 - ratio.square())[:, None]
