"""VAETransformer beside a plain DataLoader loop, pythae (if installed), and linear densities."""

import importlib.util
import itertools
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import DATA, RESULTS, Report
from skvi import VAETransformer
from skvi.estimators import vae as module

PYTHAE = importlib.util.find_spec("pythae") is not None
LABELS = {
    "loop": "DataLoader loop, float32",
    "pythae": "pythae's trainer, float32",
    "float32": "skvi, float32",
    "bfloat16": "skvi, bfloat16",
}
LEVELS = (-120, -110, -105, -100, -95, -90, -88)


@contextmanager
def noted_epochs(note: Callable[[int, float], None]) -> Iterator[None]:
    """Call ``note(epoch, bound)`` after every epoch of the fits inside."""
    announce = module.announce_epoch

    def noted(name: str, epoch: int, bound: float, *args: Any, **options: Any) -> None:
        note(epoch, bound)

    module.announce_epoch = noted
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield
    finally:
        module.announce_epoch = announce


class PlainVAE(nn.Module):
    """The network and the loss as the tutorials write them: no linear path, no linear start."""

    def __init__(self, hidden: tuple[int, ...], n_codes: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = self._stack((784, *hidden, 2 * n_codes), act)
        self.decoder = self._stack((n_codes, *hidden[::-1], 784), act)

    @staticmethod
    def _stack(sizes: tuple[int, ...], act: type[nn.Module]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(sizes):
            layers += [nn.Linear(n, m), act()]
        return nn.Sequential(*layers[:-1])

    def bound(self, x: Tensor) -> Tensor:
        """One-draw estimate, summed over rows."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        fit = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return -fit - 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum()

    @torch.no_grad()
    def log_predictive(self, x: Tensor, n_importance: int) -> float:
        """Importance-weighted ``log p(x)``, the mean over rows."""
        values = []
        for row in x:
            mean, log_var = self.encoder(row).chunk(2)
            noise = torch.randn(n_importance, len(mean))
            z = mean + (0.5 * log_var).exp() * noise
            output = self.decoder(z)
            log_weight = (row * output - nn.functional.softplus(output)).sum(1)
            log_weight += 0.5 * (log_var + noise.square() - z.square()).sum(1)
            values.append(float(log_weight.logsumexp(0)) - math.log(n_importance))
        return float(np.mean(values))


def plain_epoch(
    model: PlainVAE,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    read: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """One epoch as the tutorials write it; the mean bound of its rows."""
    total = 0.0
    for (x,) in loader:
        bound = model.bound(read(x))
        optimizer.zero_grad()
        (-bound / len(x)).backward()
        optimizer.step()
        total += bound.item()
    return total / len(loader.dataset)


def pythae_epochs(X: np.ndarray, batch_size: int, n_epochs: int) -> tuple[list[float], PlainVAE]:
    """Train the same network by pythae's trainer; return seconds of each epoch and the network."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.getLogger("pythae").setLevel(logging.ERROR)
    plain = PlainVAE((512,), 16, nn.ReLU)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_var = self.layers(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).sigmoid())

    times: list[float] = []

    class Timed(BaseTrainer):
        def train_step(self, epoch: int) -> Any:
            since = time.perf_counter()
            loss = super().train_step(epoch)
            times.append(time.perf_counter() - since)
            return loss

    config = VAEConfig(input_dim=(784,), latent_dim=16, reconstruction_loss="bce")
    model = VAE(config, encoder=Encoder(), decoder=Decoder())
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=n_epochs,
            learning_rate=1e-3,
            per_device_train_batch_size=batch_size,
            no_cuda=True,
        )
        data = BaseDataset(torch.from_numpy(X), torch.zeros(len(X)))
        Timed(model, train_dataset=data, training_config=settings).train()
    return times, plain


# -- rows per second ------------------------------------------------------------------------------


