"""Stochastic gradient descent on a loss given by row indices: knows no model and no data."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.inference.monitor import Status

# Maps row indices (B,) to the loss to descend and to the bound to record, both scalars per unit of
# weight; the bound carries no gradient.
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]

_MAX_HALVINGS = 5
# A restart from the last good state loses about this many steps at most.
_SNAPSHOT_STEPS = 100


class Schedule(NamedTuple):
    """Step size over a run, as a factor of the initial one.

    Attributes
    ----------
    n_warmup : int
        Steps of linear rise from zero; they let Adam's second moments settle.
    anneal : bool
        Whether the factor then falls to zero along a cosine, or stays at one.
    """

    n_warmup: int
    anneal: bool

    def factor(self, step: int, n_steps: int) -> float:
        """Return the factor of step `step` of `n_steps`."""
        warm = min(1.0, (step + 1) / (self.n_warmup + 1))
        if not self.anneal:
            return warm
        return warm * 0.5 * (1.0 + math.cos(math.pi * step / n_steps))


class Descent(NamedTuple):
    """What a run did; the parameters themselves were changed in place.

    Attributes
    ----------
    history : list of float
        The mean bound of each epoch's minibatches, a running estimate.
    validation_history : list of float
        What `validate` returned after each epoch; empty without it.
    status : Status
        NON_FINITE: the parameters are the last good ones, but halving the step did not help.
    """

    history: list[float]
    validation_history: list[float]
    status: Status


def adam(
    parameters: Sequence[Tensor], learning_rate: float, state: list[dict[str, Any]] | None = None
) -> torch.optim.Adam:
    """Return a fused Adam over `parameters`, going on from an exported `state` if there is one."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    if state:
        tensors = {
            # Copies: Adam updates its moments in place, and `state` may be memory-mapped.
            i: {name: torch.tensor(value, device=p.device) for name, value in entry.items()}
            for i, (p, entry) in enumerate(zip(parameters, state, strict=True))
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": tensors, "param_groups": groups})
    return optimizer


def export_state(optimizer: torch.optim.Optimizer) -> list[dict[str, np.ndarray]]:
    """Return the optimiser's state, one record per parameter, as NumPy arrays."""
    state = optimizer.state_dict()["state"]
    return [
        {name: value.cpu().numpy().copy() for name, value in state[i].items()}
        for i in sorted(state)
    ]


class _Snapshot:
    """A copy of the parameters and, for a restart, of the optimiser."""

    def __init__(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.values = [p.detach().clone() for p in parameters]
        self.optimizer_state = copy.deepcopy(optimizer.state_dict()["state"])

    def restore(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for p, value in zip(parameters, self.values, strict=True):
                p.copy_(value)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(
            {"state": copy.deepcopy(self.optimizer_state), "param_groups": groups}
        )


class Patience(NamedTuple):
    """When a run has stopped making progress.

    Attributes
    ----------
    window : int
        With validation: stop when the best epoch is this many epochs ago.
    tol : float
        Without validation nothing stops a run, since a running bound says nothing about other
        rows; it has converged if its last `window` epochs gain less than `tol` on the ones before.
    """

    window: int
    tol: float

    def exhausted(self, validation_history: Sequence[float]) -> bool:
        """Whether validation has not improved for `window` epochs."""
        n_epochs = len(validation_history)
        return n_epochs > 0 and n_epochs - 1 - int(np.argmax(validation_history)) >= self.window

    def settled(self, history: Sequence[float]) -> bool:
        """Whether the running bound has become flat."""
        if len(history) < 2 * self.window:
            return False
        recent = np.mean(history[-self.window :])
        before = np.mean(history[-2 * self.window : -self.window])
        return bool(recent - before < self.tol)


def descend(
    objective: Objective,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    *,
    batch_size: int,
    n_epochs: int,
    schedule: Schedule,
    generator: torch.Generator,
    patience: Patience,
    validate: Callable[[], Tensor] | None = None,
    report: Callable[[int, float, float | None], None] = lambda *_: None,
) -> Descent:
    """Run epochs of shuffled minibatches until patience ends or `n_epochs` are made.

    Indices are shuffled and sliced on the device of `rows`, and the bounds add up there: the host
    waits for the device once per epoch, to read one pair of numbers. After a non-finite epoch the
    last good state is restored and the step halved, a few times.

    Parameters
    ----------
    objective : callable
        Index tensor (B,) -> (loss, bound).
    parameters : sequence of Tensor
        Leaves; changed in place. With `validate`, they end at the best validated values.
    optimizer : torch.optim.Optimizer
        Over `parameters`; its learning rate is the initial one.
    rows : Tensor of int64, shape (N,)
        The training rows; every epoch visits each once.
    batch_size : int
        Upper limit; an epoch is cut into minibatches of equal size, give or take one row.
    n_epochs : int
        At least 1.
    schedule : Schedule
    generator : torch.Generator
        On the device of `rows`.
    patience : Patience
    validate : callable, optional
        Returns a scalar tensor, higher is better; called once per epoch, without gradient.
    report : callable, optional
        Called with (epoch, bound, validation bound) after every epoch.

    Returns
    -------
    Descent
    """
    base_rate = [group["lr"] for group in optimizer.param_groups]
    n_batches = math.ceil(len(rows) / batch_size)
    halvings = 0
    history: list[float] = []
    validation: list[float] = []
    best = good_best = last_good = _Snapshot(parameters, optimizer)
    good_epochs = 0
    while len(history) < n_epochs:
        total = rows.new_zeros((), dtype=parameters[0].dtype)
        shuffled = rows[torch.randperm(len(rows), generator=generator, device=rows.device)]
        for i, batch in enumerate(shuffled.tensor_split(n_batches)):
            factor = schedule.factor(len(history) * n_batches + i, n_epochs * n_batches)
            for group, rate in zip(optimizer.param_groups, base_rate, strict=True):
                group["lr"] = rate * factor * 0.5**halvings
            optimizer.zero_grad(set_to_none=True)
            loss, bound = objective(batch)
            loss.backward()
            optimizer.step()
            total += bound
        with torch.no_grad():
            # The last update may have spoilt the parameters after the last loss was seen.
            total += 0.0 * torch.nn.utils.get_total_norm(parameters)
            validated = total if validate is None else validate()
            read = torch.stack([total / n_batches, validated]).tolist()

        if not all(math.isfinite(value) for value in read):
            last_good.restore(parameters, optimizer)
            best = good_best
            del history[good_epochs:], validation[good_epochs:]
            halvings += 1
            if halvings > _MAX_HALVINGS:
                return Descent(history, validation, Status.NON_FINITE)
            continue
        history.append(read[0])
        if validate is not None:
            validation.append(read[1])
            if validation[-1] > max(validation[:-1], default=-math.inf):
                best = _Snapshot(parameters, optimizer)
        report(len(history), read[0], read[1] if validate is not None else None)
        if (len(history) - good_epochs) * n_batches >= _SNAPSHOT_STEPS:
            last_good, good_epochs = _Snapshot(parameters, optimizer), len(history)
            good_best = best
        if patience.exhausted(validation):
            break
    for group, rate in zip(optimizer.param_groups, base_rate, strict=True):
        group["lr"] = rate
    if validation:
        best.restore(parameters, optimizer)
        converged = patience.exhausted(validation)
    else:
        converged = patience.settled(history)
    return Descent(history, validation, Status.CONVERGED if converged else Status.MAX_ITER)
