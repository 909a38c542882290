"""Likelihoods of real numbers: normal ones of three kinds, and Student's t."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from skvi.distributions import normal, student_t
from skvi.models.vae.likelihoods.base import Likelihood, Marginals

# Adam moves every parameter at the same pace. A variance may have to fall by orders of magnitude
# while the weights change by their own size: its logarithm is stored in units of this.
_LOG_VAR_UNIT = 10.0
# What is left above the floor where the variance starts on it.
_SMALLEST_EXCESS = 1e-8
# Predicted variances end at about this logarithm: 1000 standard deviations of a column.
_LARGEST_LOG_VAR = 14.0
# Degrees of freedom of the t: above 1, so that the mean exists; 100 is a normal to the eye.
_LEAST_DOF, _MOST_DOF, _FIRST_DOF = 1.0, 100.0, 5.0


class Gaussian(Likelihood):
    r"""Normal with one variance per column, learned with the decoder.

    .. math::
        \log p(x|z) = -\tfrac12 \sum_j \bigl[\log(2\pi\psi_j) + (x_j - f_j(z))^2 / \psi_j\bigr],
        \qquad \psi_j = \mathrm{floor}_j + e^{10 \rho_j}

    The floor bounds the density, however well a network learns the training rows by heart. It is
    smooth, so that a variance that came close to it can still leave it.
    Source: Mattei & Frellsen (2018), Leveraging the exact likelihood of deep latent variable
    models, section 2 (why the likelihood is unbounded without it).
    """

    support: ClassVar[str] = "real"
    standardised: ClassVar[bool] = True
    log_floor: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, n_features, n_features)
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

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return normal.log_density(x, output, self.log_var())

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """``log p(x|z)``: one matrix-vector product instead of three passes over (..., D)."""
        log_var = self.log_var()
        distance = (x - output).square() @ (-log_var).exp()
        return -0.5 * (distance + (normal.LOG_2PI + log_var).sum())

    def mean(self, output: Tensor) -> Tensor:
        return output

    def variance(self, output: Tensor) -> Tensor:
        return self.log_var().exp().expand_as(output)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(output).normal_(generator=generator)
        return output + (0.5 * self.log_var()).exp() * noise

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        self.set_noise(_residual_variance(known), known.floor)
        return known.mean, known.loadings

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, self.log_floor.to(weight.dtype).exp()

    def learned(self) -> dict[str, Tensor]:
        return {
            "noise_std": (0.5 * self.log_var()).exp(),
            "noise_floor": (0.5 * self.log_floor).exp(),
        }


class FixedGaussian(Gaussian):
    r"""Normal with one variance per column that is given, not learned.

    .. math::
        \log p(x|z) = -\tfrac12 \sum_j \bigl[\log(2\pi\psi_j) + (x_j - f_j(z))^2 / \psi_j\bigr]
    """

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        del self.rho

    def least_noise(self, floor: Tensor) -> Tensor:
        return torch.maximum(super().least_noise(floor), floor)

    def log_var(self) -> Tensor:
        """``log psi``, shape (D,)."""
        return self.log_floor

    def set_noise(self, var: Tensor, floor: Tensor) -> None:
        """Set ``psi = floor``; `var` is of no use here."""
        self.log_floor.copy_(floor.log())

    def learned(self) -> dict[str, Tensor]:
        return {"noise_std": (0.5 * self.log_var()).exp()}


class HeteroscedasticGaussian(Likelihood):
    r"""Normal whose mean and variance are both functions of the code.

    .. math:: \log p(x|z)
        = -\tfrac12 \sum_j \bigl[\log(2\pi\psi_j(z)) + (x_j - f_j(z))^2 / \psi_j(z)\bigr],
        \qquad \psi_j(z) = \mathrm{floor}_j + e^{g_j(z)}

    The output holds f, then g, which is bent smoothly below 14.
    Source: Kingma & Welling (2014), appendix C.2; the floor as in Mattei & Frellsen (2018).
    """

    support: ClassVar[str] = "real"
    standardised: ClassVar[bool] = True
    outputs_per_feature: ClassVar[int] = 2
    log_floor: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, n_features, 2 * n_features)
        self.register_buffer("log_floor", torch.empty(n_features))  # (D,)

    def _moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, (..., D) each."""
        mean, raw = output.chunk(2, dim=-1)
        raw = _LARGEST_LOG_VAR - nn.functional.softplus(_LARGEST_LOG_VAR - raw)
        return mean, torch.logaddexp(self.log_floor, raw)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return normal.log_density(x, *self._moments(output))

    def mean(self, output: Tensor) -> Tensor:
        return self._moments(output)[0]

    def variance(self, output: Tensor) -> Tensor:
        return self._moments(output)[1].exp()

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_var = self._moments(output)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + (0.5 * log_var).exp() * noise

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        self.log_floor.copy_(known.floor.log())
        excess = (_residual_variance(known) - known.floor).clamp_min(_SMALLEST_EXCESS)
        bias = torch.cat([known.mean, excess.log()])
        return bias, torch.cat([known.loadings, torch.zeros_like(known.loadings)])

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # At the start codes move no variance: what that would tell of them is left out.
        return weight[: self.n_features], self.log_floor.to(weight.dtype).exp()

    def learned(self) -> dict[str, Tensor]:
        return {"noise_floor": (0.5 * self.log_floor).exp()}


