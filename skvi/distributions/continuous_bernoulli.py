r"""Continuous Bernoulli on [0, 1], from its natural parameter (the logit), elementwise.

.. math::
    \log p(x|\eta) = \eta x - \log\frac{e^\eta - 1}{\eta}
        = \eta (x - \tfrac12) - \log\frac{\sinh(\eta/2)}{\eta/2}

Source: Loaiza-Ganem & Cunningham (2019), The continuous Bernoulli, arXiv:1907.06845, equation 6.
The second form has no pole at 0: the even function of h = eta / 2 is a series there.
"""

import torch
from torch import Tensor

# Below this |h| the series are exact to double precision, above it the closed forms are.
_SERIES = 0.1


def _split(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the series hold, and ``|h|`` with a harmless value there."""
    magnitude = h.abs()
    small = magnitude < _SERIES
    return small, torch.where(small, 1.0, magnitude)


def log_density(x: Tensor, logit: Tensor) -> Tensor:
    """``log p(x)`` for x in [0, 1]."""
    h = 0.5 * logit
    small, a = _split(h)
    h2 = torch.where(small, h, 0.0).square()
    series = h2 * (1 / 6 - h2 * (1 / 180 - h2 * (1 / 2835 - h2 * (1 / 37800 - h2 / 467775))))
    log_sinhc = torch.where(small, series, a + torch.log1p(-(-2.0 * a).exp()) - (2.0 * a).log())
    return logit * (x - 0.5) - log_sinhc


def mean(logit: Tensor) -> Tensor:
    """``E[x] = 1/2 + (coth h - 1/h) / 2``."""
    h = 0.5 * logit
    small, a = _split(h)
    h2 = h.square()
    series = h * (1 / 3 - h2 * (1 / 45 - h2 * (2 / 945 - h2 * (1 / 4725 - 2 * h2 / 93555))))
    langevin = torch.where(small, series, torch.sign(h) * (1.0 / torch.tanh(a) - 1.0 / a))
    return 0.5 + 0.5 * langevin


def variance(logit: Tensor) -> Tensor:
    """``Var[x] = (1/h^2 - 1/sinh^2 h) / 4``, the derivative of the mean."""
    h = 0.5 * logit
    small, a = _split(h)
    h2 = h.square()
    series = 1 / 3 - h2 * (1 / 15 - h2 * (2 / 189 - h2 * (1 / 675 - 2 * h2 / 10395)))
    decay = (-2.0 * a).exp()
    closed = a.reciprocal().square() - 4.0 * decay / (1.0 - decay).square()
    return 0.25 * torch.where(small, series, closed)


def sample(logit: Tensor, generator: torch.Generator) -> Tensor:
    """Draw by the inverse distribution function; same shape."""
    uniform = torch.empty_like(logit).uniform_(generator=generator)
    rate = logit.abs()
    # The density falls as exp(-rate y), from the end that the logit points to.
    flat = rate < 1e-6
    safe = torch.where(flat, 1.0, rate)
    y = torch.where(flat, uniform, -torch.log1p(uniform * torch.expm1(-safe)) / safe)
    return torch.where(logit > 0, 1.0 - y, y).clamp(0.0, 1.0)
