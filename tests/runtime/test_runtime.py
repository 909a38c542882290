"""Devices, generators, row blocks and moments."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from skvi.runtime import blocks
from skvi.runtime.batches import Batches
from skvi.runtime.blocks import Affine, Rows, power_of_two, row_slices
from skvi.runtime.device import has_fast_bfloat16, resolve_device
from skvi.runtime.linalg import inv_chol, log_det_from_chol
from skvi.runtime.moments import weighted_moments
from skvi.runtime.random import draw_seed, make_generator, make_rng

CPU = torch.device("cpu")


class TestDevice:
    def test_auto_follows_a_tensor_then_the_machine(self):
        assert resolve_device("auto", torch.zeros(1)) == CPU
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert resolve_device("auto", np.zeros(1)).type == expected

    def test_explicit_devices(self):
        assert resolve_device("cpu") == CPU
        assert resolve_device(CPU) == CPU

    @pytest.mark.parametrize(
        ("device", "match"),
        [("tpu-9000", "not a device"), ("meta", "not supported"), ("cuda:99", "was asked for")],
    )
    def test_impossible_devices_are_errors(self, device, match):
        with pytest.raises(ValueError, match=match):
            resolve_device(device)

    def test_bfloat16_is_asked_of_the_device_itself(self, monkeypatch):
        current = []

        @contextlib.contextmanager
        def inside(device):
            current.append(device.index)
            yield
            current.pop()

        def supported(*, including_emulation):
            return not including_emulation and current == [1]

        monkeypatch.setattr(torch.cuda, "device", inside)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert has_fast_bfloat16(torch.device("cuda", 1))
        assert not has_fast_bfloat16(torch.device("cuda", 0))


class TestRandom:
    def test_seeds(self):
        assert draw_seed(7) == 7
        assert draw_seed(np.int64(7)) == 7
        assert draw_seed(None) != draw_seed(None)
        legacy = np.random.RandomState(0)
        assert draw_seed(legacy) != draw_seed(legacy)
        assert draw_seed(np.random.RandomState(0)) == draw_seed(np.random.RandomState(0))
        assert draw_seed(np.random.default_rng(0)) == draw_seed(np.random.default_rng(0))

    @pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "0"])
    def test_bad_seeds(self, bad):
        with pytest.raises(ValueError, match="random_state"):
            draw_seed(bad)

    def test_generators_are_private_and_reproducible(self):
        state = torch.get_rng_state()
        first = torch.rand(3, generator=make_generator(1))
        assert torch.equal(first, torch.rand(3, generator=make_generator(1)))
        assert torch.equal(torch.get_rng_state(), state)
        assert make_rng(1).random() == make_rng(1).random()


class TestBlocks:
    @given(st.integers(1, 500), st.integers(1, 90))
    def test_slices_cover_the_rows_in_order(self, n_rows, step):
        covered = np.concatenate([np.arange(n_rows)[rows] for rows in row_slices(n_rows, step)])
        assert_array_equal(covered, np.arange(n_rows))

    @pytest.mark.parametrize("keep", [None, "rows", "columns"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_rows_convert_shift_and_scale_without_touching_the_input(
        self, dtype, keep, device, rng
    ):
        X = np.asfortranarray(rng.normal(size=(300, 4)).astype(dtype) + dtype(1e4))
        before = X.copy()
        X.flags.writeable = False
        affine = Affine(X.mean(0, dtype=float), X.std(0, dtype=float))
        weight = rng.uniform(size=300)
        rows = Rows(X, affine, torch.device(device), weight, keep=keep)
        assert rows.kept == (keep is not None or device == "cuda")
        expected = (X.astype(float) - affine.shift) / affine.scale
        seen = list(rows.blocks(1 << 20))
        assert len(seen) > 1 or device == "cuda"
        assert_array_equal(torch.cat([x for _, x, _ in seen]).cpu(), expected)
        assert_array_equal(torch.cat([w for *_, w in seen]).cpu(), weight)
        picked = np.array([5, 299, 5])
        assert_array_equal(rows[picked][0].cpu(), expected[picked])
        assert_array_equal(X, before)

    def test_rows_beyond_the_budget_are_not_kept(self, rng, monkeypatch):
        X = rng.normal(size=(100, 3))
        monkeypatch.setattr(blocks, "_RESIDENT_BYTES", X.nbytes - 1)
        assert not Rows(X, Affine(np.zeros(3), np.ones(3)), CPU, keep="rows").kept

    def test_memory_is_used_again(self):
        workspace, like = blocks.Workspace(), torch.zeros((), dtype=torch.float64)
        first = workspace.take("a", like, 3, 4)
        assert first.shape == (3, 4)
        assert workspace.take("a", like, 2, 5).data_ptr() == first.data_ptr()
        assert workspace.take("b", like, 2, 5).data_ptr() != first.data_ptr()
        assert workspace.take("a", like, 5, 5).shape == (5, 5)

    def test_blocks_grow_with_the_budget(self, monkeypatch):
        small = blocks.block_rows(1000, CPU)
        monkeypatch.setitem(blocks._WORKSPACE_BYTES, "cpu", 1 << 26)
        assert blocks.block_rows(1000, CPU) > small

    def test_affine_log_determinant(self):
        assert Affine(np.zeros(2), np.array([2.0, 8.0])).log_abs_det == pytest.approx(np.log(16.0))

    @given(st.floats(1e-300, 1e300))
    def test_powers_of_two(self, scale):
        power = float(power_of_two(np.array([scale]))[0])
        assert np.frexp(power)[0] == 0.5
        assert 0.5 <= scale / power <= 1.0
        assert power_of_two(np.array([0.0]))[0] == 1.0


class TestMoments:
    @given(
        st.integers(0, 2**16),
        st.sampled_from([1e-150, 1e-8, 1.0, 1e8, 1e150]),
        st.sampled_from([0.0, 1.0, 1e6]),
    )
    def test_equal_the_textbook_at_any_scale_and_offset(self, seed, scale, offset):
        rng = np.random.default_rng(seed)
        base, weight = rng.normal(size=(50, 3)), rng.uniform(size=50)
        mean, std = weighted_moments((base + offset) * scale, weight)
        expected = np.average(base, axis=0, weights=weight)
        spread = np.sqrt(np.average((base - expected) ** 2, axis=0, weights=weight))
        assert_allclose(mean / scale, expected + offset, rtol=1e-12, atol=1e-14)
        assert_allclose(std / scale, spread, rtol=1e-9)

    def test_constant_columns_have_no_spread(self):
        X = np.full((7, 2), 0.1)
        mean, std = weighted_moments(X, np.array([0.3, 1.7, 1.0, 0.1, 2.0, 9.0, 1e-9]))
        assert_array_equal(mean, [0.1, 0.1])
        assert_array_equal(std, [0.0, 0.0])

    def test_a_misleading_sample_and_lone_heavy_rows_cost_no_digits(self):
        X = np.concatenate([np.full(5000, 1e6), np.linspace(0.0, 1.0, 5000)])[:, None]
        weight = np.concatenate([np.full(5000, 1e-15), np.ones(5000)])
        mean, std = weighted_moments(X, weight)
        centre = np.average(X[:, 0], weights=weight)
        assert_allclose(mean, centre, rtol=1e-12)
        expected = np.sqrt(np.average((X[:, 0] - centre) ** 2, weights=weight))
        assert_allclose(std, expected, rtol=1e-9)

    def test_float32_is_taken_in_float64(self):
        X = (np.float32(1e4) + np.linspace(0, 1, 1000, dtype=np.float32))[:, None]
        mean, std = weighted_moments(X, np.ones(1000))
        assert_allclose(mean, X.astype(float).mean(), rtol=1e-14)
        assert_allclose(std, X.astype(float).std(), rtol=1e-10)

    def test_a_column_is_weighted_by_the_rows_that_have_it(self, monkeypatch, rng):
        """However little these count beside the rows that lack it."""
        monkeypatch.setattr("skvi.runtime.moments._BLOCK_FLOATS", 200)
        X, weight = rng.normal(size=(200, 2)) + 3.0, rng.uniform(1.0, 2.0, size=200)
        X[:150, 1] = np.nan
        weight[:150] *= 1e200
        weight[150:] *= 1e-200
        mean, std = weighted_moments(X, weight)
        for j, seen in ((0, slice(150)), (1, slice(150, None))):
            scaled = weight[seen] / weight[seen].max()
            centre = np.average(X[seen, j], weights=scaled)
            assert_allclose(mean[j], centre, rtol=1e-12)
            spread = np.sqrt(np.average((X[seen, j] - centre) ** 2, weights=scaled))
            assert_allclose(std[j], spread, rtol=1e-12)

    def test_blocks_do_not_matter(self, monkeypatch, rng):
        X, weight = rng.normal(size=(1000, 2)), rng.uniform(size=1000)
        whole = weighted_moments(X, weight)
        monkeypatch.setattr("skvi.runtime.moments._BLOCK_FLOATS", 200)
        assert_allclose(weighted_moments(X, weight), whole, rtol=1e-12)


def test_cholesky_helpers(rng):
    root = rng.normal(size=(2, 4, 6))
    A = torch.from_numpy(root @ np.swapaxes(root, 1, 2))
    chol = torch.linalg.cholesky(A)
    assert_allclose(log_det_from_chol(chol), torch.linalg.slogdet(A)[1], rtol=1e-12)
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    assert_allclose(inv_chol(chol) @ chol, eye, atol=1e-12)


class TestBatches:
    @given(
        st.integers(2, 40),
        st.integers(1, 9),
        st.sampled_from([0.0, 3.0, 20.0]),
        st.sampled_from([None, "columns"]),
        st.integers(0, 2**32 - 1),
    )
    def test_batches_are_a_partition_of_the_weight(self, n, n_batches, spread, keep, seed):
        """Even rows whose weight a running sum rounds off are in one batch, with their weight."""
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(n, 2))[rng.integers(n, size=n)]
        weight = np.exp(spread * rng.normal(size=n))
        rows = Rows(X, Affine(np.zeros(2), np.ones(2)), CPU, weight, keep=keep)
        batches = Batches(rows, n_batches, rng)
        seen, sizes = {}, []
        for batch in range(n_batches):
            parts = list(batches.blocks(batch, 3))
            sizes.append(sum(float(s.sum()) for _, s in parts))
            for x, s in parts:
                for row, share in zip(x.numpy(), s.tolist(), strict=True):
                    assert share >= 0.0
                    seen[tuple(row)] = seen.get(tuple(row), 0.0) + share
        assert_allclose(sizes, weight.sum() / n_batches, rtol=1e-9)
        for row in np.unique(X, axis=0):
            own = weight[(row == X).all(1)].sum()
            # A row on a border is cut by differences of the running sum.
            assert_allclose(seen[tuple(row)], own, rtol=1e-9, atol=1e-13 * weight.sum())
            assert seen[tuple(row)] > 0.0
