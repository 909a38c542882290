"""VariationalGMM beside scikit-learn's BayesianGaussianMixture."""

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import BayesianGaussianMixture

from benchmarks.common import DATA, Report, gemm_gflops, seconds_per_pass
from skvi import VariationalGMM
from skvi.inference.monitor import Monitor
from skvi.models.mixture.bound import Posterior, expectation
from skvi.models.mixture.components import Full
from skvi.models.mixture.weights import StickBreaking
from skvi.runtime.blocks import Affine, Rows

SIZES = [(20_000, 8, 10), (100_000, 16, 20), (100_000, 32, 32), (200_000, 64, 32)]


def clusters(n: int, d: int, k: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return labelled_clusters(n, d, k, seed, spread)[0]


def labelled_clusters(
    n: int, d: int, k: int, seed: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(scale=spread, size=(k, d))
    labels = rng.integers(k, size=n)
    return centres[labels] + rng.normal(size=(n, d)), labels


def speed(report: Report, sizes: list[tuple[int, int, int]], cases: list[tuple[str, str]]) -> None:
    limit = gemm_gflops() * 1e9
    rows = []
    for covariance_type, dtype in cases:
        for n, d, k in sizes:
            X = clusters(n, d, k).astype(dtype)
            common = {
                "n_components": k,
                "covariance_type": covariance_type,
                "init_params": "random_from_data",
                "random_state": 0,
                "tol": 0.0,
            }

            def ours(max_iter: int, X: np.ndarray = X, common: dict = common) -> None:
                VariationalGMM(**common, max_iter=max_iter, device="cpu").fit(X)

            def peer(max_iter: int, X: np.ndarray = X, common: dict = common) -> None:
                BayesianGaussianMixture(**common, max_iter=max_iter).fit(X)

            # A multiple of eight: passes over active components alternate with full ones.
            our_time = seconds_per_pass(ours, 16)
            peer_time = seconds_per_pass(peer, 2 if n * d * d * k > 1e9 else 10)
            # bound and statistics: two products with 1 + D + D (D + 1) / 2 features
            features = 1 + d + (d * (d + 1) // 2 if covariance_type == "full" else d)
            bound = 4.0 * n * k * features / limit
            rows.append(
                [
                    covariance_type, dtype, f"{n} x {d}, K={k}", peer_time, our_time,
                    peer_time / our_time, our_time / bound,
                ]
            )  # fmt: skip
    report.table(
        "Seconds per coordinate-ascent pass",
        ["covariance", "dtype", "size", "scikit-learn", "skvi", "ratio", "times GEMM limit"],
        rows,
    )


def exact_bound(peer: BayesianGaussianMixture, X: np.ndarray) -> float:
    """Bound of a fitted full Dirichlet-process mixture of scikit-learn, in nats per row."""

    def tensor(array: Any) -> torch.Tensor:
        return torch.as_tensor(np.array(array, dtype=np.float64))

    def components(mean: Any, kappa: Any, dof: Any, inverse_scale: Any) -> Full:
        return Full(tensor(mean), tensor(kappa), tensor(dof), Full.factor(tensor(inverse_scale)))

    K, D = peer.means_.shape
    prior = Posterior(
        StickBreaking.prior(K, peer.weight_concentration_prior_, torch.device("cpu")),
        components(
            peer.mean_prior_[None],
            [peer.mean_precision_prior_],
            [peer.degrees_of_freedom_prior_],
            np.asarray(peer.covariance_prior_)[None],
        ),
    )
    a, b = peer.weight_concentration_
    dof = peer.degrees_of_freedom_
    posterior = Posterior(
        StickBreaking(tensor(a), tensor(b)),
        components(peer.means_, peer.mean_precision_, dof, peer.covariances_ * dof[:, None, None]),
    )
    rows = Rows(X, Affine(np.zeros(D), np.ones(D)), torch.device("cpu"))
    _, local = expectation(posterior, rows)
    return (local - float(posterior.kl(prior))) / len(X)


def timed_climb(fit: Callable[[], VariationalGMM]) -> tuple[VariationalGMM, list[float]]:
    """Fit, and note when each pass was done, in seconds from the call."""
    times: list[float] = []
    update = Monitor.update
    since = time.perf_counter()

    def noted(self: Monitor, bound: float, *, last: bool = False) -> Any:
        times.append(time.perf_counter() - since)
        return update(self, bound, last=last)

    Monitor.update = noted  # type: ignore[method-assign]
    try:
        return fit(), times
    finally:
        Monitor.update = update  # type: ignore[method-assign]


def time_to_bound(report: Report) -> None:
    pixels = np.load(DATA / "mnist.npz", allow_pickle=False)["X_train"] / 255.0
    X = PCA(32, svd_solver="covariance_eigh").fit_transform(pixels)
    settings = {"n_components": 30, "init_params": "k-means++", "random_state": 0}
    since = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer = BayesianGaussianMixture(**settings, max_iter=100, tol=0.0, reg_covar=0.0).fit(X)
    peer_time = time.perf_counter() - since
    target = exact_bound(peer, X)
    rows = [["scikit-learn, 100 passes", 100, peer_time, target, peer_time, 1.0]]
    for seed in range(3):
        settings["random_state"] = seed
        model, times = timed_climb(lambda: VariationalGMM(**settings, device="cpu").fit(X))
        bounds = np.array(model.elbo_history_) / len(X)
        reached = np.flatnonzero(bounds >= target)
        when = times[reached[0]] if reached.size else float("nan")
        rows.append(
            [f"skvi, seed {seed}", model.n_iter_, times[-1], bounds[-1], when, peer_time / when]
        )
    report.table(
        f"Time to the bound: MNIST, PCA-32, K = 30, full, Dirichlet process ({len(X)} rows)",
        ["fit", "passes", "seconds", "nats per row", "to scikit-learn's bound", "ratio"],
        rows,
    )


_MEMORY_SCRIPT = """
import sys, warnings
import numpy as np
from skvi import VariationalGMM
warnings.simplefilter("ignore")
def status(name):  # of this process alone: ru_maxrss begins with the peak of the parent
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
warm_up = np.random.default_rng(0).normal(size=(1000, 16))
VariationalGMM(2, max_iter=1, device="cpu").fit(warm_up)  # what loading the libraries costs
before = status("VmRSS")
X = np.load(sys.argv[1], mmap_mode="r" if sys.argv[2] == "memmap" else None)
VariationalGMM(20, max_iter=3, tol=0.0, random_state=0, device="cpu").fit(X)
print(status("VmHWM") - before)
"""


def memory(report: Report, n: int) -> None:
    if not Path("/proc/self/status").exists():
        print("\nPeak memory is measured on Linux only.")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "X.npy"
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(n, 16))
        for start in range(0, n, 100_000):
            part = stored[start : start + 100_000]
            part[:] = clusters(len(part), 16, 20, seed=start)
        stored.flush()
        del stored
        size = n * 16 * 8 / 1e6
        for kind in ("array", "memmap"):
            command = [sys.executable, "-c", _MEMORY_SCRIPT, str(path), kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            # A mapped file's pages count as resident too, until the system wants them back.
            peak = int(done.stdout) * 1024 / 1e6
            rows.append([kind, f"{n} x 16", size, peak, peak - size])
    report.table(
        "Peak memory of a fit, MB",
        ["input", "size", "input MB", "peak above an idle process", "beyond the input"],
        rows,
    )


def quality(report: Report, *, repeats: int) -> None:
    rows = []
    for k, d in [(5, 2), (20, 8), (50, 16)]:
        found: dict[str, list[float]] = {"skvi": [], "scikit-learn": []}
        spent = {"skvi": 0.0, "scikit-learn": 0.0}
        for seed in range(repeats):
            X, labels = labelled_clusters(200 * k, d, k, seed, spread=6.0)
            models = {
                "skvi": VariationalGMM(2 * k, random_state=seed, device="cpu"),
                "scikit-learn": BayesianGaussianMixture(n_components=2 * k, random_state=seed),
            }
            for name, model in models.items():
                since = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    predicted = model.fit_predict(X)
                spent[name] += (time.perf_counter() - since) / repeats
                found[name].append(adjusted_rand_score(labels, predicted))
        scores = [float(np.mean(found[name])) for name in models]
        rows.append([k, d, *scores, *spent.values()])
    report.table(
        f"Planted clusters, K = twice the truth, one start, mean of {repeats} data sets",
        ["clusters", "D", "ARI skvi", "ARI scikit-learn", "seconds skvi", "seconds scikit-learn"],
        rows,
    )


def _with_holes(X: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Remove cells at random; one of each row stays."""
    rng = np.random.default_rng(seed)
    holes = rng.uniform(size=X.shape) < share
    holes[np.arange(len(X)), rng.integers(X.shape[1], size=len(X))] = False
    return np.where(holes, np.nan, X)


def missing(report: Report, *, repeats: int) -> None:
    """Fit with holes, beside filling in means first: held-out scores and errors of imputation."""
    sets = {"wine": load_wine().data, "iris": load_iris().data}
    if (DATA / "dlbcl.npz").exists():
        with np.load(DATA / "dlbcl.npz", allow_pickle=False) as file:
            sets["dlbcl"] = file["X"][:1000].astype(np.float64)
    if (DATA / "penguins.csv").exists():
        penguins = np.genfromtxt(DATA / "penguins.csv", delimiter=",", skip_header=1)[:, 2:6]
        sets["penguins"] = penguins[~np.isnan(penguins).any(axis=1)]
    rows = []
    for name, data in sets.items():
        data = (data - data.mean(0)) / data.std(0)
        for share in (0.1, 0.3):
            for covariance_type in ("full", "diag"):
                results = []
                for seed in range(repeats):
                    order = np.random.default_rng(seed).permutation(len(data))
                    train, test = data[order[::2]], data[order[1::2]]
                    train = _with_holes(train, share, seed)
                    holed = _with_holes(test, share, seed + 1)
                    holes = np.isnan(holed)
                    means = np.where(np.isnan(train), np.nanmean(train, axis=0), train)
                    result = []
                    for table in (train, means):
                        model = VariationalGMM(
                            10, covariance_type=covariance_type, random_state=seed, device="cpu"
                        ).fit(table)
                        error = (model.impute(holed) - test)[holes]
                        result += [
                            model.score(test),
                            float(model.log_predictive(test).mean()),
                            float(np.sqrt(np.square(error).mean())),
                        ]
                    error = (np.nanmean(train, axis=0) - test)[holes]
                    results.append([*result, float(np.sqrt(np.square(error).mean()))])
                ours, naive, rest = np.split(np.mean(results, axis=0), [3, 6])
                pairs = np.column_stack([ours, naive]).ravel().tolist()
                rows.append([name, share, covariance_type, *pairs, float(rest[0])])
    report.table(
        f"Missing cells, held-out half, skvi with holes / after mean imputation ({repeats} splits)",
        [
            "data", "removed", "covariance", "ELBO/row", "mean-filled", "log p/row", "mean-filled",
            "RMSE", "mean-filled", "RMSE of means",
        ],
        rows,
    )  # fmt: skip
    if "penguins" not in sets:
        return
    rows = []
    for covariance_type in ("full", "tied", "diag", "spherical"):
        model = VariationalGMM(
            10, covariance_type=covariance_type, random_state=0, device="cpu"
        ).fit(penguins)
        used = int((model.weights_ > 0.01).sum())
        rows.append([covariance_type, model.n_iter_, used, model.elbo_, model.score(penguins)])
    report.table(
        f"Penguins with their {int(np.isnan(penguins).sum())} holes, K = 10",
        ["covariance", "passes", "components above 1 %", "ELBO", "nats per row"],
        rows,
    )


def run(report: Report, *, quick: bool) -> None:
    cases = [("full", "float64"), ("diag", "float64"), ("tied", "float64")]
    cases += [("spherical", "float64"), ("full", "float32")]
    speed(report, SIZES[:2] if quick else SIZES, cases[:2] if quick else cases)
    memory(report, 200_000 if quick else 2_000_000)
    quality(report, repeats=2 if quick else 5)
    missing(report, repeats=1 if quick else 5)
    if (DATA / "mnist.npz").exists() and not quick:
        time_to_bound(report)
