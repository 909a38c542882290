"""The gradient loop on small losses whose answers are known."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from skvi.inference import gradient as module
from skvi.inference.gradient import Patience, Schedule, adam, descend, export_state
from skvi.inference.monitor import Status
from skvi.runtime.random import make_generator
from tests.recording import recorder

ENDLESS = Patience(10**6, 0.0)


def _parameter(value=0.0):
    return torch.tensor([value], dtype=torch.float32, requires_grad=True)


def _least_squares(p, y):
    def objective(batch, step):
        loss = (p - y[batch]).square().mean()
        return loss, -loss.detach()

    return objective


def _descend(objective, p, *, lr=0.1, n_rows=50, optimizer=None, seed=0, **options):
    defaults = {
        "batch_size": 16,
        "n_epochs": 60,
        "schedule": Schedule(0, anneal=True),
        "patience": ENDLESS,
    }
    return descend(
        objective,
        [p],
        adam([p], lr) if optimizer is None else optimizer,
        torch.arange(n_rows),
        generator=make_generator(seed),
        **defaults | options,
    )


def test_it_finds_the_minimum_and_records_the_mean_bound_of_each_epoch():
    y = torch.linspace(1.0, 3.0, 50)
    p = _parameter()
    result = _descend(_least_squares(p, y), p)
    assert float(p.detach()) == pytest.approx(2.0, abs=0.01)
    assert len(result.history) == 60
    assert result.history[-1] == pytest.approx(-float(y.var(unbiased=False)), rel=0.02)
    assert result.status is Status.MAX_ITER


def test_an_epoch_visits_every_row_once_in_even_minibatches_in_a_new_order():
    p = _parameter()
    seen = []

    def objective(batch, step):
        seen.append(batch)
        return p.square().sum(), torch.zeros(())

    _descend(objective, p, n_rows=50, n_epochs=2)
    assert [len(batch) for batch in seen] == [13, 13, 12, 12] * 2
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, torch.arange(50))
    assert torch.equal(second.sort().values, torch.arange(50))
    assert not torch.equal(first, second)


def test_the_same_generator_gives_the_same_bits_and_the_global_one_is_untouched():
    y = torch.linspace(1.0, 3.0, 50)
    state = torch.get_rng_state()
    ends = []
    for _ in range(2):
        p = _parameter()
        _descend(_least_squares(p, y), p, n_epochs=3)
        ends.append(float(p.detach()))
    assert ends[0] == ends[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_validated_parameters_are_restored_and_patience_ends_the_run():
    y = torch.full((50,), 10.0)
    p = _parameter()
    # Held-out rows would have p at 1: training goes on to 10.
    result = _descend(
        _least_squares(p, y),
        p,
        lr=0.01,
        n_epochs=500,
        schedule=Schedule(0, anneal=False),
        patience=Patience(5, 0.0),
        validate=lambda: -(p - 1.0).square().sum(),
    )
    best = max(range(len(result.validation_history)), key=result.validation_history.__getitem__)
    assert result.status is Status.CONVERGED
    assert len(result.validation_history) == best + 6
    assert float(p.detach()) == pytest.approx(1.0, abs=0.05)
    assert -((float(p.detach()) - 1.0) ** 2) == pytest.approx(
        result.validation_history[best], abs=1e-6
    )


def test_without_validation_a_flat_end_is_convergence():
    y = torch.full((50,), 2.0)
    p = _parameter()
    settled = _descend(_least_squares(p, y), p, n_epochs=100, patience=Patience(10, 1e-3))
    assert settled.status is Status.CONVERGED
    assert len(settled.history) == 100
    p = _parameter()
    rising = _descend(_least_squares(p, y), p, lr=1e-3, n_epochs=30, patience=Patience(10, 1e-3))
    assert rising.status is Status.MAX_ITER


def test_a_non_finite_loss_restores_the_last_good_state_and_halves_the_step():
    p = _parameter(1.0)
    rates = []
    optimizer = adam([p], 1.0)

    def objective(batch, step):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        # log of a negative number is NaN: a step of 1 leaves the domain
        loss = torch.log(p).sum()
        return loss, -loss.detach()

    result = _descend(
        objective,
        p,
        optimizer=optimizer,
        n_rows=4,
        n_epochs=3,
        schedule=Schedule(0, anneal=False),
    )
    assert result.status is not Status.NON_FINITE
    assert len(result.history) == 3
    assert rates[0] == 1.0
    assert rates[-1] <= 0.5
    assert math.isfinite(float(p.detach()))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_restart_forgets_the_best_of_the_epochs_that_it_takes_back():
    p = _parameter(0.0)
    n_steps = 0
    numbers = []

    def objective(batch, step):
        nonlocal n_steps
        n_steps += 1
        numbers.append(int(step))
        loss = -(p * (math.nan if n_steps == 300 else 1.0)).sum()
        return loss, -loss.detach()

    # Epochs of 50 steps: the sixth fails and takes back the fifth, after the snapshot at step 200.
    bounds = iter([-1.0, 5.0, 1.0, 2.0, 3.0, 10.0, 0.0, 1.5, 2.5, 3.5])
    parameter_at = {}

    def validate():
        bound = next(bounds)
        parameter_at[bound] = float(p.detach())
        return torch.tensor(bound)

    result = _descend(
        objective,
        p,
        batch_size=1,
        n_epochs=7,
        schedule=Schedule(0, anneal=False),
        validate=validate,
    )
    assert result.validation_history == [5.0, 1.0, 2.0, 3.0, 1.5, 2.5, 3.5]
    assert float(p.detach()) == parameter_at[5.0]
    # The steps of the two epochs that are made again have their numbers again.
    assert numbers == [*range(300), *range(200, 350)]


def test_a_loss_that_stays_non_finite_is_a_status_and_leaves_good_parameters():
    p = _parameter(1.0)

    def objective(batch, step):
        loss = (p * math.nan).sum()
        return loss, -loss.detach()

    result = _descend(objective, p)
    assert result.status is Status.NON_FINITE
    assert result.history == []
    assert float(p.detach()) == 1.0


def test_an_update_that_spoils_the_parameters_is_seen_although_its_loss_was_finite():
    p = _parameter(1.0)

    def objective(batch, step):
        # finite value, infinite gradient
        loss = (p - 1.0).abs().sqrt().sum()
        return loss, -loss.detach()

    result = _descend(objective, p, n_rows=4, n_epochs=1)
    assert result.status is Status.NON_FINITE
    assert float(p.detach()) == 1.0


def test_an_exported_optimiser_continues_exactly():
    y = torch.linspace(1.0, 3.0, 50)
    constant = {"schedule": Schedule(0, anneal=False), "n_epochs": 1}
    p = _parameter()
    optimizer = adam([p], 0.1)
    for seed in (1, 2):
        _descend(_least_squares(p, y), p, optimizer=optimizer, seed=seed, **constant)

    q = _parameter()
    first = adam([q], 0.1)
    _descend(_least_squares(q, y), q, optimizer=first, seed=1, **constant)
    exported = export_state(first)
    kept = copy.deepcopy(exported)
    second = adam([q], 0.1, exported)
    _descend(_least_squares(q, y), q, optimizer=second, seed=2, **constant)
    assert torch.equal(p, q)
    # whoever exported the state still has it
    assert exported == kept


def test_the_start_is_a_candidate_for_the_best():
    p = _parameter(1.0)
    optimizer = adam([p], 0.01)
    first = _descend(_least_squares(p, torch.full((50,), 5.0)), p, optimizer=optimizer, n_epochs=2)
    assert first.history
    start = float(p.detach())
    moments = export_state(optimizer)
    # Held-out rows would have p where it is: every epoch of training takes it away from there.
    result = _descend(
        _least_squares(p, torch.full((50,), 5.0)),
        p,
        optimizer=optimizer,
        n_epochs=50,
        patience=Patience(4, 0.0),
        validate=lambda: -(p - start).square().sum(),
    )
    assert result.status is Status.CONVERGED
    assert len(result.validation_history) == 4
    assert max(result.validation_history) < 0.0
    assert float(p.detach()) == start
    assert export_state(optimizer) == moments


def _failing_run(p, *, state=None, save=lambda _: None):
    """Validated epochs of which one is spoilt by a NaN, so that every part of the state counts."""
    y = torch.linspace(1.0, 3.0, 50)
    optimizer = adam([p], 0.1)

    def objective(batch, step):
        # The rate of the optimiser tells the second attempt from the first.
        first = optimizer.param_groups[0]["lr"] > 0.05
        loss = (p - y[batch]).square().mean()
        if first and float(p.detach()) > 1.4:
            loss = loss * math.nan
        return loss, -loss.detach()

    return _descend(
        objective,
        p,
        optimizer=optimizer,
        batch_size=2,
        n_epochs=14,
        schedule=Schedule(3, anneal=False),
        patience=Patience(100, 0.0),
        validate=lambda: -(p - 1.5).square().sum(),
        state=state,
        save=save,
    ), export_state(optimizer)


def test_a_run_goes_on_from_any_saved_state_to_the_same_bits():
    p = _parameter(-8.0)
    states = []
    expected, moments = _failing_run(p, save=lambda export: states.append(export()))
    assert len(states) > len(expected.history) == 14  # epochs were taken back
    assert len({int(state["counts"][0]) for state in states}) > 1
    for state in states:
        q = _parameter(123.0)
        result, its_moments = _failing_run(q, state=state)
        assert result == expected
        assert torch.equal(p, q)
        assert its_moments == moments


def test_a_state_does_not_change_when_the_run_goes_on():
    p = _parameter(-8.0)
    states = []
    _failing_run(p, save=lambda export: states.append((export(), copy.deepcopy(export()))))
    for state, copied in states:
        for name, value in copied.items():
            np.testing.assert_array_equal(state[name], value)


def test_recorded_steps_give_the_same_bits_also_after_a_restart(monkeypatch):
    monkeypatch.setattr(module, "_WORTH_RECORDING", 0)
    monkeypatch.setattr(module, "_SNAPSHOT_STEPS", 10)
    y = torch.linspace(1.0, 3.0, 50)
    ends = []
    for recorded in (False, True):
        p, n_records = _parameter(-8.0), 0
        optimizer = adam([p], 0.1)

        def objective(batch, step):
            rate = optimizer.param_groups[0]["lr"]  # noqa: B023
            noise = y.new_empty(len(batch)).normal_(generator=generator)  # noqa: B023
            loss = (p + 0.01 * noise - y[batch]).square().mean() * (1.0 + 0.001 * step)  # noqa: B023
            spoilt = (p.detach() > 1.4) & (rate > 0.05)  # noqa: B023
            loss = loss * torch.where(spoilt, math.nan, 1.0)
            return loss.sum(), -loss.detach().sum()

        def counted(run):
            nonlocal n_records
            n_records += 1
            return recorder(generator)(run)  # noqa: B023

        generator = make_generator(0)
        result = descend(
            objective,
            [p],
            optimizer,
            torch.arange(50),
            batch_size=16,
            n_epochs=100,
            schedule=Schedule(3, anneal=True),
            generator=generator,
            patience=ENDLESS,
            record=counted if recorded else None,
        )
        ends.append((result, float(p.detach()), export_state(optimizer)))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert n_records == 4  # two sizes of minibatch, and anew after the restart
    assert ends[0] == ends[1]


def test_what_a_recorded_step_reads_is_on_its_device():
    class OnCuda(torch.nn.Parameter):
        is_cuda = True

    p = OnCuda(torch.zeros(2, device="meta"))
    optimizer = adam([{"params": [p]}, {"params": [OnCuda(torch.zeros(3, device="meta"))]}], 0.1)
    for group in optimizer.param_groups:
        assert group["lr"].device.type == "meta"
        assert group["lr"].dtype is torch.float32
        assert group["capturable"]
    numbers = []

    def objective(batch, step):
        numbers.append(step)
        return p.sum(), p.detach().sum()

    total = torch.zeros((), device="meta")
    steps = module._Steps(objective, optimizer, total, None)
    optimizer.step = lambda: None  # meta tensors have no fused kernel
    steps(torch.arange(3), 0, [0.1, 0.1])
    assert numbers[0].device.type == "meta"


def test_a_short_run_is_not_recorded():
    def refuse(run):
        pytest.fail("a run of twelve steps was recorded")

    p = _parameter()
    _descend(_least_squares(p, torch.ones(50)), p, n_epochs=3, record=refuse)


def test_the_schedule_warms_up_and_anneals_to_zero():
    schedule = Schedule(9, anneal=True)
    factors = [schedule.factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] < 1e-5
    assert Schedule(0, anneal=False).factor(999, 1000) == 1.0
