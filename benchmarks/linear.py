"""BayesianLinearVI beside BayesianRidge, ARDRegression, and the matrix products it cannot avoid."""

from functools import partial

import numpy as np
from sklearn.linear_model import ARDRegression, BayesianRidge

from benchmarks.common import Report, seconds
from skvi import BayesianLinearVI

SIZES = [(10_000, 100), (200_000, 50), (300, 3000), (20_000, 1000)]


def regression(n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, p))
    weights = rng.normal(size=p) * (rng.random(p) < 0.3)
    return X, X @ weights + rng.normal(size=n)


def gram_and_eigenvalues(X: np.ndarray, y: np.ndarray) -> None:
    """Do the least that a shared prior needs: one product, one decomposition of the small side."""
    np.linalg.eigh(X.T @ X if X.shape[0] >= X.shape[1] else X @ X.T)
    X.T @ y


def run(report: Report, *, quick: bool) -> None:
    rows = []
    for n, p in SIZES[:2] if quick else SIZES:
        X, y = regression(n, p)
        limit = seconds(partial(gram_and_eigenvalues, X, y))
        ours = seconds(partial(BayesianLinearVI(device="cpu").fit, X, y))
        peer = seconds(partial(BayesianRidge().fit, X, y))
        rows.append(["ridge", f"{n} x {p}", peer, ours, peer / ours, ours / limit])
        if p <= 100:
            ours = seconds(partial(BayesianLinearVI(prior="ard", device="cpu").fit, X, y))
            peer = seconds(partial(ARDRegression().fit, X, y))
            rows.append(["ard", f"{n} x {p}", peer, ours, peer / ours, ours / limit])
    report.table(
        "Seconds per fit",
        ["prior", "n x p", "scikit-learn", "skvi", "ratio", "times Gram + eigen limit"],
        rows,
    )
