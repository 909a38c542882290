"""BayesianLinearVI beside BayesianRidge, ARDRegression, and the matrix products it cannot avoid."""

from functools import partial
from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.linear_model import ARDRegression, BayesianRidge
from sklearn.preprocessing import StandardScaler

from benchmarks.common import DATA, Report, peak_memory, seconds
from skvi import BayesianLinearVI

# (prior, rows, features, kind of rows)
CASES = [
    ("ridge", 10_000, 100, ""),
    ("ard", 10_000, 100, ""),
    ("ridge", 200_000, 50, ""),
    ("ard", 200_000, 50, ""),
    ("ridge", 200_000, 50, "float32"),
    ("ridge", 200_000, 50, "offset 1e6"),
    ("ridge", 200_000, 50, "noise 1e-6"),
    ("ridge", 300, 3000, ""),
    ("ridge", 20_000, 1000, ""),
]
PEERS = {"ridge": BayesianRidge, "ard": ARDRegression}
LEVEL = 0.9


def regression(n: int, p: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, p))
    weights = rng.normal(size=p) * (rng.random(p) < 0.3)
    return X, X @ weights + noise * rng.normal(size=n)


def gram_and_eigenvalues(X: np.ndarray, y: np.ndarray) -> None:
    """Do the least that a shared prior needs: one product, one decomposition of the small side."""
    np.linalg.eigh(X.T @ X if X.shape[0] >= X.shape[1] else X @ X.T)
    X.T @ y


def speed(report: Report, cases: list[tuple[str, int, int, str]]) -> None:
    rows = []
    for prior, n, p, kind in cases:
        X, y = regression(n, p, noise=1e-6 if kind == "noise 1e-6" else 1.0)
        X = X + 1e6 if kind == "offset 1e6" else X
        limit = seconds(partial(gram_and_eigenvalues, X, y), 5)
        X = X.astype(np.float32) if kind == "float32" else X
        ours = seconds(partial(BayesianLinearVI(prior=prior, device="cpu").fit, X, y), 5)
        peer = seconds(partial(PEERS[prior]().fit, X, y))
        rows.append([prior, f"{n} x {p}", kind, limit, peer, ours, peer / ours, ours / limit])
    report.table(
        "Seconds per fit",
        [
            "prior", "n x p", "kind", "Gram + eigen", "scikit-learn", "skvi", "ratio",
            "times Gram + eigen",
        ],
        rows,
    )  # fmt: skip


def memory(report: Report, n: int) -> None:
    peak_memory(
        report,
        (n, 50),
        lambda start, n: np.random.default_rng(start).normal(size=(n, 50)),
        warm_up="""
import numpy as np
from skvi import BayesianLinearVI
warm_up = np.random.default_rng(0).normal(size=(2000, 50))
BayesianLinearVI(device="cpu").fit(warm_up, warm_up[:, 0])""",
        fit='BayesianLinearVI(device="cpu").fit(X, X[:, 0] - X[:, 1])',
    )


def splits(data: Any, n_train: int | None) -> Any:
    """Yield standardised ``(X_train, y_train, X_test, y_test)`` of the usual splits."""
    X, y = data["X"], data["y"].ravel()
    for i in range(int(data["n_splits"])):
        test = data[f"test_{i}"]
        train = np.setdiff1d(np.arange(len(X)), test)
        if n_train is not None:
            train = np.random.default_rng(i).choice(train, n_train, replace=False)
        scaler = StandardScaler().fit(X[train])
        yield scaler.transform(X[train]), y[train], scaler.transform(X[test]), y[test]


def held_out(report: Report, sizes: list[int | None]) -> None:
    """Score the two priors and their peers on the same rows."""
    scores, gains = [], []
    for path in sorted((DATA / "uci").glob("*.npz")):
        data = np.load(path, allow_pickle=False)
        for n_train in sizes:
            found: dict[str, list[list[float]]] = {}
            n_rows = 0
            for X, y, X_test, y_test in splits(data, n_train):
                n_rows = len(X)
                for prior, peer_class in PEERS.items():
                    ours = BayesianLinearVI(prior=prior, device="cpu").fit(X, y)
                    error = ours.predict(X_test) - y_test
                    low, high = ours.predict_interval(X_test, LEVEL).T
                    covered = np.mean((low <= y_test) & (y_test <= high))
                    density = ours.log_predictive(X_test, y_test).mean()
                    found.setdefault(f"skvi {prior}", []).append(
                        [density, np.sqrt(np.mean(error**2)), covered]
                    )
                    peer = peer_class().fit(X, y)
                    mean, std = peer.predict(X_test, return_std=True)
                    reach = norm.ppf(0.5 + LEVEL / 2) * std
                    found.setdefault(peer_class.__name__, []).append(
                        [
                            norm.logpdf(y_test, mean, std).mean(),
                            np.sqrt(np.mean((mean - y_test) ** 2)),
                            np.mean(np.abs(mean - y_test) <= reach),
                        ]
                    )
            for name, values in found.items():
                scores.append([path.stem, n_rows, name, *np.mean(values, axis=0).tolist()])
            for prior, peer_class in PEERS.items():
                gain = np.subtract(found[f"skvi {prior}"], found[peer_class.__name__])[:, 0]
                # of the splits, which share rows: a rough measure
                error = gain.std(ddof=1) / np.sqrt(len(gain))
                gains.append([path.stem, n_rows, prior, float(gain.mean()), float(error)])
    report.table(
        f"Held-out rows of the UCI splits; intervals of {LEVEL:.0%}",
        ["data", "training rows", "model", "log density per row", "RMSE", "coverage"],
        scores,
    )
    report.table(
        "Gain in log density per row over the peer with the same prior",
        ["data", "training rows", "prior", "gain", "standard error"],
        gains,
    )


def run(report: Report, *, quick: bool) -> None:
    speed(report, CASES[:3] if quick else CASES)
    memory(report, 100_000 if quick else 1_000_000)
    if (DATA / "uci").exists():
        held_out(report, [None] if quick else [None, 40])
