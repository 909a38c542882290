"""What the benchmarks share: timing, tables, the record of the machine."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning

RESULTS = Path(__file__).parent / "results"
# Data sets that are not shipped: mnist.npz and others, beside the checkout or where SKVI_DATA says.
DATA = Path(os.environ.get("SKVI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def seconds(function: Callable[[], Any], repeat: int = 3) -> float:
    """Best wall time of `repeat` calls: the one that was disturbed least."""
    best = float("inf")
    for _ in range(repeat):
        since = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            function()
        best = min(best, time.perf_counter() - since)
    return best


def seconds_per_pass(fit: Callable[[int], Any], n_passes: int, repeat: int = 2) -> float:
    """Time of one pass: what `n_passes` more passes cost, so that start-up cancels."""
    return (seconds(lambda: fit(1 + n_passes), repeat) - seconds(lambda: fit(1), repeat)) / n_passes


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_gflops(
    dtype: torch.dtype = torch.float64, size: int = 2048, device: str | torch.device = "cpu"
) -> float:
    """Measured rate of a square product, the limit that passes and steps are held against."""
    a = torch.rand(size, size, device=device).to(dtype)

    def product() -> None:
        a @ a
        synchronise(a.device)

    product()
    return 2.0 * size**3 / seconds(product, 5) / 1e9


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


_MEMORY_SCRIPT = """
import sys
def status(name):  # of this process alone: ru_maxrss begins with the peak of the parent
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
{warm_up}  # what loading the libraries costs
before = status("VmRSS")
X = np.load(sys.argv[1], mmap_mode="r" if sys.argv[2] == "memmap" else None)
{fit}
print(status("VmHWM") - before)
"""


def peak_memory(
    report: "Report",
    shape: tuple[int, int],
    part: Callable[[int, int], np.ndarray],
    *,
    warm_up: str,
    fit: str,
) -> None:
    """Peak of a fit in a process of its own, from an array and from a memory-mapped file.

    ``part(start, n)`` makes n rows; `warm_up` and `fit` are statements, the second one about X.
    """
    if not Path("/proc/self/status").exists():
        print("\nPeak memory is measured on Linux only.")
        return
    rows = []
    script = _MEMORY_SCRIPT.format(warm_up=warm_up, fit=fit)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "X.npy"
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=shape)
        for start in range(0, len(stored), 100_000):
            place = stored[start : start + 100_000]
            place[:] = part(start, len(place))
        stored.flush()
        size = stored.nbytes / 1e6
        del stored
        for kind in ("array", "memmap"):
            command = [sys.executable, "-c", script, str(path), kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            # A mapped file's pages count as resident too, until the system wants them back.
            peak = int(done.stdout) * 1024 / 1e6
            rows.append([kind, f"{shape[0]} x {shape[1]}", size, peak, peak - size])
    report.table(
        "Peak memory of a fit, MB",
        ["input", "size", "input MB", "peak above an idle process", "beyond the input"],
        rows,
    )


class Report:
    """Tables printed as they are made, and written as JSON at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.record: dict[str, Any] = {"machine": machine(), "tables": {}}
        print("machine:", json.dumps(self.record["machine"]))

    def table(self, title: str, header: list[str], rows: list[list[Any]]) -> None:
        self.record["tables"][title] = {"header": header, "rows": rows}
        cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
        widths = [max(len(row[j]) for row in [header, *cells]) for j in range(len(header))]
        print(f"\n{title}")
        for row in [header, ["-" * w for w in widths], *cells]:
            print("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))

    def save(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps(self.record, indent=1, default=float))
        print(f"\nwritten: benchmarks/results/{path.name}")
