"""Where training starts: the best linear model, with an undisturbed correction network on top."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skvi.models.vae.likelihoods import Marginals
from skvi.models.vae.networks import VAE, ResidualMLP
from skvi.models.vae.posteriors import unbounded_log_var

# Enough for a linear start; more rows cost time and add nothing that training would not find.
_MAX_ROWS = 4096
_EM_ITERATIONS = 200
# Below this a variance is nothing.
_SMALLEST_VARIANCE = 1e-4
# The encoder's inputs are scaled down to this magnitude where the training rows exceed it.
_LARGEST_INPUT = 10.0


class LinearStart(NamedTuple):
    """Factor analysis of centred rows, rotated so that the posterior covariance is diagonal.

    Attributes
    ----------
    loadings : Tensor of shape (D, k)
    noise : Tensor of shape (D,)
        Variances.
    encoder : Tensor of shape (k, D)
        ``E[z|x] = encoder @ x``.
    log_var : Tensor of shape (k,)
        ``log Var[z|x]``.
    """

    loadings: Tensor
    noise: Tensor
    encoder: Tensor
    log_var: Tensor


def factor_analysis(
    x: Tensor, n_components: int, least_noise: Tensor, generator: torch.Generator
) -> LinearStart:
    r"""Fit ``x ~ N(0, W W' + diag(psi))`` by EM (Rubin & Thayer 1982).

    .. math::
        B = (I + W'\Psi^{-1}W)^{-1} W'\Psi^{-1}, \quad
        W \leftarrow S B' (I - B W + B S B')^{-1}, \quad
        \Psi \leftarrow \mathrm{diag}(S - W B S), \qquad S = x'x

    Parameters
    ----------
    x : Tensor of shape (N, D)
        Centred rows times the root of their share of the weight; float64.
    n_components : int
    least_noise : Tensor of shape (D,)
        Of each column's variance: keeps EM from explaining a column completely.
    generator : torch.Generator
        For the first loadings.

    Returns
    -------
    LinearStart
    """
    n_rows, n_features = x.shape
    if n_rows > n_features:
        # The triangular factor has the same cross products in D rows.
        x = torch.linalg.qr(x, mode="r").R  # (min(N, D), D)
    variance = x.square().sum(0)  # (D,)
    floor = least_noise * variance.clamp_min(_SMALLEST_VARIANCE)
    eye = torch.eye(n_components, dtype=x.dtype, device=x.device)

    loadings = torch.empty(n_features, n_components, dtype=x.dtype, device=x.device)
    loadings.normal_(generator=generator).mul_(0.1)
    noise = variance.clamp_min(_SMALLEST_VARIANCE)
    for _ in range(_EM_ITERATIONS):
        scaled = loadings.T / noise  # (k, D)
        encoder = torch.linalg.solve(eye + scaled @ loadings, scaled)  # (k, D)
        z = x @ encoder.T  # (N, k)
        cross = x.T @ z  # (D, k)
        second = eye - encoder @ loadings + z.T @ z  # (k, k)
        loadings = torch.linalg.solve(second, cross, left=False)
        noise = torch.maximum(variance - (loadings * cross).sum(-1), floor)

    precision, rotation = torch.linalg.eigh(loadings.T @ (loadings / noise[:, None]))
    loadings = loadings @ rotation.flip(-1)
    precision = 1.0 + precision.flip(-1).clamp_min(0.0)  # (k,), the most informative first
    return LinearStart(
        loadings, noise, (loadings / noise[:, None]).T / precision[:, None], -precision.log()
    )


def initialise(
    model: VAE,
    x: Tensor,
    observed: Tensor | None,
    weight: Tensor,
    noise_floor: Tensor,
    generator: torch.Generator,
) -> None:
    """Fill `model` in place: linear parts from factor analysis, corrections at zero.

    Custom networks keep the values that they came with.

    Parameters
    ----------
    model : VAE
        From :func:`skvi.models.vae.networks.build`; its values are overwritten.
    x : Tensor of shape (N, D)
        Training rows in fitted units. Factor analysis uses the first few thousand: they must come
        in no particular order.
    observed : Tensor of bool, shape (N, D), or None
        The cells that count; None: all.
    weight : Tensor of shape (N,)
        Positive, float64: a float32 may be zero in all rows that factor analysis uses.
    noise_floor : Tensor of shape (D,)
        Lower limits of noise variances, in fitted units; the variance itself where it is fixed.
    generator : torch.Generator
    """
    likelihood = model.likelihood
    first, weight = x[:_MAX_ROWS].double(), weight[:_MAX_ROWS]
    weight = weight / weight.max()
    weight = weight / weight.sum()
    features = likelihood.features(first)  # (n, n_inputs)
    cells = torch.ones_like(first) if observed is None else observed[:_MAX_ROWS].double()
    seen = likelihood.per_feature(cells)
    mean, var, _ = _observed_moments(first, cells, weight)
    shift, _, share = _observed_moments(features, seen, weight)
    # Cells at their mean add no variance: the others stand in for them.
    centred = (features - shift) * seen / share.sqrt()
    start = factor_analysis(
        centred * weight.sqrt()[:, None],
        model.family.n_components,
        likelihood.least_noise(noise_floor),
        generator,
    )
    known = Marginals(mean, var, shift, start.loadings, start.noise, noise_floor)
    with torch.no_grad():
        model.input_shift.copy_(shift)
        deviation = (likelihood.features(x) - model.input_shift).abs()  # (N, n_inputs)
        if observed is not None:
            deviation *= likelihood.per_feature(observed)
        model.input_scale.copy_((_LARGEST_INPUT / deviation.amax(0)).clamp_max(1.0))
        bias, loadings = likelihood.start(known)
        if isinstance(model.encoder, ResidualMLP):
            _fill_encoder(model, model.encoder.linear, start)
            _fill_correction(model.encoder, generator)
        if isinstance(model.decoder, ResidualMLP):
            model.decoder.linear.bias.copy_(bias)
            model.decoder.linear.weight.copy_(loadings)
            _fill_correction(model.decoder, generator)
        model.family.initialise(generator)
        _start_prior(model, x, observed, generator)


def _observed_moments(
    values: Tensor, observed: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and observed share of columns; 0, 0 and 1 where nothing is seen."""
    share = weight @ observed
    share = torch.where(share > 0, share, 1.0)
    mean = weight @ (values * observed) / share
    return mean, weight @ ((values - mean).square() * observed) / share, share


def _fill_encoder(model: VAE, linear: nn.Linear, start: LinearStart) -> None:
    n_components = start.encoder.shape[0]
    linear.weight.zero_()
    linear.bias.zero_()
    linear.weight[:n_components] = start.encoder / model.input_scale
    linear.bias[n_components : 2 * n_components] = unbounded_log_var(start.log_var)
    model.family.start(linear)


def _start_prior(
    model: VAE, x: Tensor, observed: Tensor | None, generator: torch.Generator
) -> None:
    """Give the prior what the encoder reads of some rows, each at most once if there are enough."""
    n_wanted = model.prior.n_prior_components
    if n_wanted == 0:
        return
    order = torch.randperm(len(x), generator=generator, device=x.device)
    rows = order.repeat(math.ceil(n_wanted / len(x)))[:n_wanted]
    inputs = model.inputs(x[rows], None if observed is None else observed[rows])
    model.prior.initialise(inputs, model.encoder(inputs)[:, : model.family.n_components])


def _fill_correction(network: ResidualMLP, generator: torch.Generator) -> None:
    """He initialisation and an output of zero; inputs are centred."""
    for layer in network.hidden_layers():
        layer.weight.normal_(0.0, math.sqrt(2.0 / layer.in_features), generator=generator)
        layer.bias.zero_()
    if network.correction is not None:
        network.correction.weight.zero_()
