"""What the linear estimators share: units of the columns, groups, and priors of the precisions."""

from numbers import Real
from typing import Any

import numpy as np
import torch

from skvi.estimators._compat import Interval
from skvi.models.linear.climb import WeightPrior
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.reduction import root_scale
from skvi.runtime.blocks import Affine, power_of_two

# Hyper-parameters without units, whose squares, products and log gammas stay in range.
HYPERPARAMETER = Interval(Real, 1e-100, 1e100, closed="both")


def group_of_features(prior: str, groups: Any, n_features: int) -> np.ndarray:
    """Return which of the precisions 0, ..., H - 1 each feature has, shape (D,).

    Raises
    ------
    ValueError
        For `groups` with another prior than "ridge", not one label for each feature, or labels
        without an order.
    """
    if groups is not None:
        groups = np.asarray(groups)
        if prior != "ridge":
            raise ValueError(
                f'groups= is for prior="ridge", one precision a group; prior={prior!r} '
                "has no groups. Set groups=None."
            )
        if groups.shape != (n_features,):
            raise ValueError(
                f"groups has shape {groups.shape}, but X has {n_features} features: give one "
                "label for each feature."
            )
        try:
            missing = bool((groups != groups).any())  # NaN
            group = np.unique(groups, return_inverse=True)[1]
        except TypeError as error:
            raise ValueError(
                "groups mixes labels that have no common order, such as numbers, strings and "
                "None; give labels of one type."
            ) from error
        if missing:
            raise ValueError(
                "groups has labels that are NaN; give every feature a label that equals itself."
            )
        return group
    one_each = prior in {"ard", "horseshoe", "flat"}
    return np.arange(n_features) if one_each else np.zeros(n_features, dtype=np.intp)


def fitted_units(
    mean: np.ndarray, std: np.ndarray, group: np.ndarray, *, intercept: bool
) -> tuple[Affine, np.ndarray]:
    """Return the fitted units of the columns and their spread in these units.

    The spread is the standard deviation `std`, or the root mean square without an intercept;
    that of a constant column is the size of the constant, or one. The columns of a group have
    the scale of the root mean square of their spreads, and that is what is returned, (H,).
    """
    spread = root_scale(std if intercept else np.hypot(mean, std), group)
    size = root_scale(np.abs(mean), group)
    spread = np.where(spread > 0.0, spread, np.where(size > 0.0, size, 1.0))
    scale = power_of_two(spread)
    shift = mean if intercept else np.zeros_like(mean)
    return Affine(shift, scale[group]), spread / scale


def scale_of_groups(x: Affine, group: np.ndarray) -> np.ndarray:
    """Return the scale that the features of each group share, shape (H,)."""
    return x.scale[np.unique(group, return_index=True)[1]]


def prior_of_precisions(
    prior: str,
    spread: np.ndarray,
    group: np.ndarray,
    *,
    weight_shape: float,
    weight_rate: float,
    global_scale: float,
) -> WeightPrior | HorseshoePrior | None:
    """Return the prior of the weight precisions in fitted units; None if they are known.

    `spread`, shape (H,), is the second result of :func:`fitted_units`.
    """
    if prior in {"fixed", "flat"}:
        return None
    if prior == "horseshoe":
        return HorseshoePrior(float(global_scale), torch.from_numpy(spread**2))
    # One precision for all and one for each feature have their own ways, the latter only where the
    # sorted labels follow the features.
    in_order = np.array_equal(group, np.arange(len(group)))
    several = len(spread) > 1 and not in_order
    return WeightPrior(
        float(weight_shape),
        torch.from_numpy(weight_rate / spread**2),
        torch.from_numpy(group) if several else None,
    )
