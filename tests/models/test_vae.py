"""The VAE's bound against exact answers: linear-Gaussian marginals, quadrature, enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FactorAnalysis

from skvi.distributions import normal
from skvi.models.vae import objective, start
from skvi.models.vae.likelihoods import Block
from skvi.models.vae.networks import Architecture, build, export, restore
from skvi.models.vae.posteriors import Full, bounded_log_var, unbounded_log_var
from skvi.models.vae.start import (
    CentredEntries,
    TrainingRows,
    factor_analysis,
    initialise,
    linear_posterior,
)
from skvi.runtime.random import make_generator, matched_noise, shared_noise

# A two-sided normal deviate beyond 5 has probability 6e-7: the false-positive rate per check.
Z_LIMIT = 5.0
CPU = torch.device("cpu")


def _model(n_features, n_components, hidden=(), likelihood="gaussian", seed=0, scale=0.4):
    """A network with random weights, in float64."""
    architecture = Architecture(
        n_features, n_components, hidden, "tanh", (Block(likelihood, tuple(range(n_features))),)
    )
    model = build(architecture, CPU, torch.float64)
    generator = make_generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, scale, generator=generator)
        model.input_shift.zero_()
        model.input_scale.fill_(1.0)
        # Posteriors a little wider than the prior: importance weights then have finite variance.
        for layer in (model.encoder.linear, model.encoder.correction):
            if layer is not None:
                layer.weight[n_components:] *= 0.1
        model.encoder.linear.bias[n_components:] = unbounded_log_var(torch.tensor(0.5))
        if likelihood == "gaussian":
            model.likelihood.log_floor.fill_(math.log(1e-3))
            model.likelihood.rho *= 0.1
    return model.requires_grad_(False)


def _noise(n_draws, n_components, seed=0):
    return shared_noise(n_draws, n_components, seed)


def _bound(model, x, noise):
    terms = objective.elbo_terms(model, x, None, noise, len(noise))
    return terms.reconstruction - terms.kl


def _with_exact_posterior(model):
    """Replace a linear model's encoder by the exact posterior, rotated to be diagonal."""
    W, noise = model.decoder.linear.weight, model.likelihood.log_var().exp()
    precision, rotation = torch.linalg.eigh(W.T @ (W / noise[:, None]))
    W = W @ rotation
    gain = (W / noise[:, None]).T / (1.0 + precision)[:, None]
    k = W.shape[1]
    model.decoder.linear.weight.copy_(W)
    model.encoder.linear.weight.zero_()
    model.encoder.linear.weight[:k] = gain
    model.encoder.linear.bias[:k] = -gain @ model.decoder.linear.bias
    model.encoder.linear.bias[k:] = unbounded_log_var(-torch.log1p(precision))
    return model


def _exact_log_marginal(model, x):
    """``log N(x | b, W W' + Psi)`` of a linear decoder."""
    W = model.decoder.linear.weight.numpy()
    noise = model.likelihood.log_var().exp().numpy()
    law = stats.multivariate_normal(model.decoder.linear.bias.numpy(), W @ W.T + np.diag(noise))
    return torch.from_numpy(law.logpdf(x.numpy()))


def _x(rng, n, d):
    return torch.from_numpy(rng.normal(size=(n, d)))


def test_a_linear_decoder_with_its_exact_posterior_attains_the_marginal_likelihood(rng):
    model = _with_exact_posterior(_model(5, 2))
    x = _x(rng, 30, 5)
    exact = _exact_log_marginal(model, x)
    assert torch.allclose(_bound(model, x, _noise(1 << 14, 2)), exact, atol=2e-3)
    # every importance weight is p(x) itself, whatever the draw
    assert torch.allclose(
        objective.log_predictive(model, x, None, _noise(3, 2), 2), exact, atol=1e-9
    )


