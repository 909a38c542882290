"""Likelihoods p(x|z): what the decoder's output means.

Each is a module with the likelihood's own parameters, if any, and three functions of the decoder's
output: ``log_prob(x, output)`` summed over features, ``mean(output)`` and
``sample(output, generator)``, all in fitted units.
"""

import torch
from torch import Tensor, nn

from skvi.distributions.normal import LOG_2PI

# Adam moves every parameter at the same pace. A variance may have to fall by orders of magnitude
# while the weights change by their own size: its logarithm is stored in units of this.
_LOG_VAR_UNIT = 10.0
# What is left above the floor where the variance starts on it.
_SMALLEST_EXCESS = 1e-8


class Gaussian(nn.Module):
    r"""Normal with one variance per feature, learned with the decoder.

    .. math:: \log p(x|z) = -\tfrac12 \sum_j \log(2\pi\psi_j) + (x_j - f_j(z))^2 / \psi_j,
        \qquad \psi_j = \mathrm{floor}_j + e^{10 \rho_j}

    The floor bounds the density, however well a network learns the training rows by heart. It is
    smooth, so that a variance that came close to it can still leave it.
    Source: Mattei & Frellsen (2018), Leveraging the exact likelihood of deep latent variable
    models, section 2 (why the likelihood is unbounded without it).
    """

    log_floor: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.empty(n_features))  # (D,)
        self.register_buffer("log_floor", torch.empty(n_features))  # (D,)

    def log_var(self) -> Tensor:
        """``log psi``, shape (D,)."""
        return torch.logaddexp(self.log_floor, _LOG_VAR_UNIT * self.rho)

    def set_noise(self, var: Tensor, floor: Tensor) -> None:
        """Set ``psi`` and its floor, both of shape (D,), without gradient."""
        with torch.no_grad():
            self.log_floor.copy_(floor.log())
            self.rho.copy_((var - floor).clamp_min(_SMALLEST_EXCESS).log() / _LOG_VAR_UNIT)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """``log p(x|z)``: x of shape (..., D), output broadcastable with it -> (...)."""
        log_var = self.log_var()
        # One matrix-vector product instead of three passes over (..., D).
        distance = (x - output).square() @ (-log_var).exp()
        return -0.5 * (distance + (LOG_2PI + log_var).sum())

    def mean(self, output: Tensor) -> Tensor:
        """``E[x|z]``."""
        return output

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw x given the output; same shape."""
        noise = torch.empty_like(output).normal_(generator=generator)
        return output + (0.5 * self.log_var()).exp() * noise


class Bernoulli(nn.Module):
    r"""Binary features; the output holds the logits.

    .. math:: \log p(x|z) = \sum_j x_j f_j(z) - \log(1 + e^{f_j(z)})
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.n_features = n_features

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """``log p(x|z)``: x in {0, 1} of shape (..., D), output broadcastable -> (...)."""
        return (x * output - nn.functional.softplus(output)).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """``P(x = 1|z)``."""
        return torch.sigmoid(output)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw x in {0, 1}; same shape."""
        uniform = torch.empty_like(output).uniform_(generator=generator)
        return (uniform < torch.sigmoid(output)).to(output.dtype)


LIKELIHOODS: dict[str, type[Gaussian] | type[Bernoulli]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}
