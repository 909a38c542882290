"""Where a mixture starts: statistics of the rows under first responsibilities.

Every start depends on the weighted set of rows alone: not on their order, and integer weights act
exactly like repeated rows. Random choices are made by inverting the cumulative weight along a
canonical order (the rank along a random direction), where a row of weight w and w copies of it
occupy the same interval.

Where cells are missing, centres are chosen among rows filled with the means, rows go to the centre
that is nearest in the observed features, and the first statistics complete them around it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from skvi.models.mixture import missing
from skvi.models.mixture.components import Components, Moments, add_to
from skvi.models.mixture.missing import Cells, filled
from skvi.runtime.blocks import Rows

# Seeding looks at no more rows than this, drawn in proportion to their weight.
_MAX_SEED_ROWS = 20_000
_MAX_LLOYD_PASSES = 100


def start(
    kind: str,
    rows: Rows,
    shape: type[Components],
    n_components: int,
    rng: np.random.Generator,
) -> Moments:
    """Return the statistics that the first posterior is computed from, largest component first.

    Parameters
    ----------
    kind : {"k-means++", "kmeans", "random_from_data", "random"}
        Hard assignment to centres chosen by greedy k-means++, refined by Lloyd's algorithm, or
        picked among the rows; or random responsibilities, where equal rows get equal ones.
    rows : Rows
    shape : type of Components
    n_components : int
    rng : numpy.random.Generator
    """
    reference = torch.zeros(n_components, rows.n_features, dtype=torch.float64, device=rows.device)
    if kind == "random":
        return statistics(
            rows,
            missing.around(shape, reference),
            _random_responsibilities(n_components, rows, rng),
        )
    centres = choose_centres(kind, rows, n_components, rng)
    # Fewer distinct rows than components: the components left over start empty.
    reference[: len(centres)] = centres
    return statistics(
        rows,
        missing.around(shape, reference),
        lambda _, x: one_hot(nearest(centres, x), n_components),
    )


def choose_centres(kind: str, rows: Rows, n_components: int, rng: np.random.Generator) -> Tensor:
    """Return centres (at most `n_components`, D) of one of the kinds but "random"."""
    choose = _random_rows if kind == "random_from_data" else _kmeans_plusplus
    x, weight = sample_rows(rows, rng, _MAX_SEED_ROWS)
    x = np.where(np.isnan(x), 0.0, x)  # the mean, in fitted units
    centres = torch.from_numpy(choose(n_components, x, weight, rng)).to(rows.device)
    return _lloyd(centres, rows) if kind == "kmeans" else centres


def statistics(
    rows: Rows, around: Components, resp: Callable[[slice, Tensor | Cells], Tensor]
) -> Moments:
    """Return the statistics of rows under given responsibilities, largest component first.

    Parameters
    ----------
    rows : Rows
    around : Components
        Its means are the references; where cells are missing it completes the rows of Full and
        Tied.
    resp : callable
        Maps a block, its place and its rows, to responsibilities (K, B). Each row has one
        component to itself, unless all the means are the same.
    """
    shape, reference = type(around), around.mean
    sums: tuple[Tensor, ...] | None = None
    incomplete: Moments | None = None
    for where, x, weight in rows.blocks(shape.n_monomials(rows.n_features) + 4 * len(reference)):
        r = resp(where, x) * weight
        if isinstance(x, Cells):
            for batch in missing.batches(around, x):
                incomplete = missing.added(incomplete, batch.moments(r[:, batch.rows]))
            whole = missing.complete(around, x)
            if not whole.numel():
                continue
            x, r = x.x[whole], r[:, whole]
        # Each row has one component, so it can be centred before its monomials are taken.
        x = x - reference[r.argmax(0)]
        sums = add_to(sums, shape.sums(x, shape.monomials(x), r))
    if sums is None:
        assert incomplete is not None  # rows are never empty
        moments = incomplete
    else:
        moments = shape.unpack(reference, sums)
        moments = moments if incomplete is None else missing.added(moments, incomplete)
    # Stick-breaking weights prefer the largest components first.
    return moments.reordered(moments.counts.argsort(descending=True, stable=True))


def sample_rows(rows: Rows, rng: np.random.Generator, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (M, D) in canonical order and their weights (M,), M at most `most`.

    Beyond that many, a systematic sample: equally spaced points of the cumulative weight, each
    standing for the same share of it. Missing cells are NaN.
    """
    direction = torch.from_numpy(rng.standard_normal(rows.n_features)).to(rows.device)
    offset = rng.random()
    rank, weight = np.empty(rows.n_rows), np.empty(rows.n_rows)
    for where, x, w in rows.blocks(rows.n_features):
        rank[where] = (filled(x) @ direction).cpu().numpy()
        weight[where] = w.cpu().numpy()
    order = np.argsort(rank, kind="stable")
    cumulative = weight[order].cumsum()
    total = cumulative[-1]
    # Repeated rows count as often as their weight says, so this branches alike for both.
    if max(total, rows.n_rows) > most:
        points = (np.arange(most) + offset) * (total / most)
        # A row that was drawn several times stands once, with the weight of all its draws.
        drawn, times = np.unique(_invert(cumulative, points), return_counts=True)
        order = order[drawn]
        seed_weight = times * (total / most)
    else:
        seed_weight = weight[order]
    return rows.read(order)[0].cpu().numpy(), seed_weight


