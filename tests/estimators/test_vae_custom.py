"""VAETransformer with networks of the user's own."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from torch import nn

from skvi.estimators import vae as vae_module
from skvi.estimators.vae import VAETransformer


def _short(**params):
    settings = {"hidden_layer_sizes": (8,), "max_iter": 20, "random_state": 0}
    return VAETransformer(**settings | params)


def _fit(estimator, X, **fit_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **fit_params)


def _scripted(n_in, n_out):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(n_in, n_out))


class _Single(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


def _mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 6), nn.Tanh(), nn.Linear(6, n_out))


def _linear(n_in, n_out):
    return nn.Linear(n_in, n_out)


def _pictures_to_codes(n_in, n_out):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, n_out),
    )


def _codes_to_pictures(n_in, n_out):
    return nn.Sequential(
        nn.Linear(n_in, 8 * 4 * 4),
        nn.SiLU(),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


class _Raised(nn.Linear):
    """No output of a row of zeros is negative."""

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.bias, 1.0)


class _Beside(nn.Linear):
    """Centres its result over the rows."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0)


class _Recurrent(nn.Module):
    """Has a layer that returns a pair."""

    def __init__(self, as_pair=False):
        super().__init__()
        self.as_pair = as_pair
        self.layer = nn.GRU(1, 5, batch_first=True)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        states, last = self.layer(x[..., None])
        return (states, last) if self.as_pair else self.last(last[0])


@pytest.fixture(scope="module")
def iris():
    return load_iris().data


def test_convolutions_on_pictures():
    X = (load_digits().data[:400] > 7).astype(float)
    vae = _short(encoder=_pictures_to_codes, decoder=_codes_to_pictures, n_components=8)
    vae = _fit(vae.set_params(learning_rate_init=0.01, max_iter=60), X)
    assert vae.elbo_ == pytest.approx(vae.score_samples(X).sum(), rel=1e-9)
    blank = X.mean(0).clip(1e-3, 1 - 1e-3)
    independent = (X * np.log(blank) + (1 - X) * np.log1p(-blank)).sum(1).mean()
    assert vae.score(X) > independent + 1.0
    assert vae.sample(3)[0].shape == (3, 64)
    assert vae._model.architecture.widest_layer == 8 * 4 * 4
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_allclose(vae.score_samples(X[order]), vae.score_samples(X)[order], rtol=1e-9)


@pytest.mark.parametrize("posterior_type", ["diag", "full", "flow"])
def test_a_module_is_copied_and_never_changed(iris, posterior_type):
    n_out = {"diag": 4, "full": 5, "flow": 6}[posterior_type]
    torch.manual_seed(0)
    encoder, decoder = _mlp(4, n_out), _mlp(2, 4)
    before = copy.deepcopy(encoder.state_dict())
    laws = {"posterior_type": posterior_type, "prior": "vamp", "n_prior_components": 4}
    vae = _short(encoder=encoder, decoder=decoder, max_iter=10, **laws)
    vae = _fit(vae, iris)
    assert vae.encoder is encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    assert vae.score(iris) > _fit(clone(vae).set_params(max_iter=1), iris).score(iris)
    assert _fit(clone(vae), iris).elbo_ == vae.elbo_
    again = pickle.loads(pickle.dumps(vae))
    np.testing.assert_array_equal(again.transform(iris), vae.transform(iris))
    assert (vae.amortisation_gap(iris[:5], refine=3) >= 0).all()


def test_callables_are_seeded_by_random_state_alone(iris):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = _fit(_short(encoder=_mlp), iris)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert _fit(_short(encoder=_mlp), iris).elbo_ == first.elbo_
    assert _fit(_short(encoder=_mlp, random_state=1), iris).elbo_ != first.elbo_


def test_networks_can_be_searched(iris):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        grid = {"encoder": [None, _mlp, nn.Linear(4, 4)], "decoder": [None, _linear]}
        search = GridSearchCV(_short(max_iter=3), grid, cv=2, error_score="raise").fit(iris)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_frozen_layers_stay_and_fits_continue(iris):
    encoder = _mlp(4, 4)
    encoder[0].requires_grad_(False)
    whole = _short(encoder=encoder)
    for _ in range(3):
        whole.partial_fit(iris)
    parts = _short(encoder=encoder).partial_fit(iris)
    for _ in range(2):
        parts = pickle.loads(pickle.dumps(parts)).partial_fit(iris)
    np.testing.assert_array_equal(parts.transform(iris), whole.transform(iris))
    frozen = whole._model.weights["encoder.module.0.weight"]
    np.testing.assert_array_equal(frozen, encoder[0].weight.numpy())
    for other in (None, _linear, nn.Linear(4, 4)):
        with pytest.raises(ValueError, match="cannot be continued"):
            copy.deepcopy(whole).set_params(encoder=other).partial_fit(iris)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"encoder": nn.Linear(4, 3)}, r"encoder maps .* shape \(2, 3\); it must be \(2, 4\)"),
        ({"encoder": nn.Linear(5, 4)}, "encoder fails on rows of 4 numbers"),
        ({"decoder": nn.Linear(2, 8)}, r"must be \(2, 4\)"),
        ({"decoder": lambda n_in, n_out: None}, "decoder must be a torch.nn.Module"),
        ({"encoder": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))}, "BatchNorm1d"),
        ({"encoder": nn.Sequential(nn.Dropout(), nn.Linear(4, 4))}, "Dropout"),
        ({"encoder": 3}, "'encoder' parameter"),
        ({"encoder": _Beside()}, "when the row beside it changes"),
        ({"encoder": nn.Sequential(nn.Linear(4, 4), nn.RReLU())}, "draws random numbers"),
        ({"encoder": nn.Sequential(_Raised(4, 4), nn.RReLU())}, "draws random numbers"),
        ({"decoder": nn.LazyLinear(4)}, "draws random numbers"),
        ({"decoder": lambda: nn.Linear(2, 4)}, r"called with the widths \(2, 4\)"),
        ({"encoder": _Recurrent(as_pair=True)}, "to shape tuple; it must be"),
        ({"encoder": _Single(4, 4)}, "encoder fails on rows of float64.*dtype of what they read"),
        ({"decoder": _scripted}, "decoder is compiled by torch.jit"),
    ],
)
def test_unfit_networks_are_errors_that_say_why(iris, params, match):
    vae = _short(**params)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        vae.fit(iris)
    assert not hasattr(vae, "elbo_")
    assert torch.equal(torch.get_rng_state(), state)


