"""Private random generators: the global ones are never read and never set."""

import numpy as np
import torch
from torch import Tensor

# Seeds are drawn below 2**31 so that every generator in the ecosystem accepts them.
_SEED_BOUND = 2**31


def draw_seed(random_state: int | np.random.RandomState | np.random.Generator | None) -> int:
    """Draw one integer seed from what scikit-learn calls a ``random_state``.

    Parameters
    ----------
    random_state : int, RandomState, Generator or None
        An int is returned as it is (reproducible); a generator is advanced by one draw; None
        takes fresh entropy from the operating system, not from NumPy's global generator.

    Returns
    -------
    int
        In ``[0, 2**32)``.

    Raises
    ------
    ValueError
        If `random_state` is none of the above.
    """
    if random_state is None:
        return int(np.random.default_rng().integers(_SEED_BOUND))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(_SEED_BOUND))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(_SEED_BOUND - 1))
    if isinstance(random_state, int | np.integer) and 0 <= random_state < 2**32:
        return int(random_state)
    raise ValueError(
        f"random_state={random_state!r} cannot seed a generator; use None, an integer in "
        "[0, 2**32), a numpy RandomState or a numpy Generator."
    )


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a private generator on `device`, seeded with `seed`."""
    return torch.Generator(device=device).manual_seed(seed)


def make_rng(seed: int) -> np.random.Generator:
    """Return a private NumPy generator, for draws on the host."""
    return np.random.default_rng(seed)


def shared_noise(n_draws: int, n_components: int, seed: int) -> Tensor:
    """Return one block of standard normal draws that every row shares.

    A scrambled Sobol sequence through the normal quantile, in antithetic pairs: each draw is
    standard normal over seeds, so that averages are unbiased, and much less noisy than independent
    draws. Because it is shared, a row's score does not depend on the rows beside it.

    Parameters
    ----------
    n_draws, n_components : int
        S and k.
    seed : int

    Returns
    -------
    Tensor of shape (S, k)
        float64, on the CPU.
    """
    engine = torch.quasirandom.SobolEngine(n_components, scramble=True, seed=seed)
    uniform = engine.draw((n_draws + 1) // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-10, 1.0 - 1e-10))
    return torch.cat([half, -half])[:n_draws]


def matched_noise(n_draws: int, n_components: int, seed: int) -> Tensor:
    r"""Return :func:`shared_noise` with the second moments of the normal law.

    .. math:: z_s \leftarrow \Big(\tfrac1S \sum_t z_t z_t'\Big)^{-1/2} z_s

    after their mean has been taken off, which is not zero for odd S. Averages of quadratic
    functions are then exact, and those of smooth functions nearly so: what is left is of fourth
    order. Where S/2 draws do not span k dimensions only the trace is matched. The price is a bias
    of order 1/S for functions that are not quadratic, far below the noise that goes. Not for
    importance weights, whose mean has to be right.
    Source: Barraquand (1995), Numerical valuation of high dimensional multivariate European
    securities (quadratic resampling).

    Parameters
    ----------
    n_draws, n_components, seed
        As for :func:`shared_noise`.

    Returns
    -------
    Tensor of shape (S, k)
        float64, on the CPU.
    """
    noise = shared_noise(n_draws, n_components, seed)
    if n_draws > 1:
        noise = noise - noise.mean(0)
    if (n_draws + 1) // 2 < n_components:
        return noise * noise.square().mean().rsqrt()
    moments, axes = torch.linalg.eigh(noise.T @ noise / n_draws)
    return noise @ (axes * moments.rsqrt()) @ axes.T
