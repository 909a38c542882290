"""VAETransformer beside a plain DataLoader loop, pythae (if installed), and linear densities."""

import importlib.util
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import mnist
from benchmarks.common import DATA, Report, gemm_gflops
from benchmarks.mnist import noted_epochs
from benchmarks.plain_vae import PlainVAE, plain_epoch
from skvi import VAETransformer
from skvi.models.vae import objective
from skvi.runtime.random import matched_noise

PYTHAE = importlib.util.find_spec("pythae") is not None
LABELS = {
    "loop": "DataLoader loop, float32",
    "pythae": "pythae's trainer, float32",
    "float32": "skvi, float32",
    "bfloat16": "skvi, bfloat16",
}
RUNS = [*mnist.FITS, *mnist.LOOPS]


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


# Of the square products that are the limit: launching them must not count.
_SIZE = {"cpu": 2048, "cuda": 8192}
# Multiplications of a row, forward and back, without those for the gradient of the pictures.
_FLOPS_PER_ROW = 6 * (784 * 512 + 512 * 32 + 16 * 512 + 512 * 784) - 2 * 784 * 512


def loop_epochs(
    X: np.ndarray, batch_size: int, n_epochs: int, device: str
) -> tuple[list[float], PlainVAE]:
    """Train by the plain loop; return seconds of each epoch and the network."""
    torch.manual_seed(0)
    model = PlainVAE((512,), 16, nn.ReLU).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=batch_size, shuffle=True)
    times = []
    for _ in range(n_epochs):
        since = time.perf_counter()
        plain_epoch(model, optimizer, loader, lambda x: x.to(device))
        times.append(time.perf_counter() - since)
    return times, model


def our_epochs(
    X: np.ndarray, X_test: np.ndarray, batch_size: int, n_epochs: int, device: str, precision: str
) -> tuple[list[float], list[float], VAETransformer, float]:
    """Fit; return seconds and held-out ELBO of each epoch, the start in the first, and the fit.

    Last, the seconds of what follows the epochs: the scores of all rows.
    """
    times: list[float] = []
    bounds: list[float] = []
    x = torch.from_numpy(X_test).to(device)
    noise = matched_noise(8, 16, seed=0).to(x)
    since = time.perf_counter()

    @torch.no_grad()
    def note(epoch: int, bound: float, network: nn.Module) -> None:
        nonlocal since
        times.append(time.perf_counter() - since)
        terms = objective.elbo_terms(network, x, None, noise, 1)
        bounds.append(float((terms.reconstruction - terms.kl).mean()))
        since = time.perf_counter()

    vae = VAETransformer(
        16,
        hidden_layer_sizes=(512,),
        activation="relu",
        batch_size=batch_size,
        max_iter=n_epochs,
        early_stopping=False,
        precision=precision,
        n_mc=8,
        device=device,
        random_state=0,
    )
    with noted_epochs(note):
        vae.fit(X)
    end = time.perf_counter() - since
    return times, bounds, vae, end


class Run(NamedTuple):
    """Seconds of each epoch, of all, and until the loop's last held-out ELBO; the own last one."""

    epochs: list[float]
    seconds: float
    to_goal: float
    score: float


def throughput(report: Report, *, n_rows: int, n_epochs: int, device: str = "cpu") -> None:
    X, X_test = np.split(pictures(n_rows + 2000), [n_rows])
    limits = {
        name: 1e9 * gemm_gflops(dtype, _SIZE[device], device) / _FLOPS_PER_ROW
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }

    def held_out(network: PlainVAE) -> float:
        with torch.no_grad():
            x = torch.from_numpy(X_test).to(next(network.parameters()).device)
            return float(network.bound(x)) / len(X_test)

    rows = []
    for batch_size in (128, 1024):
        runs: dict[str, list[Run]] = {}
        # In turns, so that a disturbance meets all of them.
        for _ in range(2):
            times, network = loop_epochs(X, batch_size, n_epochs, device)
            goal = held_out(network)
            runs.setdefault("loop", []).append(Run(times, sum(times), sum(times), goal))
            if PYTHAE and device == "cpu":
                times, network = pythae_epochs(X, batch_size, n_epochs)
                run = Run(times, sum(times), math.nan, held_out(network))
                runs.setdefault("pythae", []).append(run)
            for name in ("float32", "bfloat16"):
                times, bounds, vae, end = our_epochs(X, X_test, batch_size, n_epochs, device, name)
                n_needed = next((n for n, b in enumerate(bounds, 1) if b >= goal), None)
                to_goal = math.nan if n_needed is None else sum(times[:n_needed])
                run = Run(times, sum(times) + end, to_goal, vae.score(X_test))
                runs.setdefault(name, []).append(run)
        # The first epochs find their memory, and skvi's has the start in it.
        rates = {
            name: n_rows / min(t for run in made for t in run.epochs[1:])
            for name, made in runs.items()
        }
        for name, made in runs.items():
            ratio = rates[name] / rates["loop"]
            limit = limits.get(name, limits["float32"]) / rates[name]
            total = min(run.seconds for run in made)
            # NaN if one of them did not come there: not the better luck.
            to_goal = float(np.min([run.to_goal for run in made]))
            rows.append(
                [batch_size, LABELS[name], rates[name], ratio, limit, made[-1].score, total,
                 to_goal]
            )  # fmt: skip
    report.table(
        f"Training rows per second on {torch.device(device).type}, 784-512-16-512-784, ReLU, "
        "Bernoulli, Adam (skvi with its linear path: 5% more arithmetic), best epoch; limit: "
        "the network's products at the rate of a square one in the same precision; held-out ELBO "
        f"after {n_epochs} epochs, the seconds of the fit, skvi's start and last scores included, "
        "and those to the end of the epoch after which it is no less than the loop's after all",
        [
            "batch",
            "training",
            "rows per second",
            "ratio",
            "times limit",
            "ELBO",
            "seconds",
            "to loop's ELBO",
        ],
        rows,
    )


# -- tables ---------------------------------------------------------------------------------------


def tables() -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, rows and number of codes; counts are spread over their unit, to have a density."""
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(3, 20))
    yield "linear, made", rng.normal(size=(1000, 3)) @ loadings + rng.normal(size=(1000, 20)), 3
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


def run(
    report: Report, *, quick: bool, only: list[str] | None = None, budget: list[float] | None = None
) -> None:
    usual = ["throughput", "gpu", "density", "elbo", "loop"]
    parts = only or (usual if budget is None else list(RUNS))
    unknown = set(parts) - {*usual, *RUNS}
    if unknown:
        raise SystemExit(f"no such part of vae: {', '.join(sorted(unknown))}")
    if "throughput" in parts:
        throughput(report, n_rows=4_000 if quick else 20_000, n_epochs=3 if quick else 5)
    if "gpu" in parts and torch.cuda.is_available():
        throughput(report, n_rows=60_000, n_epochs=5, device="cuda")
    elif "gpu" in parts:
        print("\nTraining on a GPU is measured where there is one.")
    if "density" in parts:
        density(report, n_splits=1 if quick else 3)
    runs = [part for part in parts if part in RUNS]
    if runs and (only or budget or not quick):
        if (DATA / "mnist.npz").exists():
            mnist.run(report, runs, budget or [2.0])
        else:
            print("\nTraining on MNIST is measured where mnist.npz is.")