def test_any_encoder_stays_below_the_marginal_likelihood_and_importance_weights_close_the_gap(rng):
    model = _model(5, 2)
    x = _x(rng, 30, 5)
    exact = _exact_log_marginal(model, x)
    bound = _bound(model, x, _noise(4096, 2))
    tighter = objective.log_predictive(model, x, None, _noise(1 << 16, 2), 4096)
    assert (bound < exact).all()
    assert torch.allclose(tighter, exact, atol=0.02)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_gap_is_the_divergence_to_the_true_posterior_by_quadrature(likelihood, rng):
    model = _model(3, 1, hidden=(4,), likelihood=likelihood, scale=0.8)
    x = _x(rng, 6, 3)
    x = (x > 0).double() if likelihood == "bernoulli" else x
    z = torch.linspace(-12.0, 12.0, 40_001, dtype=torch.float64)  # (G,)
    step = float(z[1] - z[0])
    log_joint = model.likelihood.log_prob(x[:, None, :], model.decoder(z[:, None]))  # (N, G)
    log_joint = log_joint + normal.log_density(z, torch.zeros(()), torch.zeros(()))
    log_p = log_joint.logsumexp(-1) + math.log(step)
    mean, log_var = model.posterior(x)
    log_q = normal.log_density(z, mean, log_var)  # (N, G)
    kl_to_posterior = (log_q.exp() * (log_q - log_joint + log_p[:, None])).sum(-1) * step

    bound = _bound(model, x, _noise(1 << 15, 1))
    assert (kl_to_posterior > 0).all()
    assert torch.allclose(bound + kl_to_posterior, log_p, atol=1e-3)
    assert torch.allclose(
        objective.log_predictive(model, x, None, _noise(1 << 15, 1), 1 << 12), log_p, atol=2e-3
    )


def test_decoding_the_mean_only_is_caught_as_a_bound_that_is_too_high(rng):
    """The planted bug: without posterior draws the 'bound' exceeds the marginal likelihood."""
    model = _with_exact_posterior(_model(5, 2))
    x = _x(rng, 30, 5)
    decoded_mean = _bound(model, x, torch.zeros(1, 2, dtype=torch.float64))
    assert (decoded_mean > _exact_log_marginal(model, x) + 0.1).all()


def test_both_readings_of_the_bound_agree(rng):
    model = _model(4, 3, hidden=(5,))
    terms = objective.elbo_terms(model, _x(rng, 20, 4), None, _noise(8, 3), 8)
    assert torch.allclose(
        terms.energy + terms.entropy, terms.reconstruction - terms.kl, rtol=1e-12, atol=1e-12
    )
    assert (terms.kl >= 0).all()


def test_the_terms_are_the_expectations_of_torchs_densities(rng):
    model = _model(4, 2, hidden=(5,))
    x = _x(rng, 5, 4)
    mean, log_var = model.posterior(x)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    prior = torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double())
    n_draws = 50_000
    eps = torch.empty(n_draws, 5, 2, dtype=torch.float64).normal_(generator=make_generator(3))
    z = mean + (0.5 * log_var).exp() * eps
    p = torch.distributions.Normal(model.decoder(z), (0.5 * model.likelihood.log_var()).exp())
    log_joint = p.log_prob(x).sum(-1) + prior.log_prob(z).sum(-1)
    draws = {
        "energy": log_joint,
        "entropy": -q.log_prob(z).sum(-1),
        "kl": (q.log_prob(z) - prior.log_prob(z)).sum(-1),
    }
    terms = objective.elbo_terms(model, x, None, _noise(1 << 15, 2), 1 << 12)
    for name, values in draws.items():
        error = values.std(0) / math.sqrt(n_draws)
        assert ((values.mean(0) - getattr(terms, name)).abs() < Z_LIMIT * error + 1e-3).all()


def test_the_shared_draws_are_unbiased_over_seeds(rng):
    model = _model(4, 2, hidden=(5,))
    x = _x(rng, 5, 4)
    exact = _bound(model, x, _noise(1 << 15, 2, seed=99))
    estimates = torch.stack([_bound(model, x, _noise(8, 2, seed)) for seed in range(300)])
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - exact).abs() < Z_LIMIT * error + 1e-3).all()


def test_the_importance_weighted_bound_rises_with_the_number_of_draws(rng):
    model = _model(6, 2, hidden=(5,), scale=0.7)
    x = _x(rng, 200, 6)
    generator = make_generator(4)

    def estimate(k):
        draws = []
        for _ in range(40):
            noise = torch.empty(k, 2, dtype=torch.float64).normal_(generator=generator)
            draws.append(objective.log_predictive(model, x, None, noise, 64).mean())
        draws = torch.stack(draws)
        return float(draws.mean()), float(draws.std() / math.sqrt(len(draws)))

    levels = [estimate(k) for k in (1, 4, 16, 64)]
    for (low, low_error), (high, high_error) in itertools.pairwise(levels):
        assert high - low > Z_LIMIT * math.hypot(low_error, high_error)


