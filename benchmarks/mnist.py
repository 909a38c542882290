"""Dynamically binarised MNIST: what so many minutes of training reach, beside the plain loop.

Long runs may be cut: each goes on from its own files under ``benchmarks/results/mnist``. A run that
has ended is read back from there; delete its file to have it made again.
"""

import json
import math
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import DATA, RESULTS, Report
from benchmarks.plain_vae import PlainVAE, plain_epoch
from skvi import VAETransformer
from skvi.estimators import vae as module
from skvi.models.vae import objective
from skvi.runtime.random import make_generator

# What differs from the defaults of VAETransformer, and the number of draws of the plain loops.
FITS: dict[str, dict[str, Any]] = {
    "elbo": {},
    "importance": {"n_importance": 50},
    "importance-after": {"n_importance": 50, "learning_rate_init": 0.003},
    "vamp": {"prior": "vamp", "n_prior_components": 500},
}
# So much of the time such a fit has these parameters; then a warm start goes on with its own.
FIRST_PART = {"importance-after": (0.4, {"n_importance": 1, "learning_rate_init": 0.006})}
LOOPS = {"loop": 1, "importance-loop": 50}
LEVELS = (-110, -100, -95, -90, -88, -87, -86)
N_DRAWS = 5000
# Off the clock: log p with so many draws on every such row of the test set. It is below the final
# one by the draws that it lacks. It is taken after an epoch once the seconds have grown by such a
# factor, which is how exactly the seconds to a level are known.
N_WATCHING_DRAWS, WATCHED, WATCHING_FACTOR = 100, 20, 1.02
# Published levels are means over all test rows; for the shorter runs a tenth of them will do.
MINUTES_FOR_ALL_ROWS = 60
TENTH = slice(None, None, 10)
FOLDER = RESULTS / "mnist"


