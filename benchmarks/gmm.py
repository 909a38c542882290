"""VariationalGMM beside scikit-learn's BayesianGaussianMixture."""

import numpy as np
from sklearn.mixture import BayesianGaussianMixture

from benchmarks.common import Report, gemm_gflops, seconds_per_pass
from skvi import VariationalGMM

SIZES = [(20_000, 8, 10), (100_000, 16, 20), (100_000, 32, 32), (200_000, 64, 32)]


def clusters(n: int, d: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(scale=3.0, size=(k, d))
    return centres[rng.integers(k, size=n)] + rng.normal(size=(n, d))


def speed(report: Report, sizes: list[tuple[int, int, int]], shapes: list[str]) -> None:
    limit = gemm_gflops() * 1e9
    rows = []
    for covariance_type in shapes:
        for n, d, k in sizes:
            X = clusters(n, d, k)
            n_passes = 2 if n * d * d * k > 1e9 else 10
            common = {
                "n_components": k,
                "covariance_type": covariance_type,
                "init_params": "random_from_data",
                "random_state": 0,
                "tol": 0.0,
            }

            def ours(max_iter: int, X=X, common=common) -> None:
                VariationalGMM(**common, max_iter=max_iter, device="cpu").fit(X)

            def peer(max_iter: int, X=X, common=common) -> None:
                BayesianGaussianMixture(**common, max_iter=max_iter).fit(X)

            our_time = seconds_per_pass(ours, n_passes)
            peer_time = seconds_per_pass(peer, n_passes)
            # bound and statistics: two products with 1 + D + D (D + 1) / 2 features
            features = 1 + d + (d * (d + 1) // 2 if covariance_type in {"full", "tied"} else d)
            bound = 4.0 * n * k * features / limit
            rows.append(
                [
                    covariance_type, f"{n} x {d}, K={k}", peer_time, our_time,
                    peer_time / our_time, our_time / bound,
                ]
            )  # fmt: skip
    report.table(
        "Seconds per coordinate-ascent pass",
        ["covariance", "size", "scikit-learn", "skvi", "ratio", "times GEMM limit"],
        rows,
    )


def run(report: Report, *, quick: bool) -> None:
    sizes = SIZES[:2] if quick else SIZES
    speed(report, sizes, ["full", "diag", "tied", "spherical"])
