"""BayesianLogisticVI beside LogisticRegression: held-out log loss, calibration, seconds."""

from collections.abc import Callable
from functools import partial

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.common import Report, seconds
from skvi import BayesianLogisticVI

DATA = {"breast_cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}
CLASSIFIERS: dict[str, Callable[[], BaseEstimator]] = {
    "LogisticRegression": lambda: LogisticRegression(max_iter=1000),
    "LogisticRegressionCV": lambda: LogisticRegressionCV(
        max_iter=1000, scoring="neg_log_loss", l1_ratios=(0.0,), use_legacy_attributes=False
    ),
    **{
        f"BayesianLogisticVI {prior}": lambda prior=prior: BayesianLogisticVI(
            prior=prior, device="cpu"
        )
        for prior in ("ridge", "ard", "horseshoe")
    },
}


def calibration_error(proba: np.ndarray, hit: np.ndarray, n_bins: int = 10) -> float:
    """Mean distance of confidence and frequency over bins of the most probable class."""
    confidence = proba.max(axis=1)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, confidence - hit, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(proba))


def run(report: Report, *, quick: bool) -> None:
    rows = []
    for data, load in DATA.items():
        if quick and data == "digits":
            continue
        X, y = load(return_X_y=True)
        folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
        for name, make in CLASSIFIERS.items():
            proba = np.empty((len(X), len(np.unique(y))))
            time = 0.0
            for train, test in folds:
                model = make_pipeline(StandardScaler(), make())
                time += seconds(partial(model.fit, X[train], y[train]), repeat=1)
                proba[test] = model.predict_proba(X[test])
            hit = proba.argmax(axis=1) == y
            rows.append(
                [data, name, log_loss(y, proba), hit.mean(), calibration_error(proba, hit), time]
            )
    report.table(
        "Held-out rows of five folds",
        ["data", "classifier", "log loss", "accuracy", "calibration error", "seconds of five fits"],
        rows,
    )
