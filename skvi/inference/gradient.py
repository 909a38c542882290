"""Stochastic gradient descent on a loss given by row indices: knows no model and no data."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skvi.inference.monitor import Status
from skvi.runtime.graph import Recorder

# Maps row indices (B,) and the number of the step, a scalar of float64, to the loss to descend and
# to the bound to record, both scalars per unit of weight; the bound carries no gradient.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# What a run needs to go on, as arrays.
State = dict[str, np.ndarray]

_MAX_HALVINGS = 5
# A restart from the last good state loses about this many steps at most.
_SNAPSHOT_STEPS = 100
# Steps that are made before others are recorded, and how many must follow to make that pay.
_PLAIN_STEPS = 5
_WORTH_RECORDING = 200


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
    parameters: Sequence[Tensor] | Sequence[dict[str, Any]],
    learning_rate: float,
    state: list[dict[str, Any]] | None = None,
) -> torch.optim.Adam:
    """Return a fused Adam over `parameters`, going on from an exported `state` if there is one.

    Its learning rates are tensors, on their device. `parameters` may be groups of them, as torch's
    optimisers take them.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        # A recorded step reads the rate from its device, where the kernel wants this dtype.
        group["lr"] = torch.tensor(learning_rate, dtype=torch.float32, device=flat[0].device)
        group["capturable"] = flat[0].is_cuda
    if state:
        tensors = {
            # Copies: Adam updates its moments in place, and `state` may be memory-mapped.
            i: {name: torch.tensor(value, device=p.device) for name, value in entry.items()}
            for i, (p, entry) in enumerate(zip(flat, state, strict=True))
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


_Moments = dict[int, dict[str, Tensor]]


def _copied(moments: _Moments) -> _Moments:
    # copy.deepcopy takes ten times as long, which is that of a step of small data.
    return {i: {name: value.clone() for name, value in of.items()} for i, of in moments.items()}


class _Snapshot:
    """A copy of the parameters and of the optimiser's moments."""

    def __init__(self, values: list[Tensor], moments: _Moments) -> None:
        self.values = values
        self.moments = moments

    @classmethod
    def take(cls, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> "_Snapshot":
        values = [p.detach().clone() for p in parameters]
        return cls(values, _copied(optimizer.state_dict()["state"]))

    def restore(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for p, value in zip(parameters, self.values, strict=True):
                p.copy_(value)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": _copied(self.moments), "param_groups": groups})


class _Progress:
    """Where a run is after an epoch: with the parameters, all that decides what follows."""

    def __init__(self, start: _Snapshot, bound: float) -> None:
        self.history: list[float] = []
        self.validation: list[float] = []
        self.start_bound = bound  # of the held-out rows; the start is a candidate for the best
        self.halvings = 0
        self.good_epochs = 0
        self.best = self.good_best = self.last_good = start

    @property
    def candidates(self) -> list[float]:
        """The validated bounds, the start's first."""
        return [self.start_bound, *self.validation]

    def export(self, current: _Snapshot, generator: torch.Generator) -> State:
        state: State = {
            "history": np.array(self.history),
            "validation": np.array(self.validation),
            "start_bound": np.array(self.start_bound),
            "counts": np.array([self.halvings, self.good_epochs]),
            "generator": generator.get_state().numpy().copy(),
        }
        roles = [current, self.best, self.good_best, self.last_good]
        distinct = list({id(snapshot): snapshot for snapshot in roles}.values())
        state["roles"] = np.array([distinct.index(snapshot) for snapshot in roles])
        for n, snapshot in enumerate(distinct):
            for i, value in enumerate(snapshot.values):
                state[f"snapshot/{n}/{i}"] = value.cpu().numpy().copy()
                for name, moment in snapshot.moments.get(i, {}).items():
                    state[f"snapshot/{n}/{i}/{name}"] = moment.cpu().numpy().copy()
        return state

    @classmethod
    def resume(
        cls,
        state: State,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> "_Progress":
        """Return what was exported; the parameters, the optimiser and the generator follow it."""

        def snapshot(n: int) -> _Snapshot:
            values = [
                torch.tensor(state[f"snapshot/{n}/{i}"], device=p.device)
                for i, p in enumerate(parameters)
            ]
            moments: _Moments = {}
            for key, value in state.items():
                prefix, *place = key.split("/")
                if prefix == "snapshot" and len(place) == 3 and int(place[0]) == n:
                    of = moments.setdefault(int(place[1]), {})
                    of[place[2]] = torch.tensor(value, device=parameters[0].device)
            return _Snapshot(values, moments)

        roles = state["roles"].tolist()
        distinct = [snapshot(n) for n in range(max(roles) + 1)]
        current, best, good_best, last_good = (distinct[n] for n in roles)
        progress = cls(best, float(state["start_bound"]))
        progress.good_best, progress.last_good = good_best, last_good
        progress.history = state["history"].tolist()
        progress.validation = state["validation"].tolist()
        progress.halvings, progress.good_epochs = state["counts"].tolist()
        current.restore(parameters, optimizer)
        generator.set_state(torch.from_numpy(state["generator"].copy()))
        return progress


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

    def exhausted(self, bounds: Sequence[float]) -> bool:
        """Whether the last `window` validated bounds are below an earlier one.

        `bounds` begins with that of the start.
        """
        return len(bounds) - 1 - int(np.argmax(bounds)) >= self.window

    def settled(self, history: Sequence[float]) -> bool:
        """Whether the running bound has become flat."""
        if len(history) < 2 * self.window:
            return False
        recent = np.mean(history[-self.window :])
        before = np.mean(history[-2 * self.window : -self.window])
        return bool(recent - before < self.tol)


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)


class _Steps:
    """Makes the steps of a run; repeats recorded ones where `record` is given.

    There is one record for each size of minibatch. The host then only writes what changes from
    step to step: rows, number and rate.

    Attributes
    ----------
    total : Tensor of shape ()
        Sum of the bounds since it was last set to zero.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        total: Tensor,
        record: Recorder | None,
    ) -> None:
        self.total = total
        self._objective, self._optimizer, self._record = objective, optimizer, record
        self._number = total.new_zeros((), dtype=torch.float64)
        self.forget()

    def forget(self) -> None:
        """Drop all records: the optimiser's moments have moved to other memory."""
        # Plain steps to come: they create moments, and what libraries set up at their first call.
        self._n_plain = _PLAIN_STEPS
        # Sizes of minibatches that a plain step has had: a kernel that is used for the first time
        # may have to be loaded, which a record cannot.
        self._seen: set[int] = set()
        # By the size of the minibatch: where its rows are read, and what repeats the step.
        self._recorded: dict[int, tuple[Tensor, Callable[[], None]]] = {}

    def __call__(self, batch: Tensor, number: int, rates: Sequence[float]) -> None:
        """Make a step with these rows and these learning rates of the optimiser's groups."""
        self._number.fill_(number)
        _set_rates(self._optimizer, rates)
        if self._record is not None and self._n_plain == 0 and len(batch) in self._seen:
            self._record_for(batch, self._record)
        self._n_plain = max(0, self._n_plain - 1)
        if len(batch) in self._recorded:
            rows, repeat = self._recorded[len(batch)]
            rows.copy_(batch)
            repeat()
        else:
            self._run(batch)
            self._seen.add(len(batch))

    def _record_for(self, batch: Tensor, record: Recorder) -> None:
        """Have a record for minibatches of this size, if there can be one."""
        if len(batch) in self._recorded:
            return
        rows = batch.clone()
        try:
            self._recorded[len(batch)] = rows, record(lambda: self._run(rows))
        except RuntimeError as error:
            self._record = None
            warnings.warn(
                "The steps of training cannot be recorded and are made one by one, which takes "
                # The end of a capture that failed raises an error of its own over the cause.
                f"longer: {': '.join(str(e) for e in (error, error.__context__) if e)}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _run(self, batch: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss, bound = self._objective(batch, self._number)
        loss.backward()
        self._optimizer.step()
        self.total += bound


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
    state: State | None = None,
    save: Callable[[Callable[[], State]], None] = lambda _: None,
    record: Recorder | None = None,
) -> Descent:
    """Run epochs of shuffled minibatches until patience ends or `n_epochs` are made.

    Indices are shuffled and sliced on the device of `rows`, and the bounds add up there: the host
    waits for the device once per epoch, to read one pair of numbers. After a non-finite epoch the
    last good state is restored and the step halved, a few times.

    Parameters
    ----------
    objective : callable
        Index tensor (B,), number of the step () -> (loss, bound). Steps are counted from 0; those
        of an epoch that is taken back are made again under the same numbers.
    parameters : sequence of Tensor
        Leaves, in the order in which `optimizer` holds them; changed in place. With `validate`,
        they end at the best validated values, those of the start included.
    optimizer : torch.optim.Optimizer
        Over `parameters`; its learning rates, which are tensors, are the initial ones.
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
        Returns a scalar tensor, higher is better; called at the start and after every epoch,
        without gradient.
    report : callable, optional
        Called with (epoch, bound, validation bound) after every epoch.
    state : dict of ndarray, optional
        What `save` was given by a run with the same arguments: this run goes on from there, to
        the same bits on the same machine.
    save : callable, optional
        Called after every epoch with a function that returns the state of the run.
    record : Recorder, optional
        Steps of long runs are recorded by it and repeated; see
        :func:`skvi.runtime.graph.recorder` for what that asks of `objective`. Where it fails, a
        RuntimeWarning says so and all steps are made as they are.

    Returns
    -------
    Descent
    """
    base_rate = [float(group["lr"]) for group in optimizer.param_groups]
    n_batches = math.ceil(len(rows) / batch_size)
    total = rows.new_zeros((), dtype=parameters[0].dtype)
    if state is None:
        progress = _Progress(_Snapshot.take(parameters, optimizer), -math.inf)
        if validate is not None:
            with torch.no_grad():
                bound_at_start = float(validate())
            if math.isfinite(bound_at_start):
                progress.start_bound = bound_at_start
    else:
        progress = _Progress.resume(state, parameters, optimizer, generator)
    history, validation = progress.history, progress.validation
    worth_it = (n_epochs - len(history)) * n_batches >= _WORTH_RECORDING
    make_step = _Steps(objective, optimizer, total, record if worth_it else None)

    def export() -> State:
        return progress.export(_Snapshot.take(parameters, optimizer), generator)

    exhausted = validate is not None and patience.exhausted(progress.candidates)
    while len(history) < n_epochs and not exhausted:
        total.zero_()
        shuffled = rows[torch.randperm(len(rows), generator=generator, device=rows.device)]
        for i, batch in enumerate(shuffled.tensor_split(n_batches)):
            step = len(history) * n_batches + i
            factor = schedule.factor(step, n_epochs * n_batches) * 0.5**progress.halvings
            make_step(batch, step, [rate * factor for rate in base_rate])
        with torch.no_grad():
            # The last update may have spoilt the parameters after the last loss was seen.
            total += 0.0 * torch.nn.utils.get_total_norm(parameters)
            validated = total if validate is None else validate()
            read = torch.stack([total / n_batches, validated]).tolist()

        if not all(math.isfinite(value) for value in read):
            progress.last_good.restore(parameters, optimizer)
            make_step.forget()
            progress.best = progress.good_best
            del history[progress.good_epochs :], validation[progress.good_epochs :]
            progress.halvings += 1
            if progress.halvings > _MAX_HALVINGS:
                return Descent(history, validation, Status.NON_FINITE)
            continue
        history.append(read[0])
        if validate is not None:
            if read[1] > max(progress.candidates):
                progress.best = _Snapshot.take(parameters, optimizer)
            validation.append(read[1])
            exhausted = patience.exhausted(progress.candidates)
        if (len(history) - progress.good_epochs) * n_batches >= _SNAPSHOT_STEPS:
            progress.last_good = _Snapshot.take(parameters, optimizer)
            progress.good_epochs = len(history)
            progress.good_best = progress.best
        save(export)
        report(len(history), read[0], read[1] if validate is not None else None)
    _set_rates(optimizer, base_rate)
    if validate is not None:
        progress.best.restore(parameters, optimizer)
        converged = exhausted
    else:
        converged = patience.settled(history)
    return Descent(history, validation, Status.CONVERGED if converged else Status.MAX_ITER)