class StudentT(Gaussian):
    r"""Student's t with one scale and one number of degrees of freedom per column, both learned.

    .. math:: \log p(x|z) = \sum_j \log t_{\nu_j}(x_j | f_j(z), \psi_j), \qquad 1 < \nu_j < 100

    The encoder reads ``asinh(x)``: values far out, which this law takes in its stride, then cannot
    flood a network.
    Source: Takahashi et al. (2018), Student-t variational autoencoder for robust density
    estimation.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features)
        self.tail = nn.Parameter(torch.empty(n_features))  # (D,)

    def features(self, x: Tensor) -> Tensor:
        return torch.asinh(x)

    def dof(self) -> Tensor:
        """``nu``, shape (D,)."""
        return _LEAST_DOF + (_MOST_DOF - _LEAST_DOF) * torch.sigmoid(_LOG_VAR_UNIT * self.tail)

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        log_var = self.log_var()
        distance = (x - output).square() * (-log_var).exp()
        return student_t.log_density(distance, log_var, self.dof(), 1)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return self.cells(x, output).sum(-1)

    def variance(self, output: Tensor) -> Tensor:
        """``psi nu / (nu - 2)``, infinite up to two degrees of freedom."""
        dof = self.dof()
        ratio = torch.where(dof > 2.0, dof / (dof - 2.0), torch.inf)
        return (self.log_var().exp() * ratio).expand_as(output)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        normal_draw = torch.empty_like(output).normal_(generator=generator)
        half_dof = (0.5 * self.dof()).expand_as(output).contiguous()
        chi2_over_dof = torch._standard_gamma(half_dof, generator=generator) / half_dof
        return output + (0.5 * self.log_var()).exp() * normal_draw / chi2_over_dof.sqrt()

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            odds = (_FIRST_DOF - _LEAST_DOF) / (_MOST_DOF - _FIRST_DOF)
            self.tail.fill_(math.log(odds) / _LOG_VAR_UNIT)
        # Fitted units are robust: the bulk is around zero, whatever the moments are.
        self.set_noise(torch.maximum(known.noise, known.floor), known.floor)
        return torch.zeros_like(known.mean), known.loadings

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.log_var().to(weight.dtype).exp()
        dof = self.dof().to(weight.dtype)
        # d E[asinh(x)] / df = E[(1 + x^2)^-1/2]; with sinh(v) for the deviation the trapezium rule
        # is exact to many digits, whatever the tails.
        v = torch.linspace(-20.0, 20.0, 401, dtype=weight.dtype, device=weight.device)
        deviation = v.sinh()
        density = student_t.log_density(deviation.square(), 0.0 * v, dof[:, None], 1).exp()
        x = bias[:, None] + scale.sqrt()[:, None] * deviation  # (D, 401)
        slope = (density * v.cosh() * (1.0 + x.square()).rsqrt()).sum(-1) * (v[1] - v[0])
        # The information of a t about its location (Lange, Little & Taylor 1989, appendix B).
        noise = scale * (dof + 3.0) / (dof + 1.0)
        return slope[:, None] * weight, slope.square() * noise

    def learned(self) -> dict[str, Tensor]:
        return {**super().learned(), "dof": self.dof()}


def _residual_variance(known: Marginals) -> Tensor:
    """All rows together have unit variance: what the first ones do not show is noise."""
    return torch.maximum(1.0 - known.loadings.square().sum(-1), known.noise)
