"""Batches of equal weight, each a fair sample of all rows."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from skvi.runtime.blocks import Rows, block_rows, row_slices

# The comb that deals out the rows has this many teeth in one unit of spread. More would take the
# rounding of the fitted units for a difference between rows.
_TEETH = 1e4
# A copy of kept rows in the order of the batches may take this many bytes.
_COPY_BYTES = 1 << 26


def stay_resident(rows: Rows) -> bool:
    """Whether batches of these rows are a copy in their own order, so that no visit gathers."""
    return rows.kept and 8 * rows.n_rows * rows.n_features <= _COPY_BYTES


class Batches:
    r"""A partition of weighted rows into batches of the same weight.

    Rows stand in the order of the fractional part of :math:`10^4 a'x` with a random direction a:
    as mixed as a random permutation, but the same for any order of the rows, and with equal rows
    side by side. A batch is an interval of the cumulative weight, where a row of weight w and w
    copies of it occupy the same interval; a row on the border belongs to both sides in part.

    Memory is 24 bytes a row, and up to 64 MB for a copy of kept rows in this order; other rows are
    gathered at every visit. One batch is the rows as they are.

    Parameters
    ----------
    rows : Rows
    n_batches : int
    rng : numpy.random.Generator
    """

    def __init__(self, rows: Rows, n_batches: int, rng: np.random.Generator) -> None:
        self.rows = rows
        self.n_batches = n_batches
        if n_batches == 1:
            return
        direction = torch.from_numpy(rng.standard_normal(rows.n_features)).to(rows.device)
        rank, weight = np.empty(rows.n_rows), np.empty(rows.n_rows)
        for where in row_slices(rows.n_rows, block_rows(2 * rows.n_features, rows.device)):
            x, w = rows.read(where)
            rank[where] = (x.nan_to_num(0.0) @ direction * _TEETH).remainder_(1.0).cpu().numpy()
            weight[where] = w.cpu().numpy()
        self._order = np.argsort(rank, kind="stable")
        self._own = weight[self._order]
        self._end = self._own.cumsum()
        self._borders = self._end[-1] * (np.arange(n_batches + 1) / n_batches)
        self._copy: Tensor | None = None
        if stay_resident(rows):
            columns = torch.empty(
                rows.n_features, rows.n_rows, dtype=torch.float64, device=rows.device
            )
            self._copy = columns.T
            for part in row_slices(rows.n_rows, block_rows(rows.n_features, rows.device)):
                self._copy[part], _ = rows.read(self._order[part])

    def blocks(self, batch: int, floats_per_row: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, weight)`` of a batch in blocks whose workspace is `floats_per_row` a row."""
        if self.n_batches == 1:
            for _, x, weight in self.rows.blocks(floats_per_row):
                yield x, weight
            return
        low, high = self._borders[batch], self._borders[batch + 1]
        first = int(np.searchsorted(self._end, low, side="right"))
        # The row that reaches across; or the last behind it whose weight the sum rounds off.
        across = int(np.searchsorted(self._end, high, side="left"))
        last = max(across, int(np.searchsorted(self._end, high, side="right")) - 1)
        last = min(last, self._end.size - 1)
        height = block_rows(floats_per_row, self.rows.device)
        for start in range(first, last + 1, height):
            stop = min(start + height, last + 1)
            if self._copy is not None:
                x = self._copy[start:stop]
            else:
                x, _ = self.rows.read(self._order[start:stop])
            share = self._own[start:stop].copy()
            for i in {first, across} & set(range(start, stop)):  # rows on a border count in part
                begin = self._end[i - 1] if i else 0.0
                if begin < low or self._end[i] > high:
                    share[i - start] = min(self._end[i], high) - max(begin, low)
            yield self.rows.present(x), torch.from_numpy(share).to(self.rows.device)
