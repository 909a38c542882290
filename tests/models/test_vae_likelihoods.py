"""Every likelihood of the VAE: normalised, equal to scipy's, differentiable, and its own draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from skvi.models.vae import networks, objective, start
from skvi.models.vae.likelihoods import LIKELIHOODS, Block, Marginals, build_likelihood, unit
from skvi.models.vae.networks import Architecture, build
from skvi.models.vae.start import TrainingRows, initialise, linear_posterior
from skvi.runtime.random import make_generator, shared_noise

Z_LIMIT = 5.0
CPU = torch.device("cpu")
REAL = ["gaussian", "gaussian_heteroscedastic", "student_t"]
COUNT = ["poisson", "negative_binomial"]
LEVELS = (3, 2)
MIXED = (
    Block("student_t", (4,)),
    Block("categorical", (0, 3), LEVELS),
    Block("gaussian", (2,), (), (0.5,)),
    Block("negative_binomial", (1,)),
)


def _t(values):
    return torch.as_tensor(values, dtype=torch.float64)


def _block(name, n_features=2):
    return Block(name, tuple(range(n_features)), LEVELS if name == "categorical" else ())


def _rows(name, rng, n):
    """Rows of two columns in the support."""
    if name in REAL:
        return _t(rng.normal(size=(n, 2)))
    if name in COUNT:
        return _t(rng.poisson([2.0, 30.0], size=(n, 2)))
    if name == "continuous_bernoulli":
        return _t(rng.uniform(size=(n, 2)))
    return _t(np.c_[rng.integers(0, 2 if name == "bernoulli" else 3, n), rng.integers(0, 2, n)])


def _started(blocks, x, n_components=2, hidden=(4,), dtype=torch.float64, *, one_draw=False):
    """A network at its start on rows x."""
    n_features = x.shape[1]
    model = build(Architecture(n_features, n_components, hidden, "tanh", blocks), CPU, dtype)
    floor = torch.full((n_features,), 1e-3, dtype=torch.float64)
    weight, generator = torch.ones(len(x)).double(), make_generator(0)
    initialise(model, TrainingRows.of(x.to(dtype)), weight, floor, generator, one_draw=one_draw)
    return model


@pytest.fixture(params=sorted(LIKELIHOODS))
def name(request):
    return request.param


@pytest.fixture
def likelihood(name, rng):
    return _started((_block(name),), _rows(name, rng, 60)).likelihood.requires_grad_(False)


@pytest.fixture
def output(likelihood, rng):
    return _t(rng.normal(size=(1, likelihood.n_outputs)))


def _grid(name, likelihood, output):
    """Values of one column and their weights in an integral or a sum."""
    if name in REAL:
        # x = m + s sinh(t): the trapezium rule then converges fast for heavy tails as well
        t = torch.linspace(-40.0, 40.0, 40_001, dtype=torch.float64)
        return output[0, 0] + 0.3 * torch.sinh(t), 0.3 * torch.cosh(t) * (t[1] - t[0])
    if name == "continuous_bernoulli":
        x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        return x, torch.full_like(x, 1 / 20_000)
    n = {"bernoulli": 2, "categorical": 3}.get(name, 2000)
    return torch.arange(n).double(), torch.ones(n).double()


def test_each_column_has_mass_one_and_the_moments_that_are_reported(name, likelihood, output):
    x, weight = _grid(name, likelihood, output)
    columns = torch.stack([x, torch.zeros_like(x)], -1)
    density = likelihood.cells(columns, output)[:, 0].exp() * weight
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-6)
    if name == "categorical":
        assert float(likelihood.mean(output)[0, 0]) == float(density.argmax())
        return
    mean = density @ x
    assert float(likelihood.mean(output)[0, 0]) == pytest.approx(float(mean), abs=1e-5)
    variance = float(density @ (x - mean).square())
    assert float(likelihood.variance(output)[0, 0]) == pytest.approx(variance, rel=1e-3)


def test_densities_are_scipys(name, likelihood, output, rng):
    x = _rows(name, rng, 40)
    out = output.numpy()
    learned = {key: value.numpy() for key, value in likelihood.learned().items()}
    if name == "continuous_bernoulli":
        expected = torch.distributions.ContinuousBernoulli(logits=output).log_prob(x).numpy()
    elif name == "categorical":
        shares = [np.exp(v) / np.exp(v).sum() for v in (out[0, :3], out[0, 3:])]
        expected = np.log([[p[int(code)] for p, code in zip(shares, row)] for row in x])  # noqa: B905
    else:
        law = {
            "gaussian": lambda: stats.norm(out, learned["noise_std"]),
            "gaussian_heteroscedastic": lambda: stats.norm(
                out[:, :2], np.sqrt(np.exp(out[:, 2:]) + 1e-3)
            ),
            "student_t": lambda: stats.t(learned["dof"], out, learned["noise_std"]),
            "bernoulli": lambda: stats.bernoulli(1 / (1 + np.exp(-out))),
            "poisson": lambda: stats.poisson(np.exp(out)),
            "negative_binomial": lambda: stats.nbinom(
                1 / learned["dispersion"], 1 / (1 + np.exp(out) * learned["dispersion"])
            ),
        }[name]()
        expected = (law.logpdf if name in REAL else law.logpmf)(x.numpy())
    # the bends that keep outputs in range move them by less than a thousandth here
    cells = likelihood.cells(x, output).numpy()
    np.testing.assert_allclose(cells, expected, rtol=5e-3, atol=2e-3)
    np.testing.assert_allclose(likelihood.log_prob(x, output), cells.sum(-1), rtol=1e-12)


def test_densities_have_right_and_finite_gradients(name, likelihood, rng):
    x = _rows(name, rng, 3)
    parameters = [p.requires_grad_() for p in likelihood.parameters()]
    outputs = _t(rng.normal(size=(2, 3, likelihood.n_outputs))).requires_grad_()  # of two draws
    assert torch.autograd.gradcheck(
        lambda o, *_: likelihood.log_prob(x, o), (outputs, *parameters), atol=1e-4
    )
    for size in (1e-6, 1.0, 1e3, 1e6):
        extreme = (size * torch.randn(3, likelihood.n_outputs, generator=make_generator(1))).float()
        single = _started((_block(name),), _rows(name, rng, 60), dtype=torch.float32).likelihood
        extreme.requires_grad_()
        value = single.log_prob(x.float(), extreme).sum()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(extreme.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in single.parameters())
        for function in (single.mean, single.variance):
            assert not torch.isnan(function(extreme)).any()


def test_draws_have_the_moments_of_the_law(name, likelihood, output):
    many = output.expand(40_000, -1)
    draws = likelihood.sample(many, make_generator(1))
    assert draws.shape == (40_000, 2)
    if name == "categorical":
        shares = np.bincount(draws[:, 0].long(), minlength=3) / 40_000
        np.testing.assert_allclose(shares, likelihood.statistics(output)[0, :3], atol=0.015)
        return
    variance = likelihood.variance(output)[0]
    error = (variance / 40_000).sqrt()
    assert ((draws.mean(0) - likelihood.mean(output)[0]).abs() < Z_LIMIT * error).all()
    assert torch.allclose(draws.var(0), variance, rtol=0.25)


def test_the_start_explains_the_columns_means(name, rng):
    x = _rows(name, rng, 4000)
    model = _started((_block(name),), x)
    z = torch.randn(4000, 2, generator=make_generator(0)).double()
    with torch.no_grad():
        drawn = model.likelihood.sample(model.decoder(z), make_generator(2))
    assert torch.allclose(drawn.mean(0), x.mean(0), rtol=0.1, atol=0.1)


def test_the_linearised_model_has_the_fisher_information_of_the_likelihood(name, likelihood, rng):
    """Of the first column, by quadrature: its part of ``L' Psi^-1 L`` is ``w' I(f) w``."""
    n_outputs = likelihood.n_outputs
    bias, weight = _t(rng.normal(size=n_outputs)), _t(0.5 * rng.normal(size=(n_outputs, 2)))
    n_levels = LEVELS[0] if name == "categorical" else 1
    first = slice(n_levels)
    # variances that are learned are as small as they may be
    if name == "gaussian":
        likelihood.rho.fill_(-5.0)
    if name == "gaussian_heteroscedastic":
        bias[2:] = -50.0
        weight[2:] = 0.0  # as the start has it: codes move the means alone
    loadings, noise = likelihood.linearised(bias, weight)
    assert loadings.shape == (likelihood.n_inputs, 2)
    assert noise.shape == (likelihood.n_inputs,)

    # counts are linearised where their mean over codes is
    around = bias + 0.5 * weight.square().sum(-1) if name in COUNT else bias
    x, share = _grid(name, likelihood, around[None])
    columns = torch.stack([x, torch.zeros_like(x)], -1)
    outputs = around.expand(len(x), -1).clone().requires_grad_()
    log_prob = likelihood.cells(columns, outputs)[:, 0]
    (score,) = torch.autograd.grad(log_prob.sum(), outputs)
    density = (log_prob.exp() * share).detach()
    information = weight[first].T @ ((score.T * density) @ score)[first, first] @ weight[first]
    ours = loadings[first].T @ (loadings[first] / noise[first, None])
    # the bends of outputs are not quite straight
    torch.testing.assert_close(ours, information, rtol=1e-2, atol=1e-9)
    # d E[f(x) | z] / dz = E[f(x) score'] w; of counts, whose logarithm the encoder reads, to first
    # order around the mean
    features = likelihood.features(columns)[:, first]
    if name in COUNT:
        mean = likelihood.mean(around[None])[0, first]
        features = columns[:, first] / (1.0 + mean)
    slope = (features.T * density) @ score[:, first] @ weight[first]
    torch.testing.assert_close(loadings[first], slope, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "output"),
    [("poisson", 20.0), ("negative_binomial", 15.0), ("continuous_bernoulli", 150.0)],
)
def test_bent_outputs_tell_less_of_their_codes(name, output):
    likelihood = LIKELIHOODS[name](1).double().requires_grad_(False)
    for p in likelihood.parameters():
        p.fill_(0.1)
    bias, weight = _t([output]), _t([[1e-3]])
    loadings, _ = likelihood.linearised(bias, weight)

    def mean(z):
        m = likelihood.mean(bias + weight @ z)
        return (1.0 + m).log() if name in COUNT else m

    slope = torch.autograd.functional.jacobian(mean, torch.zeros(1).double())
    torch.testing.assert_close(loadings, slope, rtol=1e-5, atol=0.0)
    straight = weight if name in COUNT else weight * likelihood.variance(bias)
    assert float(loadings) < 0.9 * float(straight)


def test_the_start_knows_what_each_row_tells_about_its_code(name):
    """Posteriors of the start beside the exact ones, by a grid over the one code.

    Half of the columns are rare: there factor analysis sees the least noise, and the law has the
    least to say.
    """
    n_columns, n_rows = 60, 400
    rng = np.random.default_rng(0)
    block = Block(name, tuple(range(n_columns)), (2,) * n_columns if name == "categorical" else ())
    likelihood = block.build().double().requires_grad_(False)
    mean, level = {
        "bernoulli": ([1e-3, 0.4], 0.02),
        "categorical": ([1e-3, 0.4], 0.02),
        "continuous_bernoulli": ([0.1, 0.5], 0.02),
        "poisson": ([0.02, 3.0], 0.2),
        "negative_binomial": ([0.02, 3.0], 0.2),
    }.get(name, ([0.0, 0.0], 0.2))
    mean = _t(mean).repeat_interleave(n_columns // 2)
    loadings = level * _t(rng.normal(size=(n_columns, 1)))
    if name in {"bernoulli", "categorical"}:
        loadings[: n_columns // 2] *= 0.05
    noise, floor = torch.full_like(mean, 1.0 if name in REAL else 1e-6), torch.full_like(mean, 1e-3)
    known = Marginals(mean, mean + mean.square(), mean, loadings, noise, floor)
    if name == "categorical":
        known = known._replace(
            feature_mean=torch.stack([mean, 1.0 - mean], 1).flatten(),
            loadings=torch.stack([loadings, -loadings], 1).flatten(0, 1),
        )
    bias, weight = likelihood.start(known)
    loadings, own_noise = likelihood.linearised(bias, weight)
    seen_noise = noise if name != "categorical" else noise.repeat_interleave(2)
    posterior = linear_posterior(loadings, torch.maximum(own_noise, seen_noise))
    weight = weight @ posterior.rotation

    z = torch.randn(n_rows, 1, generator=make_generator(1)).double()
    x = likelihood.sample(bias + z @ weight.T, make_generator(2))
    features = likelihood.features(x)
    ours = (features - features.mean(0)) @ posterior.encoder.T
    grid = torch.linspace(-5.0, 5.0, 401, dtype=torch.float64)[:, None]
    log_joint = torch.stack([likelihood.log_prob(x, bias + v * weight[:, 0]) for v in grid])
    share = (log_joint - 0.5 * grid.square()).softmax(0)  # (G, N)
    exact = (share * grid).sum(0)
    var = (share * (grid - exact).square()).sum(0).mean()
    assert 0.7 < float(posterior.log_var.exp() / var) < 1.4
    assert float((ours[:, 0] - exact).square().mean()) < 0.3 * float(var)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 7, 5), (2, 3, 7, 5), (3, 0, 5)])
@pytest.mark.parametrize("n_cells", [1, 11, 35, 60, 1000])
def test_blocks_of_cells_change_nothing(shape, n_cells, rng, monkeypatch):
    monkeypatch.setattr(unit, "_CELLS_PER_BLOCK", n_cells)
    likelihood = LIKELIHOODS["bernoulli"](5)
    x = _t(rng.integers(0, 2, shape[-2:]))
    f, factor = _t(rng.normal(size=shape)).requires_grad_(), _t(rng.normal(size=shape[:-1]))
    value = likelihood.log_prob(x, f)
    plain = likelihood.cells(x, f).sum(-1)
    torch.testing.assert_close(value, plain)
    for one, other in zip(
        torch.autograd.grad((factor * value).sum(), f),
        torch.autograd.grad((factor * plain).sum(), f),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    # outputs that lack the rows, as those of one code for all of them
    torch.testing.assert_close(
        likelihood.log_prob(x, f[..., :1, :]) if len(shape) > 1 else value,
        likelihood.cells(x, f[..., :1, :]).sum(-1) if len(shape) > 1 else plain,
    )


def test_blocks_are_as_large_as_they_may_be():
    x, f = torch.zeros(256, 784), torch.zeros(50, 256, 784)
    sizes = [logits.numel() for _, logits in unit._blocks(x, f)]
    assert sum(sizes) == f.numel()
    assert max(sizes) <= unit._CELLS_PER_BLOCK
    assert min(sizes[:-1]) > unit._CELLS_PER_BLOCK // 2
    wide = torch.zeros(3, 100, 100_000)
    sizes = [logits.numel() for _, logits in unit._blocks(wide[0], wide)]
    assert sum(sizes) == wide.numel()
    assert unit._CELLS_PER_BLOCK // 2 < max(sizes) <= unit._CELLS_PER_BLOCK


@pytest.mark.parametrize("blocks", [*sorted(LIKELIHOODS), MIXED], ids=str)
def test_only_laws_that_widen_outputs_get_narrow_ones(blocks, rng, monkeypatch):
    monkeypatch.setattr(networks, "_LARGE", 1)
    x = _mixed_rows(rng, 20) if blocks is MIXED else _rows(blocks, rng, 20)
    blocks = blocks if blocks is MIXED else (_block(blocks),)
    model = _started(blocks, x, dtype=torch.float32)
    model.set_product_dtype(torch.bfloat16)
    narrow = blocks[0].name == "bernoulli"
    z = torch.zeros(20, 2)
    assert model.decode(z).dtype == (torch.bfloat16 if narrow else torch.float32)
    weight, noise = torch.ones(20), torch.randn(20, 2, generator=make_generator(0))
    loss, _ = objective.training_loss(model, x.float(), None, weight, noise, beta=1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_outputs_of_few_digits_are_widened_before_anything_is_made_of_them(rng):
    likelihood = LIKELIHOODS["bernoulli"](50)
    x = _t(rng.integers(0, 2, (6, 50))).float()
    narrow = (4.0 * torch.randn(3, 6, 50, generator=make_generator(0))).bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    for function in (likelihood.log_prob, likelihood.cells):
        one, other = function(x, narrow), function(x, wide)
        assert torch.equal(one, other)
        (slope,) = torch.autograd.grad(one.sum(), narrow)
        (expected,) = torch.autograd.grad(other.sum(), wide)
        assert torch.equal(slope, expected.bfloat16())


@pytest.mark.parametrize("blocks", [*sorted(LIKELIHOODS), MIXED], ids=str)
def test_the_encoder_starts_at_the_posterior_of_the_linearised_decoder(blocks, rng, monkeypatch):
    """With the noise of factor analysis where that is larger."""
    x = _mixed_rows(rng, 80) if blocks is MIXED else _rows(blocks, rng, 80)
    if blocks in COUNT:
        x[:, 1] *= torch.arange(80)  # varies far more than a count may
    found = []
    plain = start.factor_analysis

    def watched(*args):
        found.append(plain(*args))
        return found[0]

    monkeypatch.setattr(start, "factor_analysis", watched)
    model = _started(blocks if blocks is MIXED else (_block(blocks),), x).requires_grad_(False)
    ((_, seen_noise),) = found
    decoder = model.decoder.linear
    loadings, noise = model.likelihood.linearised(decoder.bias, decoder.weight)
    if blocks in COUNT:
        assert (seen_noise > 2.0 * noise).any()
    scaled = loadings / torch.maximum(noise, seen_noise)[:, None]
    cov = torch.linalg.inv(torch.eye(2) + loadings.T @ scaled)
    q = model.posterior(x)
    torch.testing.assert_close(cov, torch.diag(q.log_var[0].exp()), rtol=1e-4, atol=1e-8)
    features = model.likelihood.features(x)
    expected = (features - model.input_shift) @ scaled @ cov
    torch.testing.assert_close(q.mean, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bernoulli", "poisson", "gaussian"])
def test_for_one_draw_posteriors_start_as_narrow_as_those_of_factor_analysis(
    name, rng, monkeypatch
):
    x = _rows(name, rng, 80)
    if name != "gaussian":
        x[:, 1] = x[:, 0]  # factor analysis explains all of them; the likelihood has noise left
    found = []

    def watched(step):
        def watch(*args):
            found.append(step(*args))
            return found[-1]

        return watch

    for step in (start.factor_analysis, start.linear_posterior):
        monkeypatch.setattr(start, step.__name__, watched(step))
    narrow = _started((_block(name),), x, one_draw=True).requires_grad_(False)
    (factors, noise), linear = found
    wide = _started((_block(name),), x).requires_grad_(False)
    q, wider = narrow.posterior(x), wide.posterior(x)
    torch.testing.assert_close(q.mean, wider.mean)
    torch.testing.assert_close(narrow.decoder.linear.weight, wide.decoder.linear.weight)
    rotated = factors @ linear.rotation
    precision = torch.eye(2) + (rotated.T / noise) @ rotated
    torch.testing.assert_close(-precision.diagonal().log(), q.log_var[0], rtol=1e-5, atol=1e-6)
    if name == "gaussian":
        torch.testing.assert_close(q.log_var, wider.log_var, rtol=1e-6, atol=1e-6)
    else:
        assert float((wider.log_var - q.log_var).max()) > 1.0


def test_a_mixed_table_is_linearised_part_by_part(rng):
    mixed = _started(MIXED, _mixed_rows(rng, 50)).likelihood.requires_grad_(False)
    bias, weight = _t(rng.normal(size=mixed.n_outputs)), _t(rng.normal(size=(mixed.n_outputs, 2)))
    loadings, noise = mixed.linearised(bias, weight)
    at, out = 0, 0
    for part in mixed.parts:
        own = slice(out, out + part.n_outputs)
        one, other = part.linearised(bias[own], weight[own])
        assert torch.equal(loadings[at : at + part.n_inputs], one)
        assert torch.equal(noise[at : at + part.n_inputs], other)
        at, out = at + part.n_inputs, out + part.n_outputs
    assert (at, out) == (len(noise), mixed.n_outputs)


def test_a_count_that_varies_more_than_it_may_does_not_carry_the_others_away():
    rng = np.random.default_rng(0)
    z, W = rng.normal(size=(400, 2)), rng.normal(size=(2, 8))
    x = _t(rng.poisson(3.0 * np.exp(0.5 * z @ W)))
    x[:, 0] = _t(rng.poisson(1e3 * np.exp(rng.normal(size=400))))
    blocks = (Block("poisson", tuple(range(8))),)
    bounds = {}
    for n_columns in (8, 7):
        rows = x[:, -n_columns:]
        blocks = (Block("poisson", tuple(range(n_columns))),)
        model = _started(blocks, rows).requires_grad_(False)
        codes = model.posterior(rows).mean
        bounds[n_columns] = model.likelihood.cells(rows, model.decode(codes))[:, -7:].sum(-1).mean()
    assert float(bounds[8]) > float(bounds[7]) - 10.0


def test_fixed_noise_has_no_parameter_and_is_the_floor():
    blocks = (Block("gaussian", (0, 1), (), (0.5, 2.0)),)
    model = build(Architecture(2, 1, (), "tanh", blocks), CPU, torch.float64)
    floor = _t([0.25, 4.0])
    initialise(
        model,
        TrainingRows.of(torch.eye(2).double()),
        torch.ones(2).double(),
        floor,
        make_generator(0),
    )
    assert not list(model.likelihood.parameters())
    x, f = _t([[0.3, -1.0]]), _t([[0.1, 0.4]])
    expected = stats.norm([0.1, 0.4], [0.5, 2.0]).logpdf([0.3, -1.0]).sum()
    assert float(model.likelihood.log_prob(x, f)) == pytest.approx(expected, rel=1e-9)


def _mixed_rows(rng, n):
    return _t(
        np.c_[
            rng.integers(0, 3, n),
            rng.poisson(3.0, n),
            rng.normal(size=n),
            rng.integers(0, 2, n),
            rng.standard_t(3, size=n),
        ]
    )


def test_a_mixed_table_is_the_sum_of_its_parts(rng):
    x = _mixed_rows(rng, 50)
    mixed = _started(MIXED, x).likelihood.requires_grad_(False)
    outputs = _t(rng.normal(size=(7, 50, mixed.n_outputs)))
    cells = mixed.cells(x, outputs)
    offset = 0
    for block, part in zip(MIXED, mixed.parts, strict=True):
        own = outputs[..., offset : offset + part.n_outputs]
        columns = list(block.columns)
        assert torch.equal(cells[..., columns], part.cells(x[:, columns], own))
        assert torch.equal(mixed.mean(outputs)[..., columns], part.mean(own))
        assert torch.equal(mixed.variance(outputs)[..., columns], part.variance(own))
        offset += part.n_outputs
    assert offset == mixed.n_outputs == Architecture(5, 1, (), "tanh", MIXED).n_outputs
    assert torch.allclose(mixed.log_prob(x, outputs), cells.sum(-1))
    drawn = mixed.sample(outputs[0], make_generator(0))
    assert torch.isfinite(mixed.cells(drawn, outputs[0])).all()
    assert mixed.features(x).shape == (50, 5 - 2 + sum(LEVELS))
    shown = mixed.learned()
    assert np.flatnonzero(~shown["noise_std"].isnan()).tolist() == [2, 4]
    assert np.flatnonzero(~shown["dispersion"].isnan()).tolist() == [1]


def test_the_mass_of_a_mixed_table_sums_to_one():
    blocks = (Block("categorical", (0, 2), (3, 2)), Block("bernoulli", (1,)))
    x = _t(list(itertools.product(range(3), range(2), range(2))))
    mixed = _started(blocks, x).likelihood
    output = torch.randn(1, mixed.n_outputs, generator=make_generator(0)).double()
    assert float(mixed.log_prob(x, output).exp().sum()) == pytest.approx(1.0, rel=1e-12)


def test_counts_of_a_million_keep_their_digits_in_float32():
    x = torch.tensor([[1_000_000.0, 16_000_000.0]])
    for name in COUNT:
        likelihood = build_likelihood((_block(name),)).requires_grad_(False)
        for p in likelihood.parameters():
            p.fill_(1.2)
        # outputs that float32 holds exactly, near the logarithms of the counts
        output = torch.tensor([[17.5, 18.25]])
        exact = likelihood.double().log_prob(x.double(), output.double())
        single = likelihood.float().log_prob(x, output)
        assert float(single) == pytest.approx(float(exact), rel=1e-4)
        assert math.isfinite(float(exact))


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("poisson", [1e-3, 30.0, 1e7]),
        ("negative_binomial", [1e-3, 30.0, 1e7]),
        ("continuous_bernoulli", [0.012, 0.5, 0.988]),
    ],
)
def test_the_start_knows_that_outputs_are_bent(name, means):
    mean, loadings = _t(means), _t([[0.05, 0.0], [0.0, -0.03], [0.02, 0.01]])
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    likelihood = LIKELIHOODS[name](3).double().requires_grad_(False)

    def start(loadings):
        return likelihood.start(Marginals(mean, mean, zero, loadings, one, one))

    torch.testing.assert_close(likelihood.mean(start(torch.zeros(3, 2).double())[0]), mean)
    bias, weight = start(loadings)
    slope = torch.autograd.functional.jacobian(
        lambda z: likelihood.mean(bias + weight @ z), zero[:2]
    )
    if name in COUNT:  # of the logarithm; log-normal means over codes are those of the columns
        spread = 0.5 * loadings.square().sum(-1)
        torch.testing.assert_close(likelihood.mean(bias).log() + spread, mean.log())
        slope = slope / likelihood.mean(bias)[:, None]
    else:
        variance = likelihood.variance(bias)
        slope = slope * (variance.clamp_min(0.01) / variance)[:, None]
    torch.testing.assert_close(slope, loadings)


def test_an_average_that_rounds_above_one_has_no_negative_variance():
    likelihood = LIKELIHOODS["categorical"](LEVELS)
    shares = _t([0.0, 1.0 + 1e-15, 0.0, 0.25, 0.75])
    mode, variance = likelihood.summarise(shares)
    assert mode.tolist() == [1.0, 1.0]
    assert variance.tolist() == [0.0, 0.1875]


def test_binary_columns_and_codes_start_at_the_slopes_of_factor_analysis():
    zero = torch.zeros(2).double()
    for name, mean, loadings in (
        ("bernoulli", [0.3, 0.8], [[0.1, 0.0], [-0.05, 0.02]]),
        # indicators of a column sum to one, and their loadings to zero
        ("categorical", [0.2, 0.5, 0.3], [[0.1, 0.0], [-0.04, 0.02], [-0.06, -0.02]]),
    ):
        mean, loadings = _t(mean), _t(loadings)
        likelihood = build_likelihood((Block(name, (0,), (3,) if name == "categorical" else ()),))
        bias, weight = likelihood.start(Marginals(mean, mean, mean, loadings, mean, mean))

        def shares(z, likelihood=likelihood, name=name, bias=bias, weight=weight):
            output = bias + weight @ z
            return likelihood.mean(output) if name == "bernoulli" else likelihood.statistics(output)

        torch.testing.assert_close(shares(zero), mean)
        slope = torch.autograd.functional.jacobian(shares, zero)
        torch.testing.assert_close(slope, loadings)


def test_the_size_of_counts_starts_by_moments():
    mean, var = _t([3.0, 20.0, 5.0]), _t([3.0 + 9.0 / 0.5, 20.0 + 400.0 / 7.0, 4.0])
    likelihood = build_likelihood((Block("negative_binomial", (0, 1, 2)),)).double()
    likelihood.start(Marginals(mean, var, mean, torch.zeros(3, 2).double(), mean, mean))
    size = likelihood.size().detach()
    torch.testing.assert_close(size[:2], _t([0.5, 7.0]))
    assert float(size[2]) == pytest.approx(5000.0)  # as good as Poisson


def test_the_start_of_noise_is_what_the_code_leaves():
    loadings, noise, floor = _t([[0.8, 0.0], [0.0, 0.1]]), _t([0.2, 0.3]), _t([1e-3, 1e-3])
    known = Marginals(_t([0.0, 0.0]), _t([1.0, 1.0]), _t([0.0, 0.0]), loadings, noise, floor)
    for name, expected in (
        ("gaussian", [0.36, 0.99]),
        ("gaussian_heteroscedastic", [0.36, 0.99]),
        ("student_t", [0.2, 0.3]),
    ):
        likelihood = build_likelihood((Block(name, (0, 1)),)).double().requires_grad_(False)
        bias, weight = likelihood.start(known)
        if name == "gaussian_heteroscedastic":
            assert torch.equal(weight[2:], torch.zeros(2, 2).double())
            var = likelihood.variance(bias)
        else:
            var = likelihood.log_var().exp()
        torch.testing.assert_close(var, _t(expected), rtol=1e-5, atol=0.0)  # bent by e^-14
        torch.testing.assert_close(weight[:2], loadings)


@pytest.mark.parametrize("name", COUNT)
def test_deviations_of_large_counts_keep_their_digits_in_float32(name):
    x = torch.full((2, 1), 1e7)
    model = _started((Block(name, (0,)),), x, 1, (), torch.float32).requires_grad_(False)
    model.decoder.linear.weight.zero_()
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    mean, var = objective.predictive_moments(model, x, nothing, shared_noise(50, 1, 0).float(), 7)
    expected = model.likelihood.variance(model.decoder.linear.bias.double())
    torch.testing.assert_close(mean, x.double(), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(var, expected.expand(2, 1), rtol=1e-4, atol=0.0)


def test_predicted_variances_end():
    likelihood = build_likelihood((Block("gaussian_heteroscedastic", (0,)),))
    likelihood.log_floor.fill_(-7.0)
    variance = likelihood.variance(_t([[0.0, -1e4], [0.0, 3.0], [0.0, 1e4]]))[:, 0]
    expected = _t([math.exp(-7.0), math.exp(3.0) + math.exp(-7.0), math.exp(14.0)])
    torch.testing.assert_close(variance, expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dof", [1.5, 5.0])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_moments_of_missing_cells_are_weighted_draws_in_any_blocks(dof, spread, rng):
    """Far from the data most draws have a weight of zero, and below two dof infinite variances."""
    x = _t(rng.normal(size=(5, 2)))
    blocks = (Block("gaussian", (0,), (), (spread,)), Block("student_t", (1,)))
    model = _started(blocks, x, 2, ()).requires_grad_(False)
    gaussian, student = model.likelihood.parts
    gaussian.log_floor.fill_(2.0 * math.log(spread))
    odds = (dof - 1.0) / (100.0 - dof)
    student.tail.fill_(math.log(odds) / 10.0)
    model.encoder.linear.weight.zero_()
    observed = torch.tensor([[True, False]]).expand(5, 2)
    noise = _t(rng.normal(size=(40, 2)))
    moments = [objective.predictive_moments(model, x, observed, noise, size) for size in (1, 7, 40)]
    z, log_q = model.posterior(x, observed).draw_with_density(noise[:, None])
    output = model.decode(z)
    log_prob = gaussian.log_prob(x[:, :1], output[..., :1])
    weight = (log_prob - 0.5 * z.square().sum(-1) - log_q).softmax(0)[..., None]
    mean = (weight * output).sum(0)
    within = torch.where(weight > 0, model.likelihood.variance(output), 0.0)
    second = (weight * (within + output.square())).sum(0)
    for one in moments:
        torch.testing.assert_close(one[0], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one[1], second - mean.square(), rtol=1e-6, atol=1e-9)
    assert bool(torch.isinf(second[:, 1]).all()) == (dof < 2.0)


def test_the_encoder_reads_the_mean_in_place_of_missing_cells(name, rng):
    x = _rows(name, rng, 60)
    model = _started((_block(name),), x).requires_grad_(False)
    observed = torch.ones(60, 2, dtype=torch.bool)
    observed[:30, 1] = False
    inputs = model.inputs(x, observed)
    seen = model.likelihood.per_feature(observed)
    assert (inputs[~seen] == 0.0).all()
    assert torch.equal(inputs[seen], model.inputs(x)[seen])
    other = x.clone()
    other[:30, 1] = 0.0
    assert torch.equal(model.posterior(other, observed).mean, model.posterior(x, observed).mean)


def test_missing_cells_do_not_scale_what_the_encoder_reads():
    x = _t([[500.0, 1.0], [501.0, 2.0], [499.0, 3.0], [0.0, 2.5]])  # zero stands for a hole
    observed = torch.tensor([[True, True]] * 3 + [[False, True]])
    model = build(Architecture(2, 1, (), "tanh", (_block("gaussian"),)), CPU, torch.float64)
    floor, weight = torch.full((2,), 1e-3).double(), torch.ones(4).double()
    initialise(model, TrainingRows.of(x, observed), weight, floor, make_generator(0))
    assert model.input_scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("levels", [(4,), (3, 3, 3), (3, 3, 2, 2, 2, 5, 3)])
def test_codes_are_taken_column_by_column_however_their_levels_are_grouped(levels, rng):
    likelihood = LIKELIHOODS["categorical"](levels)
    x = torch.from_numpy(np.stack([rng.integers(0, n, 6) for n in levels], 1).astype(float))
    output = torch.from_numpy(rng.normal(size=(2, 6, sum(levels))))  # (S, B, n_outputs)
    columns = output.split(levels, -1)
    cells = [
        column.log_softmax(-1)[:, torch.arange(6), code.long()]
        for column, code in zip(columns, x.T, strict=True)
    ]
    torch.testing.assert_close(likelihood.cells(x, output), torch.stack(cells, -1))
    torch.testing.assert_close(
        likelihood.statistics(output), torch.cat([c.softmax(-1) for c in columns], -1)
    )
    mode = torch.stack([c.argmax(-1) for c in columns], -1)
    torch.testing.assert_close(likelihood.mean(output), mode.double())
    indicators = [
        torch.nn.functional.one_hot(code.long(), n) for code, n in zip(x.T, levels, strict=True)
    ]
    torch.testing.assert_close(likelihood.features(x), torch.cat(indicators, -1).double())
    repeated = x.repeat_interleave(torch.tensor(levels), -1)
    torch.testing.assert_close(likelihood.per_feature(x), repeated)
    bias, weight = output[0, 0], torch.from_numpy(rng.normal(size=(sum(levels), 2)))
    loadings, noise = likelihood.linearised(bias, weight)
    p = torch.cat([b.softmax(-1) for b in bias.split(levels)])
    torch.testing.assert_close(noise, p)
    blocks = [torch.diag(q) - torch.outer(q, q) for q in p.split(levels)]
    torch.testing.assert_close(loadings, torch.block_diag(*blocks) @ weight)