def _invert(cumulative: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Index of the interval of `cumulative` that each point falls in."""
    index = np.searchsorted(cumulative, points, side="right")
    return np.minimum(index, cumulative.size - 1)


def _square_distance(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (M, D), (L, D) -> (L, M), exactly zero for equal rows."""
    return np.stack([np.square(x - centre).sum(-1) for centre in centres])


def _kmeans_plusplus(
    n_components: int, x: np.ndarray, weight: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007) on weighted rows in canonical order.

    Returns at most `n_components` centres: fewer where fewer rows are distinct.
    """
    n_candidates = 2 + int(math.log(n_components))
    first = _invert(weight.cumsum(), rng.random(1) * weight.sum())
    centres = [x[first[0]]]
    distance = _square_distance(x, x[first])[0]  # (M,)
    while len(centres) < n_components:
        cumulative = (weight * distance).cumsum()
        if not cumulative[-1] > 0.0:
            break
        candidates = _invert(cumulative, rng.random(n_candidates) * cumulative[-1])
        shrunk = np.minimum(distance, _square_distance(x, x[candidates]))  # (L, M)
        best = (shrunk @ weight).argmin()
        centres.append(x[candidates[best]])
        distance = shrunk[best]
    return np.stack(centres)


def _random_rows(
    n_components: int, x: np.ndarray, weight: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Pick distinct rows with probability proportional to their weight."""
    centres: list[np.ndarray] = []
    left = weight.copy()
    while len(centres) < n_components and left.any():
        cumulative = left.cumsum()
        chosen = x[_invert(cumulative, rng.random(1) * cumulative[-1])]
        centres.append(chosen[0])
        left[(x == chosen).all(-1)] = 0.0
    return np.stack(centres)


def nearest(centres: Tensor, x: Tensor | Cells) -> Tensor:
    """Index of the nearest centre of rows (B, D) by their observed cells, shape (B,)."""
    if isinstance(x, Cells):
        square = 0.5 * centres.square() @ x.observed.double().T  # (K, B)
        return (square - centres @ x.x.T).argmin(0)
    # |x|^2 is the same for every centre; fitted units keep the rest free of cancellation.
    return (0.5 * centres.square().sum(-1)[:, None] - centres @ x.T).argmin(0)


def one_hot(labels: Tensor, n_components: int) -> Tensor:
    """Responsibilities (K, B) of hard labels (B,)."""
    return torch.nn.functional.one_hot(labels, n_components).T.double()


def _lloyd(centres: Tensor, rows: Rows) -> Tensor:
    """Lloyd's algorithm; a centre that loses all its rows stays where it is."""
    for _ in range(_MAX_LLOYD_PASSES):
        counts = torch.zeros_like(centres)  # (K, D)
        shift = torch.zeros_like(centres)  # (K, D)
        for _, x, weight in rows.blocks(4 * len(centres) + 4 * rows.n_features):
            labels = nearest(centres, x)
            resp = one_hot(labels, len(centres)) * weight  # (K, B)
            diff = filled(x) - centres[labels]
            if isinstance(x, Cells):
                seen = x.observed.double()
                counts += resp @ seen
                diff *= seen
            else:
                counts += resp.sum(-1, keepdim=True)
            shift += resp @ diff
        shift = torch.where(counts > 0, shift / counts, 0.0)
        centres = centres + shift
        # Fitted units: rows have unit spread, so this is far below what the start can feel.
        if float(shift.abs().max()) < 1e-6:
            break
    return centres


def _random_responsibilities(
    n_components: int, rows: Rows, rng: np.random.Generator
) -> Callable[[slice, Tensor | Cells], Tensor]:
    """Return a random function from blocks of rows (B, D) to responsibilities (K, B).

    ``r_nk`` is proportional to ``1 + cos(omega_k' x_n + phi_k)``: as rough as independent draws
    for distinct rows, but the same for equal rows wherever they stand.
    """
    D = rows.n_features
    frequency = torch.from_numpy(20.0 * rng.standard_normal((n_components, D)) / math.sqrt(D))
    phase = torch.from_numpy(rng.uniform(0.0, 2.0 * math.pi, n_components))
    frequency, phase = frequency.to(rows.device), phase.to(rows.device)

    def resp(_: slice, x: Tensor | Cells) -> Tensor:
        raw = 1.0 + torch.cos(frequency @ filled(x).T + phase[:, None])  # (K, B)
        return raw / raw.sum(0)

    return resp
