"""The autoencoder and the training loop as tutorials write them: what skvi is measured against."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class PlainVAE(nn.Module):
    """Bernoulli pixels, normal codes: no linear path, no linear start."""

    def __init__(self, hidden: tuple[int, ...], n_codes: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = self._stack((784, *hidden, 2 * n_codes), act)
        self.decoder = self._stack((n_codes, *hidden[::-1], 784), act)

    @staticmethod
    def _stack(sizes: tuple[int, ...], act: type[nn.Module]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(sizes):
            layers += [nn.Linear(n, m), act()]
        return nn.Sequential(*layers[:-1])

    def bound(self, x: Tensor, n_importance: int = 1) -> Tensor:
        """One-draw estimate of the ELBO with a closed KL, or the importance-weighted bound."""
        if n_importance > 1:
            return (self.log_weights(x, n_importance).logsumexp(0) - math.log(n_importance)).sum()
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        fit = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return -fit - 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum()

    def log_weights(self, x: Tensor, n_importance: int) -> Tensor:
        """Return ``log p(x, z) / q(z|x)`` of draws from q, (n_importance, B)."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn(n_importance, *mean.shape)
        z = mean + (0.5 * log_var).exp() * noise
        output = self.decoder(z)
        fit = (x * output - nn.functional.softplus(output)).sum(-1)
        return fit + 0.5 * (log_var + noise.square() - z.square()).sum(-1)

    @torch.no_grad()
    def log_predictive(self, x: Tensor, n_importance: int) -> np.ndarray:
        """Importance-weighted ``log p(x)`` of every row."""
        # Numbers, not tensors: those would keep the large ones before them from being given back.
        return np.array([float(self.bound(row[None], n_importance)) for row in x])


def plain_epoch(
    model: PlainVAE,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    read: Callable[[Tensor], Tensor] = lambda x: x,
    n_importance: int = 1,
) -> float:
    """One epoch as the tutorials write it; the mean bound of its rows."""
    total = 0.0
    for (x,) in loader:
        bound = model.bound(read(x), n_importance)
        optimizer.zero_grad()
        (-bound / len(x)).backward()
        optimizer.step()
        total += bound.item()
    return total / len(loader.dataset)