def pictures(n: int) -> np.ndarray:
    """Binary pictures with structure: thresholded random mixtures of bumps."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(10, 784))
    return (rng.normal(size=(n, 10)) @ basis > 2.0).astype(np.float32)


def throughput(report: Report, *, n_rows: int, n_epochs: int) -> None:
    X, X_test = np.split(pictures(n_rows + 2000), [n_rows])
    rows = []
    for batch_size in (128, 1024):
        seconds: dict[str, list[float]] = {}

        def ours(precision: str, batch: int = batch_size, times: dict = seconds) -> VAETransformer:
            stamps = [time.perf_counter()]
            vae = VAETransformer(
                16,
                hidden_layer_sizes=(512,),
                activation="relu",
                batch_size=batch,
                max_iter=n_epochs,
                early_stopping=False,
                precision=precision,
                n_mc=8,
                device="cpu",
                random_state=0,
            )
            with noted_epochs(lambda *_: stamps.append(time.perf_counter())):
                vae.fit(X)
            # The first epoch has the start in it.
            times.setdefault(precision, []).extend(np.diff(stamps)[1:])
            return vae

        def held_out(network: PlainVAE) -> float:
            with torch.no_grad():
                return float(network.bound(torch.from_numpy(X_test))) / len(X_test)

        model = PlainVAE((512,), 16, nn.ReLU)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        data = TensorDataset(torch.from_numpy(X))
        loader = DataLoader(data, batch_size=batch_size, shuffle=True)
        # In turns, so that a disturbance meets all of them.
        for _ in range(2):
            for _ in range(n_epochs - 1):
                since = time.perf_counter()
                plain_epoch(model, optimizer, loader)
                seconds.setdefault("loop", []).append(time.perf_counter() - since)
            scores = {"loop": held_out(model)}
            if PYTHAE:
                times, network = pythae_epochs(X, batch_size, n_epochs)
                seconds.setdefault("pythae", []).extend(times[1:])
                scores["pythae"] = held_out(network)
            scores |= {name: ours(name).score(X_test) for name in ("float32", "bfloat16")}
        rates = {name: n_rows / min(times) for name, times in seconds.items()}
        for name, score in scores.items():
            ratio = rates[name] / rates["loop"]
            rows.append([batch_size, LABELS[name], rates[name], ratio, score])
    report.table(
        "Training rows per second, 784-512-16-512-784, ReLU, Bernoulli, Adam (skvi with its "
        f"linear path: 5% more arithmetic), best epoch; held-out ELBO after {n_epochs} epochs",
        ["batch", "training", "rows per second", "ratio", "ELBO"],
        rows,
    )


# -- time to a bound ------------------------------------------------------------------------------


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


def time_to_bound(report: Report, *, minutes: float, n_test: int) -> None:
    """Train both for `minutes`; a run of skvi that was cut goes on where it was."""
    with np.load(DATA / "mnist.npz", allow_pickle=False) as data:
        grey = (data["X_train"] / 255.0).astype(np.float32)
        test = binarised(data["X_test"][:n_test] / 255.0, seed=0)
    threads = torch.get_num_threads()
    RESULTS.mkdir(exist_ok=True)
    log_path = RESULTS / f"vae-dynamic-{minutes:g}-minutes.json"

    def skvi(n_epochs: int) -> DynamicVAE:
        path = log_path.with_suffix(".npz")
        vae = DynamicVAE(
            50,
            hidden_layer_sizes=(200, 200),
            activation="tanh",
            max_iter=n_epochs,
            early_stopping=False,
            n_mc=1,
            device="cpu",
            random_state=0,
            checkpoint=path if n_epochs > 2 else None,
        )
        vae.grey = torch.from_numpy(grey)
        return vae

    X = binarised(grey, seed=1)
    if not log_path.exists():
        stamps = [time.perf_counter()]
        with noted_epochs(lambda *_: stamps.append(time.perf_counter())):
            skvi(2).fit(X)
        start, epoch = np.diff(stamps)
        # The first epoch of the trial has the start in it.
        n_epochs = max(3, round((60 * minutes - (start - epoch)) / epoch))
        log_path.write_text(json.dumps({"n_epochs": n_epochs, "seconds": [], "bounds": []}))
    log = json.loads(log_path.read_text())
    since = time.perf_counter() - (log["seconds"][-1] if log["seconds"] else 0.0)

    def note(epoch: int, bound: float) -> None:
        del log["seconds"][epoch - 1 :], log["bounds"][epoch - 1 :]
        log["seconds"].append(time.perf_counter() - since)
        log["bounds"].append(bound)
        log_path.write_text(json.dumps(log))

    with noted_epochs(note):
        vae = skvi(log["n_epochs"]).fit(X)
    curves = {"skvi, defaults": (log["seconds"], log["bounds"])}
    quality = {"skvi, defaults": float(vae.log_predictive(test, n_importance=5000).mean())}

    torch.manual_seed(0)
    model = PlainVAE((200, 200), 50, nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.from_numpy(grey)), batch_size=128, shuffle=True)
    spent, seconds, bounds = 0.0, [], []
    while spent < log["seconds"][-1]:
        begin = time.perf_counter()
        bounds.append(plain_epoch(model, optimizer, loader, torch.bernoulli))
        spent += time.perf_counter() - begin
        seconds.append(spent)
    curves["plain loop"] = (seconds, bounds)
    quality["plain loop"] = model.log_predictive(torch.from_numpy(test), 5000)

    rows = []
    for name, (times, values) in curves.items():
        reached = [
            next((t for t, v in zip(times, values, strict=True) if v >= level), float("nan"))
            for level in LEVELS
        ]
        rows.append([name, len(times), times[-1], values[-1], quality[name], *reached])
    report.table(
        f"Dynamically binarised MNIST, 2 x 200 tanh, 50 codes, {minutes:g} minutes, {threads} "
        f"threads; log p with 5000 draws on the first {n_test} test rows, binarised with seed 0; "
        "seconds until the running bound of training passes a level",
        ["fit", "epochs", "seconds", "last bound", "log p", *(f"to {v}" for v in LEVELS)],
        rows,
    )
    log_path.unlink()


# -- tables ---------------------------------------------------------------------------------------


def tables() -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, rows and number of codes; counts are spread over their unit, to have a density."""
    rng = np.random.default_rng(0)
    yield "digits", load_digits().data + rng.uniform(size=(1797, 64)), 8
    for name, load, n_codes in (("breast cancer", load_breast_cancer, 5), ("wine", load_wine, 2)):
        yield name, StandardScaler().fit_transform(load().data), n_codes
    if (DATA / "frey_faces.npz").exists():
        with np.load(DATA / "frey_faces.npz", allow_pickle=False) as data:
            yield "frey faces", (data["X"] + rng.uniform(size=data["X"].shape)) / 256.0, 10


