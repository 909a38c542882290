"""Which likelihood explains which columns of X: parameters, supports, and the units of training."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import issparse
from sklearn.utils.sparsefuncs import min_max_axis

from skvi.models.vae.likelihoods import LIKELIHOODS, Block
from skvi.runtime.blocks import Affine, Densified, row_slices
from skvi.runtime.moments import weighted_moments, weighted_quantiles

# A normal's noise is at least the range of its feature over this. Ranges, not standard
# deviations: a feature that is zero in all rows but few has a tiny one, and a network that learns
# those rows by heart would call every other value impossible.
_RANGE_PER_NOISE_STD = 300.0
# The same for Student's t, whose range is that of its outliers: about a normal's range.
_RANGE_OF_THE_BULK = 6.0
# Between the quartiles of a normal, in standard deviations.
_QUARTILE_RANGE = 1.349
# A given noise may be so many spreads of its column, or one of so many parts of it: its square and
# what is divided by it stay in the range of float32.
_MOST_RELATIVE_NOISE = 1e15
# Training is in float32, which holds integers up to here.
_LARGEST_COUNT = 2.0**24
_MOST_LEVELS = 10_000
_ROWS_PER_CHECK = 1024


class _Support(NamedTuple):
    contains: Callable[[np.ndarray], np.ndarray]
    wrong: str  # "has values ..."
    remedy: str


SUPPORTS: dict[str, _Support] = {
    "binary": _Support(
        lambda x: (x == 0) | (x == 1),
        "other than 0 and 1",
        "Binarise it (for example with sklearn.preprocessing.Binarizer), or fit with "
        'likelihood="gaussian".',
    ),
    "unit": _Support(
        lambda x: (x >= 0) & (x <= 1),
        "outside [0, 1]",
        "Rescale it (for example with sklearn.preprocessing.MinMaxScaler(clip=True)), or fit with "
        'likelihood="gaussian".',
    ),
    "count": _Support(
        lambda x: (x >= 0) & (x <= _LARGEST_COUNT) & (x == np.floor(x)),
        f"other than counts 0, 1, 2, ... up to {_LARGEST_COUNT:.0f}",
        'Round it, or fit with likelihood="gaussian".',
    ),
    "code": _Support(
        lambda x: (x >= 0) & (x < _MOST_LEVELS) & (x == np.floor(x)),
        f"other than codes 0, 1, 2, ... below {_MOST_LEVELS}",
        "Encode it with sklearn.preprocessing.OrdinalEncoder.",
    ),
}


def by_rows(X: Any) -> np.ndarray | Densified:
    """Return X as what can be read row by row."""
    return Densified(X) if issparse(X) else X


def extremes(X: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest observed value of each column, (D,); NaN without any."""
    if issparse(X):
        return min_max_axis(X, axis=0, ignore_nan=True)
    return np.fmin.reduce(X), np.fmax.reduce(X)


def first_outside(X: Any, support: str) -> int | None:
    """Return a column with a value outside a support, or None; the first of dense blocks."""
    if issparse(X):
        # Cells without an entry are zero, which every support contains.
        outside = ~(SUPPORTS[support].contains(X.data) | np.isnan(X.data))
        return int(X.indices[outside].min()) if outside.any() else None
    inside = np.ones(X.shape[1], dtype=bool)
    for rows in row_slices(X.shape[0], _ROWS_PER_CHECK):
        inside &= (SUPPORTS[support].contains(X[rows]) | np.isnan(X[rows])).all(axis=0)
        if not inside.all():
            return int(np.argmin(inside))
    return None


