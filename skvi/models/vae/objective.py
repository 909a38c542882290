"""The bound, its training estimate, and the importance-weighted likelihood."""

import math
from typing import Any

import torch
from torch import Tensor

from skvi.distributions import normal
from skvi.models.terms import ElboTerms
from skvi.models.vae.networks import VAE
from skvi.runtime.blocks import row_slices

# Precision of the normal prior of the weights that bend the networks; see `parameter_groups`.
WEIGHT_PRECISION = 20.0


def shared_noise(n_draws: int, n_components: int, seed: int) -> Tensor:
    """Return one block of standard normal draws that every row shares.

    A scrambled Sobol sequence through the normal quantile, in antithetic pairs: each draw is
    standard normal over seeds, so that averages are unbiased, and much less noisy than independent
    draws. Because it is shared, a row's score does not depend on the rows beside it.

    Parameters
    ----------
    n_draws, n_components : int
        S and k.
    seed : int

    Returns
    -------
    Tensor of shape (S, k)
        float64, on the CPU.
    """
    engine = torch.quasirandom.SobolEngine(n_components, scramble=True, seed=seed)
    uniform = engine.draw((n_draws + 1) // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-10, 1.0 - 1e-10))
    return torch.cat([half, -half])[:n_draws]


def split_missing(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return x with zeros for NaN, and a mask of the other cells, or None if there is no NaN."""
    missing = x.isnan()
    return (x.masked_fill(missing, 0.0), ~missing) if missing.any() else (x, None)


def elbo_terms(
    model: VAE, x: Tensor, observed: Tensor | None, noise: Tensor, draws_per_block: int
) -> ElboTerms[Tensor]:
    r"""Return the terms of the bound, per row.

    .. math::
        \tfrac1S \sum_s \log p(x_n | \mu_n + \sigma_n \epsilon_s)
        - \mathrm{KL}(N(\mu_n, \sigma_n^2) \| N(0, I))

    Kingma & Welling (2014), arXiv:1312.6114, equation 10 and appendix B; Rezende et al. (2014).
    Only the reconstruction is an average over draws; KL, ``E_q log p(z)`` and entropy are exact.

    Parameters
    ----------
    model : VAE
    x : Tensor of shape (B, D)
        In fitted units. What cells that are not `observed` hold must be in the support.
    observed : Tensor of bool, shape (B, D), or None
        The cells that count; None: all.
    noise : Tensor of shape (S, k)
        Shared by the rows.
    draws_per_block : int
        Bounds the memory: B times this many rows are decoded at a time.

    Returns
    -------
    ElboTerms of Tensors of shape (B,)
        Nats, densities in fitted units.
    """
    mean, log_var = model.posterior(x, observed)  # (B, k)
    std = (0.5 * log_var).exp()
    total = x.new_zeros(x.shape[0])
    for draws in row_slices(noise.shape[0], draws_per_block):
        z = mean + std * noise[draws, None, :]  # (S, B, k)
        log_prob = model.likelihood.log_prob_observed(x, model.decoder(z), observed)
        total += log_prob.sum(0)
    reconstruction = total / noise.shape[0]  # (B,)
    kl = normal.kl_standard(mean, log_var).sum(-1)
    # E_q log p(z) = -1/2 sum_k (log 2 pi + mu^2 + sigma^2)
    E_log_prior = -0.5 * (normal.LOG_2PI + mean.square() + log_var.exp()).sum(-1)
    return ElboTerms(reconstruction, kl, reconstruction + E_log_prior, normal.entropy(log_var))


def parameter_groups(model: VAE, n_rows: int) -> list[dict[str, Any]]:
    r"""Return all parameters, those with a prior in a group of their own.

    .. math:: \nabla\, \tfrac{\tau}{2N} \|W\|^2 = \tfrac{\tau}{N} W

    A normal prior of precision :math:`\tau` on the weights that bend the networks: it matters for
    a hundred rows and vanishes for many. The optimiser adds its gradient in its one pass over the
    weights; no loss that is computed has a part of it.

    Parameters
    ----------
    model : VAE
    n_rows : int
        N, the number of training rows, without those held out.

    Returns
    -------
    list of dict
        With the keys "params" and "weight_decay", as torch's optimisers take them.
    """
    curved = model.curvature_weights()
    among = {id(matrix) for matrix in curved}
    free = [p for p in model.parameters() if id(p) not in among]
    groups = [
        {"params": free, "weight_decay": 0.0},
        {"params": curved, "weight_decay": WEIGHT_PRECISION / n_rows},
    ]
    return [group for group in groups if group["params"]]


def training_loss(
    model: VAE,
    x: Tensor,
    observed: Tensor | None,
    weight: Tensor,
    noise: Tensor,
    *,
    beta: float,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Return the loss of a minibatch and its estimate of the bound, both per unit of weight.

    .. math::
        \text{loss} = \beta \sum_k \max(\lambda, \tfrac1B \sum_n w_n \mathrm{KL}_{nk})
            - \tfrac1B \sum_n w_n \text{reconstruction}_n

    The prior of the weights is the optimiser's part; see :func:`parameter_groups`.

    Parameters
    ----------
    model : VAE
    x : Tensor of shape (B, D)
        In fitted units. What cells that are not `observed` hold must be in the support.
    observed : Tensor of bool, shape (B, D), or None
        The cells that count; None: all.
    weight : Tensor of shape (B,)
        Of mean one over the training rows.
    noise : Tensor of shape (B, k)
        One draw per row.
    beta : float
        Weight of the KL (Higgins et al. 2017); 1 is the bound.
    free_bits : float
        lambda, nats per code that cost nothing (Kingma et al. 2016, arXiv:1606.04934, C.8).

    Returns
    -------
    loss, bound : Tensor of shape ()
        `bound` has ``beta = 1``, no free nats, no prior on weights, and no gradient.
    """
    mean, log_var = model.posterior(x, observed)  # (B, k)
    z = torch.addcmul(mean, (0.5 * log_var).exp(), noise)
    log_prob = model.likelihood.log_prob_observed(x, model.decoder(z), observed)
    reconstruction = (weight * log_prob).mean()
    kl = weight @ normal.kl_standard(mean, log_var) / len(x)  # (k,)
    loss = beta * kl.clamp_min(free_bits).sum() - reconstruction
    return loss, (reconstruction - kl.sum()).detach()


def log_predictive(
    model: VAE, x: Tensor, observed: Tensor | None, noise: Tensor, draws_per_block: int
) -> Tensor:
    r"""Return the importance-weighted estimate of ``log p(x_n)``, per row.

    .. math::
        \log \tfrac1K \sum_{k=1}^K \frac{p(x_n|z_k)\,p(z_k)}{q(z_k|x_n)}, \qquad z_k \sim q(z|x_n)

    Burda et al. (2016), arXiv:1509.00519, equation 8: in expectation it lies between the ELBO and
    ``log p(x_n)`` and does not fall as K grows. The mean is taken under the logarithm, never
    replaced by a self-normalised sum.

    Parameters
    ----------
    model : VAE
    x : Tensor of shape (B, D)
        In fitted units. What cells that are not `observed` hold must be in the support.
    observed : Tensor of bool, shape (B, D), or None
        The cells that count; None: all.
    noise : Tensor of shape (K, k)
        Shared by all rows.
    draws_per_block : int
        Bounds the memory: B times this many rows are decoded at a time.

    Returns
    -------
    Tensor of shape (B,)
    """
    mean, log_var = model.posterior(x, observed)  # (B, k)
    log_sum = x.new_full((x.shape[0],), -math.inf)
    for draws in row_slices(noise.shape[0], draws_per_block):
        log_weight, _ = _weighted_draws(model, x, observed, (mean, log_var), noise[draws])
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(0))
    return log_sum - math.log(noise.shape[0])


def _weighted_draws(
    model: VAE, x: Tensor, observed: Tensor | None, q: tuple[Tensor, Tensor], noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log importance weights ``p(x, z) / q(z|x)``, (S, B), and the decoded draws."""
    mean, log_var = q
    eps = noise[:, None, :]  # (S, 1, k)
    z = mean + (0.5 * log_var).exp() * eps  # (S, B, k)
    # log p(z) - log q(z|x): the factors 2 pi cancel.
    log_ratio = 0.5 * (log_var + eps.square() - z.square()).sum(-1)  # (S, B)
    output = model.decoder(z)
    return model.likelihood.log_prob_observed(x, output, observed) + log_ratio, output


def predictive_moments(
    model: VAE, x: Tensor, observed: Tensor | None, noise: Tensor, draws_per_block: int
) -> tuple[Tensor, Tensor]:
    r"""Return mean and variance of every cell given the observed ones of its row.

    .. math::
        E[x_j | x_o] \approx \sum_s \bar w_s E[x_j | z_s], \qquad
        \bar w_s \propto \frac{p(x_o|z_s)\,p(z_s)}{q(z_s|x_o)}, \qquad z_s \sim q(z|x_o)

    Self-normalised importance sampling: Mattei & Frellsen (2019), MIWAE, equation 12. Codes have
    their most probable value and the variance of its indicator.

    Parameters
    ----------
    model : VAE
    x, observed : Tensor of shape (B, D)
        As in :func:`elbo_terms`.
    noise : Tensor of shape (S, k)
        Shared by the rows.
    draws_per_block : int

    Returns
    -------
    mean, var : Tensor of shape (B, D)
    """
    q = model.posterior(x, observed)
    peak = x.new_full((x.shape[0],), -math.inf)  # the largest log weight so far
    total = x.new_zeros(x.shape[0])
    sums = x.new_zeros(x.shape[0], model.likelihood.n_statistics)
    for draws in row_slices(noise.shape[0], draws_per_block):
        log_weight, output = _weighted_draws(model, x, observed, q, noise[draws])
        higher = torch.maximum(peak, log_weight.amax(0))
        shrink = (peak - higher).exp()
        weight = (log_weight - higher).exp()  # (S, B)
        total = total * shrink + weight.sum(0)
        weighted = weight[..., None] * model.likelihood.statistics(output)
        # Draws without weight say nothing, even where the variance is infinite.
        weighted = torch.where(weight[..., None] > 0, weighted, 0.0)
        sums = torch.where(shrink[:, None] > 0, sums * shrink[:, None], 0.0) + weighted.sum(0)
        peak = higher
    return model.likelihood.summarise(sums / total[:, None])
