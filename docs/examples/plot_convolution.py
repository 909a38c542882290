"""
Convolutions in an autoencoder
==============================

``encoder`` and ``decoder`` take torch modules, or callables that build them. Here convolutions read
and draw the 8 x 8 digits that come with scikit-learn, beside the perceptrons that are built in:
everything else (priors, scores, draws, grid search) stays as it is.

It prints one table and saves a picture beside this file.
"""

import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from torch import nn

from skvi import VAETransformer

START = time.perf_counter()
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
IMAGES = HERE / "images"
IMAGES.mkdir(exist_ok=True)


def table(title: str, header: list[str], rows: list[list[object]]) -> None:
    """Print rows under a title, numbers to the right."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[j]) for row in [header, *cells]) for j in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *cells]:
        others = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *others]))


# %%
# 1. The networks
# ---------------
# A callable gets the lengths of a row that goes in and of one that comes out, so that the same one
# serves every likelihood and posterior. Training starts from the values that it gives its layers,
# which `random_state` seeds.


def encoder(n_in: int, n_out: int) -> nn.Module:
    """Return a network from pictures to the numbers that describe q(z|x)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, n_out),
    )


def decoder(n_in: int, n_out: int) -> nn.Module:
    """Return a network from codes to pixels."""
    return nn.Sequential(
        nn.Linear(n_in, 32 * 2 * 2),
        nn.SiLU(),
        nn.Unflatten(1, (32, 2, 2)),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


# %%
# 2. Held-out bounds
# ------------------
# Pixels are counts from 0 to 16. Those above 7 are ink, and the likelihood is Bernoulli: scores are
# log probabilities of whole pictures, in nats.

digits = load_digits()
ink = (digits.data > 7).astype(np.float64)
X_train, X_test, _, y_test = train_test_split(
    ink, digits.target, test_size=0.25, random_state=0, stratify=digits.target
)
networks: dict[str, dict[str, Any]] = {
    "perceptrons": {},
    "convolutions": {"encoder": encoder, "decoder": decoder},
}
rows, fitted = [], {}
for name, layers in networks.items():
    for prior in ("normal", "vamp"):
        since = time.perf_counter()
        vae = VAETransformer(
            16, prior=prior, learning_rate_init=0.01, max_iter=60, random_state=0, **layers
        )
        with warnings.catch_warnings():
            # Sixty epochs show the difference; max_iter=None goes on to the end of it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            vae.fit(X_train)
        seconds = time.perf_counter() - since
        fitted[name, prior] = vae
        log_p = float(vae.log_predictive(X_test, n_importance=100).mean())
        rows.append([f"{name}, {prior}", vae.score(X_test), log_p, round(seconds, 1)])
table(
    f"Digits ({len(X_train)} + {len(X_test)} held out, 64 pixels): nats per held-out picture",
    ["networks, prior", "ELBO", "log p", "fit s"],
    rows,
)

# %%
# 3. What the codes draw
# ----------------------
# Means of the likelihood, so that grey is doubt about a pixel: held-out pictures and what their
# codes say of them, pictures of codes from the prior, and the way from one held-out picture to
# another.

vae = fitted["convolutions", "vamp"]
chosen = np.array([np.flatnonzero(y_test == digit)[0] for digit in range(10)])
_, codes = vae.sample(20, random_state=0)
drawn = vae.inverse_transform(codes)
panels = {
    "held out": X_test[chosen],
    "reconstructed": vae.reconstruct(X_test[chosen]),
    "drawn": drawn[:10],
    "drawn again": drawn[10:],
    "from 3 to 8": vae.interpolate(X_test[chosen[3]], X_test[chosen[8]], 10),
}
figure, axes = plt.subplots(len(panels), 10, figsize=(10, 5.6), layout="constrained")
for row, (name, pictures) in zip(axes, panels.items(), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
figure.suptitle("Convolutional encoder and decoder, vamp prior, 16 codes")
figure.savefig(IMAGES / "convolution.png", dpi=110)
plt.close(figure)

print(f"\nPicture: {IMAGES.name}/convolution.png")
print(f"Total: {time.perf_counter() - START:.1f} s")
