"""Parts of the benchmarks that most machines cannot run at size."""

import numpy as np
import pytest
import torch

gmm = pytest.importorskip("benchmarks.gmm")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_pass_that_is_timed_on_a_gpu_runs_anywhere(dtype, device):
    per_pass, ratio = gmm.gpu_pass(2000, 3, 4, torch.device(device), dtype)
    assert 0.0 < per_pass < np.inf
    assert 0.0 < ratio < np.inf
