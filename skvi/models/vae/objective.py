"""The bound, its training estimate, and the importance-weighted likelihood."""

import math

import torch
from torch import Tensor

from skvi.distributions import normal
from skvi.models.terms import ElboTerms
from skvi.models.vae.networks import VAE
from skvi.runtime.blocks import row_slices

# Precision of the normal prior of the weights that bend the networks; see `training_loss`.
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


def elbo_terms(model: VAE, x: Tensor, noise: Tensor, draws_per_block: int) -> ElboTerms[Tensor]:
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
        In fitted units.
    noise : Tensor of shape (S, k)
        Shared by the rows.
    draws_per_block : int
        Bounds the memory: B times this many rows are decoded at a time.

    Returns
    -------
    ElboTerms of Tensors of shape (B,)
        Nats, densities in fitted units.
    """
    mean, log_var = model.posterior(x)  # (B, k)
    std = (0.5 * log_var).exp()
    total = x.new_zeros(x.shape[0])
    for draws in row_slices(noise.shape[0], draws_per_block):
        z = mean + std * noise[draws, None, :]  # (S, B, k)
        total += model.likelihood.log_prob(x, model.decoder(z)).sum(0)
    reconstruction = total / noise.shape[0]  # (B,)
    kl = normal.kl_standard(mean, log_var).sum(-1)
    # E_q log p(z) = -1/2 sum_k (log 2 pi + mu^2 + sigma^2)
    E_log_prior = -0.5 * (normal.LOG_2PI + mean.square() + log_var.exp()).sum(-1)
    return ElboTerms(reconstruction, kl, reconstruction + E_log_prior, normal.entropy(log_var))


def training_loss(
    model: VAE, x: Tensor, weight: Tensor, noise: Tensor, *, beta: float, n_rows: int
) -> tuple[Tensor, Tensor]:
    r"""Return the loss of a minibatch and its estimate of the bound, both per unit of weight.

    .. math::
        \text{loss} = \tfrac1B \sum_n w_n (\beta\, \mathrm{KL}_n - \text{reconstruction}_n)
            + \tfrac{\tau}{2N} \|\text{curvature weights}\|^2

    The second term is a normal prior of precision :math:`\tau` on the weights that bend the
    networks: it matters for a hundred rows and vanishes for many.

    Parameters
    ----------
    model : VAE
    x : Tensor of shape (B, D)
    weight : Tensor of shape (B,)
        Of mean one over the training rows.
    noise : Tensor of shape (B, k)
        One draw per row.
    beta : float
        Weight of the KL (Higgins et al. 2017); 1 is the bound.
    n_rows : int
        N, the number of training rows, without those held out.

    Returns
    -------
    loss, bound : Tensor of shape ()
        `bound` has ``beta = 1``, no prior on weights, and no gradient.
    """
    mean, log_var = model.posterior(x)  # (B, k)
    z = torch.addcmul(mean, (0.5 * log_var).exp(), noise)
    reconstruction = (weight * model.likelihood.log_prob(x, model.decoder(z))).mean()
    kl = (weight * normal.kl_standard(mean, log_var).sum(-1)).mean()
    loss = beta * kl - reconstruction
    for matrix in model.curvature_weights():
        loss = loss + (0.5 * WEIGHT_PRECISION / n_rows) * matrix.square().sum()
    return loss, (reconstruction - kl).detach()


def log_predictive(model: VAE, x: Tensor, noise: Tensor, draws_per_block: int) -> Tensor:
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
        In fitted units.
    noise : Tensor of shape (K, k)
        Shared by all rows.
    draws_per_block : int
        Bounds the memory: B times this many rows are decoded at a time.

    Returns
    -------
    Tensor of shape (B,)
    """
    mean, log_var = model.posterior(x)  # (B, k)
    std = (0.5 * log_var).exp()
    log_sum = x.new_full((x.shape[0],), -math.inf)
    for draws in row_slices(noise.shape[0], draws_per_block):
        eps = noise[draws, None, :]  # (S, 1, k)
        z = mean + std * eps  # (S, B, k)
        # log p(z) - log q(z|x): the factors 2 pi cancel.
        log_ratio = 0.5 * (log_var + eps.square() - z.square()).sum(-1)  # (S, B)
        log_weight = model.likelihood.log_prob(x, model.decoder(z)) + log_ratio
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(0))
    return log_sum - math.log(noise.shape[0])
