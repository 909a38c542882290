"""VAETransformer on scipy.sparse rows: the same answers as on dense ones, in little memory."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.pipeline import make_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from skvi.estimators import vae as module
from skvi.estimators.vae import VAETransformer
from skvi.runtime import blocks, moments

TABLE = {"poisson": list(range(12)), "gaussian": [12, 13, 14, 15], "categorical": [16, 17, 18, 19]}
LIKELIHOODS = {
    "poisson": lambda counts: counts,
    "negative_binomial": lambda counts: counts,
    "bernoulli": lambda counts: np.minimum(counts, 1.0),
    "gaussian": lambda counts: 0.5 * counts,
    "gaussian_heteroscedastic": lambda counts: counts,
    "student_t": lambda counts: -counts,
    "continuous_bernoulli": lambda counts: counts / counts.max(),
    "categorical": lambda counts: np.minimum(counts, 3.0),
    "auto": lambda counts: counts,
    "table": lambda counts: np.hstack([counts[:, :16], np.minimum(counts[:, 16:], 3.0)]),
}


def _short(**params):
    settings = {"hidden_layer_sizes": (8,), "max_iter": 3, "n_mc": 4, "random_state": 0}
    return VAETransformer(**settings | params)


def _fit(estimator, X, method="fit", **fit_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return getattr(estimator, method)(X, **fit_params)


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    log_rate = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 20)) - 1.5
    X = rng.poisson(np.exp(log_rate)).astype(float)
    X[0] = 0.0
    X[1] = 1.0  # every column has two values
    assert (X == 0).mean() > 0.5
    return X


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sparse_rows_equal_dense_ones(counts, likelihood, missing):
    X = LIKELIHOODS[likelihood](counts).copy()
    if missing:
        X[::5, 3] = np.nan
        X[7] = np.nan
    thin = sparse.csr_array(X)
    dense = _short(likelihood=TABLE if likelihood == "table" else likelihood, max_iter=5)
    dense, weight = _fit(dense, X), np.linspace(0.0, 2.0, 300)
    other = _fit(clone(dense), thin)
    assert other.likelihood_ == dense.likelihood_
    assert other.elbo_ == pytest.approx(dense.elbo_, rel=1e-9)
    for answer in (
        lambda model, rows: model.transform(rows),
        lambda model, rows: model.score_samples(rows),
        lambda model, rows: model.log_predictive(rows, 10),
        lambda model, rows: model.reconstruct(rows),
        lambda model, rows: model.elbo_terms(rows).kl,
        lambda model, rows: model.posterior(rows, refine=2)[1],
        lambda model, rows: model.interpolate(rows[[1]], rows[[2]], 3),
        lambda model, rows: model.score(rows, sample_weight=weight),
    ):
        np.testing.assert_allclose(answer(other, thin), answer(dense, X), rtol=1e-8, atol=1e-9)
    # one model, either form
    np.testing.assert_allclose(dense.transform(thin), dense.transform(X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "container", [sparse.csc_array, sparse.coo_matrix, sparse.csr_matrix, sparse.lil_array]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_any_format_and_type_of_number(counts, container, dtype):
    X = counts.astype(dtype)
    dense, thin = (_fit(_short(likelihood="poisson"), rows) for rows in (X, container(X)))
    assert thin.transform(container(X)).dtype == dense.transform(X).dtype
    assert thin.elbo_ == pytest.approx(dense.elbo_, rel=1e-9)


@pytest.mark.parametrize(
    "params",
    [
        {"prior": "vamp", "posterior_type": "flow", "n_prior_components": 4, "n_importance": 2},
        {"early_stopping": True, "precision": "float64"},
        {"precision": "bfloat16", "kl_warmup": 2, "encoder": torch.nn.Linear},
    ],
    ids=str,
)
def test_every_way_to_train(counts, params):
    weight = np.arange(300.0) % 3  # a third of the rows is left out
    models = [
        _fit(_short(likelihood="poisson", **params), rows, sample_weight=weight)
        for rows in (counts, sparse.csr_array(counts))
    ]
    assert models[0].elbo_ == pytest.approx(models[1].elbo_, rel=1e-9)
    assert models[0].n_samples_seen_ == models[1].n_samples_seen_ == weight.sum()
    np.testing.assert_allclose(models[0].elbo_history_, models[1].elbo_history_, rtol=1e-6)


def test_streams_and_warm_starts_mix_both_forms(counts):
    thin = sparse.csr_array(counts)
    parts = [slice(0, 100), slice(100, 200), slice(200, 300)]
    plain, mixed = _short(likelihood="poisson"), _short(likelihood="poisson")
    for i, part in enumerate(parts):
        plain.partial_fit(counts[part])
        mixed.partial_fit((thin if i != 1 else counts)[part])
    np.testing.assert_allclose(mixed.transform(counts), plain.transform(thin), rtol=1e-6)
    both = [_fit(copy.deepcopy(m).set_params(warm_start=True), thin) for m in (plain, mixed)]
    assert both[0].elbo_ == pytest.approx(both[1].elbo_, rel=1e-6)
    again = pickle.loads(pickle.dumps(mixed))
    np.testing.assert_array_equal(again.transform(thin), mixed.transform(thin))


class _Largest(TorchDispatchMode):
    """Records the largest dense tensor that is made."""

    def __init__(self):
        super().__init__()
        self.cells = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for y in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(y, torch.Tensor) and not y.is_sparse:
                self.cells = max(self.cells, y.numel())
        return out


@pytest.mark.parametrize("shape", [(8000, 150), (1500, 1100)])
def test_rows_are_never_dense_all_at_once(shape, monkeypatch):
    bound = 1 << 17
    monkeypatch.setitem(blocks._WORKSPACE_BYTES, "cpu", 8 * bound)
    monkeypatch.setattr(moments, "_SAMPLE_FLOATS", bound)
    X = sparse.random_array(shape, density=0.003, rng=np.random.default_rng(0), format="csr")
    X.data = np.ceil(4.0 * X.data)
    assert X.shape[0] * X.shape[1] > 9 * bound
    read, plain = [], sparse.csr_array.toarray

    def guarded(self, *args, **kwargs):
        read.append(self.shape[0] * self.shape[1])
        assert read[-1] <= bound
        return plain(self, *args, **kwargs)

    for kind in (sparse.csr_array, sparse.csc_array):
        for name in ("toarray", "todense", "__array__"):
            monkeypatch.setattr(kind, name, guarded, raising=False)
    vae = _short(likelihood="poisson", max_iter=1, n_mc=1, batch_size=bound // (2 * shape[1]))
    with _Largest() as made:
        vae = _fit(vae, X)
        assert vae.transform(X).shape == (shape[0], 2)
        assert np.isfinite(vae.log_predictive(X, 2)).all()
    assert sum(read) >= 3 * X.shape[0] * X.shape[1]
    # 8 draws of the least number of rows that a block has
    assert made.cells < 0.5 * X.shape[0] * X.shape[1]


def test_every_device(counts, device):
    thin = sparse.csr_array(counts)
    for likelihood in ("poisson", "gaussian"):
        vae = _short(likelihood=likelihood, device=device, prior="vamp", n_prior_components=3)
        dense, other = _fit(clone(vae), counts), _fit(clone(vae), thin)
        assert other.elbo_ == pytest.approx(dense.elbo_, rel=1e-5)
        np.testing.assert_allclose(other.transform(thin), other.transform(counts), rtol=1e-9)


def test_repeated_entries_are_summed_and_stored_zeros_are_zeros(counts):
    thin = sparse.csr_array(counts)
    where = sparse.coo_array(np.ones_like(counts))
    coords = tuple(np.tile(axis, 2) for axis in where.coords)
    values = counts[where.coords]
    halves = sparse.coo_array((np.concatenate([values, 0.0 * values]), coords), shape=(300, 20))
    twice = sparse.csr_array(
        (np.repeat(values, 2) * np.tile([1.0, 0.0], values.size), np.repeat(where.coords[1], 2),
         np.arange(0, 2 * values.size + 1, 40)), shape=(300, 20),
    )  # fmt: skip
    assert not twice.has_canonical_format
    before = twice.data.copy()
    expected = _fit(_short(likelihood="poisson"), thin)
    for same in (twice, halves):
        assert _fit(_short(likelihood="poisson"), same).elbo_ == pytest.approx(expected.elbo_)
        np.testing.assert_allclose(expected.transform(same), expected.transform(thin))
    np.testing.assert_array_equal(twice.data, before)


def test_bad_cells_are_errors_that_name_the_column(counts):
    def with_cell(value, column=5):
        X = sparse.lil_array(counts)
        X[4, column] = value
        return X.tocsr()

    short = _short(likelihood="poisson")
    with pytest.raises(ValueError, match=r"Column 5 of X has values other than counts"):
        short.fit(with_cell(0.5))
    with pytest.raises(ValueError, match=r"Column 2 of X has values other than counts"):
        short.fit(with_cell(-1.0, 2))
    with pytest.raises(ValueError, match="infinity"):
        short.fit(with_cell(np.inf))
    with pytest.raises(ValueError, match="beyond 1e"):
        _short(likelihood="gaussian").fit(with_cell(1e200))
    assert not hasattr(short, "elbo_")
    nothing = counts.copy()
    nothing[:, 3] = np.nan
    with pytest.raises(ValueError, match="Column 3 of X has no observed value"):
        short.fit(sparse.csr_array(nothing))

    fitted = _fit(short, sparse.csr_array(counts))
    with pytest.raises(ValueError, match=r"Column 5 of X has values other than counts"):
        fitted.score_samples(with_cell(0.5))
    table = _fit(_short(likelihood=TABLE), sparse.csr_array(counts))
    with pytest.raises(ValueError, match=r"Column 17 of X has the code 99"):
        table.transform(with_cell(99.0, 17))
    with pytest.raises(ValueError, match=r"Column 13 of X has values .* too far"):
        table.transform(with_cell(1e120, 13))
    with pytest.raises(ValueError, match="19 features"):
        fitted.transform(sparse.csr_array(counts[:, :19]))
    with pytest.raises(TypeError, match=r"[Ss]parse.*dense.*required"):
        fitted.impute(sparse.csr_array(counts))


def test_a_killed_fit_goes_on_and_a_checkpoint_knows_its_entries(counts, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(name, epoch, *args, **kwargs):
        if epoch == 1:
            raise Killed

    thin = sparse.csr_array(counts)
    vae = _short(likelihood="poisson", checkpoint=tmp_path / "vae.npz")
    expected = _fit(clone(vae), thin)
    with monkeypatch.context() as patch:
        patch.setattr(module, "announce_epoch", kill)
        with pytest.raises(Killed):
            clone(vae).fit(thin)
    moved = thin.copy()
    moved.indices[thin.indptr[5] - 1] -= 1
    moved.sum_duplicates()
    for other in (moved, thin[::-1].tocsr(), 2.0 * thin):
        with pytest.raises(ValueError, match="another fit: X differs"):
            clone(vae).fit(other)
    assert _fit(clone(vae), thin).elbo_ == expected.elbo_


def test_words_go_through_a_pipeline():
    texts = [f"{a} {b} {b} {c}" for a in ("red", "blue") for b in "xyzw" for c in ("up", "down")]
    words = CountVectorizer(token_pattern=r"\w+", dtype=np.float64)
    pipeline = make_pipeline(words, _short(likelihood="poisson", max_iter=20))
    codes = _fit(pipeline, texts, "fit_transform")
    assert codes.shape == (16, 2)
    np.testing.assert_allclose(pipeline.transform(texts), codes)