def test_blocks_of_draws_do_not_change_either_bound(rng):
    model = _model(4, 2, hidden=(5,))
    x, noise = _x(rng, 7, 4), _noise(50, 2)
    whole = objective.log_predictive(model, x, None, noise, 50)
    assert torch.allclose(objective.log_predictive(model, x, None, noise, 7), whole, rtol=1e-13)
    decoded = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
    terms = objective.elbo_terms(model, x, None, noise, 7)
    assert decoded == [7] * 7 + [1]
    assert torch.allclose(terms.reconstruction - terms.kl, _bound(model, x, noise), rtol=1e-13)


def test_the_gaussian_predictive_density_integrates_to_one():
    model = _model(1, 1, hidden=(4,), scale=0.8)
    grid = torch.linspace(-30.0, 30.0, 6001, dtype=torch.float64)[:, None]
    density = objective.log_predictive(model, grid, None, _noise(4096, 1), 256).exp()
    # a biased-low estimate of every point; 4096 draws leave less than 1%
    assert float(density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0, abs=0.01)


def test_the_bernoulli_predictive_sums_to_one():
    model = _model(4, 1, hidden=(4,), likelihood="bernoulli", scale=0.8)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    total = objective.log_predictive(model, x, None, _noise(4096, 1), 512).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=0.005)


def test_likelihoods_equal_torchs(rng):
    x, output = _x(rng, 5, 3), _x(rng, 5, 3)
    gaussian = _model(3, 1).likelihood
    law = torch.distributions.Normal(output, (0.5 * gaussian.log_var()).exp())
    assert torch.allclose(gaussian.log_prob(x, output), law.log_prob(x).sum(-1), rtol=1e-12)
    binary = (x > 0).double()
    bernoulli = _model(3, 1, likelihood="bernoulli").likelihood
    law = torch.distributions.Bernoulli(logits=output)
    assert torch.allclose(bernoulli.log_prob(binary, output), law.log_prob(binary).sum(-1))
    assert torch.equal(bernoulli.mean(output), law.mean)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_draws_of_a_likelihood_have_its_moments(likelihood):
    model = _model(2, 1, likelihood=likelihood).likelihood
    output = torch.tensor([[0.3, -1.2]], dtype=torch.float64).expand(40_000, 2)
    draws = model.sample(output, make_generator(1))
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - model.mean(output)[0]).abs() < Z_LIMIT * error).all()
    if likelihood == "gaussian":
        assert torch.allclose(draws.var(0).log(), model.log_var(), atol=0.05)
    else:
        assert set(draws.unique().tolist()) == {0.0, 1.0}


def test_weights_count_as_repeated_rows_in_the_loss(rng):
    model = _model(3, 2, hidden=(4,))
    x, noise = _x(rng, 4, 3), _x(rng, 4, 2)
    counts = torch.tensor([1, 3, 2, 4])
    weight = counts.double()
    options = {"beta": 0.7}
    weighted = objective.training_loss(model, x, None, weight / weight.mean(), noise, **options)
    repeated = objective.training_loss(
        model,
        x.repeat_interleave(counts, 0),
        None,
        torch.ones(10, dtype=torch.float64),
        noise.repeat_interleave(counts, 0),
        **options,
    )
    for a, b in zip(weighted, repeated, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_free_nats_cost_nothing_and_leave_the_bound_alone(rng):
    model = _model(3, 2, hidden=(4,))
    x, eps, weight = _x(rng, 6, 3), _x(rng, 6, 2), torch.ones(6, dtype=torch.float64)
    kl = normal.kl_standard(*model.posterior(x)).mean(0)
    free = float(kl.mean())  # between the two codes
    plain, freed = (
        objective.training_loss(model, x, None, weight, eps, beta=2.0, free_bits=f)
        for f in (0.0, free)
    )
    assert float(freed[0] - plain[0]) == pytest.approx(2.0 * float(free - kl.min()), rel=1e-9)
    assert float(freed[1]) == float(plain[1])


def test_the_loss_is_the_negative_bound(rng):
    model = _model(3, 2, hidden=(4,))
    x, eps = _x(rng, 6, 3), _x(rng, 6, 2)
    loss, bound = objective.training_loss(
        model, x, None, torch.ones(6, dtype=torch.float64), eps, beta=1.0
    )
    rows = torch.cat([_bound(model, x[i : i + 1], eps[i : i + 1]) for i in range(6)])
    assert torch.allclose(bound, rows.mean(), rtol=1e-12)
    assert float(loss + bound) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("hidden", [(4,), ()])
def test_the_groups_hold_every_parameter_once_and_shrink_those_that_bend(hidden):
    model = _model(3, 2, hidden=hidden).requires_grad_()
    groups = objective.parameter_groups(model, n_rows=50)
    together = [id(p) for group in groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    # One step of plain descent from a loss of gradient zero: W - lr * tau / N * W.
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    bending = {id(p) for p in model.curvature_weights()}
    for name, p in model.named_parameters():
        factor = 1.0 - 0.5 * objective.WEIGHT_PRECISION / 50 if id(p) in bending else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])


