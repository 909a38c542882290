"""The residual perceptron as one differentiable function, with products in another dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skvi.runtime.blocks import block_rows


def _silu_slope(u: Tensor, h: Tensor, g: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    # a' = s + u s (1 - s) = s + h - h s
    return g * torch.addcmul(s + h, h, s, value=-1.0)


# The activations a, and the way back through each: from u, h = a(u) and the gradient of h to the
# gradient of u.
_Function = Callable[[Tensor], Tensor]
_Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
ACTIVATIONS: dict[str, tuple[_Function, _Slope]] = {
    "logistic": (torch.sigmoid, lambda u, h, g: g * torch.addcmul(h, h, h, value=-1.0)),
    "relu": (torch.relu, lambda u, h, g: torch.ops.aten.threshold_backward(g, h, 0)),
    "silu": (nn.functional.silu, _silu_slope),
    "tanh": (torch.tanh, lambda u, h, g: torch.addcmul(g, g * h, h, value=-1.0)),
}


class ResidualProduct(torch.autograd.Function):
    r"""Value and gradient of a residual perceptron of one hidden layer or more.

    .. math:: y = A x + b + C h_L, \quad h_l = a(W_l h_{l-1} + c_l), \quad h_0 = x

    The matrices are converted in every step, so they may as well be put together: a narrow product
    takes far longer than its share of the arithmetic, and A has none of its own. It is stacked
    below ``W_1`` where x is wider than y, and set beside C where it is not.

    The products read `dtype` and accumulate in float32 or better, on CUDA as torch is set to. What
    goes in and comes out, the gradients included, has the dtype of the parameters; y and its
    gradient have `out_dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        x: Tensor,
        A: Tensor,
        b: Tensor,
        C: Tensor,
        *layers: Tensor,
    ) -> Tensor:
        """Map x, (B, n_in), to y, (B, n_out); `layers` are W_1, c_1, W_2, c_2, ..."""
        function, _ = ACTIVATIONS[activation]
        below = A.shape[1] >= A.shape[0]
        # Every matrix is converted once.
        if below:
            first = _joined((layers[0], A), 0, dtype)  # (H_1 + n_out, n_in)
            offset = _joined((layers[1], b), 0, dtype)
            last = C.to(dtype)
        else:
            first, offset = layers[0].to(dtype), layers[1].to(dtype)
            last = _joined((C, A), 1, dtype)  # (n_out, H_L + n_in)
        matrices = [first, *(W.to(dtype) for W in layers[2::2])]
        offsets = [offset, *(c.to(dtype) for c in layers[3::2])]

        h, linear = x.to(dtype), b.to(dtype)
        states: list[
            Tensor
        ] = []  # input, u and h of every layer, then the input of the last product
        for W, c in zip(matrices, offsets, strict=True):
            u = torch.addmm(c, h, W.t())
            if below and not states:
                u, linear = u.tensor_split([len(layers[0])], dim=1)
            states += [h, u]
            h = function(u)
            states.append(h)
        if not below:
            h = torch.cat([h, x.to(dtype)], dim=1)  # (B, H_L + n_in)
        ctx.save_for_backward(h, last, *states, *matrices)
        ctx.activation, ctx.below, ctx.n_layers = activation, below, len(matrices)
        ctx.dtype = x.dtype
        return torch.addmm(linear, h, last.t()).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of all parameters."""
        _, slope = ACTIVATIONS[ctx.activation]
        n, (h, last, *saved) = ctx.n_layers, ctx.saved_tensors
        states, matrices = saved[: 3 * n], saved[3 * n :]
        dtype = ctx.dtype
        d_b = _column_sums(grad, dtype)
        g = grad.to(last.dtype)
        d_last = g.t() @ h
        width = states[-1].shape[1]
        # Converted part by part, so that each owns its memory and needs no further copy.
        d_C, d_A = d_last[:, :width].to(dtype), d_last[:, width:].to(dtype)
        d_h = g @ last
        d_x = None
        if not ctx.below:
            d_h, d_x = d_h[:, :width], d_h[:, width:]
        d_layers: list[Tensor] = []
        for i in reversed(range(n)):
            below_x = ctx.below and i == 0
            h_in, u, h_out = states[3 * i : 3 * i + 3]
            d_u = slope(u, h_out, d_h)
            d_c = _column_sums(d_u, dtype)
            if below_x:
                d_u = torch.cat([d_u, g], dim=1)  # (B, H_1 + n_out)
            d_W = (d_u.t() @ h_in).to(dtype)
            if below_x:
                d_W, d_A = d_W.tensor_split([len(d_c)])
            d_layers = [d_W, d_c, *d_layers]
            if i > 0 or ctx.needs_input_grad[3]:
                d_h = d_u @ matrices[i]
        gradients = (d_A, d_b, d_C, *d_layers)
        if not ctx.needs_input_grad[3]:
            return None, None, None, None, *gradients
        return None, None, None, (d_h if d_x is None else d_h + d_x).to(dtype), *gradients


def _column_sums(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over rows in `dtype`, (B, n) -> (n,)."""
    if values.dtype == dtype or values.device.type != "cpu":
        return values.sum(0, dtype=dtype)
    # The sum would be preceded by a copy of all values; those of a part stay in the cache.
    parts = values.split(block_rows(values.shape[1], values.device))
    return torch.stack([part.sum(0, dtype=dtype) for part in parts]).sum(0)


def _joined(parts: tuple[Tensor, ...], dim: int, dtype: torch.dtype) -> Tensor:
    """Concatenate in `dtype`, with one pass over the values."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    out = parts[0].new_empty(shape, dtype=dtype)
    for place, part in zip(out.split([part.shape[dim] for part in parts], dim), parts, strict=True):
        place.copy_(part)
    return out
