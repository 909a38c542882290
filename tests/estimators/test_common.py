"""scikit-learn's own checks, those that it does not send to third parties included."""

import os
import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from joblib import parallel_backend
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from skvi import BayesianLinearVI, BayesianLogisticVI, VAETransformer, VariationalGMM

# Small networks and few steps: the checks ask about the contract, not about the fit; so the
# warning that a fit has not converged is expected of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # Some checks fit on frames and transform arrays, or the reverse, on purpose.
    pytest.mark.filterwarnings("ignore:X .* feature names:UserWarning"),
]
SMALL_VAE = {"hidden_layer_sizes": (8,), "max_iter": 5, "early_stopping": False, "random_state": 0}

MIXTURES = [
    VariationalGMM(covariance_type=shape, weight_concentration_prior_type=law, random_state=0)
    for shape in ("full", "tied", "diag", "spherical")
    for law in ("dirichlet_process", "dirichlet_distribution")
]
MIXTURES += [
    VariationalGMM(algorithm=algorithm, batch_size=10, random_state=0)
    for algorithm in ("memoized", "svi")
]
LINEARS = [BayesianLinearVI(prior=prior) for prior in ("ridge", "ard", "fixed", "horseshoe")]
LINEARS += [BayesianLinearVI(noise="student_t")]
LOGISTICS = [BayesianLogisticVI(prior=prior) for prior in ("ridge", "ard", "horseshoe")]
# The checks' data are real numbers, which not every likelihood can explain.
AUTOENCODERS = [
    VAETransformer(**SMALL_VAE),
    VAETransformer(random_state=0),
    VAETransformer(**SMALL_VAE, noise_std=0.5),
    VAETransformer(**SMALL_VAE, likelihood="gaussian_heteroscedastic"),
    VAETransformer(**SMALL_VAE, likelihood="student_t"),
    # Every prior, every posterior and importance weights once: their pairs are independent.
    VAETransformer(**SMALL_VAE, prior="uniform", posterior_type="full"),
    VAETransformer(**SMALL_VAE, prior="mixture", posterior_type="flow", n_prior_components=3),
    VAETransformer(**SMALL_VAE, prior="vamp", n_prior_components=3, n_importance=3),
    VAETransformer(**SMALL_VAE, encoder=nn.Linear, decoder=nn.Linear),
]
ALL = [MIXTURES[0], LINEARS[0], LOGISTICS[0], AUTOENCODERS[0]]
# which need a target
SUPERVISED = (BayesianLinearVI, BayesianLogisticVI)

_WEIGHTS_AND_BATCHES = (
    "minibatches of repeated rows are other minibatches than those of weighted rows"
)


def _expected_failures(estimator):
    if not isinstance(estimator, VAETransformer):
        return {}
    return {
        f"check_sample_weight_equivalence_on_{kind}_data": _WEIGHTS_AND_BATCHES
        for kind in ("dense", "sparse")
    }


@parametrize_with_checks(
    [*MIXTURES, *LINEARS, *LOGISTICS, *AUTOENCODERS],
    expected_failed_checks=_expected_failures,
    xfail_strict=True,
)
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    "name",
    [
        "check_param_validation",
        "check_dataframe_column_names_consistency",
        "check_transformer_get_feature_names_out",
        "check_transformer_get_feature_names_out_pandas",
        "check_set_output_transform",
        "check_set_output_transform_pandas",
        "check_set_output_transform_polars",
        "check_global_output_transform_pandas",
        "check_global_set_output_transform_polars",
        "check_inplace_ensure_writeable",
    ],
)
def test_checks_that_are_not_sent_to_third_parties(estimator, name):
    getattr(estimator_checks, name)(type(estimator).__name__, clone(estimator))


def _data(estimator):
    if isinstance(estimator, BayesianLinearVI):
        return load_diabetes(return_X_y=True, as_frame=True)
    return load_iris(return_X_y=True, as_frame=True)


every_estimator = pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)


@every_estimator
def test_grid_search_in_a_pipeline_with_two_processes(estimator):
    X, y = _data(estimator)
    name, values = {
        "VariationalGMM": ("n_components", [1, 3]),
        "BayesianLinearVI": ("prior", ["ridge", "ard"]),
        "BayesianLogisticVI": ("prior", ["ridge", "ard"]),
        "VAETransformer": ("n_components", [1, 2]),
    }[type(estimator).__name__]
    pipeline = make_pipeline(StandardScaler(), clone(estimator).set_params(device="cpu"))
    step = type(estimator).__name__.lower()
    search = GridSearchCV(pipeline, {f"{step}__{name}": values}, cv=3, n_jobs=2)
    with parallel_backend("loky"):
        search.fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_params_[f"{step}__{name}"] in values
    assert search.best_score_ == search.cv_results_["mean_test_score"].max()