def test_shared_noise_is_antithetic_seeded_and_private():
    state = torch.get_rng_state()
    noise = shared_noise(33, 3, 5)
    assert noise.shape == (33, 3)
    assert torch.equal(noise[:16], -noise[17:])
    assert torch.equal(noise, shared_noise(33, 3, 5))
    assert not torch.equal(noise, shared_noise(33, 3, 6))
    assert torch.equal(torch.get_rng_state(), state)
    many = shared_noise(1 << 14, 3, 5)
    assert torch.allclose(many.T @ many / len(many), torch.eye(3).double(), atol=0.01)


@pytest.mark.parametrize(
    ("n_draws", "n_components"), [(2, 1), (5, 3), (6, 3), (7, 4), (33, 3), (64, 5)]
)
def test_matched_noise_has_the_moments_of_the_law(n_draws, n_components):
    noise = matched_noise(n_draws, n_components, 5)
    assert noise.shape == (n_draws, n_components)
    eye = torch.eye(n_components, dtype=torch.float64)
    torch.testing.assert_close(noise.T @ noise / n_draws, eye)
    torch.testing.assert_close(noise.mean(0), torch.zeros_like(noise[0]))
    assert torch.equal(noise, matched_noise(n_draws, n_components, 5))
    assert not torch.equal(noise, matched_noise(n_draws, n_components, 6))
    # what is asked for is little of a change
    many = shared_noise(1 << 12, n_components, 5)
    torch.testing.assert_close(matched_noise(1 << 12, n_components, 5), many, atol=0.02, rtol=0.0)


@pytest.mark.parametrize(("n_draws", "n_components"), [(1, 1), (1, 4), (8, 5), (7, 5)])
def test_few_matched_draws_have_the_size_of_the_law(n_draws, n_components):
    noise = matched_noise(n_draws, n_components, 5)
    assert float(noise.square().mean()) == pytest.approx(1.0)
    plain = shared_noise(n_draws, n_components, 5)
    plain = plain - plain.mean(0) if n_draws > 1 else plain
    torch.testing.assert_close(noise / noise.norm(), plain / plain.norm())


@pytest.mark.parametrize("family", ["diag", "full"])
def test_two_matched_draws_a_code_give_the_exact_bound_of_a_linear_decoder(family, rng):
    """``E_q log N(x | b + Wz, psi)`` has the closed form with ``tr(W' Psi^-1 W Cov)``."""
    x = _x(rng, 5, 6)
    model = _model(6, 3)
    q = model.posterior(x)
    if family == "full":
        slope = torch.from_numpy(rng.normal(size=(5, 3, 3))).tril(-1)
        q = Full(q.mean, q.log_var, slope)
        root = q.log_var.mul(0.5).exp()[:, :, None] * (torch.eye(3) + slope)
    else:
        root = torch.diag_embed(q.log_var.mul(0.5).exp())
    psi = model.likelihood.log_var().exp()
    W = model.decoder.linear.weight
    at_mean = model.likelihood.log_prob(x, model.decode(q.mean))
    information = W.T @ (W / psi[:, None])
    exact = at_mean - 0.5 * torch.einsum("bij,bkj,ik->b", root, root, information)
    draws = q.draw(matched_noise(6, 3, 0)[:, None])
    averaged = model.likelihood.log_prob(x, model.decode(draws)).mean(0)
    torch.testing.assert_close(averaged, exact, rtol=1e-10, atol=1e-10)
    noisy = model.likelihood.log_prob(x, model.decode(q.draw(_noise(6, 3)[:, None]))).mean(0)
    assert not torch.allclose(noisy, exact, atol=1e-2)


