"""Row blocks: a pass over data is a loop over blocks that fit the cache or the device."""

from collections.abc import Iterator
from copy import copy
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

# Bytes of float64 workspace that one block may take: about the L2 cache of a CPU core, or a
# share of a GPU's memory that leaves room for everything else.
_WORKSPACE_BYTES = {"cpu": 1 << 23, "cuda": 1 << 29}

# Rows that are read again and again may be kept in fitted units up to this many bytes.
_RESIDENT_BYTES = 1 << 27


def block_rows(floats_per_row: int, device: torch.device, *, at_least: int = 64) -> int:
    """Return how many rows of `floats_per_row` float64 numbers fit a block on `device`."""
    budget = _WORKSPACE_BYTES[device.type] // 8
    return max(at_least, budget // max(1, floats_per_row))


def row_slices(n_rows: int, rows_per_block: int) -> Iterator[slice]:
    """Yield consecutive slices that cover ``range(n_rows)``."""
    for start in range(0, n_rows, rows_per_block):
        yield slice(start, min(start + rows_per_block, n_rows))


class Affine(NamedTuple):
    """The map ``x -> (x - shift) / scale`` from original units to fitted ones.

    Attributes
    ----------
    shift : ndarray of shape (D,)
    scale : ndarray of shape (D,)
    """

    shift: np.ndarray
    scale: np.ndarray

    @property
    def log_abs_det(self) -> float:
        """``sum_j log scale_j``: subtract it from a log density in fitted units."""
        return float(np.log(self.scale).sum())


def power_of_two(scale: np.ndarray) -> np.ndarray:
    """Round positive numbers to a power of two; zero (no spread) becomes one."""
    _, exponent = np.frexp(scale)
    # The clip keeps both the power and its reciprocal normal numbers.
    power = np.ldexp(1.0, np.clip(exponent, -1021, 1021))
    return np.where(scale > 0, power, 1.0)


class Workspace:
    """Memory that is used again from block to block and from pass to pass.

    Fresh megabytes for each block cost page faults that take longer than what is computed in them.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, rows: int, columns: int) -> Tensor:
        """Return an uninitialised matrix with the dtype and device of `like`.

        It shares memory with whatever was taken under the same name before.
        """
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._flat[name] = like.new_empty(rows * columns)
        return flat[: rows * columns].view(rows, columns)


class Densified:
    """Rows of a sparse matrix that are made dense when they are read, and never all of them.

    Parameters
    ----------
    X : scipy sparse matrix or array of shape (N, D) in CSR format
    """

    def __init__(self, X: Any) -> None:
        self._X = X
        self.shape: tuple[int, int] = X.shape
        self.dtype: np.dtype[Any] = X.dtype

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.shape[0] * self.shape[1]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return the rows (B, D) of a slice or an index."""
        return self._X[rows].toarray()


Keep: TypeAlias = Literal["rows", "columns", "never"] | None


class Rows:
    """Rows of a NumPy array, read block by block as float64 tensors in fitted units.

    On the CPU the array is never copied as a whole, unless it is small and asked for. On a GPU the
    converted rows stay resident, because moving them in every pass would cost more than the pass,
    unless there is one pass only.

    Parameters
    ----------
    X : ndarray or Densified of shape (N, D)
        Any float dtype; may be read-only or memory-mapped. Those of a sparse matrix are converted
        whenever they are read, on every device.
    affine : Affine
        Applied to each block in float64.
    device : torch.device
    weight : ndarray of shape (N,), optional
        Sample weights; None stands for ones.
    keep : {"rows", "columns", "never"} or None, default=None
        For rows that many passes will read: convert them once and keep them, if that is a small
        amount of memory. They lie row by row, for whoever gathers rows, or column by column, for
        whoever multiplies columns. None: only a GPU keeps them. "never": nor does that, for rows
        that are read once.

    Attributes
    ----------
    kept : bool
        Whether the converted rows are kept.
    workspace : Workspace
        For whoever works on the blocks.
    """

    def __init__(
        self,
        X: np.ndarray | Densified,
        affine: Affine,
        device: torch.device,
        weight: np.ndarray | None = None,
        *,
        keep: Keep = None,
    ) -> None:
        self.n_rows, self.n_features = X.shape
        self.dtype = X.dtype
        self.device = device
        self._X = X
        self._affine = affine
        self._weight = np.broadcast_to(1.0, self.n_rows) if weight is None else weight
        if isinstance(X, Densified):
            keep = "never"
        elif device.type != "cpu":
            keep = keep or "rows"
        elif 8 * X.size > _RESIDENT_BYTES:
            keep = None
        self._resident: tuple[Tensor, Tensor] | None = None
        if keep in ("rows", "columns"):
            self._resident = self._keep(keep)
        self.kept = self._resident is not None
        self.workspace = Workspace()

    def _keep(self, layout: Keep) -> tuple[Tensor, Tensor]:
        kept = torch.empty(self.n_features, self.n_rows, dtype=torch.float64, device=self.device)
        kept = kept.T if layout == "columns" else kept.view(self.n_rows, self.n_features)
        weight = torch.empty(self.n_rows, dtype=torch.float64, device=self.device)
        for rows in row_slices(self.n_rows, block_rows(self.n_features, self.device)):
            kept[rows], weight[rows] = self._convert(rows)
        return kept, weight

    def _convert(self, rows: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        x = np.array(self._X[rows], dtype=np.float64)  # a copy: the input is never written to
        x -= self._affine.shift
        x /= self._affine.scale
        return torch.from_numpy(x).to(self.device), self.weights(rows)

    def read(self, rows: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the rows (B, D) of a slice or an index in fitted units, and their weights (B,)."""
        if self._resident is None:
            return self._convert(rows)
        x, weight = self._resident
        return x[rows], weight[rows]

    def weights(self, rows: slice | np.ndarray) -> Tensor:
        """Return the weights (B,) of the rows of a slice or an index."""
        if self._resident is None:
            weight = np.array(self._weight[rows], dtype=np.float64)
            return torch.from_numpy(weight).to(self.device)
        return self._resident[1][rows]

    def reweighted(self, weight: Tensor) -> "Rows":
        """Return the same rows, in the same memory, with other weights (N,) on their device."""
        other = copy(self)
        other._weight = weight.cpu().numpy()
        if self._resident is not None:
            other._resident = self._resident[0], weight
        return other

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write the rows of a slice in fitted units to `out` (B, D), without another copy."""
        if self.kept or self.device.type != "cpu":
            out.copy_(self.read(rows)[0])
            return
        x, shift, scale = self._X[rows], self._affine.shift, self._affine.scale
        # torch takes all threads, but neither read-only memory nor negative strides
        if x.flags.writeable and min(x.strides) >= 0:
            torch.sub(torch.from_numpy(x), torch.from_numpy(shift), out=out)
        else:
            np.subtract(x, shift, out=out.numpy())
        if (scale != 1.0).any():
            out /= torch.from_numpy(scale)

    def present(self, x: Tensor) -> Any:
        """Return rows that were read as whoever works on them takes them: here as they are."""
        return x

    def __getitem__(self, rows: slice | np.ndarray) -> tuple[Any, Tensor]:
        """Return the rows of a slice or an index in fitted units, presented, and their weights."""
        x, weight = self.read(rows)
        return self.present(x), weight

    def blocks(self, floats_per_row: int) -> Iterator[tuple[slice, Any, Tensor]]:
        """Yield ``(rows, x, weight)`` in blocks whose workspace is `floats_per_row` a row."""
        for rows in row_slices(self.n_rows, block_rows(floats_per_row, self.device)):
            x, weight = self[rows]
            yield rows, x, weight
