"""Which likelihood explains which columns of a table."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skvi.models.vae.likelihoods.base import Likelihood, Marginals
from skvi.models.vae.likelihoods.categorical import Categorical
from skvi.models.vae.likelihoods.count import NegativeBinomial, Poisson
from skvi.models.vae.likelihoods.real import (
    FixedGaussian,
    Gaussian,
    HeteroscedasticGaussian,
    StudentT,
)
from skvi.models.vae.likelihoods.unit import Bernoulli, ContinuousBernoulli

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "gaussian_heteroscedastic": HeteroscedasticGaussian,
    "student_t": StudentT,
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "categorical": Categorical,
}


class Block(NamedTuple):
    """Columns of one kind.

    Attributes
    ----------
    name : str
        A key of `LIKELIHOODS`.
    columns : tuple of int
        Their positions in the table.
    n_levels : tuple of int
        Categorical: the number of levels of each column; else empty.
    noise_std : tuple of float
        Gaussian with fixed noise: its standard deviations, in the units of the data; else empty.
    """

    name: str
    columns: tuple[int, ...]
    n_levels: tuple[int, ...] = ()
    noise_std: tuple[float, ...] = ()

    @property
    def kind(self) -> type[Likelihood]:
        """The class of the likelihood."""
        return LIKELIHOODS[self.name]

    @property
    def n_outputs(self) -> int:
        """Width of the decoder's output for these columns."""
        return sum(self.n_levels) or len(self.columns) * self.kind.outputs_per_feature

    def build(self) -> Likelihood:
        """Return the likelihood of these columns; its parameters are undefined."""
        if self.n_levels:
            return Categorical(self.n_levels)
        if self.noise_std:
            return FixedGaussian(len(self.columns))
        build: Callable[[int], Likelihood] = self.kind
        return build(len(self.columns))


class Mixed(Likelihood):
    """Several likelihoods side by side: densities add, codes are shared.

    Parameters
    ----------
    blocks : tuple of Block
        Every column of the table is in exactly one.
    """

    order: Tensor
    position: Tensor

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        parts = [block.build() for block in blocks]
        widths = [(p.n_features, p.n_inputs, p.n_outputs) for p in parts]
        super().__init__(*(sum(width) for width in zip(*widths, strict=True)))
        self.parts = nn.ModuleList(parts)
        self.columns = tuple(itertools.chain.from_iterable(block.columns for block in blocks))
        n_features = len(self.columns)
        # From the table's order to that of the blocks, and back.
        for name in ("order", "position"):
            index = torch.empty(n_features, dtype=torch.int64)
            self.register_buffer(name, index, persistent=False)

    def arrange(self) -> None:
        """Fill the index buffers, which :func:`skvi.models.vae.networks.build` leaves undefined."""
        order = torch.tensor(self.columns, device=self.order.device)
        self.order.copy_(order)
        self.position.copy_(order.argsort())

    def _parts(self) -> Iterator[Likelihood]:
        return (part for part in self.parts if isinstance(part, Likelihood))

    def _split(self, values: Tensor, width: str) -> Iterator[tuple[Likelihood, Tensor]]:
        """Cut the last dimension, in the order of the blocks, by an attribute of the parts."""
        sizes = [getattr(part, width) for part in self._parts()]
        return zip(self._parts(), values.split(sizes, dim=-1), strict=True)

    def _split_columns(self, x: Tensor) -> Iterator[tuple[Likelihood, Tensor]]:
        return self._split(x.index_select(-1, self.order), "n_features")

    def _join_columns(self, values: list[Tensor]) -> Tensor:
        return torch.cat(values, -1).index_select(-1, self.position)

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([part.features(v) for part, v in self._split_columns(x)], -1)

    def per_feature(self, cells: Tensor) -> Tensor:
        return torch.cat([part.per_feature(v) for part, v in self._split_columns(cells)], -1)

    def least_noise(self, floor: Tensor) -> Tensor:
        return torch.cat([part.least_noise(v) for part, v in self._split_columns(floor)])

    def _pairs(self, x: Tensor, output: Tensor) -> Iterator[tuple[Likelihood, Tensor, Tensor]]:
        outputs = self._split(output, "n_outputs")
        for (part, columns), (_, values) in zip(self._split_columns(x), outputs, strict=True):
            yield part, columns, values

    def cells(self, x: Tensor, output: Tensor) -> Tensor:
        return self._join_columns([part.cells(v, o) for part, v, o in self._pairs(x, output)])

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        total = [part.log_prob(v, o) for part, v, o in self._pairs(x, output)]
        return torch.stack(total).sum(0)

    def statistics(self, output: Tensor) -> Tensor:
        return torch.cat([p.statistics(o) for p, o in self._split(output, "n_outputs")], -1)

    @property
    def n_statistics(self) -> int:
        return sum(part.n_statistics for part in self._parts())

    def summarise(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        parts = [p.summarise(a) for p, a in self._split(averages, "n_statistics")]
        means, variances = zip(*parts, strict=True)
        return self._join_columns([*means]), self._join_columns([*variances])

    def mean(self, output: Tensor) -> Tensor:
        return self._join_columns([p.mean(o) for p, o in self._split(output, "n_outputs")])

    def variance(self, output: Tensor) -> Tensor:
        return self._join_columns([p.variance(o) for p, o in self._split(output, "n_outputs")])

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        outputs = self._split(output, "n_outputs")
        return self._join_columns([part.sample(o, generator) for part, o in outputs])

    def start(self, known: Marginals) -> tuple[Tensor, Tensor]:
        by_column = [known.mean, known.var, known.floor]
        by_input = [known.feature_mean, known.noise, known.loadings.T]
        columns = [[v for _, v in self._split_columns(values)] for values in by_column]
        inputs = [[v for _, v in self._split(values, "n_inputs")] for values in by_input]
        starts = [
            part.start(
                Marginals(
                    mean, var, feature_mean=centre, loadings=loadings.T, noise=noise, floor=floor
                )
            )
            for part, mean, var, floor, centre, noise, loadings in zip(
                self._parts(), *columns, *inputs, strict=True
            )
        ]
        biases, weights = zip(*starts, strict=True)
        return torch.cat(biases), torch.cat(weights)

    def linearised(self, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [part.n_outputs for part in self._parts()]
        outputs = zip(self._parts(), bias.split(sizes), weight.split(sizes), strict=True)
        loadings, noise = zip(*(part.linearised(b, w) for part, b, w in outputs), strict=True)
        return torch.cat(loadings), torch.cat(noise)

    def learned(self) -> dict[str, Tensor]:
        """Return what the parts show; NaN for columns that have no such parameter."""
        shown: dict[str, Tensor] = {}
        start = 0
        for part in self._parts():
            here = self.order[start : start + part.n_features]
            start += part.n_features
            for name, values in part.learned().items():
                whole = shown.setdefault(name, values.new_full((self.n_features,), torch.nan))
                whole[here] = values
        return shown


def build_likelihood(blocks: tuple[Block, ...]) -> Likelihood:
    """Return the likelihood of a table; one kind of column needs no :class:`Mixed`."""
    return Mixed(blocks) if len(blocks) > 1 else blocks[0].build()