def requested_blocks(
    likelihood: str | Mapping[str, Any],
    noise_std: Any,
    X: Any,
    names: np.ndarray | None,
    previous: tuple[Block, ...] | None = None,
) -> tuple[Block, ...]:
    """Read the parameters `likelihood` and `noise_std`; levels are left open.

    Parameters
    ----------
    likelihood : str or mapping
        "auto", a name, or names with the columns that they explain.
    noise_std : None, float or array-like of shape (D,)
    X : ndarray or sparse matrix of shape (N, D)
        Only "auto" looks at its values.
    names : ndarray of shape (D,) or None
        Of the columns.
    previous : tuple of Block, optional
        The decision of an earlier fit, which "auto" keeps.

    Raises
    ------
    ValueError
        For unknown names or columns, columns that are named twice or not at all, and for a
        `noise_std` that is not positive, of another length, or without a Gaussian column.
    """
    n_features = X.shape[1]
    if isinstance(likelihood, Mapping):
        columns = _assigned(likelihood, n_features, names)
    elif likelihood != "auto":
        columns = {likelihood: tuple(range(n_features))}
    elif previous is not None:
        columns = {block.name: block.columns for block in previous}
    else:
        name = "gaussian" if first_outside(X, "binary") is not None else "bernoulli"
        columns = {name: tuple(range(n_features))}
    blocks = tuple(Block(name, where) for name, where in columns.items())
    if noise_std is None:
        return blocks
    if "gaussian" not in columns:
        raise ValueError(
            f"noise_std={noise_std!r} fixes the noise of Gaussian columns, but there are none "
            f"with likelihood={likelihood!r}."
        )
    try:
        std = np.asarray(noise_std, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"noise_std={noise_std!r} must be a number or ({n_features},) numbers."
        ) from error
    if std.shape not in ((), (n_features,)):
        raise ValueError(
            f"noise_std has shape {std.shape}; it must be a number or ({n_features},)."
        )
    std = np.broadcast_to(std, n_features)[list(columns["gaussian"])]
    if not ((std > 0) & np.isfinite(std)).all():
        raise ValueError("noise_std must be positive and finite.")
    fixed = tuple(std.tolist())
    return tuple(b._replace(noise_std=fixed) if b.name == "gaussian" else b for b in blocks)


def _assigned(
    likelihood: Mapping[str, Any], n_features: int, names: np.ndarray | None
) -> dict[str, tuple[int, ...]]:
    position = {} if names is None else {name: i for i, name in enumerate(names)}
    owner: dict[int, str] = {}
    for name, given in likelihood.items():
        if name not in LIKELIHOODS:
            raise ValueError(f"likelihood has the key {name!r}; it must be among {[*LIKELIHOODS]}.")
        listed = [given] if isinstance(given, str | Integral) else given
        if not isinstance(listed, Iterable):
            raise ValueError(f"likelihood[{name!r}] must be a list of columns, not {given!r}.")
        for column in listed:
            index = position.get(column, -1) if isinstance(column, str) else -1
            if isinstance(column, Integral) and not isinstance(column, bool):
                index = int(column)
            if not 0 <= index < n_features:
                raise ValueError(
                    f"likelihood[{name!r}] has {column!r}, which is neither an index below "
                    f"{n_features} nor the name of a column of X."
                )
            if index in owner:
                raise ValueError(
                    f"{_label(index, names)} of X is listed twice in likelihood, for "
                    f"{owner[index]!r} and {name!r}."
                )
            owner[index] = name
    left = [i for i in range(n_features) if i not in owner]
    if left:
        raise ValueError(
            f"{_label(left[0], names)} of X has no likelihood ({len(left)} of {n_features} are "
            "not listed); every column must be listed once."
        )
    # In the order of the columns: that of the keys says nothing.
    used = dict.fromkeys(owner[i] for i in range(n_features))
    return {name: tuple(i for i in range(n_features) if owner[i] == name) for name in used}


def _label(column: int, names: np.ndarray | None) -> str:
    return f"Column {column}" if names is None else f"Column {column} ({names[column]!r})"


def with_levels(blocks: tuple[Block, ...], X: Any) -> tuple[Block, ...]:
    """Count the levels of categorical columns: one more than the largest code of each."""
    if all(block.kind.support != "code" for block in blocks):
        return blocks
    _, high = extremes(X)
    return tuple(
        block._replace(n_levels=tuple(int(high[i]) + 1 for i in block.columns))
        if block.kind.support == "code"
        else block
        for block in blocks
    )