def clock() -> float:
    """Return seconds; of one thread those that it was at work, whatever else the machine does."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextmanager
def noted_epochs(note: Callable[[int, float, nn.Module], None]) -> Iterator[None]:
    """Call ``note(epoch, bound, network)`` after every epoch of the fits inside."""
    announce, groups = module.announce_epoch, objective.parameter_groups
    networks: list[nn.Module] = []

    def noted(name: str, epoch: int, bound: float, *args: Any, **options: Any) -> None:
        note(epoch, bound, networks[-1])

    def kept(network: nn.Module, *args: Any) -> Any:
        networks.append(network)
        return groups(network, *args)

    module.announce_epoch, objective.parameter_groups = noted, kept
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield
    finally:
        module.announce_epoch, objective.parameter_groups = announce, groups


class DynamicVAE(VAETransformer):
    """Every minibatch is binarised anew from the grey values `grey`."""

    grey: Tensor

    def _reader(self, x: Tensor, observed: Any, generator: torch.Generator) -> Any:
        grey = self.grey.to(x)
        return lambda batch: (
            torch.bernoulli(grey.index_select(0, batch), generator=generator),
            None,
        )


def binarised(grey: np.ndarray, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(grey.shape) < grey).astype(np.float32)


def path_of(name: str, minutes: float) -> Path:
    return FOLDER / f"{name}-{minutes:g}-minutes-{torch.get_num_threads()}-threads.json"


def test_rows(test: np.ndarray, minutes: float) -> np.ndarray:
    """Return the rows on which a run of `minutes` is judged."""
    return test if minutes >= MINUTES_FOR_ALL_ROWS else test[TENTH]


def judged(log_p: np.ndarray, n_test: int) -> dict[str, float]:
    """Return the mean log p of these rows, and of those that every run is judged on."""
    tenth = log_p[TENTH] if len(log_p) == n_test else log_p
    return {
        "log p": float(log_p.mean()),
        "test rows": len(log_p),
        "log p of a tenth": float(tenth.mean()),
    }


@torch.no_grad()
def watched_log_p(
    network: nn.Module, test: np.ndarray, now: float, seconds: list[float], watched: list[float]
) -> float:
    """Return log p of some test rows, without a trace in the global generator; NaN until due."""
    last = max((t for t, v in zip(seconds, watched, strict=True) if v == v), default=0.0)
    if now < WATCHING_FACTOR * last:
        return math.nan
    x = torch.from_numpy(test[::WATCHED])
    if isinstance(network, PlainVAE):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            parts = [network.log_weights(rows, N_WATCHING_DRAWS) for rows in x.split(50)]
        log_weight = torch.cat(parts, 1)
        return float(log_weight.logsumexp(0).mean()) - math.log(N_WATCHING_DRAWS)
    k = network.family.n_components
    noise = torch.randn(N_WATCHING_DRAWS, k, generator=make_generator(0))
    parts = [objective.log_predictive(network, rows, None, noise, 64) for rows in x.split(100)]
    return float(torch.cat(parts).mean())


def fit(name: str, minutes: float, grey: np.ndarray, test: np.ndarray) -> None:
    """Train for `minutes`, the schedules made for as many epochs as fit in; write the record.

    What a cut takes back is made again and its time counted twice.
    """
    path = path_of(name, minutes)
    X = binarised(grey, seed=1)
    share, begin = FIRST_PART.get(name, (0.0, {}))

    def estimator(n_epochs: int, checkpoint: Path | None, **changes: Any) -> DynamicVAE:
        vae = DynamicVAE(
            50,
            hidden_layer_sizes=(200, 200),
            activation="tanh",
            max_iter=n_epochs,
            early_stopping=False,
            n_mc=1,
            device="cpu",
            random_state=0,
            checkpoint=checkpoint,
            **FITS[name] | changes,
        )
        vae.grey = torch.from_numpy(grey)
        return vae

    def epochs_in(seconds: float, **changes: Any) -> int:
        stamps = [clock()]
        with noted_epochs(lambda *_: stamps.append(clock())):
            estimator(2, None, **changes).fit(X)
        # The first epoch of the trial has the start in it.
        start, epoch = np.diff(stamps)
        return max(3, round((seconds - (start - epoch)) / epoch))

    if not path.exists():
        n_epochs = [epochs_in(60 * minutes * (1 - share))]
        if share:
            n_epochs.insert(0, epochs_in(60 * minutes * share, **begin))
        empty = {"n_epochs": n_epochs, "seconds": [], "bounds": [], "watched": []}
        path.write_text(json.dumps(empty))
    record = json.loads(path.read_text())
    since = clock() - (record["seconds"] or [0.0])[-1]
    n_before = 0

    def note(epoch: int, bound: float, network: nn.Module) -> None:
        nonlocal since
        now = clock()
        done = n_before + epoch - 1
        for key in ("seconds", "bounds", "watched"):
            del record[key][done:]
        log_p = watched_log_p(network, test, now - since, record["seconds"], record["watched"])
        record["seconds"].append(now - since)
        record["bounds"].append(bound)
        record["watched"].append(log_p)
        path.write_text(json.dumps(record))
        since += clock() - now

    *first, last = record["n_epochs"]
    checkpoint, halfway = path.with_suffix(".npz"), path.with_suffix(".pickle")
    vae = estimator(last, checkpoint)
    with noted_epochs(note):
        if first:
            if not halfway.exists():
                begun = estimator(first[0], checkpoint, **begin).fit(X)
                state = begun.__getstate__()
                del state["grey"]
                written = halfway.with_suffix(".part")
                written.write_bytes(pickle.dumps(state))
                written.replace(halfway)
            vae.__setstate__(pickle.loads(halfway.read_bytes()))
            vae.set_params(max_iter=last, warm_start=True, **FITS[name])
            n_before = first[0]
        vae.fit(X)
    rows = test_rows(test, minutes)
    record |= judged(vae.log_predictive(rows, n_importance=N_DRAWS), len(test))
    path.write_text(json.dumps(record))
    halfway.unlink(missing_ok=True)


def loop(name: str, minutes: list[float], grey: np.ndarray, test: np.ndarray) -> None:
    """Train by the plain loop, which has no schedule, and write a record at each of `minutes`."""
    state_path = FOLDER / f"{name}-{torch.get_num_threads()}-threads.pt"
    torch.manual_seed(0)
    model = PlainVAE((200, 200), 50, nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.from_numpy(grey)), batch_size=128, shuffle=True)
    seconds, bounds, watched = [], [], []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        seconds, bounds, watched = state["seconds"], state["bounds"], state["watched"]
    for limit in sorted(minutes):
        path = path_of(name, limit)
        if path.exists():
            continue
        while not seconds or seconds[-1] < 60 * limit:
            begin = clock()
            bound = plain_epoch(model, optimizer, loader, torch.bernoulli, LOOPS[name])
            now = (seconds or [0.0])[-1] + clock() - begin
            watched.append(watched_log_p(model, test, now, seconds, watched))
            seconds.append(now)
            bounds.append(bound)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "seconds": seconds,
                "bounds": bounds,
                "watched": watched,
            }
            torch.save(state, state_path)
        rows = test_rows(test, limit)
        record = {
            "seconds": seconds,
            "bounds": bounds,
            "watched": watched,
            **judged(model.log_predictive(torch.from_numpy(rows), N_DRAWS), len(test)),
        }
        path.write_text(json.dumps(record))


def run(report: Report, names: list[str], minutes: list[float]) -> None:
    """Make the runs that are missing, then print a row for each."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with np.load(DATA / "mnist.npz", allow_pickle=False) as data:
        grey = (data["X_train"] / 255.0).astype(np.float32)
        test = binarised(data["X_test"] / 255.0, seed=0)
    rows = []
    for name in names:
        if name in LOOPS:
            loop(name, minutes, grey, test)
        for limit in minutes:
            path = path_of(name, limit)
            if name in FITS and not (path.exists() and "log p" in json.loads(path.read_text())):
                fit(name, limit, grey, test)
            record = json.loads(path.read_text())
            reached = [
                next((t for t, v in zip(record["seconds"], record["watched"], strict=True)
                      if v >= level), float("nan"))
                for level in LEVELS
            ]  # fmt: skip
            rows.append(
                [
                    name,
                    f"{limit:g}",
                    len(record["seconds"]),
                    record["seconds"][-1],
                    record["bounds"][-1],
                    record["log p"],
                    record["test rows"],
                    record["log p of a tenth"],
                    *reached,
                ]
            )
    report.table(
        "Dynamically binarised MNIST, 2 x 200 tanh, 50 codes, "
        f"{torch.get_num_threads()} threads; log p with {N_DRAWS} draws on so many test rows "
        "binarised with seed 0, and on every tenth, as for all runs; seconds until log p "
        f"with {N_WATCHING_DRAWS} draws on every {WATCHED}th test row passes a level (of one "
        "thread: those it was at work)",
        [
            "fit", "minutes", "epochs", "seconds", "last bound", "log p", "test rows", "of a tenth",
            *(f"to {v}" for v in LEVELS),
        ],
        rows,
    )  # fmt: skip
