"""VariationalGMM beside scikit-learn's BayesianGaussianMixture."""

import itertools
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import BayesianGaussianMixture
from sklearn.preprocessing import StandardScaler

from benchmarks.common import (
    DATA,
    Report,
    gemm_gflops,
    peak_memory,
    seconds,
    seconds_per_pass,
    synchronise,
)
from skvi import VariationalGMM
from skvi.inference.monitor import Monitor
from skvi.models.mixture import active
from skvi.models.mixture.bound import Posterior, State, coordinate_ascent, expectation
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
            plain = {"algorithm": "cavi", "moves": None, "device": "cpu"}

            def ours(max_iter: int, X: np.ndarray = X, common: dict = common | plain) -> None:
                VariationalGMM(**common, max_iter=max_iter).fit(X)

            def peer(max_iter: int, X: np.ndarray = X, common: dict = common) -> None:
                BayesianGaussianMixture(**common, max_iter=max_iter).fit(X)

            # A multiple of eight: passes over active rows alternate with full ones.
            our_time = seconds_per_pass(ours, 16)
            with mock.patch.object(active, "pays", return_value=False):
                full_time = seconds_per_pass(ours, 8)
            peer_time = seconds_per_pass(peer, 2 if n * d * d * k > 1e9 else 10)
            # bound and statistics: two products with 1 + D + D (D + 1) / 2 features
            features = 1 + d + (d * (d + 1) // 2 if covariance_type == "full" else d)
            bound = 4.0 * n * k * features / limit
            rows.append(
                [
                    covariance_type, dtype, f"{n} x {d}, K={k}", peer_time, our_time,
                    peer_time / our_time, full_time, peer_time / full_time, full_time / bound,
                ]
            )  # fmt: skip
    report.table(
        "Seconds per coordinate-ascent pass",
        [
            "covariance",
            "dtype",
            "size",
            "scikit-learn",
            "skvi",
            "ratio",
            "full passes only",
            "ratio",
            "times GEMM limit",
        ],
        rows,
    )


def peers(report: Report, sizes: list[tuple[int, int, int]]) -> None:
    """Passes of mixtures on torch that fit by EM: the same E-step, no posterior."""
    try:
        from pomegranate.distributions import Normal
        from pomegranate.gmm import GeneralMixtureModel
    except ImportError:
        print("\npomegranate is not installed: no pass of it is timed.")
        return
    rows = []
    for n, d, k in sizes:
        X = clusters(n, d, k)
        x = torch.from_numpy(X)
        law = [Normal(covariance_type="full") for _ in range(k)]
        model = GeneralMixtureModel(law, max_iter=1, random_state=0).fit(x)

        def em_pass(model: Any = model, x: torch.Tensor = x) -> None:
            model.summarize(x)
            model.from_summaries()

        settings = {"algorithm": "cavi", "moves": None, "tol": 0.0}
        settings |= {"init_params": "random_from_data"}

        def ours(max_iter: int, X: np.ndarray = X, k: int = k, settings: dict = settings) -> None:
            VariationalGMM(k, **settings, random_state=0, max_iter=max_iter, device="cpu").fit(X)

        our_time, peer_time = seconds_per_pass(ours, 16), seconds(em_pass, 2)
        rows.append([f"{n} x {d}, K={k}", peer_time, our_time, peer_time / our_time])
    report.table(
        "Seconds per pass, full, float64, beside EM of pomegranate",
        ["size", "pomegranate", "skvi", "ratio"],
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
    since = time.perf_counter()

    def noted(record: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Monitor, *args: Any, **options: Any) -> Any:
            result = record(self, *args, **options)
            del times[len(self.history) :]  # what was taken back
            times.extend([time.perf_counter() - since] * (len(self.history) - len(times)))
            return result

        return call

    with mock.patch.multiple(Monitor, update=noted(Monitor.update), accept=noted(Monitor.accept)):
        return fit(), times


def time_to_bound(report: Report) -> None:
    """Seconds to the bound of 100 passes of scikit-learn from the same seed."""
    pixels = np.load(DATA / "mnist.npz", allow_pickle=False)["X_train"] / 255.0
    X = PCA(32, svd_solver="covariance_eigh").fit_transform(pixels)
    rows = []
    for seed in range(3):
        settings = {"n_components": 30, "init_params": "k-means++", "random_state": seed}
        peer, peer_time = timed(
            lambda settings=settings: BayesianGaussianMixture(
                **settings, max_iter=100, tol=0.0, reg_covar=0.0
            ).fit(X)
        )
        target = exact_bound(peer, X)
        rows.append([seed, "scikit-learn", 100, peer_time, target, peer_time, 1.0])
        model, times = timed_climb(
            lambda settings=settings: VariationalGMM(**settings, device="cpu").fit(X)
        )
        bounds = np.array(model.elbo_history_) / len(X)
        reached = np.flatnonzero(bounds >= target)
        when = times[reached[0]] if reached.size else float("nan")
        rows.append([seed, "skvi", model.n_iter_, times[-1], bounds[-1], when, peer_time / when])
    report.table(
        f"Time to the bound: MNIST, PCA-32, K = 30, full, Dirichlet process ({len(X)} rows)",
        ["seed", "fit", "passes", "seconds", "nats per row", "to scikit-learn's bound", "ratio"],
        rows,
    )


def memory(report: Report, n: int) -> None:
    peak_memory(
        report,
        (n, 16),
        lambda start, n: clusters(n, 16, 20, seed=start),
        warm_up="""
import warnings
import numpy as np
from skvi import VariationalGMM
warnings.simplefilter("ignore")
warm_up = np.random.default_rng(0).normal(size=(1000, 16))
VariationalGMM(2, max_iter=1, device="cpu").fit(warm_up)""",
        fit='VariationalGMM(20, max_iter=3, tol=0.0, random_state=0, device="cpu").fit(X)',
    )


def planted_clusters(n: int, d: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of random shape (standard deviations 1/2 to 1) whose centres are 8 apart or more."""
    rng = np.random.default_rng(seed)
    apart = 8.0
    radius = apart * max(0.8, 0.5 * (k / 0.3) ** (1.0 / d))
    centres: list[np.ndarray] = []
    while len(centres) < k:
        direction = rng.normal(size=d)
        point = radius * rng.random() ** (1.0 / d) * direction / np.linalg.norm(direction)
        if all(np.linalg.norm(point - centre) >= apart for centre in centres):
            centres.append(point)
        else:
            radius *= 1.0005
    labels = rng.integers(k, size=n)
    X = np.array(centres)[labels]
    for j in range(k):
        rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
        noise = rng.normal(size=((labels == j).sum(), d)) * rng.uniform(0.5, 1.0, size=d)
        X[labels == j] += noise @ rotation
    return X, labels


def bound_from_truth(model: VariationalGMM, X: np.ndarray, labels: np.ndarray) -> float:
    """Bound in nats of coordinate ascent that starts at the true labels, under model's priors."""
    device = torch.device("cpu")
    _, prior = model._model.on(device)
    rows = Rows(X, model._model.affine, device)
    x, _ = rows[slice(None)]
    resp = torch.zeros(model.n_components, len(X), dtype=torch.float64)
    sizes = np.bincount(labels)
    rank = np.empty_like(sizes)
    rank[np.argsort(-sizes)] = np.arange(len(sizes))  # sticks prefer the largest first
    resp[torch.as_tensor(rank[labels]), torch.arange(len(X))] = 1.0
    shape = type(prior.components)
    reference = torch.zeros(model.n_components, X.shape[1], dtype=torch.float64)
    state = State(prior, shape.unpack(reference, shape.sums(x, shape.monomials(x), resp)))
    step, before = coordinate_ascent(prior, rows), -np.inf
    for _ in range(1000):
        state, value = step(state)
        if value - before < 1e-5 * len(X):
            break
        before = value
    return value - len(X) * model._model.affine.log_abs_det


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds of one call."""
    since = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = function()
    return result, time.perf_counter() - since


def one_start(
    X: np.ndarray, labels: np.ndarray, k: int, init_params: str, seed: int, *, peer: bool
) -> dict[str, tuple[float, float, float]]:
    """By name of the fit: clusters found, bound as high as from the truth, and seconds."""
    n_components = 2 * k
    common = {"init_params": init_params, "random_state": seed}

    def ours(moves: str | None) -> VariationalGMM:
        return VariationalGMM(n_components, moves=moves, device="cpu", **common).fit(X)

    def theirs(n_init: int) -> BayesianGaussianMixture:
        peer = BayesianGaussianMixture(
            n_components=n_components, n_init=n_init, max_iter=1000, **common
        )
        return peer.fit(X)

    fits = {
        "skvi": timed(lambda: ours("auto")),
        "skvi, moves=None": timed(lambda: ours(None)),
    }
    model, seconds = fits["skvi"]
    if peer:
        fits["scikit-learn"] = timed(lambda: theirs(1))
        # As many starts as fit into our time.
        n_init = max(1, round(seconds / fits["scikit-learn"][1]))
        again = fits["scikit-learn"] if n_init == 1 else timed(lambda: theirs(n_init))
        fits["scikit-learn, equal time"] = again
        fits["scikit-learn, n_init=10"] = timed(lambda: theirs(10))
    target = bound_from_truth(model, X, labels) - 0.1
    result = {}
    for name, (fit, spent) in fits.items():
        value = fit.elbo_ if isinstance(fit, VariationalGMM) else exact_bound(fit, X) * len(X)
        ari = adjusted_rand_score(labels, fit.predict(X))
        result[name] = (float(ari >= 0.99), float(value >= target), spent)
    return result


def planted(
    k: int, d: int, per_cluster: int, init_params: str, seed: int, *, peer: bool
) -> dict[str, tuple[float, float, float]]:
    """The results of :func:`one_start` on one data set of planted clusters."""
    X, labels = planted_clusters(per_cluster * k, d, k, seed)
    return one_start(X, labels, k, init_params, seed, peer=peer)


def quality(report: Report, cells: list[tuple[int, int, int]], *, repeats: int, peer: bool) -> None:
    """Are planted clusters found from one bad start?

    "Found" is an adjusted Rand index of 0.99 at least; "bound" is a bound no more than 0.1 nats
    below that of the ascent from the true labels. (Under the default priors fewer components than
    planted may have the higher bound.)
    """
    rows = []
    # Processes of one thread each: such small fits gain nothing from more.
    with ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        for (k, d, per_cluster), init_params in itertools.product(
            cells, ("random", "random_from_data")
        ):
            work = partial(planted, k, d, per_cluster, init_params, peer=peer)
            results = list(pool.map(work, range(repeats)))
            for name in results[0]:
                values = [result[name] for result in results]
                found, high, spent = np.mean(values, axis=0).tolist()
                either = float(np.mean([max(outcome[:2]) for outcome in values]))
                cell = [k, d, per_cluster * k, init_params]
                rows.append([*cell, name, found, high, either, spent])
                print("...", *rows[-1], flush=True)  # the whole table takes long
    report.table(
        f"Planted clusters from one bad start, K = twice the truth, full: share of {repeats} data "
        "sets with ARI >= 0.99, with a bound as high as from the truth, with either",
        ["clusters", "D", "rows", "start", "fit", "found", "bound", "either", "seconds"],
        rows,
    )


def pruning(report: Report) -> None:
    """How many of 30 components do the Dirichlet process and the Dirichlet keep?"""
    wine, digits = load_wine(), load_digits()
    sets: list[tuple[str, np.ndarray, np.ndarray]] = [
        ("wine", StandardScaler().fit_transform(wine.data), wine.target),
        ("digits, PCA-16", PCA(16, random_state=0).fit_transform(digits.data), digits.target),
    ]
    if (DATA / "geyser.csv").exists():
        table = np.genfromtxt(
            DATA / "geyser.csv", delimiter=",", names=True, dtype=None, encoding="utf-8"
        )
        numbers = np.column_stack([table["duration"], table["waiting"]]).astype(float)
        sets.append(("geyser", numbers, np.unique(table["kind"], return_inverse=True)[1]))
    if (DATA / "dlbcl.npz").exists():
        stored = np.load(DATA / "dlbcl.npz", allow_pickle=False)
        sets.append(("dlbcl", stored["X"].astype(float), stored["y"]))
    rows = []
    for name, X, y in sets:
        for covariance_type in ("full", "diag"):
            for moves in ("auto", None):
                model, spent = timed(
                    lambda X=X, covariance_type=covariance_type, moves=moves: VariationalGMM(
                        30, covariance_type=covariance_type, moves=moves, random_state=0,
                        device="cpu",
                    ).fit(X)
                )  # fmt: skip
                # dlbcl: the rows that no expert gated (0) say nothing.
                known = y > 0 if name == "dlbcl" else np.full(len(y), True)
                ari = float(adjusted_rand_score(y[known], model.predict(X[known])))
                rows.append(
                    [
                        name, f"{X.shape[0]} x {X.shape[1]}", covariance_type, str(moves),
                        model.n_active_components_, model.elbo_, ari, spent,
                    ]
                )  # fmt: skip
    report.table(
        "Components kept of 30 (Dirichlet process, default priors)",
        ["data", "size", "covariance", "moves", "active", "elbo_", "ARI", "seconds"],
        rows,
    )


def algorithms(report: Report, *, repeats: int) -> None:
    """Time and passes to the lower one of two final bounds, less a thousandth of a nat a row."""
    cases = [
        ("20 000 x 8, K=10, overlapping", 20_000, 8, 10, 1.0, "full"),
        ("200 000 x 16, K=20, overlapping", 200_000, 16, 20, 0.7, "full"),
        ("200 000 x 16, K=20, separated", 200_000, 16, 20, 3.0, "full"),
        ("200 000 x 16, K=20, overlapping", 200_000, 16, 20, 0.7, "diag"),
    ]
    rows = []
    for name, n, d, k, spread, shape in cases:
        X = clusters(n, d, k, spread=spread)
        ratios = []
        for seed in range(repeats):
            settings = {"covariance_type": shape, "random_state": seed, "max_iter": 100}
            settings |= {"moves": ["reorder"]}
            climbs = {}
            for algorithm in ("cavi", "memoized"):
                model = VariationalGMM(k, **settings, algorithm=algorithm, device="cpu")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model, times = timed_climb(lambda model=model, X=X: model.fit(X))
                climbs[algorithm] = np.array(model.elbo_history_) / n, times
            target = min(history[-1] for history, _ in climbs.values()) - 1e-3
            first = {a: int((history >= target).argmax()) for a, (history, _) in climbs.items()}
            when = {a: climbs[a][1][i] for a, i in first.items()}
            ratios.append(when["cavi"] / when["memoized"])
            rows.append(
                [
                    name, shape, seed, first["cavi"] + 1, first["memoized"] + 1, when["cavi"],
                    when["memoized"], ratios[-1],
                ]
            )  # fmt: skip
    report.table(
        'To the same bound: algorithm="cavi" and "memoized"',
        ["data", "covariance", "seed", "passes cavi", "laps", "seconds cavi", "memoized", "ratio"],
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


_SCORING_SCRIPT = """
import pickle, sys, time
import numpy as np
def status(name):  # of this process alone
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
model = pickle.load(open(sys.argv[1], "rb"))
X = np.load(sys.argv[2], mmap_mode="r")
score = getattr(model, sys.argv[3])
score(X[:10_000])  # what loading the libraries costs
before = status("RssAnon")
import threading
peak, done = [before], threading.Event()
def watch():
    while not done.wait(0.02):
        peak.append(status("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
since = time.perf_counter()
result = score(X)
spent = time.perf_counter() - since
done.set()
watcher.join()
print(spent, (max(peak) - before) * 1024, result.nbytes)
"""


def scoring(report: Report, n: int) -> None:
    """Rows per second from a memory-mapped file, beside the E-step and scikit-learn."""
    if not Path("/proc/self/status").exists():
        print("\nMemory of scoring is measured on Linux only.")
        return
    rows = []
    sample = clusters(100_000, 16, 20)
    settings = {"n_components": 20, "random_state": 0, "max_iter": 5}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = VariationalGMM(**settings, device="cpu").fit(sample)
        peer = BayesianGaussianMixture(**settings).fit(sample)
        e_step = seconds(lambda: expectation(*_fitted(model, sample)))
        rows.append(["E-step of a fit", len(sample), len(sample) / e_step, "", ""])
        for method in ("score_samples", "predict", "predict_proba"):
            spent = seconds(lambda method=method: getattr(peer, method)(sample), 1)
            rows.append([f"scikit-learn {method}", len(sample), len(sample) / spent, "", ""])
        path, pickled = Path(folder) / "X.npy", Path(folder) / "model.pickle"
        pickled.write_bytes(pickle.dumps(model))
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(n, 16))
        for start in range(0, n, len(sample)):
            part = stored[start : start + len(sample)]
            part[:] = sample[: len(part)]
        stored.flush()
        del stored
        for method in ("score_samples", "predict", "transform"):
            command = [sys.executable, "-c", _SCORING_SCRIPT, str(pickled), str(path), method]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            spent, peak, output = map(float, done.stdout.split())
            rows.append([f"skvi {method}", n, n / spent, output / 1e6, (peak - output) / 1e6])
    report.table(
        "Scoring n x 16, K = 20, full, from a memory-mapped file",
        ["method", "n", "rows per second", "output MB", "memory beyond it, MB"],
        rows,
    )


def _fitted(model: VariationalGMM, X: np.ndarray) -> tuple[Posterior, Rows]:
    """Posterior and rows of a fit as its passes see them."""
    device = torch.device("cpu")
    posterior, _ = model._model.on(device)
    return posterior, Rows(X, model._model.affine, device)


def gpu_pass(
    n: int, d: int, k: int, device: torch.device, dtype: type = np.float32
) -> tuple[float, float]:
    """Seconds of one full pass over rows that stay on the device, and its ratio to the limit.

    The limit is the time that the two matrix products of a pass need at the rate that float64
    products reach on the same device.
    """
    rng = np.random.default_rng(0)
    X = np.empty((n, d), dtype)
    for start in range(0, n, 100_000):
        part = X[start : start + 100_000]
        part[:] = clusters(len(part), d, k, seed=start)
    model = VariationalGMM(k, random_state=0, device="cpu", max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X[rng.choice(n, min(n, 50_000), replace=False)])
    posterior, _ = model._model.on(device)
    rows = Rows(X, model._model.affine, device)

    def one_pass() -> None:
        expectation(posterior, rows)
        synchronise(device)

    one_pass()
    per_pass = seconds(one_pass)
    size = min(8192, max(256, n))
    rate = 1e9 * gemm_gflops(torch.float64, size, device)
    limit = 4.0 * n * k * Full.n_monomials(d) / rate
    return per_pass, per_pass / limit


def gpu(report: Report, n: int = 10_000_000, d: int = 64, k: int = 64) -> None:
    if not torch.cuda.is_available():
        print("\nPasses on a GPU are measured where there is one.")
        return
    per_pass, ratio = gpu_pass(n, d, k, torch.device("cuda"))
    report.table(
        "One pass on a GPU, full, rows resident",
        ["device", "size", "seconds per pass", "times float64 GEMM limit"],
        [[torch.cuda.get_device_name(), f"{n} x {d}, K={k}", per_pass, ratio]],
    )


def run(report: Report, *, quick: bool, only: list[str] | None = None) -> None:
    cases = [("full", "float64"), ("diag", "float64"), ("tied", "float64")]
    cases += [("spherical", "float64"), ("full", "float32")]
    cells = [(5, 2, 200), (5, 8, 200), (20, 2, 200), (20, 8, 200), (5, 32, 800)]
    cells += [(20, 16, 400), (50, 2, 200), (50, 8, 200), (50, 16, 400)]
    parts = {
        "speed": lambda: speed(
            report, SIZES[:2] if quick else SIZES, cases[:2] if quick else cases
        ),
        "peers": lambda: peers(report, SIZES[: 1 if quick else 3]),
        "memory": lambda: memory(report, 200_000 if quick else 2_000_000),
        "algorithms": lambda: algorithms(report, repeats=1 if quick else 3),
        "scoring": lambda: scoring(report, 200_000 if quick else 10_000_000),
        "gpu": lambda: gpu(report),
        "missing": lambda: missing(report, repeats=1 if quick else 5),
        "quality": lambda: quality(
            report, cells[:2] if quick else cells, repeats=2 if quick else 20, peer=False
        ),
        "equal_time": lambda: quality(report, [cells[1], cells[3]], repeats=2, peer=True),
        "pruning": lambda: pruning(report),
    }
    if (DATA / "mnist.npz").exists() and not quick:
        parts["time_to_bound"] = lambda: time_to_bound(report)
    for name in only or parts:
        parts[name]()
