"""Where training starts: the best linear model, with an undisturbed correction network on top.

Factor analysis of what the encoder reads gives the decoder its slopes. The encoder begins at the
posterior of the likelihood, linearised, not at that of factor analysis, whose noise is what its
loadings leave of a column: next to nothing where a column is rare. Where they leave more than the
likelihood has noise for, as of counts that vary more than theirs may, that is what the rows show.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from skvi.models.vae.likelihoods import Marginals
from skvi.models.vae.networks import VAE, ResidualMLP
from skvi.models.vae.posteriors import unbounded_log_var
from skvi.runtime.blocks import block_rows

# Enough for a linear start; more rows cost time and add nothing that training would not find.
_MAX_ROWS = 4096
_EM_ITERATIONS = 200
# Sparse rows: up to so many columns their triangular factor is cheaper than sparse products.
_MAX_TRIANGLE = 1024
# A column with a larger share of entries is centred entry by entry, so that no digits cancel.
_FILLED = 0.5
# Below this a variance is nothing.
_SMALLEST_VARIANCE = 1e-4
# The encoder's inputs are scaled down to this magnitude where the training rows exceed it.
_LARGEST_INPUT = 10.0


class TrainingRows(NamedTuple):
    """Rows that are read when they are needed.

    Attributes
    ----------
    n_rows : int
    read : callable
        Maps indices (B,) to rows in fitted units, (B, D), and to the mask of their observed cells,
        (B, D), or None if there are no others.
    device : torch.device
    zero : Tensor of shape (D,) or None
        What most cells hold, in fitted units and the dtype of `read`. Not None for sparse rows,
        which are then read block by block only.
    """

    n_rows: int
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    device: torch.device
    zero: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, observed: Tensor | None = None) -> "TrainingRows":
        """Return those of a matrix."""

        def read(index: Tensor) -> tuple[Tensor, Tensor | None]:
            return x[index], None if observed is None else observed[index]

        return cls(len(x), read, x.device)

    def blocks(self, n_rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield indices, cells and masks of the first `n_rows`; a single block unless sparse."""
        size = n_rows if self.zero is None else block_rows(len(self.zero), self.device)
        for index in torch.arange(n_rows, device=self.device).split(size):
            yield index, *self.read(index)


class CentredEntries(NamedTuple):
    """Sparse rows after centring, ``entries + root offset'``, (N, D); float64.

    Attributes
    ----------
    entries, transposed : sparse Tensor of shape (N, D) and (D, N)
        What differs from `offset`, and the same by columns.
    root : Tensor of shape (N,)
        Of the rows' shares of the weight.
    offset : Tensor of shape (D,)
        What cells without an entry hold.
    """

    entries: Tensor
    transposed: Tensor
    root: Tensor
    offset: Tensor

    def times(self, columns: Tensor) -> Tensor:
        """``X columns``, (D, k) -> (N, k)."""
        return self.entries @ columns + self.root[:, None] * (self.offset @ columns)

    def cross(self, z: Tensor) -> Tensor:
        """``X' z``, (N, k) -> (D, k)."""
        return self.transposed @ z + self.offset[:, None] * (self.root @ z)

    def square_sums(self) -> Tensor:
        """``diag(X'X)``, (D,)."""
        row, column = self.entries.indices()
        values, root, offset = self.entries.values(), self.root[row], self.offset[column]
        # (v + r o)^2 = r^2 o^2 + v (v + 2 r o), of which the first is there without an entry
        change = torch.zeros_like(self.offset).index_add_(
            0, column, values * (values + 2.0 * root * offset)
        )
        return self.root.square().sum() * self.offset.square() + change


class _Dense(NamedTuple):
    x: Tensor

    def times(self, columns: Tensor) -> Tensor:
        return self.x @ columns

    def cross(self, z: Tensor) -> Tensor:
        # Transposed: x.T @ z with its few columns takes two to ten times as long.
        return (z.T @ self.x).T

    def square_sums(self) -> Tensor:
        return self.x.square().sum(0)


