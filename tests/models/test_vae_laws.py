"""Priors and posteriors of the VAE: densities, draws, divergences, and what training climbs."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from skvi.distributions import normal
from skvi.models.vae import objective
from skvi.models.vae.fused import ResidualProduct
from skvi.models.vae.likelihoods import Block
from skvi.models.vae.networks import Architecture, Custom, build
from skvi.models.vae.posteriors import POSTERIORS, Diagonal, Flow, Full, unbounded_log_var
from skvi.models.vae.priors import (
    HALF_WIDTH,
    PRIORS,
    Mixture,
    StandardNormal,
    squash,
    squashed_moments,
)
from skvi.models.vae.start import TrainingRows, initialise
from skvi.runtime.random import make_generator, shared_noise

# A two-sided normal deviate beyond 5 has probability 6e-7: the false-positive rate per check.
Z_LIMIT = 5.0
CPU = torch.device("cpu")


def _model(prior="normal", posterior="diag", k=2, hidden=(4,), seed=0, scale=0.5):
    """A network of 3 features with random weights, in float64."""
    n_prior = 3 if prior in {"mixture", "vamp"} else 0
    blocks = (Block("gaussian", (0, 1, 2)),)
    model = build(
        Architecture(3, k, hidden, "tanh", blocks, prior, n_prior, posterior), CPU, torch.float64
    )
    generator = make_generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, scale, generator=generator)
        model.input_shift.zero_()
        model.input_scale.fill_(1.0)
        model.likelihood.log_floor.fill_(math.log(1e-3))
        model.likelihood.rho.fill_(0.0)
        # Posteriors a little wider than the prior: importance weights then have finite variance.
        for layer in (model.encoder.linear, model.encoder.correction):
            if layer is not None:
                layer.weight *= 0.3
                layer.weight[k : 2 * k] *= 0.3
        model.encoder.linear.bias *= 0.5
        model.encoder.linear.bias[k : 2 * k] = 0.4
        model.decoder.linear.weight *= 0.7
        for weight in model.family.curvature_weights():
            weight *= 0.5
        if prior == "mixture":
            model.prior.mean.mul_(3.0)
    return model.requires_grad_(False)


def _x(rng, n):
    return torch.from_numpy(rng.normal(size=(n, 3)))


def _normal_draws(*shape, seed=1):
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=make_generator(seed))


def _grid(half_width=14.0, n=281):
    """Points of the plane, (n * n, 2), and the area of one."""
    axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@pytest.fixture(params=sorted(POSTERIORS))
def posterior(request):
    return request.param


@pytest.fixture(params=sorted(PRIORS))
def prior(request):
    return request.param


# -- posteriors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_density_of_a_draw_is_the_change_of_variables(posterior, k, rng):
    model = _model(posterior=posterior, k=k)
    q = model.posterior(_x(rng, 1))
    assert isinstance(q, {"diag": Diagonal, "full": Full, "flow": Flow}[posterior])
    for eps in _normal_draws(5, k):
        jacobian = torch.autograd.functional.jacobian(lambda e: q.draw(e[None])[0], eps)
        numeric = stats.norm.logpdf(eps).sum() - float(torch.linalg.slogdet(jacobian)[1])
        z, log_q = q.draw_with_density(eps[None])
        assert float(log_q[0]) == pytest.approx(numeric, abs=1e-10)
        assert float(q.log_prob(z)[0]) == pytest.approx(numeric, abs=1e-10)


def test_posteriors_integrate_to_one(posterior, rng):
    q = _model(posterior=posterior).posterior(_x(rng, 4))
    points, area = _grid()
    mass = q.log_prob(points[:, None, :]).exp().sum(0) * area
    assert torch.allclose(mass, torch.ones(4).double(), atol=1e-6)


def test_a_full_posterior_is_torchs(rng):
    q = _model(posterior="full", k=4).posterior(_x(rng, 5))
    eye = torch.eye(4, dtype=torch.float64)
    L = (0.5 * q.log_var).exp()[..., None] * (eye + q.slope)
    law = torch.distributions.MultivariateNormal(q.mean, scale_tril=L)
    prior = torch.distributions.MultivariateNormal(torch.zeros(4).double(), eye)
    assert torch.allclose(q.entropy(), law.entropy(), rtol=1e-12)
    kl = torch.distributions.kl_divergence(law, prior)
    assert torch.allclose(q.kl_standard().sum(-1), kl, rtol=1e-10)
    assert (q.kl_standard() >= 0).all()
    mean, var = q.moments()
    assert torch.allclose(var, law.variance)
    assert torch.equal(mean, law.mean)
    z = _normal_draws(7, 5, 4)
    assert torch.allclose(q.log_prob(z), law.log_prob(z), rtol=1e-10)
    eps = _normal_draws(6, 1, 4)
    assert torch.allclose(q.draw(eps), q.mean + torch.einsum("bij,sj->sbi", L, eps[:, 0]))


def test_a_flow_bends_the_normal(rng):
    """It would be no more than a diagonal posterior if its couplings did nothing."""
    model = _model(posterior="flow")
    z = model.posterior(_x(rng, 1)).draw(_normal_draws(20_000, 1, 2))[:, 0]
    assert stats.normaltest(z.numpy()).pvalue.min() < 1e-20
    assert abs(float(z.T.corrcoef()[0, 1])) > 0.05


def test_nothing_of_a_detached_posterior_has_a_gradient(posterior, rng):
    model = _model(posterior=posterior).requires_grad_()
    z = _normal_draws(4, 2).requires_grad_()
    q = model.posterior(_x(rng, 4))
    frozen = q.detach().log_prob(z)
    assert torch.allclose(frozen, q.log_prob(z), rtol=1e-12)
    frozen.sum().backward()
    assert z.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_densities_of_pairs_are_those_of_the_laws(posterior, rng):
    """So are their gradients, for the draws and for all that the laws are made of."""
    model = _model(posterior=posterior, k=3).requires_grad_()
    q = model.posterior(_x(rng, 4))
    z = _normal_draws(6, 3).requires_grad_()
    slopes = _normal_draws(6, 4)
    base = q.base if posterior == "flow" else q
    parts = [z, base.mean, base.log_var]
    parts += {"diag": [], "full": q[2:], "flow": [q[1], *model.family.parameters()]}[posterior]
    pairs, expected = q.log_prob_pairs(z), q.log_prob(z[:, None])
    assert torch.allclose(pairs, expected, rtol=1e-12)
    gradients = [
        torch.autograd.grad((slopes * values).sum(), parts, retain_graph=True)
        for values in (pairs, expected)
    ]
    for ours, plain in zip(*gradients, strict=True):
        assert plain.any()
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("spread", "log_var"), [(1.0, -20.9), (30.0, -20.9), (10.0, -8.0), (3.0, -8.0), (1.0, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centre", [0.0, 1000.0])
def test_mixtures_of_narrow_laws_keep_their_digits(spread, log_var, dtype, centre):
    """Draws of each law under all of them, by terms in extended precision."""
    generator = make_generator(0)
    mean = torch.empty(20, 50, dtype=dtype).normal_(centre, spread, generator=generator)
    q = Diagonal(mean, torch.full_like(mean, log_var))
    z = q.draw(torch.empty(20, 50, dtype=dtype).normal_(generator=generator))
    exact = [value.numpy().astype(np.longdouble) for value in (z[:, None], *q)]
    squares = (exact[0] - exact[1]) ** 2 / np.exp(exact[2])
    pairs = -0.5 * (np.log(2 * np.longdouble(np.pi)) + exact[2] + squares).sum(-1)
    expected = np.logaddexp.reduce(pairs - np.log(np.longdouble(20)), axis=-1)
    ours = Mixture(q.mean.new_full((20,), -math.log(20)), q).log_prob(z).numpy()
    # 50 terms of the order of 10 each
    assert (np.abs(ours - expected) < 3000 * torch.finfo(dtype).eps).all()


def test_selected_rows_keep_their_posterior(posterior, rng):
    q = _model(posterior=posterior).posterior(_x(rng, 4), torch.ones(4, 3, dtype=torch.bool))
    index = torch.tensor([3, 1, 3])
    eps = _normal_draws(4, 2)
    assert torch.allclose(q.select(index).draw(eps[index]), q.draw(eps)[index], rtol=1e-13)


def test_every_family_starts_as_the_diagonal_one(posterior, rng):
    x = _x(rng, 50)
    floor = torch.full((3,), 1e-3, dtype=torch.float64)

    def start(name):
        blocks = (Block("gaussian", (0, 1, 2)),)
        architecture = Architecture(3, 2, (4,), "tanh", blocks, posterior=name)
        model = build(architecture, CPU, torch.float64)
        initialise(model, TrainingRows.of(x), torch.ones(50).double(), floor, make_generator(0))
        return model.requires_grad_(False).posterior(x)

    plain, rich, eps = start("diag"), start(posterior), _normal_draws(50, 2)
    assert torch.allclose(rich.draw(eps), plain.draw(eps))


# -- priors ---------------------------------------------------------------------------------------


def test_priors_integrate_to_one(prior, posterior):
    law = _model(prior, posterior).prior_law(torch.zeros(1, dtype=torch.float64))
    points, area = _grid()
    assert float(law.log_prob(points).exp().sum() * area) == pytest.approx(1.0, abs=1e-6)


def test_draws_of_a_prior_have_its_moments(prior, posterior):
    law = _model(prior, posterior).prior_law(torch.zeros(1, dtype=torch.float64))
    mean, var = law.moments()
    z = law.sample(100_000, make_generator(2))
    # moments of flows are averages of 256 quasi-random draws
    slack = 0.05 if (prior, posterior) == ("vamp", "flow") else 0.0
    assert ((z.mean(0) - mean).abs() < Z_LIMIT * (var / 100_000).sqrt() + slack).all()
    fourth = (z - mean).pow(4).mean(0)
    error = ((fourth - var.square()).clamp_min(0.0) / 100_000).sqrt()
    assert ((z.var(0) - var).abs() < Z_LIMIT * error + 3.0 * slack * var).all()


def test_a_mixture_is_evaluated_alike_in_blocks(monkeypatch, posterior):
    law = _model("vamp", posterior).prior_law(torch.zeros(1, dtype=torch.float64))
    z = _normal_draws(5, 3, 2)
    whole = law.log_prob(z)
    monkeypatch.setattr("skvi.models.vae.priors.block_rows", lambda *_: 2)
    assert torch.allclose(law.log_prob(z), whole, rtol=1e-13)


def test_the_squashed_normal_is_uniform_and_its_moments_are_exact():
    z = torch.from_numpy(stats.norm.ppf((np.arange(1000) + 0.5) / 1000))
    u = squash(z)
    assert torch.allclose(u, HALF_WIDTH * (2 * torch.from_numpy(stats.norm.cdf(z)) - 1))
    assert float(u.square().mean()) == pytest.approx(1.0, abs=1e-5)
    mean = torch.tensor([0.0, 0.3, -2.0, 5.0, 0.5, -30.0], dtype=torch.float64)
    std = torch.tensor([1.0, 0.1, 0.5, 2.0, 1e-4, 4.0], dtype=torch.float64)
    first, second = squashed_moments(mean, std.square())
    # Hermite nodes converge fast for a smooth function
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(180))
    weights = weights / weights.sum()
    values = squash(mean + std * nodes[:, None])
    expected = weights @ values
    assert torch.allclose(first, expected, atol=1e-10)
    assert torch.allclose(second, weights @ (values - expected).square(), rtol=1e-7, atol=1e-12)


def test_the_divergence_to_the_box_is_that_to_the_normal():
    """By quadrature over the box: the density of the code is that of z over the slope."""
    q = Diagonal(*(torch.tensor([[v]], dtype=torch.float64) for v in (0.7, -1.1)))
    u = torch.from_numpy(np.linspace(-1, 1, 400_001)[1:-1]) * HALF_WIDTH
    z = math.sqrt(2.0) * torch.special.erfinv(u / HALF_WIDTH)
    log_slope = math.log(2 * HALF_WIDTH) + normal.log_density(
        z, torch.zeros(()).double(), torch.zeros(()).double()
    )
    log_q = q.log_prob(z[:, None, None])[:, 0] - log_slope
    step = float(u[1] - u[0])
    assert float(log_q.exp().sum() * step) == pytest.approx(1.0, abs=1e-6)
    kl = float((log_q.exp() * (log_q + math.log(2 * HALF_WIDTH))).sum() * step)
    assert float(q.kl_standard()) == pytest.approx(kl, abs=1e-6)


def test_mixtures_start_at_training_rows_and_near_the_normal(rng):
    x = _x(rng, 400)
    floor = torch.full((3,), 1e-3, dtype=torch.float64)
    for prior in ("mixture", "vamp"):
        blocks = (Block("gaussian", (0, 1, 2)),)
        architecture = Architecture(3, 2, (4,), "tanh", blocks, prior, 40)
        model = build(architecture, CPU, torch.float64)
        initialise(model, TrainingRows.of(x), torch.ones(400).double(), floor, make_generator(0))
        model.requires_grad_(False)
        if prior == "vamp":  # half of the weight is on the standard normal, the last
            assert float(model.prior_law(x).log_weight[-1]) == pytest.approx(math.log(0.5))
        else:  # half of the codes' variance is between the components
            codes = model.encoder(model.inputs(x))[:, :2] * math.sqrt(0.5)
            shift = codes - model.prior.mean[0]  # the first one's code is one of these
            chosen = [(model.prior.mean[:, None] + s - codes).abs().sum(-1).amin(1) for s in shift]
            assert float(torch.stack(chosen).sum(1).min()) < 1e-7
            for ours, expected in zip(model.prior_law(x).moments(), (0.0, 1.0), strict=True):
                assert torch.allclose(ours, torch.full((2,), expected).double(), atol=1e-12)
        mean, var = model.prior_law(x).moments()
        assert float(mean.abs().max()) < 0.5
        assert 0.4 < float(var.min()) < float(var.max()) < 2.0
        if prior == "vamp":
            rows = {tuple(row) for row in model.inputs(x).tolist()}
            assert {tuple(row) for row in model.prior.pseudo_inputs.tolist()} <= rows
            # never more than log 2 below the normal prior
            law, z = model.prior_law(x), _normal_draws(50, 2)
            assert (law.log_prob(z) > StandardNormal(z[0]).log_prob(z) - math.log(2.0)).all()


def test_a_mixture_of_one_component_starts_as_the_normal_prior(rng):
    x, z = _x(rng, 50), _normal_draws(9, 2)
    floor = torch.full((3,), 1e-3, dtype=torch.float64)
    architecture = Architecture(3, 2, (4,), "tanh", (Block("gaussian", (0, 1, 2)),), "mixture", 1)
    model = build(architecture, CPU, torch.float64)
    initialise(model, TrainingRows.of(x), torch.ones(50).double(), floor, make_generator(0))
    with torch.no_grad():
        assert torch.allclose(model.prior_law(x).log_prob(z), StandardNormal(z[0]).log_prob(z))


def test_pseudo_inputs_are_rows_that_count(rng):
    x = _x(rng, 400)
    weight = torch.full((400,), 1e-60, dtype=torch.float64)
    weight[7::10] = 1.0
    floor = torch.full((3,), 1e-3, dtype=torch.float64)
    architecture = Architecture(3, 2, (4,), "tanh", (Block("gaussian", (0, 1, 2)),), "vamp", 30)
    model = build(architecture, CPU, torch.float64)
    initialise(model, TrainingRows.of(x), weight, floor, make_generator(0))
    with torch.no_grad():
        rows = {tuple(row) for row in model.inputs(x)[7::10].tolist()}
        chosen = [tuple(row) for row in model.prior.pseudo_inputs.tolist()]
    assert set(chosen) <= rows
    assert len(set(chosen)) == 30  # none twice


def test_one_component_that_is_standard_normal_changes_nothing(posterior, rng):
    x, noise = _x(rng, 6), shared_noise(64, 2, 0)
    plain = _model(posterior=posterior)
    mixed = _model("mixture", posterior)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    mixed.prior.mean.zero_()
    # the log variance of zero
    mixed.prior.raw_log_var.fill_(-9.0 + 12.0 * math.atanh(9.0 / 12.0))
    z = _normal_draws(9, 2)
    assert torch.allclose(mixed.prior_law(x).log_prob(z), StandardNormal(z[0]).log_prob(z))
    assert torch.allclose(
        *(objective.log_predictive(m, x, None, noise, 64) for m in (plain, mixed))
    )


# -- the bound ------------------------------------------------------------------------------------


def test_the_gap_is_the_divergence_to_the_true_posterior_by_quadrature(prior, posterior, rng):
    model, x = _model(prior, posterior), _x(rng, 3)
    law, q = model.prior_law(x), model.posterior(x)
    points, area = _grid()
    points = points[:, None, :]  # (G, 1, 2)
    log_joint = model.likelihood.log_prob(x, model.decode(points)) + law.log_prob(points)
    log_p = log_joint.logsumexp(0) + math.log(area)
    log_q = q.log_prob(points)
    kl = (log_q.exp() * (log_q - log_joint + log_p)).sum(0) * area
    assert (kl > 0).all()

    noise = shared_noise(1 << 13, 2, 0)
    terms = objective.elbo_terms(model, x, None, noise, 1 << 11)
    bound = terms.reconstruction - terms.kl
    assert torch.allclose(bound + kl, log_p, atol=2e-2)
    assert torch.allclose(terms.energy + terms.entropy, bound, rtol=1e-12, atol=1e-12)
    entropy = -(log_q.exp() * log_q).sum(0) * area
    assert torch.allclose(terms.entropy, entropy, atol=1e-2)
    # importance weights, with the density of q by its inverse
    z = q.draw(noise[:50, None, :])
    log_weight = model.likelihood.log_prob(x, model.decode(z)) + law.log_prob(z) - q.log_prob(z)
    expected = log_weight.logsumexp(0) - math.log(50)
    assert torch.allclose(objective.log_predictive(model, x, None, noise[:50], 7), expected)


def test_blocks_of_draws_do_not_change_the_terms(prior, posterior, rng):
    model, x, noise = _model(prior, posterior), _x(rng, 4), shared_noise(20, 2, 0)
    whole, parts = (objective.elbo_terms(model, x, None, noise, n) for n in (20, 7))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_the_training_estimate_is_unbiased(prior, posterior, rng):
    """Its bound is the ELBO for one draw and for several, and so is minus its loss for one."""
    model = _model(prior, posterior)
    x = _x(rng, 1).expand(20_000, 3)
    weight = torch.ones(20_000, dtype=torch.float64)
    # the block of rows stands for draws of one row: its sampling error is known
    exact = objective.elbo_terms(model, x[:1], None, shared_noise(1 << 13, 2, 0), 1 << 11)
    expected = float(exact.reconstruction - exact.kl)
    for shape in ((20_000, 2), (3, 20_000, 2)):
        noise = _normal_draws(*shape)
        flat = noise.reshape(-1, 1, 2)
        z, log_q = model.posterior(x[:1]).draw_with_density(flat)
        log_w = model.likelihood.log_prob(x[:1], model.decode(z)) - log_q
        log_w = log_w + model.prior_law(x).log_prob(z)
        loss, bound = objective.training_loss(model, x, None, weight, noise, beta=1.0)
        # a KL in closed form only lowers the spread
        error = float(log_w.std()) / math.sqrt(len(flat))
        assert abs(float(bound) - expected) < 2.0 * Z_LIMIT * error
        if noise.dim() == 2:
            assert float(loss) == pytest.approx(-float(bound), abs=1e-6)


def test_free_nats_of_a_sampled_divergence_count_for_all_codes(rng):
    model, x, eps = _model("mixture"), _x(rng, 50), _normal_draws(50, 2)
    weight = torch.ones(50, dtype=torch.float64)

    def loss(free_bits):
        options = {"beta": 2.0, "free_bits": free_bits}
        return float(objective.training_loss(model, x, None, weight, eps, **options)[0])

    z, _ = model.posterior(x).draw_with_density(eps)
    kl = float((-model.posterior(x).entropy() - model.prior_law(x).log_prob(z)).mean())
    assert kl > 0
    assert loss(0.5 * kl) == pytest.approx(loss(0.0), rel=1e-12)
    assert loss(kl) - loss(0.0) == pytest.approx(2.0 * kl, rel=1e-9)


# -- importance-weighted training -----------------------------------------------------------------


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    return torch.cat([p.grad.flatten() for p in parameters])


def _log_weight(model, x, q, noise, beta, density_of=None):
    """Log importance weights (K, B), and the draws; `density_of` overrides q in the density."""
    z = q.draw(noise)
    log_q = (q if density_of is None else density_of).log_prob(z)
    log_prob = model.likelihood.log_prob(x, model.decode(z))
    return log_prob + beta * (model.prior_law(x).log_prob(z) - log_q)


@pytest.mark.parametrize(
    ("prior", "posterior", "beta"),
    [
        ("normal", "diag", 1.0),
        ("normal", "diag", 0.4),
        ("uniform", "full", 1.0),
        ("mixture", "flow", 1.0),
        ("vamp", "flow", 0.7),
        ("vamp", "full", 1.0),
    ],
)
def test_doubly_reparameterised_gradients_are_those_of_the_log_mean(prior, posterior, beta, rng):
    """Paired differences to autograd, under one noise: about 100 parameters a case, each a check.

    The false-positive rate of a case is 6e-5.
    """
    model = _model(prior, posterior, hidden=()).requires_grad_()
    n, n_draws, n_batches = 600, 3, 60
    x = _x(rng, 1).expand(n, 3)
    weight = torch.ones(n, dtype=torch.float64)
    ours, theirs = [], []
    for seed in range(n_batches):
        noise = _normal_draws(n_draws, n, 2, seed=seed)
        loss, _ = objective.training_loss(model, x, None, weight, noise, beta=beta)
        ours.append(_gradients(model, loss))
        log_weight = _log_weight(model, x, model.posterior(x), noise, beta)
        theirs.append(_gradients(model, -(log_weight.logsumexp(0) - math.log(n_draws)).mean()))
    difference = torch.stack(ours) - torch.stack(theirs)  # (batches, parameters)
    error = difference.std(0) / math.sqrt(n_batches)
    # Student's t of 59 degrees of freedom at this level is 5.6; rounding is not sampling
    assert (difference.mean(0).abs() < 5.6 * error + 1e-10).all()
    assert float(torch.stack(theirs).mean(0).abs().max()) > 0.05


def test_one_draw_is_the_path_gradient_of_the_elbo(posterior, rng):
    model, x = _model("vamp", posterior).requires_grad_(), _x(rng, 8)
    noise, weight = _normal_draws(1, 8, 2), torch.from_numpy(rng.uniform(0.5, 2.0, size=8))
    loss, bound = objective.training_loss(model, x, None, weight, noise, beta=1.0)
    ours = _gradients(model, loss)
    q = model.posterior(x)
    log_weight = _log_weight(model, x, q, noise, 1.0, density_of=q.detach())
    expected = -(weight * log_weight[0]).mean()
    assert torch.allclose(ours, _gradients(model, expected), atol=1e-9)
    assert float(bound) == pytest.approx(-float(expected.detach()), rel=1e-9)


def test_at_the_exact_posterior_the_encoder_has_no_gradient_and_no_noise(rng):
    """All weights are equal there: the score that autograd keeps is nothing but noise."""
    model, x = _model(hidden=(), k=1), _x(rng, 8)
    loadings, noise = model.decoder.linear.weight[:, 0], model.likelihood.log_var().exp()
    precision = 1.0 + (loadings.square() / noise).sum()
    gain = loadings / noise / precision
    model.encoder.linear.weight[0] = gain
    model.encoder.linear.weight[1] = 0.0
    model.encoder.linear.bias[0] = -gain @ model.decoder.linear.bias
    model.encoder.linear.bias[1] = unbounded_log_var(-precision.log())
    model.requires_grad_()
    weight, eps = torch.ones(8, dtype=torch.float64), _normal_draws(5, 8, 1)
    ours, _ = objective.training_loss(model, x, None, weight, eps, beta=1.0)
    theirs = -_log_weight(model, x, model.posterior(x), eps, 1.0).logsumexp(0).mean()
    bias = model.encoder.linear.bias
    gradients = [torch.autograd.grad(loss, bias)[0] for loss in (ours, theirs)]
    assert float(gradients[0].abs().max()) < 1e-12
    assert float(gradients[1].abs().max()) > 0.1


def test_weights_count_as_repeated_rows_under_importance_weights(rng):
    model, x, noise = _model("mixture"), _x(rng, 3), _normal_draws(4, 3, 2)
    counts = torch.tensor([1, 3, 2])
    weighted, repeated = (
        objective.training_loss(model, *args, beta=0.7)
        for args in (
            (x, None, counts / 2.0, noise),
            (
                x.repeat_interleave(counts, 0),
                None,
                torch.ones(6, dtype=torch.float64),
                noise.repeat_interleave(counts, 1),
            ),
        )
    )
    for a, b in zip(weighted, repeated, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


# -- rows without cells ---------------------------------------------------------------------------


def test_a_row_of_nothing_has_the_moments_of_the_prior(prior, posterior, rng):
    model = _model(prior, posterior)
    observed = torch.ones(3, 3, dtype=torch.bool)
    observed[1] = False
    x = _x(rng, 3)
    q = model.posterior(x, observed)
    mean, var = model.prior_law(x).moments()
    points, area = _grid(30.0, 301)
    density = q.select(torch.tensor([1])).log_prob(points[:, None, :]).exp()[:, 0]
    assert torch.allclose(density @ points * area, mean, atol=1e-6)
    assert torch.allclose(density @ points.square() * area - mean.square(), var, atol=1e-6)
    terms = objective.elbo_terms(model, x, observed, shared_noise(64, 2, 0), 64)
    bound = (terms.reconstruction - terms.kl)[1]
    if prior in {"normal", "uniform"}:
        assert float(bound) == pytest.approx(0.0, abs=1e-12)
    else:
        assert float(bound) < 0.1  # -KL, by 64 draws
    partial = observed.clone()
    partial[:, 0] = False
    assert torch.isfinite(
        torch.stack([*objective.elbo_terms(model, x, partial, shared_noise(8, 2, 0), 8)])
    ).all()


# -- refined posteriors ---------------------------------------------------------------------------


def test_refining_a_linear_model_finds_its_exact_posterior(rng):
    """From an encoder that says the same of every row; the full family holds the truth."""
    model, x = _model(posterior="full", hidden=()), _x(rng, 5)
    model.encoder.linear.weight.zero_()
    W, noise = model.decoder.linear.weight, model.likelihood.log_var().exp()
    law = stats.multivariate_normal(
        model.decoder.linear.bias.numpy(), (W @ W.T + torch.diag(noise)).numpy()
    )
    exact = torch.from_numpy(law.logpdf(x.numpy()))
    draws = shared_noise(256, 2, 0), shared_noise(1 << 12, 2, 1)
    output = objective.refine(model, x, None, 400, *draws, 1 << 10)
    terms = objective.elbo_terms(model, x, None, draws[1], 1 << 10, output)
    assert torch.allclose(terms.reconstruction - terms.kl, exact, atol=5e-3)
    cov = torch.linalg.inv(torch.eye(2) + W.T @ (W / noise[:, None]))
    mean, var = model.posterior_of(output).moments()
    expected = (x - model.decoder.linear.bias) / noise @ W @ cov
    assert torch.allclose(mean, expected, atol=0.02)
    assert torch.allclose(var, cov.diagonal().expand(5, 2), atol=0.02)


def test_refining_never_loses_and_leaves_the_weights_alone(prior, posterior, rng):
    model, x = _model(prior, posterior).requires_grad_(), _x(rng, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = shared_noise(32, 2, 1)
    with torch.no_grad():
        plain = objective.elbo_terms(model, x, None, noise, 32)
    args = (30, shared_noise(16, 2, 0), noise, 32)
    output = objective.refine(model, x, None, *args)
    with torch.no_grad():
        refined = objective.elbo_terms(model, x, None, noise, 32, output)
    gain = (refined.reconstruction - refined.kl) - (plain.reconstruction - plain.kl)
    assert (gain >= 0).all()
    assert float(gain.mean()) > 0.05
    alone = objective.refine(model, x[2:3], None, *args)
    assert torch.allclose(alone, output[2:3], rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_refined_posterior_that_is_worse_is_not_taken(rng):
    """A single draw to climb by: its posterior shrinks onto that draw and loses under others."""
    model, x, noise = _model(), _x(rng, 8), shared_noise(32, 2, 1)

    def bound(output):
        terms = objective.elbo_terms(model, x, None, noise, 32, output)
        return terms.reconstruction - terms.kl

    # from a good posterior, so that there is something to lose
    before = objective.refine(model, x, None, 300, shared_noise(64, 2, 2), noise, 32)
    model.encoder = _Fixed(before)
    after = objective.refine(model, x, None, 30, _normal_draws(1, 2), noise, 32)
    kept = (after == before).all(-1)
    assert kept.any()
    assert (bound(after) >= bound(before)).all()


class _Fixed(torch.nn.Module):
    """The same output, whatever it reads."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