def test_log_variances_of_the_posterior_are_bounded_and_invertible():
    raw = torch.tensor([-1e6, -9.0, -3.0, 0.0, 1e6], dtype=torch.float64)
    bounded = bounded_log_var(raw)
    assert float(bounded.min()) >= -21.0
    assert float(bounded.max()) <= 3.0
    assert torch.allclose(unbounded_log_var(bounded[1:4]), raw[1:4])


def test_the_start_is_scikit_learns_factor_analysis(rng):
    latent = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 6))
    X = latent + rng.normal(size=(400, 6)) * rng.uniform(0.3, 1.0, size=6)
    X = X - X.mean(0)
    least = torch.full((6,), 1e-4, dtype=torch.float64)
    loadings, noise = factor_analysis(
        torch.from_numpy(X) / math.sqrt(400), 2, least, make_generator(0)
    )
    cov = (loadings @ loadings.T + torch.diag(noise)).numpy()
    ours = stats.multivariate_normal(np.zeros(6), cov).logpdf(X).mean()
    theirs = FactorAnalysis(2, tol=1e-8, max_iter=5000, svd_method="lapack").fit(X).score(X)
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_the_linear_posterior_is_exact_and_diagonal(rng):
    loadings, noise = torch.from_numpy(rng.normal(size=(6, 3))), torch.from_numpy(rng.random(6))
    posterior = linear_posterior(loadings, noise)
    torch.testing.assert_close(posterior.rotation @ posterior.rotation.T, torch.eye(3).double())
    rotated = loadings @ posterior.rotation
    precision = torch.eye(3) + rotated.T @ (rotated / noise[:, None])
    torch.testing.assert_close(precision, torch.diag((-posterior.log_var).exp()))
    assert (posterior.log_var.diff() >= 0).all()
    gain = torch.linalg.solve(precision, (rotated / noise[:, None]).T)
    torch.testing.assert_close(posterior.encoder, gain)


@pytest.mark.parametrize(("n_rows", "n_features", "n_components"), [(3, 8, 2), (50, 2, 5)])
def test_the_start_survives_few_rows_and_many_components(n_rows, n_features, n_components, rng):
    blocks = (Block("gaussian", tuple(range(n_features))),)
    model = build(Architecture(n_features, n_components, (4,), "relu", blocks), CPU, torch.float32)
    x = _x(rng, n_rows, n_features).float()
    floor = torch.full((n_features,), 1e-4, dtype=torch.float64)
    initialise(model, TrainingRows.of(x), torch.ones(n_rows).double(), floor, make_generator(0))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weights_survive_the_way_to_numpy_and_back(rng):
    model = _model(3, 2, hidden=(4, 5))
    architecture = Architecture(3, 2, (4, 5), "tanh", (Block("gaussian", (0, 1, 2)),))
    again = restore(architecture, export(model), CPU, torch.float64)
    x = _x(rng, 4, 3)
    assert torch.equal(_bound(model, x, _noise(4, 2)), _bound(again, x, _noise(4, 2)))


# -- sparse rows ----------------------------------------------------------------------------------


def _started(likelihood, rows, weight, n_features, prior="normal"):
    blocks = (Block(likelihood, tuple(range(n_features))),)
    n_prior = 3 if prior == "vamp" else 0
    architecture = Architecture(n_features, 2, (3,), "tanh", blocks, prior, n_prior)
    model = build(architecture, CPU, torch.float64)
    floor = torch.full((n_features,), 1e-4, dtype=torch.float64)
    initialise(model, rows, weight, floor, make_generator(0))
    return model.state_dict()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("likelihood", ["poisson", "gaussian", "student_t", "bernoulli"])
