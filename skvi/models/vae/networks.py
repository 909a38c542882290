"""The networks: a linear map plus a multilayer correction, on each side of the latent space.

Nothing here draws from torch's global generator: modules are built without values
(:func:`build`) and then filled, from a start (:mod:`skvi.models.vae.start`) or from stored weights.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skvi.models.vae.fused import ACTIVATIONS, ResidualProduct
from skvi.models.vae.likelihoods import Block, Mixed, build_likelihood

# log var of q(z|x) stays between -21 and 3: far below any useful precision, and not so far
# above the prior's variance that a stray row could throw its draws out of the decoder's reach.
_LOG_VAR_CENTRE, _LOG_VAR_RADIUS = -9.0, 12.0


class Architecture(NamedTuple):
    """What a network is, without its weights.

    Attributes
    ----------
    n_features, n_components : int
        D and k.
    hidden_layer_sizes : tuple of int
        From the data to the code; the decoder mirrors them. Empty: both sides are linear.
    activation : str
        A key of `ACTIVATIONS`.
    blocks : tuple of Block
        Which likelihood explains which columns.
    """

    n_features: int
    n_components: int
    hidden_layer_sizes: tuple[int, ...]
    activation: str
    blocks: tuple[Block, ...]

    @property
    def n_outputs(self) -> int:
        """Width of the decoder's output."""
        return sum(block.n_outputs for block in self.blocks)


def bounded_log_var(raw: Tensor) -> Tensor:
    """Map any number into the range of log variances, smoothly."""
    return _LOG_VAR_CENTRE + _LOG_VAR_RADIUS * torch.tanh((raw - _LOG_VAR_CENTRE) / _LOG_VAR_RADIUS)


def unbounded_log_var(log_var: Tensor) -> Tensor:
    """Invert `bounded_log_var`; values at or beyond its limits are moved just inside."""
    ratio = ((log_var - _LOG_VAR_CENTRE) / _LOG_VAR_RADIUS).clamp(-0.99, 0.99)
    return _LOG_VAR_CENTRE + _LOG_VAR_RADIUS * torch.atanh(ratio)


class Posterior(NamedTuple):
    """``q(z|x) = N(mean, diag exp(log_var))``; both of shape (N, k)."""

    mean: Tensor
    log_var: Tensor


class ResidualMLP(nn.Module):
    r"""A linear map plus a multilayer perceptron without output bias.

    .. math:: y = A x + b + C h_L, \quad h_l = a(W_l h_{l-1} + c_l), \quad h_0 = x

    With ``C = 0`` it is the linear map, so that training can begin at the best linear model and
    pays for curvature only where the data ask for it.

    Attributes
    ----------
    product_dtype : torch.dtype or None
        Of the matrix products while gradients are recorded; None: that of the parameters.
        Scores never record any, so that they always have the parameters' digits.
    """

    product_dtype: torch.dtype | None = None

    def __init__(self, n_in: int, hidden: tuple[int, ...], n_out: int, activation: str) -> None:
        super().__init__()
        sizes = (n_in, *hidden)
        self.linear = nn.Linear(n_in, n_out)
        self.hidden = nn.ModuleList(nn.Linear(n, n_next) for n, n_next in itertools.pairwise(sizes))
        self.correction = nn.Linear(sizes[-1], n_out, bias=False) if hidden else None
        self.activation = activation

    def hidden_layers(self) -> list[nn.Linear]:
        """Return the layers before the correction, from the input on."""
        return [layer for layer in self.hidden if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        if self.correction is None:
            return self.linear(x)
        if self.product_dtype is not None and torch.is_grad_enabled():
            y = ResidualProduct.apply(
                self.activation,
                self.product_dtype,
                x.flatten(0, -2),
                self.linear.weight,
                self.linear.bias,
                self.correction.weight,
                *self.hidden.parameters(),
            )
            return y.unflatten(0, x.shape[:-1])
        function, _ = ACTIVATIONS[self.activation]
        y = self.linear(x)
        for layer in self.hidden:
            x = function(layer(x))
        return y + self.correction(x)


class VAE(nn.Module):
    """Encoder, decoder and likelihood, in fitted units.

    The encoder reads ``(features(x) - input_shift) * input_scale``: centred, and so that a feature
    with a few values hundreds of standard deviations out cannot flood it; the likelihood reads x.

    Parameters
    ----------
    architecture : Architecture
    """

    input_shift: Tensor
    input_scale: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        _, n_components, hidden, activation, blocks = architecture
        self.likelihood = build_likelihood(blocks)
        n_inputs, n_outputs = self.likelihood.n_inputs, self.likelihood.n_outputs
        self.encoder = ResidualMLP(n_inputs, hidden, 2 * n_components, activation)
        self.decoder = ResidualMLP(n_components, hidden[::-1], n_outputs, activation)
        self.register_buffer("input_shift", torch.empty(n_inputs))
        self.register_buffer("input_scale", torch.empty(n_inputs))

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the encoder reads of rows x, shape (N, D) -> (N, n_inputs)."""
        return (self.likelihood.features(x) - self.input_shift) * self.input_scale

    def posterior(self, x: Tensor, observed: Tensor | None = None) -> Posterior:
        """Return q(z|x) of rows x, shape (N, D), of which the `observed` cells are known.

        Features of other cells are put at their mean, zero; a row without any known cell has the
        prior, the exact posterior given nothing.
        Source: Mattei & Frellsen (2019), MIWAE, arXiv:1812.02633, section 3.
        """
        inputs = self.inputs(x)
        if observed is not None:
            inputs = inputs * self.likelihood.per_feature(observed)
        mean, raw = self.encoder(inputs).chunk(2, dim=-1)  # (N, k) each
        log_var = bounded_log_var(raw)
        if observed is not None:
            known = observed.any(-1, keepdim=True)
            mean, log_var = mean * known, log_var * known
        return Posterior(mean, log_var)

    def set_product_dtype(self, dtype: torch.dtype | None) -> None:
        """Have the hidden layers multiply in `dtype` while gradients are recorded."""
        for network in self.modules():
            if isinstance(network, ResidualMLP):
                network.product_dtype = dtype

    def curvature_weights(self) -> list[Tensor]:
        """Return the weights that make the networks non-linear; biases and linear maps are free."""
        return [
            layer.weight
            for network in (self.encoder, self.decoder)
            for layer in (*network.hidden_layers(), network.correction)
            if layer is not None
        ]


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> VAE:
    """Return a network whose values are still undefined; no random generator is touched."""
    with torch.device("meta"):
        model = VAE(architecture)
    model = model.to_empty(device=device).to(dtype)
    if isinstance(model.likelihood, Mixed):
        model.likelihood.arrange()
    return model


def restore(
    architecture: Architecture,
    weights: Mapping[str, np.ndarray],
    device: torch.device,
    dtype: torch.dtype,
) -> VAE:
    """Return a network with stored `weights`, converted to `dtype`."""
    model = build(architecture, device, dtype)
    # torch.tensor copies: a memory-mapped array may be read-only, which torch does not support.
    model.load_state_dict(
        {name: torch.tensor(value, device=device) for name, value in weights.items()}
    )
    return model


def export(model: VAE) -> dict[str, np.ndarray]:
    """Return the weights as NumPy arrays that own their memory."""
    return {name: value.cpu().numpy().copy() for name, value in model.state_dict().items()}
