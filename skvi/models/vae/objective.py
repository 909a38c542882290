"""The bound, its training estimate, and the importance-weighted likelihood."""

import math
from typing import Any

import torch
from torch import Tensor

from skvi.models.terms import ElboTerms
from skvi.models.vae.networks import VAE
from skvi.models.vae.posteriors import Posterior
from skvi.models.vae.priors import Law
from skvi.runtime.blocks import row_slices

# Of the optimisation of single posteriors: Adam's step in units of the encoder's output.
_REFINE_RATE, _REFINE_BETAS = 0.05, (0.9, 0.99)
# Precision of the normal prior of the weights that bend the networks; see `parameter_groups`.
WEIGHT_PRECISION = 20.0


def split_missing(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return x with zeros for NaN, and a mask of the other cells, or None if there is no NaN."""
    missing = x.isnan()
    return (x.masked_fill(missing, 0.0), ~missing) if missing.any() else (x, None)


def exact_kl(model: VAE, q: Posterior) -> Tensor | None:
    """Return ``KL(q(z|x) || p(z))`` of every code, (B, k), or None without a closed form."""
    return q.kl_standard() if model.prior.standard else None


def elbo_terms(
    model: VAE,
    x: Tensor,
    observed: Tensor | None,
    noise: Tensor,
    draws_per_block: int,
    output: Tensor | None = None,
) -> ElboTerms[Tensor]:
    r"""Return the terms of the bound, per row.

    .. math::
        \tfrac1S \sum_s \log p(x_n | z_{ns}) - \mathrm{KL}(q(z|x_n) \| p(z)), \qquad
        z_{ns} \sim q(z|x_n)

    Kingma & Welling (2014), arXiv:1312.6114, equation 10 and appendix B; Rezende et al. (2014).
    For normal posteriors and a normal or uniform prior only the reconstruction is an average over
    draws; KL, ``E_q log p(z)`` and entropy are exact. Else ``E_q log p(z)`` is averaged over the
    same draws, and for flows the entropy too: as good as these draws are, so that a KL may be below
    zero.

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
    output : Tensor of shape (B, n), optional
        Stands for the encoder's output; see :func:`refine`.

    Returns
    -------
    ElboTerms of Tensors of shape (B,)
        Nats, densities in fitted units.
    """
    output = model.encoder(model.inputs(x, observed)) if output is None else output
    q, law = model.posterior_of(output, observed), model.prior_law(x)
    codewise, entropy = exact_kl(model, q), q.entropy()
    reconstruction, E_log_prior, E_log_q = x.new_zeros(3, x.shape[0])
    for draws in row_slices(noise.shape[0], draws_per_block):
        eps = noise[draws, None, :]  # (S, 1, k)
        if codewise is not None:
            z = q.draw(eps)  # (S, B, k)
        else:
            z, log_q = q.draw_with_density(eps)  # (S, B, k), (S, B)
            E_log_prior = E_log_prior + law.log_prob(z).sum(0) / noise.shape[0]
            E_log_q = E_log_q + log_q.sum(0) / noise.shape[0]
        log_prob = model.likelihood.log_prob_observed(x, model.decode(z), observed)
        reconstruction = reconstruction + log_prob.sum(0) / noise.shape[0]
    if entropy is None:
        entropy = -E_log_q
    if codewise is None:
        kl = -entropy - E_log_prior
    else:
        kl = codewise.sum(-1)
        E_log_prior = -entropy - kl
    return ElboTerms(reconstruction, kl, reconstruction + E_log_prior, entropy)


def refine(
    model: VAE,
    x: Tensor,
    observed: Tensor | None,
    n_steps: int,
    own_noise: Tensor,
    noise: Tensor,
    draws_per_block: int,
) -> Tensor:
    """Return, for the encoder's output, what `n_steps` of gradient ascent make of it, row by row.

    Each row climbs its own bound by Adam, under draws of its own so that it does not fit those of
    the score; then the better of before and after is kept, by the draws of the score. Rows share
    nothing: a row's answer does not depend on the others.
    Source: Kim et al. (2018), Semi-amortized variational autoencoders, arXiv:1802.02550.

    Parameters
    ----------
    model : VAE
        Its weights stay as they are.
    x, observed
        As in :func:`elbo_terms`.
    n_steps : int
        At least 1.
    own_noise, noise : Tensor of shape (R, k) and (S, k)
        To climb with, and to compare with.
    draws_per_block : int

    Returns
    -------
    Tensor of shape (B, n)
        See `output` of :func:`elbo_terms`.
    """
    with torch.no_grad():
        before = model.encoder(model.inputs(x, observed))
    with torch.enable_grad():
        after = before.clone().requires_grad_()
        optimizer = torch.optim.Adam([after], lr=_REFINE_RATE, betas=_REFINE_BETAS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        for _ in range(n_steps):
            terms = elbo_terms(model, x, observed, own_noise, len(own_noise), after)
            (after.grad,) = torch.autograd.grad((terms.kl - terms.reconstruction).sum(), after)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        bounds = []
        for output in (before, after.detach()):
            terms = elbo_terms(model, x, observed, noise, draws_per_block, output)
            bounds.append(terms.reconstruction - terms.kl)
        # Not "worse": a bound that is not finite is not better.
        return torch.where((bounds[1] > bounds[0])[:, None], after.detach(), before)


def parameter_groups(model: VAE, n_rows: float) -> list[dict[str, Any]]:
    r"""Return all parameters that are trained, those with a prior in a group of their own.

    .. math:: \nabla\, \tfrac{\tau}{2N} \|W\|^2 = \tfrac{\tau}{N} W

    A normal prior of precision :math:`\tau` on the weights that bend the networks: it matters for
    a hundred rows and vanishes for many. The optimiser adds its gradient in its one pass over the
    weights; no loss that is computed has a part of it. The prior of the codes (pseudo-inputs,
    means, weights of components), the likelihood and networks of the user's have none.

    Parameters
    ----------
    model : VAE
    n_rows : float
        N, the total weight of the training rows, without those held out; less than one counts as
        one, so that the prior stays finite.

    Returns
    -------
    list of dict
        With the keys "params" and "weight_decay", as torch's optimisers take them.
    """
    bending = {id(matrix) for matrix in model.curvature_weights()}
    trained = [p for p in model.parameters() if p.requires_grad]
    free = [p for p in trained if id(p) not in bending]
    curved = [p for p in trained if id(p) in bending]
    groups = [
        {"params": free, "weight_decay": 0.0},
        {"params": curved, "weight_decay": WEIGHT_PRECISION / max(n_rows, 1.0)},
    ]
    return [group for group in groups if group["params"]]


def training_loss(
    model: VAE,
    x: Tensor,
    observed: Tensor | None,
    weight: Tensor,
    noise: Tensor,
    *,
    beta: float | Tensor,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Return the loss of a minibatch and its estimate of the bound, both per unit of weight.

    .. math::
        \text{loss} = \beta \sum_k \max(\lambda, \tfrac1B \sum_n w_n \mathrm{KL}_{nk})
            - \tfrac1B \sum_n w_n \text{reconstruction}_n

    The maximum is taken for :math:`\lambda > 0` only. A KL without a closed form is that of the
    draw, and free nats are granted to its sum over codes.
    With K draws per row the loss is that of :func:`importance_loss`. The prior of the weights is
    the optimiser's part; see :func:`parameter_groups`.

    Parameters
    ----------
    model : VAE
    x : Tensor of shape (B, D)
        In fitted units. What cells that are not `observed` hold must be in the support.
    observed : Tensor of bool, shape (B, D), or None
        The cells that count; None: all.
    weight : Tensor of shape (B,)
        Of mean one over the training rows.
    noise : Tensor of shape (B, k) or (K, B, k)
        One draw per row, or K.
    beta : float or Tensor of shape ()
        Weight of the KL (Higgins et al. 2017); 1 is the bound.
    free_bits : float
        lambda, nats per code that cost nothing (Kingma et al. 2016, arXiv:1606.04934, C.8); must be
        0 with K draws, whose bound has no KL.

    Returns
    -------
    loss, bound : Tensor of shape ()
        `bound` is the ELBO: with ``beta = 1``, no free nats, no prior on weights, averaged over
        draws outside the logarithm, and without gradient.
    """
    q = model.posterior(x, observed)
    if noise.dim() == 3:
        loss, bound = importance_loss(model, x, observed, weight, q, noise, beta)
    else:
        z, kl = _draw_and_kl(model, x, weight, q, noise)
        log_prob = model.likelihood.log_prob_observed(x, model.decode(z), observed)
        reconstruction = (weight * log_prob).mean()
        # Only then: a KL that is averaged over draws may be below zero, and keeps its gradient.
        paid = kl
        if free_bits > 0.0:
            n_codes = z.shape[-1] // len(kl)  # that share the free nats of one entry
            paid = kl.clamp_min(free_bits * n_codes)
        loss = beta * paid.sum() - reconstruction
        bound = (reconstruction - kl.sum()).detach()
    return loss, bound


def _draw_and_kl(
    model: VAE, x: Tensor, weight: Tensor, q: Posterior, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return draws (B, k) and the weighted mean KL, (k,) if it is exact, else (1,)."""
    codewise = exact_kl(model, q)
    if codewise is not None:
        return q.draw(noise), weight @ codewise / len(x)
    z, log_q = q.draw_with_density(noise)
    entropy = q.entropy()
    kl = (log_q if entropy is None else -entropy) - model.prior_law(x).log_prob(z)
    return z, (weight @ kl / len(x))[None]


def importance_loss(
    model: VAE,
    x: Tensor,
    observed: Tensor | None,
    weight: Tensor,
    q: Posterior,
    noise: Tensor,
    beta: float | Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Return a loss with the gradient of the importance-weighted bound, and the ELBO.

    .. math::
        -\tfrac1B \sum_n w_n \log \tfrac1K \sum_k \omega_{nk}, \qquad
        \omega = p(x|z) \Big(\frac{p(z)}{q(z|x)}\Big)^\beta

    Of one row, with :math:`\tilde\omega_k = \omega_k / \sum_j \omega_j`, the gradient for the
    parameters of p is :math:`\sum_k \tilde\omega_k \nabla \log \omega_k`; that for those of q is
    doubly reparameterised,

    .. math::
        \sum_k \big((1 - \beta)\,\tilde\omega_k + \beta\,\tilde\omega_k^2\big)
        \frac{\partial \log \omega_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}:

    the score of q, which drowns the signal as K grows, is integrated by parts. Tucker et al.
    (2019), arXiv:1810.04152, equation 8, is ``beta = 1``; else the score has the factor beta.

    Parameters
    ----------
    model, x, observed, weight, beta
        As in :func:`training_loss`.
    q : Posterior
        Of the rows.
    noise : Tensor of shape (K, B, k)

    Returns
    -------
    loss, bound : Tensor of shape ()
        The value of `loss` is a self-normalised sum; only its gradient has a meaning.
    """
    z = q.draw(noise)  # (K, B, k)
    log_prob = model.likelihood.log_prob_observed(x, model.decode(z), observed)  # (K, B)
    log_ratio = model.prior_law(x).log_prob(z) - q.detach().log_prob(z)
    log_weight = log_prob + beta * log_ratio
    share = log_weight.detach().softmax(0)
    if z.requires_grad:
        # What arrives at z has one factor of the share; the way on to q gets the rest.
        z.register_hook(lambda gradient: gradient * (1.0 - beta + beta * share)[..., None])
    loss = -(weight * (share * log_weight).sum(0)).mean()
    bound = (weight * (log_prob + log_ratio).mean(0)).mean().detach()
    return loss, bound


def log_predictive(
    model: VAE, x: Tensor, observed: Tensor | None, noise: Tensor, draws_per_block: int
) -> Tensor:
    r"""Return the importance-weighted estimate of ``log p(x_n)``, per row.

    .. math::
        \log \tfrac1K \sum_{k=1}^K \frac{p(x_n|z_k)\,p(z_k)}{q(z_k|x_n)}, \qquad z_k \sim q(z|x_n)

    Burda et al. (2016), arXiv:1509.00519, equation 8: in expectation it lies between the ELBO and
    ``log p(x_n)``, whether draws are independent or not; for independent ones it does not fall as K
    grows. The mean is taken under the logarithm, never replaced by a self-normalised sum.

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
    q, law = model.posterior(x, observed), model.prior_law(x)
    log_sum = x.new_full((x.shape[0],), -math.inf)
    for draws in row_slices(noise.shape[0], draws_per_block):
        log_weight, _ = _weighted_draws(model, x, observed, q, law, noise[draws])
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(0))
    return log_sum - math.log(noise.shape[0])


def _weighted_draws(
    model: VAE, x: Tensor, observed: Tensor | None, q: Posterior, law: Law, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log importance weights ``p(x, z) / q(z|x)``, (S, B), and the decoded draws."""
    z, log_q = q.draw_with_density(noise[:, None, :])  # (S, B, k), (S, B)
    output = model.decode(z)
    log_joint = model.likelihood.log_prob_observed(x, output, observed) + law.log_prob(z)
    return log_joint - log_q, output


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
        float64.
    """
    q, law = model.posterior(x, observed), model.prior_law(x)
    peak = x.new_full((x.shape[0],), -math.inf)  # the largest log weight so far
    total = x.new_zeros(x.shape[0])
    sums = x.new_zeros(x.shape[0], model.likelihood.n_statistics, dtype=torch.float64)
    for draws in row_slices(noise.shape[0], draws_per_block):
        log_weight, output = _weighted_draws(model, x, observed, q, law, noise[draws])
        higher = torch.maximum(peak, log_weight.amax(0))
        shrink = (peak - higher).exp()
        weight = (log_weight - higher).exp()  # (S, B)
        total = total * shrink + weight.sum(0)
        # In float64: a variance is the difference of second moments, which may be 1e14 for counts.
        weighted = weight[..., None] * model.likelihood.statistics(output.double())
        # Draws without weight say nothing, even where the variance is infinite.
        weighted = torch.where(weight[..., None] > 0, weighted, 0.0)
        sums = torch.where(shrink[:, None] > 0, sums * shrink[:, None], 0.0) + weighted.sum(0)
        peak = higher
    return model.likelihood.summarise(sums / total[:, None])
