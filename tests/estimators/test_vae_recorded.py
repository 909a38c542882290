"""Steps that are recorded and repeated as a whole, as on a GPU, are the steps of the plain loop."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from skvi import VAETransformer
from skvi.distributions import special
from skvi.estimators import vae as module
from skvi.inference import gradient
from skvi.models.vae.likelihoods import LIKELIHOODS
from skvi.models.vae.posteriors import POSTERIORS
from skvi.models.vae.priors import PRIORS
from skvi.runtime.graph import recorder
from tests.recording import record

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
N = 70  # of which minibatches of 24 and of 23 are made


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gradient, "_WORTH_RECORDING", 0)
    # The host would otherwise look at the sizes of arguments, which it does on a CPU alone.
    monkeypatch.setattr(special, "asks_freely", lambda device: False)


def _table(likelihood="gaussian"):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(N, 2)) @ rng.normal(size=(2, 5))
    if "gaussian" in likelihood or likelihood == "student_t":
        return z + 0.3 * rng.normal(size=z.shape)
    if likelihood == "continuous_bernoulli":
        return rng.uniform(size=z.shape)
    if likelihood == "categorical":
        return rng.integers(3, size=z.shape).astype(float)
    if likelihood == "bernoulli":
        return (z > 0.0).astype(float)
    return rng.poisson(np.exp(0.3 * z)).astype(float)


def _fit(X, monkeypatch, record, **params):
    """Fit with `record` in the place of the device's; the records that were made."""
    records = []

    def counted(run):
        records.append(run)
        return record(run)

    monkeypatch.setattr(module, "recorder", lambda generator: record and counted)
    defaults = {"hidden_layer_sizes": (6,), "batch_size": 24, "max_iter": 5, "random_state": 0}
    vae = VAETransformer(2, early_stopping=False, device="cpu", **defaults | params)
    return vae.fit(X), records


@pytest.mark.parametrize(
    "params",
    [
        *({"likelihood": name} for name in sorted(LIKELIHOODS)),
        *(
            {"prior": prior, "posterior_type": posterior, "n_importance": n}
            for prior, posterior, n in itertools.product(PRIORS, POSTERIORS, (1, 3))
        ),
        *({"activation": a, "precision": "bfloat16"} for a in ("relu", "tanh", "logistic", "silu")),
        {"precision": "float64"},
        {"beta": 2.0, "free_bits": 0.1},
        {"kl_warmup": 5},
        {"likelihood": {"gaussian": [0, 1, 2], "student_t": [3, 4]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("some_missing", [False, True])
def test_recorded_steps_are_those_of_the_plain_loop_to_the_same_bits(
    params, some_missing, monkeypatch
):
    likelihood = params.get("likelihood", "gaussian")
    X = _table(likelihood if isinstance(likelihood, str) else "gaussian")
    if some_missing:
        X[np.random.default_rng(1).uniform(size=X.shape) < 0.1] = np.nan
    plain, _ = _fit(X, monkeypatch, None, **params)
    recorded, records = _fit(X, monkeypatch, record, **params)
    assert len(records) == 2  # one for each size of minibatch
    assert recorded.elbo_history_ == plain.elbo_history_
    for name, value in plain._model.weights.items():
        np.testing.assert_array_equal(recorded._model.weights[name], value)


def test_what_the_host_does_in_a_step_is_not_recorded(monkeypatch):
    X = _table()
    for rows, params in (
        (X, {"encoder": nn.Linear(5, 4)}),
        (X, {"decoder": lambda n_in, n_out: nn.Linear(n_in, n_out)}),
        (sparse.csr_array(_table("poisson")), {"likelihood": "poisson"}),
    ):
        _, records = _fit(rows, monkeypatch, record, **params)
        assert records == []


def test_the_tape_refuses_what_a_device_would_have_to_be_waited_for():
    x = torch.tensor([1.0, -1.0])
    for asking in (
        lambda: bool(x.any()),
        lambda: x.sum().item(),
        lambda: x[x > 0.0],
        lambda: torch.tensor([1.0]),
        lambda: x.nonzero(),
    ):
        with pytest.raises(AssertionError, match="needs the host"):
            record(asking)


def test_the_tape_holds_values_of_the_host_as_they_were():
    x, factor = torch.ones(()), 2.0
    repeat = record(lambda: x.mul_(factor))
    factor = 3.0
    repeat()
    assert x == 2.0  # the record itself
    repeat()
    assert x == 4.0


def test_the_tape_does_not_hold_numbers_that_the_host_has_written():
    x = torch.ones(3)

    def run():
        y = torch.empty(3)
        np.copyto(y.numpy(), 1.0)
        x.mul_(y)

    repeat = record(run)
    repeat()
    repeat()
    assert x.isnan().all()


def test_the_cpu_records_nothing():
    assert recorder(torch.Generator()) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("prior", "posterior"), list(itertools.product(sorted(PRIORS), sorted(POSTERIORS)))
)
def test_cuda_graphs_are_the_steps_of_the_plain_loop(prior, posterior, monkeypatch):
    params = {"prior": prior, "posterior_type": posterior, "device": "cuda", "max_iter": 20}
    fits = []
    for of_device in (lambda generator: None, recorder):
        monkeypatch.setattr(module, "recorder", of_device)
        vae = VAETransformer(2, batch_size=24, early_stopping=False, random_state=0, **params)
        fits.append(vae.fit(_table()))
    plain, recorded = fits
    np.testing.assert_allclose(recorded.elbo_history_, plain.elbo_history_, rtol=1e-3)