@pytest.mark.parametrize("by", ["triangle", "entries"])
def test_sparse_rows_have_the_start_of_dense_ones(likelihood, by, missing, rng, monkeypatch):
    monkeypatch.setattr(start, "_MAX_TRIANGLE", 1024 if by == "triangle" else 0)
    monkeypatch.setattr(start, "block_rows", lambda *_: 7)
    x = torch.from_numpy(rng.poisson(np.exp(rng.normal(-1.0, 1.0, size=(90, 1))), (90, 12)))
    x = x.double().clamp_max(1.0 if likelihood == "bernoulli" else 50.0)
    zero = torch.zeros(12, dtype=torch.float64)
    if likelihood in {"gaussian", "student_t"}:
        x[:, 3] += 1e5 + torch.from_numpy(rng.normal(size=90))  # a column of entries, far away
        mean, std = x.mean(0), x.std(0)
        x, zero = (x - mean) / std, -mean / std
    observed = torch.from_numpy(rng.random((90, 12)) > 0.2) if missing else None
    if missing:
        x = torch.where(observed, x, 0.0)
    weight = torch.linspace(0.5, 2.0, 90, dtype=torch.float64)
    read = TrainingRows.of(x, observed).read
    sizes = []

    def counted(index):
        sizes.append(len(index))
        return read(index)

    stored = []

    def watched(rows, *args):
        if isinstance(rows, CentredEntries):
            stored.append(rows.entries.indices().shape[1])
        return factor_analysis(rows, *args)

    monkeypatch.setattr(start, "factor_analysis", watched)
    dense = _started(likelihood, TrainingRows.of(x, observed), weight, 12, "vamp")
    thin = _started(likelihood, TrainingRows(90, counted, CPU, zero), weight, 12, "vamp")
    assert max(sizes) == 7
    if by == "entries":
        n_known = 0 if observed is None else int((~observed).sum())
        n_full = 90 * int(((x != zero).double().mean(0) > 0.3).sum())
        assert stored[0] <= int((x != zero).sum()) + n_known + n_full
        assert stored[0] < 0.8 * x.numel()
    assert thin.keys() == dense.keys()
    for name, value in thin.items():
        torch.testing.assert_close(value, dense[name], rtol=1e-7, atol=1e-9)


def test_centred_entries_are_the_matrix_that_they_stand_for(rng):
    root, offset = torch.from_numpy(rng.random(8)), torch.from_numpy(rng.normal(size=5))
    entries = torch.from_numpy(rng.normal(size=(8, 5)) * (rng.random((8, 5)) < 0.3))
    x = entries + root[:, None] * offset
    thin = entries.to_sparse_coo().coalesce()
    rows = CentredEntries(thin, thin.T.coalesce(), root, offset)
    z, columns = (
        torch.from_numpy(rng.normal(size=(8, 2))),
        torch.from_numpy(rng.normal(size=(5, 3))),
    )
    torch.testing.assert_close(rows.times(columns), x @ columns)
    torch.testing.assert_close(rows.cross(z), x.T @ z)
    torch.testing.assert_close(rows.square_sums(), x.square().sum(0))
    ours = factor_analysis(rows, 2, torch.full((5,), 1e-3).double(), make_generator(0))
    theirs = factor_analysis(x, 2, torch.full((5,), 1e-3).double(), make_generator(0))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_the_encoder_reads_far_rows_scaled_and_starts_at_the_same_codes(rng):
    """Features within ten units are read as they are; the linear map undoes the scale of others."""
    x = torch.from_numpy(rng.normal(size=(60, 3)) * [0.1, 1.0, 1.0])
    x[0, 2] = 400.0
    models = []
    for largest in (10.0, 1e9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("skvi.models.vae.start._LARGEST_INPUT", largest)
            architecture = Architecture(3, 2, (), "tanh", (Block("gaussian", (0, 1, 2)),))
            model = build(architecture, torch.device("cpu"), torch.float64)
            floor = torch.full((3,), 1e-3, dtype=torch.float64)
            weight = torch.ones(60, dtype=torch.float64)
            initialise(model, TrainingRows.of(x), weight, floor, make_generator(0))
            models.append(model.requires_grad_(False))
    scaled, plain = models
    expected = torch.tensor([1.0, 1.0, 10.0 / float(400.0 - x[:, 2].mean())]).double()
    torch.testing.assert_close(scaled.input_scale, expected)
    assert torch.equal(plain.input_scale, torch.ones(3).double())
    torch.testing.assert_close(scaled.posterior(x).mean, plain.posterior(x).mean)