# -- what the optimiser and the precision do to the laws -------------------------------------------


def test_the_prior_of_the_weights_spares_that_of_the_codes(prior, posterior):
    model = _model(prior, posterior).requires_grad_()
    groups = objective.parameter_groups(model, n_rows=50)
    together = [id(p) for group in groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    shrunk = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in shrunk}
    expected = {f"{side}.{layer}.weight" for side in ("encoder", "decoder") for layer in _BENDING}
    if posterior == "flow":
        layers = ("first", "last")
        expected |= {f"family.couplings.{i}.{layer}.weight" for i in range(4) for layer in layers}
    assert names == expected
    assert {group["weight_decay"] for group in groups} == {0.0, objective.WEIGHT_PRECISION / 50}


_BENDING = ("hidden.0", "correction")


def test_networks_of_the_users_are_not_shrunk_and_frozen_ones_not_trained():
    encoder, decoder = torch.nn.Linear(3, 4), torch.nn.Linear(2, 3)
    encoder.weight.requires_grad_(False)
    blocks = (Block("gaussian", (0, 1, 2)),)
    custom = {"encoder": Custom(encoder, 4), "decoder": Custom(decoder, 3)}
    model = build(Architecture(3, 2, (4,), "tanh", blocks, **custom), CPU, torch.float64)
    (group,) = objective.parameter_groups(model, n_rows=50)
    trained = {id(p) for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in trained}
    assert names == {"encoder.module.weight"}
    assert group["weight_decay"] == 0.0