class LinearPosterior(NamedTuple):
    """Posterior of the codes of a linear model, rotated so that its covariance is diagonal.

    Attributes
    ----------
    rotation : Tensor of shape (k, k)
        The codes of the model are ``rotation @ z``.
    encoder : Tensor of shape (k, D)
        ``E[z|x] = encoder @ x``.
    log_var : Tensor of shape (k,)
        ``log Var[z|x]``.
    """

    rotation: Tensor
    encoder: Tensor
    log_var: Tensor


def factor_analysis(
    x: Tensor | CentredEntries,
    n_components: int,
    least_noise: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    r"""Fit ``x ~ N(0, W W' + diag(psi))`` by EM (Rubin & Thayer 1982).

    .. math::
        B = (I + W'\Psi^{-1}W)^{-1} W'\Psi^{-1}, \quad
        W \leftarrow S B' (I - B W + B S B')^{-1}, \quad
        \Psi \leftarrow \mathrm{diag}(S - W B S), \qquad S = x'x

    Parameters
    ----------
    x : Tensor of shape (N, D), or CentredEntries
        Centred rows times the root of their share of the weight; float64.
    n_components : int
    least_noise : Tensor of shape (D,)
        Of each column's variance: keeps EM from explaining a column completely.
    generator : torch.Generator
        For the first loadings.

    Returns
    -------
    loadings : Tensor of shape (D, k)
    noise : Tensor of shape (D,)
        Variances.
    """
    if isinstance(x, Tensor):
        if x.shape[0] > x.shape[1]:
            x = _triangle(x)
        rows: _Dense | CentredEntries = _Dense(x)
    else:
        rows = x
    variance = rows.square_sums()  # (D,)
    floor = least_noise * variance.clamp_min(_SMALLEST_VARIANCE)
    eye = torch.eye(n_components, dtype=variance.dtype, device=variance.device)

    loadings = variance.new_empty(len(variance), n_components)
    loadings.normal_(generator=generator).mul_(0.1)
    noise = variance.clamp_min(_SMALLEST_VARIANCE)
    for _ in range(_EM_ITERATIONS):
        scaled = loadings.T / noise  # (k, D)
        encoder = torch.linalg.solve(eye + scaled @ loadings, scaled)  # (k, D)
        z = rows.times(encoder.T)  # (N, k)
        cross = rows.cross(z)  # (D, k)
        second = eye - encoder @ loadings + z.T @ z  # (k, k)
        loadings = torch.linalg.solve(second, cross, left=False)
        noise = torch.maximum(variance - (loadings * cross).sum(-1), floor)
    return loadings, noise


def linear_posterior(loadings: Tensor, noise: Tensor) -> LinearPosterior:
    r"""Return ``p(z|x)`` of ``x ~ N(L z, diag(psi))`` and ``z ~ N(0, I)``.

    .. math:: E[z|x] = (I + L' \Psi^{-1} L)^{-1} L' \Psi^{-1} x, \qquad
        \mathrm{Cov}[z|x] = (I + L' \Psi^{-1} L)^{-1}

    Parameters
    ----------
    loadings : Tensor of shape (D, k)
        L.
    noise : Tensor of shape (D,)
        psi.

    Returns
    -------
    LinearPosterior
        The code of which most is known comes first.
    """
    scaled = loadings / noise[:, None]
    precision, rotation = torch.linalg.eigh(loadings.T @ scaled)
    rotation = rotation.flip(-1)
    precision = 1.0 + precision.flip(-1).clamp_min(0.0)  # (k,)
    encoder = (scaled @ rotation).T / precision[:, None]
    return LinearPosterior(rotation, encoder, -precision.log())


def _triangle(x: Tensor) -> Tensor:
    """Return the triangular factor of (N, D), which has the same cross products in D rows."""
    return torch.linalg.qr(x, mode="r").R  # (min(N, D), D)


def initialise(
    model: VAE,
    rows: TrainingRows,
    weight: Tensor,
    noise_floor: Tensor,
    generator: torch.Generator,
    *,
    one_draw: bool = False,
) -> None:
    """Fill `model` in place: linear parts from factor analysis, corrections at zero.

    Custom networks keep the values that they came with.

    Parameters
    ----------
    model : VAE
        From :func:`skvi.models.vae.networks.build`; its values are overwritten.
    rows : TrainingRows
        Factor analysis uses the first few thousand: they must come in no particular order.
    weight : Tensor of shape (N,)
        Positive, float64: a float32 may be zero in all rows that factor analysis uses.
    noise_floor : Tensor of shape (D,)
        Lower limits of noise variances, in fitted units; the variance itself where it is fixed.
    generator : torch.Generator
    one_draw : bool
        Whether training draws one code of a row at a time. Then posteriors begin as narrow as those
        of factor analysis, which for binary columns and counts is too narrow: codes that are nearly
        without noise are put to use first, and long fits end higher. The gradients of several draws
        would be all noise. See docs/decisions/0016.
    """
    likelihood = model.likelihood
    first = _First(model, rows, weight)
    mean, var, _ = _observed_moments(first.cells)
    shift, _, share = _observed_moments(first.features)
    factors, noise = factor_analysis(
        first.centred(shift, share),
        model.family.n_components,
        likelihood.least_noise(noise_floor),
        generator,
    )
    known = Marginals(mean, var, shift, factors, noise, noise_floor)
    with torch.no_grad():
        model.input_shift.copy_(shift)
        model.input_scale.copy_((_LARGEST_INPUT / _reach(model, rows)).clamp_max(1.0))
        bias, slopes = likelihood.start(known)
        loadings, own_noise = likelihood.linearised(bias, slopes)
        posterior = linear_posterior(loadings, torch.maximum(own_noise, noise))
        if one_draw:
            # of each code given the others
            precision = 1.0 + ((factors @ posterior.rotation).square() / noise[:, None]).sum(0)
            posterior = posterior._replace(log_var=-precision.log())
        if isinstance(model.encoder, ResidualMLP):
            _fill_encoder(model, model.encoder.linear, posterior)
            _fill_correction(model.encoder, generator)
        if isinstance(model.decoder, ResidualMLP):
            model.decoder.linear.bias.copy_(bias)
            model.decoder.linear.weight.copy_(slopes @ posterior.rotation)
            _fill_correction(model.decoder, generator)
        model.family.initialise(generator)
        _start_prior(model, rows, weight, generator)


# Blocks of values (B, n), masks (B, n) and shares of the weight (B,).
_Blocks: TypeAlias = Iterator[tuple[Tensor, Tensor, Tensor]]


class _First:
    """The first training rows in float64: what factor analysis sees."""

    def __init__(self, model: VAE, rows: TrainingRows, weight: Tensor) -> None:
        self.likelihood = model.likelihood
        self.n_rows = min(rows.n_rows, _MAX_ROWS)
        weight = weight[: self.n_rows]
        weight = weight / weight.max()
        self.weight = weight / weight.sum()
        self.rows = rows
        # Others are read again and again.
        self._held = list(rows.blocks(self.n_rows)) if rows.zero is None else None

    def cells(self) -> _Blocks:
        """Yield x itself."""
        for index, x, observed in self._held or self.rows.blocks(self.n_rows):
            x = x.double()
            seen = torch.ones_like(x) if observed is None else observed.double()
            yield x, seen, self.weight[index]

    def features(self) -> _Blocks:
        """Yield what the encoder reads, before centring."""
        for x, seen, weight in self.cells():
            yield self.likelihood.features(x), self.likelihood.per_feature(seen), weight

    def centred(self, shift: Tensor, share: Tensor) -> Tensor | CentredEntries:
        """Return the features as :func:`factor_analysis` takes them."""
        # Cells at their mean add no variance: the others stand in for them.
        blocks = (
            ((features - shift) * seen / share.sqrt()) * weight.sqrt()[:, None]
            for features, seen, weight in self.features()
        )
        if self.rows.zero is None:
            return torch.cat(list(blocks))
        if len(shift) > _MAX_TRIANGLE:
            return self._centred_entries(shift, share, self.rows.zero)
        triangle = shift.new_empty(0, len(shift))
        for block in blocks:
            triangle = _triangle(torch.cat([triangle, block]))
        return triangle

    def _centred_entries(self, shift: Tensor, share: Tensor, zero: Tensor) -> CentredEntries:
        plain = self.likelihood.features(zero.double()[None])[0]  # (n_inputs,)
        filled = torch.zeros_like(shift)
        for features, _, weight in self.features():
            filled += weight @ (features != plain).double()
        offset = torch.where(filled > _FILLED, 0.0, (plain - shift) / share.sqrt())
        parts = []
        for features, seen, weight in self.features():
            # Zero where a cell has no entry: the same operations on the same numbers.
            entries = (features - shift) * seen / share.sqrt() - offset
            parts.append((entries * weight.sqrt()[:, None]).to_sparse_coo())
        whole = torch.cat(parts).coalesce()
        return CentredEntries(whole, whole.T.coalesce(), self.weight.sqrt(), offset)


def _observed_moments(blocks: Callable[[], _Blocks]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and observed share of columns; 0, 0 and 1 where nothing is seen."""
    totals = [(weight @ seen, weight @ (values * seen)) for values, seen, weight in blocks()]
    share, first = (torch.stack(part).sum(0) for part in zip(*totals, strict=True))
    share = torch.where(share > 0, share, 1.0)
    mean = first / share
    squares = [weight @ ((values - mean).square() * seen) for values, seen, weight in blocks()]
    return mean, torch.stack(squares).sum(0) / share, share


def _reach(model: VAE, rows: TrainingRows) -> Tensor:
    """Return the largest deviation of every feature over all rows, (n_inputs,)."""
    reach = torch.zeros_like(model.input_shift)
    size = block_rows(2 * len(reach), rows.device)
    for index in torch.arange(rows.n_rows, device=rows.device).split(size):
        x, observed = rows.read(index)
        deviation = (model.likelihood.features(x) - model.input_shift).abs()  # (B, n_inputs)
        if observed is not None:
            deviation *= model.likelihood.per_feature(observed)
        reach = torch.maximum(reach, deviation.amax(0))
    return reach


def _fill_encoder(model: VAE, linear: nn.Linear, posterior: LinearPosterior) -> None:
    n_components = len(posterior.encoder)
    linear.weight.zero_()
    linear.bias.zero_()
    linear.weight[:n_components] = posterior.encoder / model.input_scale
    linear.bias[n_components : 2 * n_components] = unbounded_log_var(posterior.log_var)
    model.family.start(linear)


def _start_prior(
    model: VAE, rows: TrainingRows, weight: Tensor, generator: torch.Generator
) -> None:
    """Give the prior what the encoder reads of some rows, each at most once if there are enough.

    The next one is a row with a probability in proportion to its weight.
    """
    n_wanted = model.prior.n_prior_components
    if n_wanted == 0:
        return
    # the order in which events of these rates come
    order = (torch.empty_like(weight).exponential_(generator=generator) / weight).argsort()
    chosen = order.repeat(math.ceil(n_wanted / rows.n_rows))[:n_wanted]
    inputs = model.inputs(*rows.read(chosen))
    model.prior.initialise(inputs, model.encoder(inputs)[:, : model.family.n_components])


def _fill_correction(network: ResidualMLP, generator: torch.Generator) -> None:
    """He initialisation and an output of zero; inputs are centred."""
    for layer in network.hidden_layers():
        layer.weight.normal_(0.0, math.sqrt(2.0 / layer.in_features), generator=generator)
        layer.bias.zero_()
    if network.correction is not None:
        network.correction.weight.zero_()
