"""The networks: a linear map plus a multilayer correction, on each side of the latent space.

Nothing here draws from torch's global generator: modules are built without values
(:func:`build`) and then filled, from a start (:mod:`skvi.models.vae.start`) or from stored weights.
"""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skvi.models.vae.fused import ACTIVATIONS, ResidualProduct
from skvi.models.vae.likelihoods import Block, Mixed, build_likelihood
from skvi.models.vae.posteriors import POSTERIORS, Diagonal, Full, Posterior
from skvi.models.vae.priors import PRIORS, Law

# Arrays of so many numbers are taken from the system at every step, page by page, and given back:
# from 32 MB on C libraries keep no memory. With half of the bytes there are fewer of them.
_LARGE = 1 << 23


class Custom(NamedTuple):
    """A network of the user's.

    Attributes
    ----------
    module : nn.Module
        A copy with the values to start from; float32, on the CPU.
    width : int
        Numbers that its widest layer makes of one row.
    """

    module: nn.Module
    width: int


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
    encoder, decoder : Custom or None
        None: a :class:`ResidualMLP`.
    """

    n_features: int
    n_components: int
    hidden_layer_sizes: tuple[int, ...]
    activation: str
    blocks: tuple[Block, ...]
    prior: str = "normal"
    n_prior_components: int = 0
    posterior: str = "diag"
    encoder: Custom | None = None
    decoder: Custom | None = None

    @property
    def n_outputs(self) -> int:
        """Width of the decoder's output."""
        return sum(block.n_outputs for block in self.blocks)

    @property
    def widest_layer(self) -> int:
        """Numbers that the widest layer of both networks makes of one row."""
        custom = [network.width for network in (self.encoder, self.decoder) if network]
        return max([*self.hidden_layer_sizes, *custom], default=0)

    @property
    def floats_per_draw(self) -> int:
        """Numbers of workspace that a code takes on its way to a density, decoder and prior."""
        k, own = self.n_components, POSTERIORS[self.posterior].law
        prior = Diagonal if self.prior == "mixture" else own
        laws = own.floats_per_draw(1, k) + prior.floats_per_draw(self.n_prior_components, k)
        roots = k * k if own is Full else 0
        return self.n_outputs + 2 * self.widest_layer + laws + roots


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
    narrow_output : bool
        Whether what such products end with is left in their dtype if it is large.
    """

    product_dtype: torch.dtype | None = None
    narrow_output: bool = False

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
        rows = x.flatten(0, -2)
        if self.product_dtype is not None and torch.is_grad_enabled():
            large = len(rows) * self.linear.out_features >= _LARGE
            y = ResidualProduct.apply(
                self.activation,
                self.product_dtype,
                self.product_dtype if self.narrow_output and large else x.dtype,
                rows,
                self.linear.weight,
                self.linear.bias,
                self.correction.weight,
                *self.hidden.parameters(),
            )
            return y.unflatten(0, x.shape[:-1])
        function, _ = ACTIVATIONS[self.activation]
        y, h = self.linear(rows), rows
        for layer in self.hidden:
            h = function(layer(h))
        # In place: scores decode many draws, and another array of outputs takes a tenth of it.
        y.addmm_(h, self.correction.weight.t())
        return y.unflatten(0, x.shape[:-1])


class Rowwise(nn.Module):
    """A network of the user's, which maps (N, n_in) to (N, n_out), for any leading dimensions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out), in the dtype of x whatever the network computes in."""
        y: Tensor = self.module(x.reshape(-1, x.shape[-1]))
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def checked_custom(module: nn.Module, n_in: int, n_out: int, name: str) -> Custom:
    """Return a copy of a user's network that has shown to map (2, n_in) to (2, n_out).

    Raises
    ------
    ValueError
        If it does not; for another thing than a module; and for layers that make the result for
        a row depend on the rows beside it or on torch's global generator.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{name} must be a torch.nn.Module, or a callable (n_in, n_out) that returns one; "
            f"got {type(module).__name__}."
        )
    if any(isinstance(layer, torch.jit.ScriptModule) for layer in module.modules()):
        raise ValueError(
            f"{name} is compiled by torch.jit, which hides what its layers do; pass the module "
            "that it was made from."
        )
    module = copy.deepcopy(module).to("cpu", torch.float32)
    widths = [n_in, n_out]
    hooks = []

    def measure(layer: nn.Module, inputs: Any, output: Any) -> None:
        # Recurrent and attention layers return several things.
        several = output if isinstance(output, tuple | list) else (output,)
        widths.extend(part.numel() // 2 for part in several if isinstance(part, Tensor))

    for layer in module.modules():
        kind = type(layer).__name__
        if "BatchNorm" in kind or "Dropout" in kind:
            raise ValueError(
                f"{name} has a {kind} layer, with which a row's score would depend on the rows "
                "beside it or on chance. Use LayerNorm or GroupNorm, or leave it out."
            )
        hooks.append(layer.register_forward_hook(measure))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            y = module(torch.zeros(2, n_in, dtype=torch.float32, device="cpu"))
            # Some layers draw for one sign only. Large rows, for the sake of offsets.
            steps = torch.linspace(-1.0, 1.0, n_in + 1, dtype=torch.float32, device="cpu")
            row = 100.0 * steps[1:]
            copy.deepcopy(module)(torch.stack([row, -row]))
            by_chance = not torch.equal(torch.get_rng_state(), before)
    except Exception as error:
        raise ValueError(
            f"{name} fails on rows of {n_in} numbers, which it must map to {n_out}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    if shape != (2, n_out):
        raise ValueError(
            f"{name} maps two rows of {n_in} numbers to shape {shape}; it must be (2, {n_out})."
        )
    if by_chance:
        raise ValueError(
            f"{name} draws random numbers when it is called, as layers of noise do, and lazy ones "
            "for their first weights: scores would depend on chance. Leave them out, or give "
            "lazy layers their widths."
        )
    try:
        with torch.no_grad():
            wide = torch.zeros(2, n_in, dtype=torch.float64, device="cpu")
            copy.deepcopy(module).double()(wide)
    except Exception as error:
        raise ValueError(
            f"{name} fails on rows of float64, in which float64 X is scored: {error}. Its layers "
            "must compute in the dtype of what they read, constants be kept by register_buffer."
        ) from error
    if _mixes_rows(module, n_in):
        raise ValueError(
            f"{name} gives a row another result when the row beside it changes. Use layers that "
            "treat every row alone, such as LayerNorm or GroupNorm."
        )
    return Custom(module, max(widths))


def _mixes_rows(module: nn.Module, n_in: int) -> bool:
    """Whether the result for a row depends on the one beside it."""
    numbers = torch.linspace(-1.0, 1.0, 3 * n_in, dtype=torch.float32, device="cpu")
    row, one, other = numbers.reshape(3, n_in)
    with torch.no_grad():
        # Copies: a module may count its calls.
        first, second = (copy.deepcopy(module)(torch.stack([row, x]))[0] for x in (one, other))
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)


def widths_of(architecture: Architecture) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what goes into and comes out of the encoder and of the decoder."""
    with torch.device("meta"):
        likelihood = build_likelihood(architecture.blocks)
        family = POSTERIORS[architecture.posterior](architecture.n_components)
    return (
        (likelihood.n_inputs, family.n_outputs),
        (architecture.n_components, likelihood.n_outputs),
    )


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
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        if architecture.encoder is None:
            self.encoder = ResidualMLP(n_inputs, hidden, self.family.n_outputs, activation)
        if architecture.decoder is None:
            self.decoder = ResidualMLP(k, hidden[::-1], n_outputs, activation)
        self.register_buffer("input_shift", torch.empty(n_inputs))
        self.register_buffer("input_scale", torch.empty(n_inputs))

    def inputs(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Return what the encoder reads of rows x, shape (N, D) -> (N, n_inputs).

        Features of cells that are not `observed` are put at their mean, zero.
        Source: Mattei & Frellsen (2019), MIWAE, arXiv:1812.02633, section 3.
        """
        inputs = (self.likelihood.features(x) - self.input_shift).mul_(self.input_scale)
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

    def set_product_dtype(self, dtype: torch.dtype | None) -> None:
        """Have the hidden layers multiply in `dtype` while gradients are recorded.

        Custom networks keep the dtype of their parameters, as flows do, whose products are small.
        """
        for network in (self.encoder, self.decoder):
            if isinstance(network, ResidualMLP):
                network.product_dtype = dtype
        if isinstance(self.decoder, ResidualMLP):
            self.decoder.narrow_output = self.likelihood.widens

    def curvature_weights(self) -> list[Tensor]:
        """Return the weights that make the networks non-linear; biases and linear maps are free.

        Custom networks are the user's to regularise.
        """
        return [
            layer.weight
            for network in (self.encoder, self.decoder)
            if isinstance(network, ResidualMLP)
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
    # Copies of modules that have values: only torch's own may be built without.
    for name in ("encoder", "decoder"):
        custom = getattr(architecture, name)
        if custom is not None:
            setattr(model, name, Rowwise(copy.deepcopy(custom.module)).to(device, dtype))
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