def test_networks_fit_under_any_default_dtype(iris):
    vae = _short(encoder=_linear, decoder=_linear, max_iter=2)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.isfinite(_fit(vae, iris).elbo_)
    finally:
        torch.set_default_dtype(torch.float32)


def test_layers_that_return_several_things(iris):
    vae = _fit(_short(encoder=_Recurrent(), max_iter=2), iris)
    assert vae._model.architecture.encoder.width == 4 * 5  # all states of a row
    np.testing.assert_allclose(vae.score_samples(iris[:3]), vae.score_samples(iris)[:3], rtol=1e-9)


class _Killed(BaseException):
    pass


class _Counting(nn.Module):
    """A network with a frozen part and a buffer that training changes."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.frozen = nn.Linear(n_in, 6).requires_grad_(False)
        self.last = nn.Linear(6, n_out)
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, x):
        if torch.is_grad_enabled():
            self.n_calls += 1.0
        return self.last(torch.tanh(self.frozen(x)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("random_state", [0, None])
def test_a_killed_fit_goes_on_to_the_same_bits(
    iris, tmp_path, monkeypatch, precision, random_state
):
    path = tmp_path / "vae.npz"
    params = {"encoder": _Counting, "decoder": _mlp, "prior": "vamp", "n_prior_components": 3}
    params |= {"max_iter": 6, "precision": precision, "random_state": random_state}
    if random_state is None:
        monkeypatch.setattr(vae_module, "draw_seed", lambda _: 77)
    expected = _fit(_short(**params, checkpoint=path), iris)
    assert float(expected._model.weights["encoder.module.n_calls"]) == 6 * 4  # two uses, two steps

    def kill(name, epoch, *args, **kwargs):
        if epoch == 3:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(vae_module, "announce_epoch", kill)
        with pytest.raises(_Killed):
            _short(**params, checkpoint=path).fit(iris)
    monkeypatch.undo()
    # the seed of the fit is in the file
    resumed = _fit(_short(**params, checkpoint=path), iris)
    assert resumed.elbo_ == expected.elbo_
    for name, value in expected._model.weights.items():
        np.testing.assert_array_equal(resumed._model.weights[name], value)
    assert not path.exists()


def test_a_checkpoint_knows_the_values_of_networks(iris, tmp_path, monkeypatch):
    path = tmp_path / "vae.npz"

    def kill(*args, **kwargs):
        raise _Killed

    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    for given, refused in ((one, other), (lambda i, o: _mlp(i, o), lambda i, o: nn.Linear(i, o))):
        with monkeypatch.context() as patch:
            patch.setattr(vae_module, "announce_epoch", kill)
            with pytest.raises(_Killed):
                _short(encoder=given, checkpoint=path).fit(iris)
        with pytest.raises(ValueError, match="encoder differs"):
            _short(encoder=refused, checkpoint=path).fit(iris)
        _fit(_short(encoder=copy.deepcopy(given), checkpoint=path), iris)
        assert not path.exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_networks_of_the_users_multiply_no_narrow_numbers(iris, precision):
    seen = set()

    class Layer(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            if torch.is_grad_enabled():
                seen.update({x.dtype, self.weight.dtype, y.dtype})
            return y

    vae = _fit(_short(encoder=Layer, precision=precision, max_iter=2), iris)
    assert seen == {torch.float64 if precision == "float64" else torch.float32}
    # while the decoder, which is built in, is trained in the precision asked for
    plain = _fit(clone(vae).set_params(precision="float32"), iris)
    assert vae.elbo_ != plain.elbo_
    assert vae.elbo_ == pytest.approx(plain.elbo_, rel=0.05)


class Narrow(nn.Linear):
    """Multiplies in bfloat16 and returns that."""

    def forward(self, x):
        half = torch.bfloat16
        return nn.functional.linear(x.to(half), self.weight.to(half), self.bias.to(half))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_networks_that_return_fewer_digits_cost_the_densities_none(rng):
    X = (rng.uniform(size=(60, 400)) < 0.5).astype(float)
    vae = VAETransformer(
        2, encoder=lambda n_in, n_out: nn.Linear(n_in, n_out), decoder=Narrow, max_iter=1,
        random_state=0, device="cpu",
    ).fit(X)  # fmt: skip
    net = vae._model.on(torch.device("cpu"), torch.float32)
    z = torch.zeros(1, 2)
    logits = net.decode(z)
    assert logits.dtype is torch.float32
    x = torch.from_numpy(X).float()
    expected = (x.double() * logits.double() - nn.functional.softplus(logits.double())).sum(-1)
    found = net.likelihood.log_prob(x, logits)
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-6)
