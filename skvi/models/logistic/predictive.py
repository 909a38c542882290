r"""What the posterior says about new rows.

For a row z with a one for the intercept, the log odds have the law :math:`N(\mu, v)` under q, with
:math:`\mu = z'm` and :math:`v = z'Vz`. Their sigmoid is averaged over it exactly, see
:mod:`skvi.distributions.logistic_normal`. Everything is in fitted units.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.distributions.logistic_normal import log_mean_sigmoid
from skvi.models.linear.weights import Factor, draw, lengths
from skvi.models.logistic.weights import add_ones

# Terms of the series of one probability, in each of two tails, with their workspace.
_FLOATS_OF_THE_SERIES = 200


class Posterior(NamedTuple):
    """q(w, b), ready to predict from.

    Attributes
    ----------
    factor : Factor
        m and V of the D weights and the intercept.
    intercept : bool
    """

    factor: Factor
    intercept: bool


def floats_per_row(posterior: Posterior) -> int:
    """Workspace of one row in the functions below."""
    n_models, n_columns, rank = posterior.factor.basis.shape
    return n_models * (2 * (n_columns + rank) + _FLOATS_OF_THE_SERIES)


def log_odds(posterior: Posterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance (B, M) of the log odds of rows x (B, D)."""
    z = add_ones(x) if posterior.intercept else x
    seen, unseen = lengths(posterior.factor, z)
    variance = seen.square().sum(-1) + unseen.square().sum(-1)  # (M, B)
    return z @ posterior.factor.mean.T, (posterior.factor.outer[:, None].square() * variance).T


def log_proba_of_models(posterior: Posterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log E[sigmoid(a)]`` and ``log E[sigmoid(-a)]`` (B, M) of each binary model."""
    return log_mean_sigmoid(*log_odds(posterior, x))


def log_proba(posterior: Posterior, x: Tensor) -> Tensor:
    """Return the log probabilities of the classes (B, 2 or M)."""
    return normalise(*log_proba_of_models(posterior, x))


def normalise(log_yes: Tensor, log_no: Tensor) -> Tensor:
    """Return log probabilities of the classes in the last dimension.

    From those of the binary models, (..., M): two classes of the only model, or M classes, each
    against the rest.
    """
    if log_yes.shape[-1] == 1:
        return torch.cat([log_no, log_yes], dim=-1)
    return torch.log_softmax(log_yes, dim=-1)


def draw_labels(posterior: Posterior, coef: Tensor, x: Tensor, rng: np.random.Generator) -> Tensor:
    """Return indices of classes (B, S) at rows x (B, D), one for each draw of the weights.

    Parameters
    ----------
    posterior : Posterior
    coef : Tensor of shape (S, M, C)
        See :func:`draw_coefficients`.
    x : Tensor of shape (B, D)
    rng : numpy Generator
    """
    z = add_ones(x) if posterior.intercept else x
    odds = torch.einsum("bc,smc->bsm", z, coef)
    proba = normalise(
        torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)
    ).exp()
    uniform = torch.as_tensor(rng.random(odds.shape[:2]), device=x.device)
    below = proba.cumsum(-1)[..., :-1] < uniform[..., None]
    return below.sum(-1)


def draw_coefficients(posterior: Posterior, n_draws: int, rng: np.random.Generator) -> Tensor:
    """Draw weights and intercepts, (S, M, C), from q."""
    mean = posterior.factor.mean
    noise = rng.standard_normal((n_draws, *mean.shape))
    return mean + draw(posterior.factor, torch.as_tensor(noise, device=mean.device))