def density(report: Report, *, n_splits: int) -> None:
    rows = []
    for name, X, n_codes in tables():
        scores = []
        for seed in range(n_splits):
            train, test = train_test_split(X, test_size=0.2, random_state=seed)
            vae = VAETransformer(n_codes, random_state=seed, device="cpu").fit(train)
            scores.append(
                [
                    vae.score(test),
                    float(vae.log_predictive(test, n_importance=500).mean()),
                    FactorAnalysis(n_codes, max_iter=2000).fit(train).score(test),
                    PCA(n_codes).fit(train).score(test),
                ]
            )
        elbo, log_p, fa, ppca = (float(v) for v in np.mean(scores, axis=0))
        gain = (elbo - max(fa, ppca)) / X.shape[1]
        rows.append([name, f"{len(X)} x {X.shape[1]}", n_codes, elbo, log_p, fa, ppca, gain])
    report.table(
        f"Nats per held-out row, defaults, mean of {n_splits} splits",
        ["data", "size", "codes", "VAE ELBO", "VAE log p", "FA", "PPCA", "gain per feature"],
        rows,
    )


def run(report: Report, *, quick: bool, budget: list[float] | None = None) -> None:
    if budget is None:
        throughput(report, n_rows=4_000 if quick else 20_000, n_epochs=3 if quick else 5)
        density(report, n_splits=1 if quick else 3)
        budget = [] if quick else [2.0]
    if (DATA / "mnist.npz").exists():
        for minutes in budget:
            time_to_bound(report, minutes=minutes, n_test=500)
