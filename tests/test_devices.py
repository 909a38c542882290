"""Every estimator away from the CPU: on a GPU where there is one, else on an emulated device.

The emulated one has the CPU's kernels, so that answers differ from the CPU's by the order of sums.
The autoencoder is always tested there: on a GPU the same seed gives other draws.
"""

import pickle
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning

from skvi import BayesianLinearVI, BayesianLogisticVI, VAETransformer, VariationalGMM
from skvi.estimators import vae as vae_module
from skvi.runtime import random
from skvi.runtime.blocks import Affine, Rows
from skvi.runtime.random import make_generator

from .emulation import DEVICE, emulated_device

SHAPES = ["full", "tied", "diag", "spherical"]


@contextmanager
def _another_device(emulated=False):
    if torch.cuda.is_available() and not emulated:
        yield "cuda"
    else:
        with emulated_device():
            yield str(DEVICE)


def _answers(model, names, *args, **options):
    """Every answer as a list of arrays."""
    out = {}
    for name in names:
        answer = getattr(model, name)(*args, **options.get(name, {}))
        parts = answer if isinstance(answer, tuple) else (answer,)
        out[name] = [p.toarray() if sp.issparse(p) else np.asarray(p) for p in parts]
    return out


def _compare(make, use, rtol=1e-7, atol=1e-9, emulated=False):
    """`use` a model that `make` gives for a device, here and there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        here = use(make("cpu"))
        with _another_device(emulated) as device:
            there = use(make(device))
    assert here.keys() == there.keys()
    for name, parts in here.items():
        for one, other in zip(parts, there[name], strict=True):
            assert_allclose(other, one, rtol=rtol, atol=atol, err_msg=name)


# -- mixture --------------------------------------------------------------------------------------

MIXTURE = ["score_samples", "log_predictive", "predict", "predict_proba", "transform", "score"]


def _holes(X, share=0.1):
    X = X.copy()
    X[np.random.default_rng(0).random(X.shape) < share] = np.nan
    return X


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    ("covariance_type", "law"),
    [(shape, "dirichlet_process") for shape in SHAPES] + [("diag", "dirichlet_distribution")],
)
def test_mixture(covariance_type, law, missing):
    X = load_iris().data
    X = _holes(X) if missing else X

    def use(model):
        model.fit(X)
        extra = {
            "sample": {"n_samples": 5, "random_state": 0},
            "elbo_terms": {"X": X},
            "impute": {"X": X, "return_std": True},
            "condition": {"X": X[:, :2], "targets": [2, 3], "return_std": True},
            "log_conditional": {"X": X, "targets": [2, 3]},
        }
        return {
            **_answers(model, MIXTURE, X),
            **_answers(model, extra, **extra),
            "elbo": [np.array(model.elbo_history_)],
            "means": [model.means_],
        }

    _compare(
        lambda device: VariationalGMM(
            4,
            covariance_type=covariance_type,
            weight_concentration_prior_type=law,
            random_state=0,
            max_iter=15,
            device=device,
        ),
        use,
    )


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        *({"init_params": name} for name in ("kmeans", "random", "random_from_data")),
        {"algorithm": "memoized", "batch_size": 40},
        {"algorithm": "svi", "batch_size": 40},
        {"moves": None, "n_init": 2},
        {"n_components": 30, "moves": None},
        {"max_iter": 5, "warm_start": True},
    ],
    ids=str,
)
def test_ways_of_fitting_a_mixture(params, missing):
    X = _holes(load_iris().data) if missing else load_iris().data

    def use(model):
        for _ in range(1 + model.warm_start):
            model.fit(X, sample_weight=np.arange(len(X)) % 3)
        return _answers(model, MIXTURE, X) | {"elbo": [np.array(model.elbo_history_)]}

    _compare(
        lambda device: VariationalGMM(
            **{"n_components": 4, "max_iter": 15, "random_state": 0} | params, device=device
        ),
        use,
        # Many components share few rows: rounding decides which one ends as which.
        emulated=params.get("n_components") == 30,
    )


@pytest.mark.parametrize("covariance_type", SHAPES)
def test_mixture_of_a_stream(covariance_type):
    X = load_iris().data[::-1]

    def use(model):
        for part in np.array_split(X, 4):
            model.partial_fit(part)
        return _answers(model, MIXTURE, X)

    _compare(
        lambda device: VariationalGMM(
            3, covariance_type=covariance_type, random_state=0, device=device
        ),
        use,
    )


@pytest.mark.parametrize("missing", [False, True])
def test_mixture_with_priors_of_the_users(missing):
    X = _holes(load_iris().data) if missing else load_iris().data
    params = {
        "mean_prior": np.ones(4),
        "mean_precision_prior": 0.1,
        "degrees_of_freedom_prior": 6.0,
        "covariance_prior": np.eye(4),
        "weight_concentration_prior": 0.5,
    }

    def use(model):
        labels = model.fit_predict(X)
        return _answers(model.partial_fit(X[:40]), MIXTURE, X) | {"labels": [labels]}

    _compare(
        lambda device: VariationalGMM(3, max_iter=10, random_state=0, device=device, **params), use
    )


# -- linear ---------------------------------------------------------------------------------------

LINEAR = ["predict", "predict_interval", "transform", "score_samples", "sample_y"]
WITH_TARGET = ["score", "elbo_terms", "log_predictive", "score_samples"]
PRIORS = {
    "ridge": {},
    "groups": {"groups": [0, 0, 1, 1, 2, 2]},
    "ard": {"prior": "ard"},
    "horseshoe": {"prior": "horseshoe"},
}
every_prior = pytest.mark.parametrize("prior", list(PRIORS))


def _diabetes(form):
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:80, :6], y[:80] / 50.0
    if form == "wide":
        X, y = X[:4], y[:4]
    if form in {"two outputs", "stream"}:
        y = np.stack([y, np.cos(y)], axis=1)
    return sp.csr_array(np.where(abs(X) > 0.03, X, 0.0)) if form == "sparse" else X, y


@every_prior
@pytest.mark.parametrize(
    "form", ["one output", "two outputs", "heavy tails", "sparse", "stream", "wide"]
)
def test_linear(prior, form):
    X, y = _diabetes(form)
    weight = np.arange(len(y)) % 3 + 0.5

    def use(model):
        if form == "stream":
            for part in np.array_split(np.arange(len(y)), 3):
                model.partial_fit(X[part], y[part], sample_weight=weight[part])
        else:
            model.fit(X, y, sample_weight=weight)
        return (
            _answers(model, LINEAR, X, predict={"return_std": True})
            | {f"{k} of y": v for k, v in _answers(model, WITH_TARGET, X, y).items()}
            | {"coef": [model.coef_, model.coef_cov_], "elbo": [np.array(model.elbo_history_)]}
        )

    noise = {"noise": "student_t"} if form == "heavy tails" else {}
    _compare(
        lambda device: BayesianLinearVI(max_iter=50, device=device, **PRIORS[prior], **noise),
        use,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "params",
    [
        {"prior": "flat"},
        {"prior": "fixed", "fit_intercept": False},
        {"noise": "student_t", "noise_dof": None, "warm_start": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [80, 3000])
def test_ways_of_fitting_a_line(params, n):
    X = np.random.default_rng(0).normal(size=(n, 5))
    y = X @ np.arange(5) + np.random.default_rng(1).normal(size=n)

    def use(model):
        for _ in range(1 + model.warm_start):
            model.fit(X, y)
        return {
            "coef": [model.coef_, model.coef_cov_],
            "joint": [*model.predict(X[:5], return_cov=True)],
            "r2": [np.array(model.r2_score(X, y))],
        }

    _compare(lambda device: BayesianLinearVI(max_iter=20, device=device, **params), use, rtol=1e-6)


# -- logistic -------------------------------------------------------------------------------------


@every_prior
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_logistic(prior, n_classes, wide):
    X, y = load_wine(return_X_y=True)
    X, y = X[y < n_classes, :6], y[y < n_classes]
    if wide:
        X, y = X[::30], y[::30]
    names = ["predict_log_proba", "predict_proba", "decision_function", "predict", "transform"]

    def use(model):
        model.fit(X, y, sample_weight=np.arange(len(y)) % 3 + 0.5)
        return (
            _answers(model, [*names, "sample_y", "score_samples"], X)
            | {f"{k} of y": v for k, v in _answers(model, WITH_TARGET, X, y).items()}
            | {"coef": [model.coef_, model.coef_cov_], "accuracy": [model.accuracy_score(X, y)]}
        )

    _compare(
        lambda device: BayesianLogisticVI(max_iter=50, device=device, **PRIORS[prior]),
        use,
        rtol=1e-6,
    )


# -- autoencoder ----------------------------------------------------------------------------------

ROWS = ["transform", "reconstruct", "posterior", "score_samples", "elbo_terms", "log_predictive"]


def _table(likelihood):
    rng = np.random.default_rng(0)
    X = load_iris().data[:60]
    if likelihood == "bernoulli":
        return np.greater(X, X.mean(0)).astype(float)
    if likelihood == "continuous_bernoulli":
        return X / 10.0
    if likelihood in {"poisson", "negative_binomial"}:
        return rng.poisson(X).astype(float)
    if likelihood == "categorical":
        return np.round(X / 2.5)
    return X


def _vae(device, **params):
    defaults = {
        "hidden_layer_sizes": (8,),
        "max_iter": 3,
        "n_mc": 4,
        "batch_size": 25,
        "precision": "float64",
        "random_state": 0,
    }
    return VAETransformer(2, **defaults | params, device=device)


def _use_vae(X):
    def use(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(1 + model.warm_start):
                model.fit(X)
        options = {"log_predictive": {"n_importance": 20}}
        dense = X.toarray() if sp.issparse(X) else X
        out = _answers(model, ROWS, X, **options)
        out |= _answers(model, ["sample"], 5, sample={"random_state": 0})
        out["means of draws"] = [*model.sample(5, random_state=0, mean=True)]
        out["spread"] = [*model.transform(X, return_std=True)]
        out["decoded"] = [model.inverse_transform(np.ones((2, 2)))]
        out |= _answers(model, ["amortisation_gap"], X, amortisation_gap={"refine": 3})
        if not sp.issparse(X):
            out |= _answers(
                model, ["impute"], _holes(dense), impute={"n_importance": 20, "return_std": True}
            )
        out["interpolate"] = [model.interpolate(X[:1], X[1:2], 3)]
        out["history"] = [np.array(model.elbo_history_)]
        return out

    return use


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "likelihood",
    [
        "gaussian", "gaussian_heteroscedastic", "student_t", "bernoulli", "continuous_bernoulli",
        "poisson", "negative_binomial", "categorical",
    ],
)  # fmt: skip
def test_likelihoods(likelihood, missing):
    X = _table(likelihood)
    X = _holes(X) if missing else X
    _compare(
        lambda device: _vae(device, likelihood=likelihood), _use_vae(X), rtol=1e-6, emulated=True
    )


@pytest.mark.parametrize(
    ("prior", "missing"),
    [("normal", False), ("uniform", False), ("mixture", True), ("vamp", False), ("vamp", True)],
)
@pytest.mark.parametrize("posterior_type", ["diag", "full", "flow"])
def test_priors_and_posteriors(prior, missing, posterior_type):
    X = load_iris().data[:60]
    X = _holes(X) if missing else X
    params = {"prior": prior, "posterior_type": posterior_type, "n_prior_components": 3}
    _compare(lambda device: _vae(device, **params), _use_vae(X), rtol=1e-6, emulated=True)


@pytest.mark.parametrize(
    "params",
    [
        {"n_importance": 5, "beta": 0.5},
        {"n_importance": 3, "early_stopping": True, "n_iter_no_change": 3},
        {"free_bits": 0.1, "kl_warmup": 2},
        {"likelihood": {"gaussian": [0, 1], "student_t": [2, 3]}},
        {"early_stopping": True, "n_iter_no_change": 2, "max_iter": 5},
        {"precision": "float32", "hidden_layer_sizes": (8, 6), "activation": "tanh"},
        {"precision": "bfloat16", "hidden_layer_sizes": (8, 6), "activation": "relu"},
        {"warm_start": True},
        {"noise_std": 0.5},
        {"hidden_layer_sizes": ()},
        {"encoder": torch.nn.Linear(4, 4), "decoder": torch.nn.Linear(2, 4)},
        {"encoder": torch.nn.Linear, "decoder": torch.nn.Linear},
        {"precision": "auto", "likelihood": "student_t"},
    ],
    ids=str,
)
def test_ways_of_training(params):
    narrow = params.get("precision", "float64") != "float64"
    tolerance = 0.05 if params.get("precision") == "bfloat16" else 1e-3 if narrow else 1e-6
    _compare(
        lambda device: _vae(device, **params),
        _use_vae(load_iris().data[:60]),
        rtol=tolerance,
        atol=tolerance,
        emulated=True,
    )


def test_a_cut_fit_goes_on_from_its_checkpoint(monkeypatch, tmp_path):
    X = load_iris().data[:60]

    def cut(name, epoch, *args, **options):
        if epoch == 2:
            raise KeyboardInterrupt

    def use(model):
        with monkeypatch.context() as patch:
            patch.setattr(vae_module, "announce_epoch", cut)
            with pytest.raises(KeyboardInterrupt):
                model.fit(X)
        assert model.checkpoint.exists()
        model.fit(X)
        whole = clone(model).set_params(checkpoint=None).fit(X)
        assert model.elbo_history_ == whole.elbo_history_
        return _answers(model, ["score_samples", "transform"], X)

    def make(device):
        return _vae(device, early_stopping=True, max_iter=4, checkpoint=tmp_path / f"{device}.npz")

    _compare(make, use, rtol=1e-6, emulated=True)


def test_autoencoder_of_a_stream():
    X = load_iris().data[::-1]

    def use(model):
        for part in np.array_split(X, 3):
            model.partial_fit(part, sample_weight=np.arange(len(part)) % 3 + 0.5)
        return _answers(model, ["score_samples", "transform"], X)

    _compare(_vae, use, rtol=1e-6, emulated=True)


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial", "bernoulli"])
def test_sparse_rows(likelihood):
    X = sp.csr_array(_table(likelihood))
    _compare(
        lambda device: _vae(device, likelihood=likelihood), _use_vae(X), rtol=1e-6, emulated=True
    )


# -- across devices -------------------------------------------------------------------------------

ESTIMATORS = [
    VariationalGMM(3, random_state=0, max_iter=10),
    BayesianLinearVI(max_iter=10),
    BayesianLogisticVI(max_iter=10),
    _vae("cpu"),
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)


@every_estimator
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_fitted_model_goes_from_device_to_device(estimator):
    X, y = load_iris(return_X_y=True)
    here = clone(estimator).set_params(device="cpu").fit(X, y)
    with _another_device(isinstance(estimator, VAETransformer)) as device:
        there = clone(estimator).set_params(device=device).fit(X, y)
        moved = pickle.loads(pickle.dumps(here)).set_params(device=device)
        assert_allclose(moved.score(X, y), here.score(X, y), rtol=1e-9)
        for model in (there, moved):
            if hasattr(model, "warm_start"):
                model.set_params(warm_start=True).fit(X, y)
        returned = pickle.loads(pickle.dumps(there))
        assert_allclose(moved.score(X, y), there.score(X, y), rtol=1e-9)
        expected = there.score(X, y)
    returned.set_params(device="cpu")
    assert_allclose(returned.score(X, y), expected, rtol=1e-9)
    returned.fit(X, y)


@every_estimator
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_may_be_on_the_device(estimator):
    X, y = load_iris(return_X_y=True)
    here = clone(estimator).set_params(device="cpu").fit(X, y)
    with _another_device(isinstance(estimator, VAETransformer)) as device:
        rows = torch.from_numpy(X).to(device)
        there = clone(estimator).set_params(device="auto").fit(rows, y)
        assert_allclose(there.score(rows, y), here.score(X, y), rtol=1e-9)
        assert isinstance(there.transform(rows), np.ndarray)


def test_generators_of_devices_do_not_decide_which_rows_are_held_out(monkeypatch):
    held_out = []
    score = vae_module._mean_bound
    X = load_iris().data

    def noted(net, cells, weight, rows, *rest):
        held_out.append(rows.tolist())
        return score(net, cells, weight, rows, *rest)

    monkeypatch.setattr(vae_module, "_mean_bound", noted)
    params = {"early_stopping": True, "n_iter_no_change": 3, "warm_start": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = _vae("cpu", **params).fit(X)
        # The generators of another device give other numbers for the same seed.
        monkeypatch.setattr(vae_module, "make_generator", lambda seed, *_: make_generator(seed + 1))
        other = _vae("cpu", **params).fit(X)
        model.fit(X)
    assert len(held_out[0]) == 15
    assert held_out == [held_out[0]] * len(held_out)
    assert other.elbo_ != model.elbo_


def test_a_checkpoint_stays_with_its_kind_of_device(tmp_path, monkeypatch):
    X, path = load_iris().data, tmp_path / "vae.npz"

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vae_module, "announce_epoch", kill)
        with pytest.raises(KeyboardInterrupt):
            _vae("cpu", checkpoint=path).fit(X)
    with emulated_device(), pytest.raises(ValueError, match="another fit: device differs"):
        _vae(str(DEVICE), checkpoint=path).fit(X)
    with pytest.warns(ConvergenceWarning):
        _vae("cpu", checkpoint=path).fit(X)
    assert not path.exists()


@pytest.mark.parametrize("keep", [None, "never"])
def test_rows_that_are_read_once_are_not_kept(keep):
    X = load_iris().data
    weight = np.arange(len(X), dtype=float)
    affine = Affine(X.mean(0), X.std(0))
    expected, some = (X - X.mean(0)) / X.std(0), slice(3, 40)
    with _another_device() as device:
        rows = Rows(X, affine, torch.device(device), weight, keep=keep)
        assert rows.kept == (keep is None)
        out = torch.empty(37, 4, dtype=torch.float64, device=device)
        rows.fill(some, out)
        x, w = rows[some]
        for values in (out, x):
            assert_allclose(values.cpu().tolist(), expected[some], rtol=1e-14)
        for values in (w, rows.weights(some)):
            assert values.device.type == torch.device(device).type
            assert values.cpu().tolist() == weight[some].tolist()


@pytest.mark.parametrize("estimator", [BayesianLinearVI(), BayesianLogisticVI()], ids=repr)
def test_regressions_do_not_follow_torchs_default_device(estimator):
    X, y = load_diabetes(return_X_y=True)
    y = y > 140.0 if isinstance(estimator, BayesianLogisticVI) else y
    expected = clone(estimator).set_params(device="cpu").fit(X, y).score(X, y)
    torch.set_default_device("meta")
    try:
        assert estimator.set_params(device="cpu").fit(X, y).score(X, y) == expected
    finally:
        torch.set_default_device(None)


def test_the_emulated_device_refuses_what_a_gpu_does():
    generator = make_generator(0)
    with emulated_device():
        there = torch.ones(3, 3, device=DEVICE)
        position, chosen = torch.tensor([0, 2]), torch.tensor([0, 2], device=DEVICE)
        refused = [
            lambda: there + torch.ones(3, 3),
            lambda: there @ torch.ones(3),
            lambda: torch.ones(3, 3).add_(there),
            lambda: torch.cat([there[0], torch.ones(())[None]]),
            lambda: torch.stack([there.sum(), torch.ones(())]),
            lambda: torch.ones(()).add_(there.sum()),
            lambda: torch.add(there.sum(), 1.0, out=torch.ones(())),
            lambda: there.index_put_((chosen,), torch.ones(2, 3)),
            lambda: torch.addmm(torch.ones(()), there, there),
            lambda: torch.poisson(there, generator),
            lambda: setattr(there, "data", torch.ones(3)),
            lambda: torch.ones(3, 3)[chosen],
            lambda: there.index_select(0, position),
            lambda: torch.randn(2, device=DEVICE, generator=generator),
            lambda: torch.randn(2, generator=random.make_generator(0, DEVICE)),
            lambda: there.numpy(),
            lambda: np.asarray(there),
        ]
        for attempt in refused:
            with pytest.raises((RuntimeError, TypeError)):
                attempt()
        assert there.cpu().tolist() == [[1, 1, 1]] * 3
        assert there[position].device == DEVICE
        assert (there * torch.tensor(2.0) + 1.0).sum().item() == 27.0
        part = there[0]
        part += torch.arange(3, device=DEVICE)
        assert there.cpu().tolist() == [[1, 2, 3], [1, 1, 1], [1, 1, 1]]
    with pytest.raises(RuntimeError, match="outlived"):
        there.sum()