@pytest.mark.parametrize(
    ("estimator", "name", "value"),
    [
        (MIXTURES[0], "n_init", 0),
        (LINEARS[0], "weight_shape", -1.0),
        (AUTOENCODERS[0], "beta", -3.0),
        (AUTOENCODERS[0], "batch_size", 0),
        (AUTOENCODERS[0], "n_importance", -2),
    ],
    ids=str,
)
def test_parameters_are_validated_in_every_call_of_partial_fit(estimator, name, value):
    """scikit-learn looks at those of the first call only."""
    X, y = _data(estimator)
    model = clone(estimator).partial_fit(X, y)
    before = model.score(X, y)
    with pytest.raises(ValueError, match=f"'{name}' parameter"):
        model.set_params(**{name: value}).partial_fit(X, y)
    assert model.score(X, y) == before


@every_estimator
def test_a_warm_start_refuses_other_features(estimator):
    X, y = _data(estimator)
    model = clone(estimator).set_params(warm_start=True).fit(X, y)
    before = model.score(X, y)
    for other in (X[X.columns[::-1]], X[X.columns[:-1]]):
        with pytest.raises(ValueError, match=r"(?s)feature names.*warm_start=False"):
            model.fit(other, y)
    assert model.score(X, y) == before
    model.set_params(warm_start=False).fit(X[X.columns[::-1]], y)
    assert list(model.feature_names_in_) == list(X.columns[::-1])


@every_estimator
@pytest.mark.parametrize("container", ["pandas", "polars"])
def test_set_output_and_feature_names(estimator, container):
    X, y = _data(estimator)
    X = X if container == "pandas" else pl.from_pandas(X)
    model = clone(estimator).set_output(transform=container).fit(X, y)
    assert list(model.feature_names_in_) == list(X.columns)
    Z = model.transform(X)
    assert isinstance(Z, pd.DataFrame if container == "pandas" else pl.DataFrame)
    assert list(Z.columns) == list(model.get_feature_names_out())
    if container == "pandas":
        assert Z.index.equals(X.index)
    with pytest.raises(ValueError, match="feature names"):
        model.transform(X[list(X.columns)[::-1]])


@every_estimator
def test_metadata_routing_carries_sample_weight(estimator):
    X, y = _data(estimator)
    weight = np.random.default_rng(0).uniform(0.5, 2.0, size=len(X))
    target = (y,) if isinstance(estimator, SUPERVISED) else (None,)
    with sklearn.config_context(enable_metadata_routing=True):
        routed = clone(estimator).set_fit_request(sample_weight=True)
        routed.set_score_request(sample_weight=True)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        pipeline = make_pipeline(scaler, routed)
        pipeline.fit(X, *target, sample_weight=weight)
        score = pipeline.score(X, *target, sample_weight=weight)
    scaled = StandardScaler().fit_transform(X)
    direct = clone(estimator).fit(scaled, *target, sample_weight=weight)
    assert score == pytest.approx(direct.score(scaled, *target, sample_weight=weight), rel=1e-6)


@every_estimator
def test_pickle_and_clone(estimator):
    X, y = _data(estimator)
    model = clone(estimator).fit(X, y)
    payload = pickle.dumps(model)
    assert b"torch" not in payload
    again = pickle.loads(payload)
    assert_array_equal(np.asarray(again.transform(X)), np.asarray(model.transform(X)))
    assert again.score(X, y) == model.score(X, y)
    refitted = clone(model).fit(X, y)
    assert_allclose(refitted.elbo_, model.elbo_, rtol=0)
    assert "torch" not in repr(model.get_params())


@every_estimator
def test_the_global_state_of_numpy_and_torch_is_untouched(estimator):
    import torch

    X, y = _data(estimator)
    np.random.seed(11)  # noqa: NPY002
    torch.manual_seed(11)
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_num_threads()  # noqa: NPY002
    model = clone(estimator)
    if "random_state" in model.get_params():
        model.set_params(random_state=None)
    model.fit(X, y).transform(X)
    model.score(X, y)
    assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_num_threads() == before[2]
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") is None


@every_estimator
@pytest.mark.parametrize("X", [np.empty((0, 3)), np.empty((3, 0)), np.zeros(3)])
def test_empty_or_flat_data_are_refused(estimator, X):
    with pytest.raises(ValueError, match=r"minimum of|Expected 2D"):
        clone(estimator).fit(X, np.arange(len(X)) % 2)
