"""What the estimators share: the door where data come in, weights, and the score."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from skvi.estimators._compat import check_sample_weight
from skvi.runtime.device import resolve_device

Record = TypeVar("Record")

# Squares, their sums and the ratios of scales stay far from overflow inside this range.
LARGEST_VALUE = 1e152


class Door(NamedTuple):
    """Validated input of one call.

    Attributes
    ----------
    X : ndarray of shape (N, D)
        float64 or float32, finite.
    y : ndarray or None
        Where the call takes one: a target (float64, finite) or labels.
    device : torch.device
        Where the call computes.
    """

    X: np.ndarray
    y: np.ndarray | None
    device: torch.device


def to_host(data: Any) -> Any:
    """Return a tensor as a NumPy array (half precisions as float32); anything else as it is."""
    if not isinstance(data, torch.Tensor):
        return data
    data = data.detach().cpu()
    return (data.float() if data.dtype in {torch.bfloat16, torch.float16} else data).numpy()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of any device as a NumPy array that owns its memory."""
    return tensor.detach().cpu().numpy().copy()


def weighted_mean(values: np.ndarray, weight: np.ndarray) -> float:
    """Mean of finite values under non-negative weights of any magnitude."""
    weight = weight / weight.max()
    return float(weight @ values / weight.sum())


def check_count(value: Any, name: str, least: int = 1) -> int:
    """Return an argument that counts something as an int, or raise a ValueError naming it."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    return int(value)


def without_weightless(weight: np.ndarray, *arrays: Any) -> tuple[Any, ...]:
    """Return `arrays` and `weight` without rows of weight zero; copies only if there are any."""
    if weight.all():
        return *arrays, weight
    kept = weight > 0
    return *(array[kept] for array in arrays), weight[kept]


def map_record(convert: Callable[[Any], Any], record: Record) -> Record:
    """Apply `convert` to the arrays of a nested NamedTuple; numbers and None stay."""
    if isinstance(record, tuple):
        return type(record)(*(map_record(convert, field) for field in record))
    return convert(record) if isinstance(record, torch.Tensor | np.ndarray) else record


def as_tensors(record: Record, device: torch.device | str) -> Record:
    """Return a nested NamedTuple with its arrays as tensors on `device`."""
    return map_record(lambda array: torch.as_tensor(array, device=device), record)


def as_arrays(record: Record) -> Record:
    """Return a record of NumPy arrays, which share their memory with tensors on the CPU."""
    return map_record(lambda tensor: tensor.cpu().numpy(), record)


def check_reach(values: np.ndarray) -> None:
    """Raise a ValueError if what was computed of new rows is not finite."""
    if not np.isfinite(values).all():
        raise ValueError(
            "Some rows lie so far from the training data that their squared distance leaves the "
            "range of float64; check the units of X and y."
        )


class VariationalEstimator(BaseEstimator):
    """Base class: input validation with a device, sample weights, and nothing else.

    Subclasses have the parameters ``device`` and ``warm_start``, and `_model` once they are fitted.
    """

    def _door(
        self,
        X: Any,
        y: Any = None,
        *,
        reset: bool,
        target: bool = False,
        check_values: bool = True,
        labels: bool = False,
        **check_params: Any,
    ) -> Door:
        """Validate what came in and decide where to compute.

        Parameters
        ----------
        X : array-like or torch.Tensor of shape (N, D)
        y : array-like of shape (N,) or (N, M)
            Only looked at with ``target=True`` or ``labels=True``.
        reset : bool
            True in fit, False elsewhere: feature names and count must then match.
        target : bool, default=False
            Whether y is a numeric target of the call.
        check_values : bool, default=True
            False leaves it to the caller to notice a NaN or a number out of range in X, and to
            come back: looking for them takes one pass over X each.
        labels : bool, default=False
            Whether y names the classes of the rows.
        **check_params
            Passed on to :func:`sklearn.utils.validation.validate_data`.

        Raises
        ------
        ValueError
            From scikit-learn's checks; for an impossible device; and for numbers beyond 1e152,
            whose squares leave the range of float64.
        """
        device = resolve_device(self.device, X)
        X = to_host(X)
        params: dict[str, Any] = {"dtype": [np.float64, np.float32], **check_params}
        if not check_values:
            params["ensure_all_finite"] = False
        if target:
            # y may hold integers: the target is a measurement, not a label.
            X, y = validate_data(
                self, X, to_host(y), reset=reset, y_numeric=True, **{"multi_output": True, **params}
            )
            y = np.asarray(y, dtype=np.float64)
            _check_range(y, "y")
        elif labels:
            X, y = validate_data(self, X, to_host(y), reset=reset, **params)
            check_classification_targets(y)
        else:
            X = validate_data(self, X, reset=reset, **params)
            y = None
        if check_values:
            _check_range(X, "X")
        return Door(X, y, device)

    def _continues(self) -> bool:
        """Whether `fit` goes on from the last one."""
        return self.warm_start and hasattr(self, "_model")

    def _fit_door(self, X: Any, y: Any = None, **params: Any) -> Door:
        """Return the door of a fit; one that continues takes the features of the last one only."""
        continues = self._continues()
        try:
            return self._door(X, y, reset=not continues, **params)
        except ValueError as error:
            if continues and "feature" in str(error):
                error.add_note("Set warm_start=False to fit other features, or fit a clone.")
            raise

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave the estimator as it was if fitting raises or is interrupted."""
        before = self.__dict__.copy()
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _warn_unless_converged(self) -> None:
        """Warn at the end of a fit whose passes ran out; `tol` is in nats per row."""
        if not self.converged_:
            warnings.warn(
                f"The bound had not converged to tol={self.tol:g} nats per row after "
                f"{self.n_iter_} passes; increase max_iter or tol.",
                ConvergenceWarning,
                stacklevel=4,  # past fit and its decorator, to the caller
            )

    def _weights(self, sample_weight: Any, X: np.ndarray) -> np.ndarray:
        """Return validated float64 sample weights of shape (N,): non-negative, not all zero.

        Raises
        ------
        ValueError
            For a wrong shape, negative, non-finite or all-zero weights, or a sum that overflows.
        """
        weight = check_sample_weight(
            to_host(sample_weight), X, dtype=np.float64, ensure_non_negative=True
        )
        if not weight.any():
            raise ValueError(
                "Sample weights must contain at least one non-zero number: with all weights "
                "zero there is nothing to fit or to average."
            )
        with np.errstate(over="ignore"):
            total = weight.sum()
        # A million units of room below the largest float, for the products with squared data.
        if not total < 1e300:
            raise ValueError(
                f"The sample weights sum to {total:g}, too large for float64 statistics; "
                "rescale them (weights count how often a row was seen)."
            )
        return weight


def _check_range(array: Any, name: str) -> None:
    values = array.data if issparse(array) else array
    if values.size == 0:
        return
    # fmax and fmin pass over NaN, where a caller allows them.
    largest = max(
        float(np.fmax.reduce(values, axis=None)), -float(np.fmin.reduce(values, axis=None))
    )
    if largest > LARGEST_VALUE:
        raise ValueError(
            f"{name} contains values beyond {LARGEST_VALUE:g} in magnitude, whose squares leave "
            "the range of float64; rescale the data, for example with StandardScaler."
        )