class _Narrow(TorchDispatchMode):
    """Collects the operations that make bfloat16 numbers while `counting`."""

    def __init__(self):
        super().__init__()
        self.names, self.counting = set(), True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        if self.counting and any(getattr(y, "dtype", None) == torch.bfloat16 for y in outputs):
            self.names.add(str(func))
        return out


@pytest.mark.parametrize("n_draws", [1, 3])
def test_only_the_perceptrons_multiply_narrow_numbers(prior, posterior, n_draws, rng, monkeypatch):
    model = _model(prior, posterior).float().requires_grad_()
    x, shape = _x(rng, 6).float(), (n_draws, 6, 2) if n_draws > 1 else (6, 2)
    noise, weight = _normal_draws(*shape).float(), torch.ones(6)

    def loss_and_gradient():
        loss, bound = objective.training_loss(model, x, None, weight, noise, beta=1.0)
        assert loss.dtype == bound.dtype == torch.float32
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    exact = loss_and_gradient()
    model.set_product_dtype(torch.bfloat16)
    with _Narrow() as everywhere:
        rounded = loss_and_gradient()
    assert "aten.addmm.default" in everywhere.names
    assert rounded.dtype == torch.float32
    # 8 binary digits in each of two networks, and what nonlinear laws make of them
    assert 0.0 < (rounded - exact).norm() < 0.1 * exact.norm()

    outside = _Narrow()

    def uncounted(function):
        def call(*args):
            outside.counting = False
            try:
                return function(*args)
            finally:
                outside.counting = True

        return staticmethod(call)

    for name in ("forward", "backward"):
        monkeypatch.setattr(ResidualProduct, name, uncounted(getattr(ResidualProduct, name)))
    with outside:
        loss_and_gradient()
    assert outside.names == set()


@pytest.mark.parametrize(("prior", "family"), [("mixture", "diag"), ("normal", "flow")])
def test_a_kl_of_draws_that_is_below_zero_is_climbed_as_any_other(prior, family, rng):
    model, x, weight = _model(prior, family, scale=0.2), _x(rng, 1), torch.ones(1).double()
    divergences = []
    for seed in range(60):
        noise = _normal_draws(1, 2, seed=seed)
        loss, bound = objective.training_loss(model, x, None, weight, noise, beta=1.0)
        twice, _ = objective.training_loss(model, x, None, weight, noise, beta=2.0)
        divergences.append(float(twice - loss))
        assert float(loss) == pytest.approx(-float(bound), rel=1e-12)
    assert min(divergences) < 0.0 < max(divergences)
