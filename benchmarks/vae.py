"""VAETransformer beside a plain DataLoader loop on the same network, and linear densities."""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import Report, seconds
from skvi import VAETransformer

WIDTH, CODES, FEATURES = 512, 16, 784


def pictures(n: int) -> np.ndarray:
    """Binary pictures with structure: thresholded random mixtures of bumps."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(10, FEATURES))
    return (rng.normal(size=(n, 10)) @ basis > 2.0).astype(np.float32)


def dataloader_loop(X: np.ndarray, batch_size: int) -> None:
    """One epoch as the tutorials write it."""
    encoder = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * CODES))
    decoder = nn.Sequential(nn.Linear(CODES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, FEATURES))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    loader = DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=batch_size, shuffle=True)
    for (x,) in loader:
        mean, log_var = encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        loss = nn.functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        loss = loss + 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum()
        optimizer.zero_grad()
        (loss / len(x)).backward()
        optimizer.step()


def run(report: Report, *, quick: bool) -> None:
    X = pictures(4_000 if quick else 20_000)
    rows = []
    for batch_size in (128, 1024):
        settings = {
            "hidden_layer_sizes": (WIDTH,),
            "activation": "relu",
            "batch_size": batch_size,
            "early_stopping": False,
            "n_mc": 1,
            "device": "cpu",
            "random_state": 0,
        }

        def ours(max_iter: int, settings: dict = settings) -> None:
            VAETransformer(CODES, max_iter=max_iter, **settings).fit(X)

        epoch = (seconds(partial(ours, 3), 2) - seconds(partial(ours, 1), 2)) / 2
        peer = seconds(partial(dataloader_loop, X, batch_size), 2)
        rows.append([batch_size, len(X) / peer, len(X) / epoch, peer / epoch])
    report.table(
        f"Training rows per second, {FEATURES}-{WIDTH}-{CODES}-{WIDTH}-{FEATURES}, float32",
        ["batch", "DataLoader loop", "skvi", "ratio"],
        rows,
    )

    digits = load_digits().data + np.random.default_rng(0).uniform(size=(1797, 64))
    train, test = train_test_split(digits, test_size=0.25, random_state=0)
    rows = []
    for n_components in (2, 8):
        vae = VAETransformer(n_components, random_state=0, device="cpu").fit(train)
        rows.append(
            [
                n_components,
                vae.score(test),
                float(vae.log_predictive(test, n_importance=200).mean()),
                float(FactorAnalysis(n_components, random_state=0).fit(train).score(test)),
                float(PCA(n_components).fit(train).score(test)),
            ]
        )
    report.table(
        "Digits, nats per held-out row",
        ["codes", "VAE ELBO", "VAE log p", "FactorAnalysis", "PPCA"],
        rows,
    )
