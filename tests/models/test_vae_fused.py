"""The fused perceptron against the same formula in autograd."""

import pytest
import torch
from torch.autograd import gradcheck

from skvi.models.vae import fused, networks
from skvi.models.vae.fused import ACTIVATIONS, ResidualProduct
from skvi.models.vae.networks import ResidualMLP
from skvi.runtime.random import make_generator


def _network(n_in, hidden, n_out, activation, dtype=torch.float64):
    with torch.device("meta"):
        network = ResidualMLP(n_in, hidden, n_out, activation)
    network = network.to_empty(device="cpu").to(dtype)
    generator = make_generator(0)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
    return network, torch.randn(6, n_in, generator=generator, dtype=torch.float64).to(dtype)


shapes = pytest.mark.parametrize(
    ("n_in", "hidden", "n_out"), [(5, (4,), 3), (3, (4,), 5), (4, (3, 6), 4), (2, (5, 3, 4), 7)]
)


@shapes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradient_are_those_of_the_formula(n_in, hidden, n_out, activation):
    network, x = _network(n_in, hidden, n_out, activation)
    with torch.no_grad():
        plain = network(x)
    network.product_dtype = torch.float64
    torch.testing.assert_close(network(x), plain, rtol=1e-12, atol=1e-12)

    def function(x, *parameters):
        return ResidualProduct.apply(activation, torch.float64, torch.float64, x, *parameters)

    parameters = [
        network.linear.weight,
        network.linear.bias,
        network.correction.weight,
        *network.hidden.parameters(),
    ]
    # Finite differences of all inputs; no row may lie on the kink of relu.
    assert gradcheck(function, (x.requires_grad_(), *parameters))
    assert gradcheck(function, (x.detach(), *parameters))


@shapes
def test_leading_dimensions_are_kept(n_in, hidden, n_out):
    network, x = _network(n_in, hidden, n_out, "silu")
    network.product_dtype = torch.float64
    stacked = network(torch.stack([x, 2.0 * x]))
    assert stacked.shape == (2, 6, n_out)
    torch.testing.assert_close(stacked[1], network(2.0 * x))


@pytest.mark.parametrize(("n_in", "hidden", "n_out"), [(50, (40,), 20), (20, (40, 30), 50)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_rounds_the_products_and_nothing_else(n_in, hidden, n_out, activation):
    network, x = _network(n_in, hidden, n_out, activation, torch.float32)
    x.requires_grad_()
    leaves = [x, *network.parameters()]
    exact = network(x)
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    network.product_dtype = torch.bfloat16
    rounded = network(x)
    actual = torch.autograd.grad(rounded.square().sum(), leaves)
    assert not torch.equal(rounded, exact)
    for one, other in zip((rounded, *actual), (exact, *expected), strict=True):
        assert one.dtype == torch.float32
        # 8 binary digits: a relative error of 2^-9 per rounding, of which there are a few.
        assert (one - other).norm() < 0.02 * other.norm()
    # gradients of offsets add up in float32
    for one in (gradient for gradient in actual if gradient.dim() == 1):
        assert not torch.equal(one, one.bfloat16().float())
    with torch.no_grad():
        torch.testing.assert_close(network(x), exact)


@pytest.mark.parametrize(("n_in", "hidden", "n_out"), [(50, (40,), 20), (20, (40, 30), 50)])
def test_an_output_left_narrow_is_the_wide_one_before_its_last_step(
    n_in, hidden, n_out, monkeypatch
):
    network, x = _network(n_in, hidden, n_out, "tanh", torch.float32)
    network.product_dtype = torch.bfloat16
    factor = torch.randn(6, n_out, generator=make_generator(1)).bfloat16()
    wide = network(x)
    expected = torch.autograd.grad((factor.float() * wide).sum(), list(network.parameters()))
    network.narrow_output = True
    assert network(x).dtype == torch.float32  # six rows are nothing to save
    monkeypatch.setattr(networks, "_LARGE", 6 * n_out)
    narrow = network(x)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.float(), wide)
    actual = torch.autograd.grad(narrow, list(network.parameters()), factor)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    with torch.no_grad():
        assert network(x).dtype == torch.float32


def test_columns_add_up_in_parts_as_they_do_at_once(monkeypatch):
    values = torch.randn(100, 7, generator=make_generator(0)).bfloat16()
    monkeypatch.setattr(fused, "block_rows", lambda *_: 13)
    expected = values.double().sum(0).float()
    torch.testing.assert_close(fused._column_sums(values, torch.float32), expected)
    wide = values.float()
    assert torch.equal(fused._column_sums(wide, torch.float32), wide.sum(0))
