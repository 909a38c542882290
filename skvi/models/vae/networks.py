"""The networks: a linear map plus a multilayer correction, on each side of the latent space.

Nothing here draws from torch's global generator: modules are built without values
(:func:`build`) and then filled, from a start (:mod:`skvi.models.vae.start`) or from stored weights.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skvi.models.vae.likelihoods import Block, Mixed, build_likelihood
from skvi.models.vae.posteriors import POSTERIORS, Posterior
from skvi.models.vae.priors import PRIORS, Law

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": torch.sigmoid,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


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
    prior : str
        A key of `PRIORS`.
    n_prior_components : int
        Components of a mixture prior, pseudo-inputs of a vamp prior; 0 for others.
    posterior : str
        A key of `POSTERIORS`.
    """

    n_features: int
    n_components: int
    hidden_layer_sizes: tuple[int, ...]
    activation: str
    blocks: tuple[Block, ...]
    prior: str = "normal"
    n_prior_components: int = 0
    posterior: str = "diag"

    @property
    def n_outputs(self) -> int:
        """Width of the decoder's output."""
        return sum(block.n_outputs for block in self.blocks)


class ResidualMLP(nn.Module):
    r"""A linear map plus a multilayer perceptron without output bias.

    .. math:: y = A x + b + C h_L, \quad h_l = a(W_l h_{l-1} + c_l), \quad h_0 = x

    With ``C = 0`` it is the linear map, so that training can begin at the best linear model and
    pays for curvature only where the data ask for it.
    """

    def __init__(self, n_in: int, hidden: tuple[int, ...], n_out: int, activation: str) -> None:
        super().__init__()
        sizes = (n_in, *hidden)
        self.linear = nn.Linear(n_in, n_out)
        self.hidden = nn.ModuleList(nn.Linear(n, n_next) for n, n_next in itertools.pairwise(sizes))
        self.correction = nn.Linear(sizes[-1], n_out, bias=False) if hidden else None
        self.activation = ACTIVATIONS[activation]

    def hidden_layers(self) -> list[nn.Linear]:
        """Return the layers before the correction, from the input on."""
        return [layer for layer in self.hidden if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        y = self.linear(x)
        if self.correction is None:
            return y
        for layer in self.hidden:
            x = self.activation(layer(x))
        return y + self.correction(x)


class VAE(nn.Module):
    """Encoder, decoder, likelihood, prior and posterior family, in fitted units.

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
        k, hidden, activation = architecture[1:4]
        self.likelihood = build_likelihood(architecture.blocks)
        n_inputs, n_outputs = self.likelihood.n_inputs, self.likelihood.n_outputs
        self.family = POSTERIORS[architecture.posterior](k)
        self.prior = PRIORS[architecture.prior](k, architecture.n_prior_components, n_inputs)
        self.encoder = ResidualMLP(n_inputs, hidden, self.family.n_outputs, activation)
        self.decoder = ResidualMLP(k, hidden[::-1], n_outputs, activation)
        self.register_buffer("input_shift", torch.empty(n_inputs))
        self.register_buffer("input_scale", torch.empty(n_inputs))

    def inputs(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Return what the encoder reads of rows x, shape (N, D) -> (N, n_inputs).

        Features of cells that are not `observed` are put at their mean, zero.
        Source: Mattei & Frellsen (2019), MIWAE, arXiv:1812.02633, section 3.
        """
        inputs = (self.likelihood.features(x) - self.input_shift) * self.input_scale
        return inputs if observed is None else inputs * self.likelihood.per_feature(observed)

    def posterior(self, x: Tensor, observed: Tensor | None = None) -> Posterior:
        """Return q(z|x) of rows x, shape (N, D), of which the `observed` cells are known."""
        return self.posterior_of(self.encoder(self.inputs(x, observed)), observed)

    def posterior_of(self, output: Tensor, observed: Tensor | None = None) -> Posterior:
        """Return the posteriors that an output of the encoder, (N, n), stands for.

        A row without any known cell has the prior, the exact posterior given nothing: exactly
        under a normal one, else a normal law with its mean and variances.
        """
        if observed is None:
            return self.family(output)
        known = observed.any(-1, keepdim=True)
        return self.family(output, known, self.prior_law(output).moments())

    def prior_law(self, like: Tensor) -> Law:
        """Return p(z), in the dtype and on the device of `like`."""

        def encode(inputs: Tensor, known: Tensor) -> Posterior:
            standard = torch.zeros_like(inputs[0, :1]), torch.ones_like(inputs[0, :1])
            return self.family(self.encoder(inputs), known, standard)

        return self.prior.law(encode, like)

    def decode(self, z: Tensor) -> Tensor:
        """Return the decoder's output for z, (..., k) -> (..., n_outputs)."""
        return self.decoder(self.prior.code(z))

    def curvature_weights(self) -> list[Tensor]:
        """Return the weights that make the networks non-linear; biases and linear maps are free."""
        return [
            layer.weight
            for network in (self.encoder, self.decoder)
            for layer in (*network.hidden_layers(), network.correction)
            if layer is not None
        ] + self.family.curvature_weights()


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