def without_levels(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Return what the parameters alone say about blocks."""
    return tuple(block._replace(n_levels=()) for block in blocks)


def check_observed(X: Any, names: np.ndarray | None) -> None:
    """Raise if a column has no value at all."""
    empty = np.flatnonzero(np.isnan(extremes(X)[1]))
    if empty.size:
        raise ValueError(
            f"{_label(empty[0], names)} of X has no observed value: all its cells (of rows with "
            "positive weight) are NaN. Drop it."
        )


def check_support(X: Any, blocks: tuple[Block, ...], names: np.ndarray | None) -> None:
    """Raise if a column has values that its likelihood cannot explain."""
    for block in blocks:
        if block.kind.support == "real":
            continue
        part = X if len(blocks) == 1 else X[:, list(block.columns)]
        outside = first_outside(part, block.kind.support)
        if outside is not None:
            support = SUPPORTS[block.kind.support]
            raise ValueError(
                f"{_label(block.columns[outside], names)} of X has values {support.wrong}, which "
                f'the "{block.name}" likelihood cannot explain. {support.remedy}'
            )
        if not block.n_levels:
            continue
        _, high = extremes(part)
        for column, n_levels, largest in zip(block.columns, block.n_levels, high, strict=True):
            if largest >= n_levels:
                raise ValueError(
                    f"{_label(column, names)} of X has the code {largest:g}, but the fit saw "
                    f"codes 0 to {n_levels - 1}."
                )


def standardised_columns(blocks: tuple[Block, ...], n_features: int) -> np.ndarray:
    """Return which columns are real numbers, in units of their own, as a mask (D,)."""
    mask = np.zeros(n_features, dtype=bool)
    for block in blocks:
        mask[list(block.columns)] = block.kind.standardised
    return mask


def fitted_units(
    X: Any, weight: np.ndarray, blocks: tuple[Block, ...]
) -> tuple[Affine, np.ndarray]:
    """Return the units of training, and lower limits of noise variances in them.

    Normal columns are standardised; those of Student's t by their median and quartiles; others
    are left as they are.

    Returns
    -------
    affine : Affine
    floor : ndarray of shape (D,)
        The variance itself where `noise_std` fixes it; 1 for constant columns.
    """
    n_features = X.shape[1]
    mean, std = weighted_moments(by_rows(X), weight)
    shift, scale = np.zeros(n_features), np.ones(n_features)
    low, high = (extreme.astype(np.float64) for extreme in extremes(X))
    spread = 0.5 * high - 0.5 * low > 0
    standardised = standardised_columns(blocks, n_features)
    shift[standardised] = mean[standardised]
    scale[standardised & spread] = std[standardised & spread]
    scale[scale == 0] = 1.0
    width = high - low
    robust = [block for block in blocks if block.name == "student_t"]
    columns_of = X.tocsc() if robust and issparse(X) else X
    for block in robust:
        for column in block.columns:
            values = columns_of[:, [column]]
            values = (values.toarray() if issparse(values) else values)[:, 0]
            seen = ~np.isnan(values)
            lower, middle, upper = weighted_quantiles(values[seen], weight[seen], (0.25, 0.5, 0.75))
            if upper > lower:
                shift[column], scale[column] = middle, (upper - lower) / _QUARTILE_RANGE
                width[column] = _RANGE_OF_THE_BULK * scale[column]
    floor = np.where(spread, (width / scale / _RANGE_PER_NOISE_STD) ** 2, 1.0)
    for block in blocks:
        if block.noise_std:
            columns = list(block.columns)
            relative = np.array(block.noise_std) / scale[columns]
            usable = (relative >= 1.0 / _MOST_RELATIVE_NOISE) & (relative <= _MOST_RELATIVE_NOISE)
            if not usable.all():
                wrong = int(np.argmin(usable))
                raise ValueError(
                    f"noise_std of column {columns[wrong]} is {relative[wrong]:.3g} times its "
                    "(weighted) spread, beyond what can be trained; give it in the units of X."
                )
            floor[columns] = relative**2
    return Affine(shift, scale), floor
