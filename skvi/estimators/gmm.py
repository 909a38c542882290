"""Bayesian Gaussian mixture by coordinate-ascent variational inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_array, check_is_fitted

from skvi.estimators._base import (
    LARGEST_VALUE,
    VariationalEstimator,
    check_count,
    to_numpy,
    weighted_mean,
    without_weightless,
)
from skvi.estimators._compat import Interval, StrOptions, fit_context
from skvi.inference.loop import Solution, climb
from skvi.inference.monitor import Monitor, Status
from skvi.inference.search import search
from skvi.models.mixture import active, bound, start
from skvi.models.mixture.active import AlternatingAscent
from skvi.models.mixture.bound import Posterior, State
from skvi.models.mixture.components import COMPONENTS, Components
from skvi.models.mixture.moves import EMPTY, MOVES, Proposals
from skvi.models.mixture.weights import WEIGHTS
from skvi.models.terms import ElboTerms
from skvi.runtime.blocks import Affine, Rows
from skvi.runtime.linalg import inv_chol
from skvi.runtime.moments import weighted_moments
from skvi.runtime.random import draw_seed, make_rng

# A correlation matrix whose smallest eigenvalue is below this is singular to working precision.
_SINGULAR = 1e-13
# Below this the default covariance_prior is shrunk. Not "just enough", to 1e-8, say: squared
# distances in such a direction would keep half their digits and drown everything else.
_NEARLY_SINGULAR = 1e-8
# Rows further from the training data than this, in units of their spread, have no finite square.
_LARGEST_FITTED = 1e150
# After a move, a climb stops at this many nats per row; the last one goes on to `tol`.
_ROUGH_TOL = 1e-3
_EXTREME = (
    "A posterior covariance is singular to working precision: the data, the priors and the sample "
    "weights differ by too many orders of magnitude. Rescale the sample weights, standardise the "
    'data, remove collinear features or use covariance_type="diag", or give a larger '
    "covariance_prior."
)


class _Hyperparameters(NamedTuple):
    """Priors in the units of X, as published with a trailing underscore."""

    weight_concentration: float
    mean_precision: float
    mean: np.ndarray  # (D,)
    degrees_of_freedom: float
    covariance: np.ndarray | float  # full, tied (D, D); diag (D,); spherical a float


class _Model(NamedTuple):
    """What a fit found, in fitted units ``(x - shift) / scale``; NumPy arrays only."""

    affine: Affine
    prior: Posterior
    posterior: Posterior

    def on(self, device: torch.device) -> tuple[Posterior, Posterior]:
        """Return posterior and prior as tensors on `device`."""

        def to_tensor(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array, device=device)

        return self.posterior.map(to_tensor), self.prior.map(to_tensor)


class VariationalGMM(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, VariationalEstimator
):
    r"""Bayesian Gaussian mixture fitted by coordinate-ascent variational inference.

    The model, for rows :math:`x_n \in R^D` and at most K components:

    .. math::
        z_n \sim \mathrm{Cat}(\pi), \quad x_n | z_n = k \sim N(\mu_k, \Lambda_k^{-1}), \quad
        \mu_k | \Lambda_k \sim N(m_0, (\kappa_0 \Lambda_k)^{-1}),

    with a Wishart (full, tied) or gamma (diag, spherical) prior of the precisions and a Dirichlet
    or stick-breaking prior of the weights. The posterior
    :math:`q(z) q(\pi) \prod_k q(\mu_k, \Lambda_k)` is conjugate for every `covariance_type`, and
    the bound on :math:`\log p(X)` drops no constant.

    Parameters
    ----------
    n_components : int, default=10
        Truncation K: an upper limit, since the prior empties components that are not needed. It
        may exceed the number of rows.
    covariance_type : {"full", "tied", "diag", "spherical"}, default="full"
        Shape of the precisions: one matrix per component, one matrix for all, one number per
        component and feature, one number per component.
    weight_concentration_prior_type : {"dirichlet_process", "dirichlet_distribution"}, \
            default="dirichlet_process"
        Stick-breaking with sticks Beta(1, a0), or a symmetric Dirichlet with parameter a0.
    weight_concentration_prior : float, default=None
        The a0 of the weights: small values prefer few components. None is ``1 / n_components``.
    mean_precision_prior : float, default=None
        kappa0: how many rows the prior of a mean is worth. None is 1.
    mean_prior : array-like of shape (n_features,), default=None
        m0. None is the (weighted) mean of X.
    degrees_of_freedom_prior : float, default=None
        nu0 of the precisions; above ``n_features - 1`` for "full" and "tied", above 0 otherwise.
        None is ``n_features``.
    covariance_prior : float or array-like, default=None
        Inverse scale W0^-1 of the precisions, of shape (n_features, n_features) for "full" and
        "tied", (n_features,) for "diag", a number for "spherical". None is the unbiased
        (weighted) covariance of X in that shape; with a total weight W below 2 its divisor
        ``W - 1`` becomes ``W / 2``.
    init_params : {"k-means++", "kmeans", "random_from_data", "random"}, default="k-means++"
        First responsibilities: rows go to the nearest of the centres that greedy k-means++
        chose ("kmeans": refined by Lloyd's algorithm; "random_from_data": distinct random
        rows), or are random. Distances are taken in units of each feature's spread, except for
        "spherical". Every start gives integer `sample_weight` the effect of repeated rows.
    n_init : int, default=1
        Number of starts; the fit with the highest bound is kept.
    max_iter : int, default=1000
        Limit of the passes over the data, per start, those spent on moves included.
    tol : float, default=1e-5
        A start has converged when a pass raises the bound by less than `tol` nats per row (per
        unit of total weight).
    moves : "auto", None or list or tuple of str, default="auto"
        What is tried once coordinate ascent has converged, to leave a local optimum. "auto" is
        all of these, None (or an empty list) none:

        * "merge" makes one component of two;
        * "delete" takes a component away, and its rows go to the others;
        * "birth" splits a component by a small mixture of its rows, into empty components;
        * "reorder" puts large components first, which the sticks of a Dirichlet process prefer.

        Where no component is empty, a birth is paired with a merge or a deletion. A move is kept
        only if a pass over all rows finds a higher bound, so the bound is never below that of
        ``moves=None`` with the same `random_state`. The search ends when every proposal of a
        round has failed; a round costs one pass to look for proposals (on a sample of the rows
        where they exceed 32 MB), about as much again for trial splits, and at most four passes
        for each of at most nine proposals.
    device : str or torch.device, default="auto"
        "auto": the device of X if it is a tensor, else CUDA if there is one, else the CPU. An
        explicit device that is missing is an error.
    random_state : int, RandomState instance or None, default=None
        Seeds the starts. None draws fresh entropy; NumPy's global state is never touched.
    warm_start : bool, default=False
        Continue from the posterior of the previous fit, in one start whatever `n_init` is. Its
        priors are kept too, except for those that are given as parameters.
    verbose : int, default=0
        1 prints the bound every tenth pass, 2 every pass.

    Attributes
    ----------
    weights_ : ndarray of shape (n_components,)
        Expected weights ``E[pi_k]``, normalised over the truncation.
    means_ : ndarray of shape (n_components, n_features)
        Posterior means m_k.
    covariances_ : ndarray
        ``E[Lambda_k]^-1``: (n_components, n_features, n_features) for "full", (n_features,
        n_features) for "tied", (n_components, n_features) for "diag", (n_components,) for
        "spherical".
    precisions_ : ndarray
        ``E[Lambda_k]``, same shape.
    precisions_cholesky_ : ndarray
        Upper triangular U with ``precisions = U U'``; square roots for "diag" and "spherical".
    weight_concentration_ : ndarray of shape (n_components,) or tuple of two
        Posterior Dirichlet parameters, or the Beta parameters (a, b) of the sticks.
    mean_precision_ : ndarray of shape (n_components,)
        kappa_k.
    degrees_of_freedom_ : ndarray of shape (n_components,), or float for "tied"
        nu_k. The gamma shape is ``nu_k / 2`` for "diag" and ``n_features nu_k / 2`` for
        "spherical".
    weight_concentration_prior_ : float
    mean_precision_prior_ : float
    mean_prior_ : ndarray of shape (n_features,)
    degrees_of_freedom_prior_ : float
    covariance_prior_ : ndarray or float
        The priors that were used, in the units of X.
    elbo_ : float
        The bound on ``log p(X)`` in nats: ``sum_n s_n score_samples(X)[n] - kl_``.
    kl_ : float
        ``KL(q(pi, mu, Lambda) || p(pi, mu, Lambda))`` in nats.
    n_active_components_ : int
        Number of components that hold more than half a row's worth of weight: ``N_k > 1/2``,
        where ``N_k`` is the sum of responsibilities times sample weights. A component below that
        is the prior, whatever its share in `weights_`.
    elbo_history_ : list of float
        The bound after each pass of the kept start; the last entry is ``elbo_``. A pass spent on
        a proposal that was not (yet) better repeats the entry before it.
    n_iter_ : int
        Passes of the kept start.
    converged_ : bool
        Whether the kept start reached `tol`. A search for moves that `max_iter` cut short at a
        converged state counts as converged.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only if X had feature names that are all strings.

    See Also
    --------
    sklearn.mixture.BayesianGaussianMixture : Same parameters and default priors, but a bound
        without its constants and approximate posteriors for "tied", "diag" and "spherical".

    References
    ----------
    Bishop (2006), Pattern Recognition and Machine Learning, section 10.2.
    Blei & Jordan (2006), Variational inference for Dirichlet process mixtures, Bayesian Analysis.
    Ueda & Ghahramani (2002), Bayesian model search for mixture models, Neural Networks.
    Hughes & Sudderth (2013), Memoized online variational inference for Dirichlet process mixture
    models, NeurIPS.

    Examples
    --------
    >>> import numpy as np
    >>> from skvi import VariationalGMM
    >>> X = np.array([[1.0, 2.0], [1.1, 1.9], [0.9, 2.2], [8.0, 7.0], [8.2, 6.9], [7.9, 7.3]])
    >>> gmm = VariationalGMM(n_components=3, covariance_type="diag", random_state=0).fit(X)
    >>> labels = gmm.predict(X)
    >>> bool(labels[0] == labels[1] == labels[2] != labels[3])
    True
    >>> bool(abs(gmm.elbo_ - (gmm.score_samples(X).sum() - gmm.kl_)) < 1e-9)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "covariance_type": [StrOptions(set(COMPONENTS))],
        "weight_concentration_prior_type": [StrOptions(set(WEIGHTS))],
        "weight_concentration_prior": [None, Interval(Real, 0.0, None, closed="neither")],
        "mean_precision_prior": [None, Interval(Real, 0.0, None, closed="neither")],
        "mean_prior": [None, "array-like"],
        "degrees_of_freedom_prior": [None, Interval(Real, 0.0, None, closed="neither")],
        "covariance_prior": [None, "array-like", Interval(Real, 0.0, None, closed="neither")],
        "init_params": [StrOptions({"k-means++", "kmeans", "random_from_data", "random"})],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "moves": [None, StrOptions({"auto"}), list, tuple],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_components: int = 10,
        *,
        covariance_type: str = "full",
        weight_concentration_prior_type: str = "dirichlet_process",
        weight_concentration_prior: float | None = None,
        mean_precision_prior: float | None = None,
        mean_prior: Any = None,
        degrees_of_freedom_prior: float | None = None,
        covariance_prior: Any = None,
        init_params: str = "k-means++",
        n_init: int = 1,
        max_iter: int = 1000,
        tol: float = 1e-5,
        moves: Any = "auto",
        device: str | torch.device = "auto",
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.weight_concentration_prior_type = weight_concentration_prior_type
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_precision_prior = mean_precision_prior
        self.mean_prior = mean_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.init_params = init_params
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.moves = moves
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose

    # -- fitting ----------------------------------------------------------------------------------

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Maximise the bound on ``log p(X)``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Finite numbers, float64 or float32; statistics are accumulated in float64.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            How often each row counts: an integer weight equals that many repeated rows, zero
            equals removal.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For invalid parameters or data; for constant features without a
            `covariance_prior`; for a `warm_start` from a fit of another shape.
        """
        self._kinds_of_moves()
        with self._all_or_nothing():
            door = self._door(X, reset=True, ensure_min_samples=2)
            weight = self._weights(sample_weight, door.X)
            X, weight = without_weightless(weight, door.X)
            try:
                if self.warm_start and hasattr(self, "_model"):
                    self._fit_warm(X, weight, door.device)
                else:
                    self._fit_cold(X, weight, door.device)
            except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
                raise ValueError(_EXTREME) from error
        if not self.converged_:
            warnings.warn(
                f"The bound had not converged to tol={self.tol:g} nats per row after "
                f"{self.n_iter_} passes; increase max_iter or tol.",
                ConvergenceWarning,
                stacklevel=3,  # past the decorator, to the caller of fit
            )
        return self

    def _fit_cold(self, X: np.ndarray, weight: np.ndarray, device: torch.device) -> None:
        affine = self._fitted_units(X, weight)
        rows = Rows(X, affine, device, weight)
        hyper = self._hyperparameters(rows, affine, float(weight.sum()))
        prior = self._prior(hyper, affine, device)
        rng = make_rng(draw_seed(self.random_state))
        best: Solution[State] | None = None
        failure: Exception | None = None
        for _ in range(self.n_init):
            (child,) = rng.spawn(1)
            moments = start.start(
                self.init_params, rows, type(prior.components), self.n_components, rng
            )
            try:
                solution = self._climb(prior, rows, State(prior, moments), affine, weight, child)
            except (ValueError, torch.linalg.LinAlgError) as error:
                failure = error  # one start may fail where others do not
                continue
            if best is None or solution.bound > best.bound:
                best = solution
        if best is None:
            raise ValueError(_EXTREME) from failure
        self._publish(best, prior, hyper, affine)

    def _fit_warm(self, X: np.ndarray, weight: np.ndarray, device: torch.device) -> None:
        """Continue from the previous posterior, in its units, with its priors unless given."""
        affine = self._model.affine
        posterior, _ = self._model.on(device)
        wanted = (
            COMPONENTS[self.covariance_type],
            WEIGHTS[self.weight_concentration_prior_type],
            (self.n_components, X.shape[1]),
        )
        found = (
            type(posterior.components),
            type(posterior.weights),
            tuple(posterior.components.mean.shape),
        )
        if wanted != found:
            raise ValueError(
                "warm_start=True cannot continue the previous fit: covariance_type, "
                "weight_concentration_prior_type, n_components or the number of features has "
                "changed. Set warm_start=False, or fit a clone."
            )
        self._check_reach(X, affine)
        rows = Rows(X, affine, device, weight)
        before = _Hyperparameters(
            self.weight_concentration_prior_,
            self.mean_precision_prior_,
            self.mean_prior_,
            self.degrees_of_freedom_prior_,
            self.covariance_prior_,
        )
        hyper = self._hyperparameters(rows, affine, float(weight.sum()), before)
        prior = self._prior(hyper, affine, device)
        moments, _ = bound.expectation(posterior, rows)
        rng = make_rng(draw_seed(self.random_state))
        solution = self._climb(prior, rows, State(posterior, moments), affine, weight, rng)
        self._publish(solution, prior, hyper, affine)

    def _climb(
        self,
        prior: Posterior,
        rows: Rows,
        state: State,
        affine: Affine,
        weight: np.ndarray,
        rng: np.random.Generator,
    ) -> Solution[State]:
        total = float(weight.sum())
        change_of_units = total * affine.log_abs_det
        ascend = full_pass = bound.coordinate_ascent(prior, rows)
        alternating = None
        if active.pays(rows, type(prior.components), self.n_components):
            # What passes over active components give away stays far below the tolerance.
            negligible = max(1e-3 * self.tol / self.n_components, 1e-16)
            ascend = alternating = AlternatingAscent(
                prior, rows, max_iter=self.max_iter, negligible=negligible
            )

        def step(state: State) -> tuple[State, float]:
            state, value = ascend(state)
            return state, value - change_of_units

        def attempt(state: State) -> tuple[State, float]:
            try:
                state, value = full_pass(state)
            except torch.linalg.LinAlgError:
                return state, np.nan  # a proposal may fail where others do not
            return state, value - change_of_units

        monitor = Monitor(self.tol, scale=total, verbose=self.verbose, name="VariationalGMM")

        def ascend_from(state: State, tol: float) -> Solution[State]:
            monitor.tol = tol
            left = self.max_iter - monitor.n_iter
            if alternating is not None:
                alternating.restart(left)
            solution = climb(step, state, max_iter=left, monitor=monitor)
            while (
                alternating is not None
                and solution.status is Status.CONVERGED
                and not alternating.looked_at_everything
            ):
                # Only a full pass may say so.
                alternating.look_at_everything()
                left = self.max_iter - solution.n_iter
                solution = climb(step, solution.state, max_iter=left, monitor=monitor)
            monitor.tol = self.tol
            return solution

        solution = ascend_from(state, self.tol)
        kinds = self._kinds_of_moves()
        if kinds and solution.status is Status.CONVERGED:
            summit = solution.bound
            propose = Proposals(prior, rows, kinds, rng)

            def proposals(state: State) -> Iterator[State]:
                try:
                    yield from propose(state)
                except torch.linalg.LinAlgError:
                    return  # what cannot be predicted is not tried

            solution = search(
                solution,
                proposals,
                attempt,
                lambda state: ascend_from(state, max(self.tol, _ROUGH_TOL)),
                max_iter=self.max_iter,
                monitor=monitor,
            )
            if solution.bound > summit and monitor.n_iter < self.max_iter:
                solution = ascend_from(solution.state, self.tol)
        if solution.status is Status.NON_FINITE:
            raise ValueError(_EXTREME)
        return solution

    def _kinds_of_moves(self) -> tuple[str, ...]:
        if self.moves is None:
            return ()
        kinds = MOVES if isinstance(self.moves, str) else tuple(self.moves)
        unknown = [kind for kind in kinds if kind not in MOVES]
        if unknown:
            raise ValueError(
                f'moves={self.moves!r} contains {unknown}; use "auto", None, or some of {MOVES}.'
            )
        return kinds

    def _fitted_units(self, X: np.ndarray, weight: np.ndarray) -> Affine:
        """Shift to the mean and scale to unit spread: exact changes of variables of the model."""
        mean, std = weighted_moments(X, weight)
        scale = np.where(std > 0, std, 1.0)
        if self.covariance_type == "spherical" and std.any():
            # One precision for all features allows one scale only: the root mean square.
            scale = np.full_like(std, np.linalg.norm(std / std.max()) * std.max())
            scale /= np.sqrt(std.size)
        tiny = np.flatnonzero((std > 0) & (scale < 1e-153))
        if tiny.size:
            raise ValueError(
                f"Features {tiny.tolist()} vary by less than 1e-153, so their precision leaves "
                "the range of float64; rescale the data, for example with StandardScaler."
            )
        return Affine(mean, scale)

    def _hyperparameters(
        self,
        rows: Rows,
        affine: Affine,
        total: float,
        before: _Hyperparameters | None = None,
    ) -> _Hyperparameters:
        """Return the given parameters; those not given are as `before`, or else defaults."""
        D = rows.n_features
        if before is None:
            concentration, mean_precision, dof = 1.0 / self.n_components, 1.0, float(D)
            mean = affine.shift.copy()
        else:
            concentration, mean_precision, mean, dof, _ = before
        if self.weight_concentration_prior is not None:
            concentration = float(self.weight_concentration_prior)
        if self.mean_precision_prior is not None:
            mean_precision = float(self.mean_precision_prior)
        if self.mean_prior is not None:
            mean = self._prior_array("mean_prior", (D,), LARGEST_VALUE)
        if self.degrees_of_freedom_prior is not None:
            dof = float(self.degrees_of_freedom_prior)
        if self.covariance_type in {"full", "tied"} and dof <= D - 1:
            raise ValueError(
                f"degrees_of_freedom_prior={dof:g} must exceed n_features - 1 = {D - 1} for "
                f"covariance_type={self.covariance_type!r}: the Wishart prior is improper "
                "otherwise."
            )
        if self.covariance_prior is not None:
            covariance = self._given_covariance(D)
        elif before is not None:
            covariance = before.covariance
        else:
            covariance = self._empirical_covariance(rows, affine, total)
        return _Hyperparameters(concentration, mean_precision, mean, dof, covariance)

    def _prior_array(self, name: str, shape: tuple[int, ...], largest: float) -> np.ndarray:
        """Return the array parameter `name` in float64, of this shape and within `largest`."""
        value = getattr(self, name)
        if np.shape(value) != shape:
            raise ValueError(
                f"{name} has shape {np.shape(value)}, but {shape} is asked for by the "
                f"{shape[-1]} features of X and covariance_type={self.covariance_type!r}."
            )
        array = check_array(value, dtype=np.float64, ensure_2d=False, copy=True, input_name=name)
        if np.abs(array).max() > largest:
            raise ValueError(
                f"{name} contains values beyond {largest:g}, out of proportion to any "
                "data that can be fitted; check its units."
            )
        return array

    def _given_covariance(self, D: int) -> np.ndarray | float:
        if self.covariance_type == "spherical":
            if not isinstance(self.covariance_prior, Real) or isinstance(
                self.covariance_prior, bool
            ):
                raise ValueError(
                    'covariance_prior must be a positive number for covariance_type="spherical".'
                )
            return float(self.covariance_prior)
        if self.covariance_type == "diag":
            variances = self._prior_array("covariance_prior", (D,), LARGEST_VALUE**2)
            if variances.min() <= 0:
                raise ValueError("covariance_prior must hold positive variances.")
            return variances
        matrix = self._prior_array("covariance_prior", (D, D), LARGEST_VALUE**2)
        if not np.allclose(matrix, matrix.T, rtol=1e-10, atol=0.0):
            raise ValueError("covariance_prior must be a symmetric matrix.")
        if matrix.diagonal().min() > 0:
            matrix = (matrix + matrix.T) / 2.0
            if _correlation_eigenvalues(matrix)[0] > _SINGULAR:
                return matrix
        raise ValueError(
            "covariance_prior must be positive definite: its smallest eigenvalue is not above "
            "the rounding of its largest. Add a small multiple of the variances to its diagonal."
        )

    def _empirical_covariance(self, rows: Rows, affine: Affine, total: float) -> np.ndarray | float:
        """Return the default `covariance_prior`, or raise if a feature is constant."""
        D = rows.n_features
        scatter = torch.zeros(D, D, dtype=torch.float64, device=rows.device)
        matrix = self.covariance_type in {"full", "tied"}
        for _, x, weight in rows.blocks(2 * D):
            if matrix:
                scatter += (weight[:, None] * x).T @ x
            else:
                scatter.diagonal().add_(weight @ x.square())
        fitted = to_numpy(scatter) / max(total - 1.0, 0.5 * total)
        variances = fitted.diagonal()  # (D,), the rows have mean zero
        if self.covariance_type == "spherical":
            mean_variance = float(variances.mean())
            if mean_variance == 0.0:
                raise ValueError(_constant_message(range(D)))
            return mean_variance * float(affine.scale[0]) ** 2
        constant = np.flatnonzero(variances == 0.0)
        if constant.size:
            raise ValueError(_constant_message(constant.tolist()))
        if not matrix:
            return variances * affine.scale**2
        if _correlation_eigenvalues(fitted)[0] < _NEARLY_SINGULAR:
            fitted = 0.9 * fitted + 0.1 * np.diag(variances)
        return fitted * affine.scale * affine.scale[:, None]

    def _prior(self, hyper: _Hyperparameters, affine: Affine, device: torch.device) -> Posterior:
        """Return the prior in fitted units, as tensors on `device`."""
        shape = COMPONENTS[self.covariance_type]
        mean = (hyper.mean - affine.shift) / affine.scale
        if self.covariance_type == "spherical":
            covariance = np.asarray(hyper.covariance / affine.scale[0] / affine.scale[0])
        elif self.covariance_type == "diag":
            covariance = hyper.covariance / affine.scale / affine.scale
        else:
            covariance = hyper.covariance / affine.scale / affine.scale[:, None]

        def tensor(array: Any) -> torch.Tensor:
            return torch.as_tensor(array, dtype=torch.float64, device=device)

        inverse_scale = shape.prior_inverse_scale(tensor(covariance), affine.shift.size)
        components = shape(
            tensor(mean)[None],
            tensor([hyper.mean_precision]),
            tensor([hyper.degrees_of_freedom]),
            shape.factor(inverse_scale),
        )
        law = WEIGHTS[self.weight_concentration_prior_type]
        weights = law.prior(self.n_components, hyper.weight_concentration, device)
        return Posterior(weights, components)

    def _publish(
        self,
        solution: Solution[State],
        prior: Posterior,
        hyper: _Hyperparameters,
        affine: Affine,
    ) -> None:
        """Set the fitted attributes, in the units of X."""
        self.weight_concentration_prior_ = hyper.weight_concentration
        self.mean_precision_prior_ = hyper.mean_precision
        self.mean_prior_ = hyper.mean
        self.degrees_of_freedom_prior_ = hyper.degrees_of_freedom
        self.covariance_prior_ = hyper.covariance
        posterior = solution.state.posterior
        self._model = _Model(affine, prior.map(to_numpy), posterior.map(to_numpy))
        self._n_features_out = self.n_components
        components = posterior.components
        covariances = to_numpy(components.covariances())
        scale = affine.scale
        if self.covariance_type in {"full", "tied"}:
            # U = S^-1 L^-T sqrt(dof): upper triangular, precision = U U'
            factor = inv_chol(components.root).mT * components.dof.sqrt()[:, None, None]
            chol = to_numpy(factor) / scale[:, None]  # (K, D, D) or (1, D, D)
            covariances = covariances * scale * scale[:, None]
            with np.errstate(over="ignore"):
                precisions = chol @ np.swapaxes(chol, -1, -2)
            if self.covariance_type == "tied":
                chol, covariances, precisions = chol[0], covariances[0], precisions[0]
        else:
            unit = scale if self.covariance_type == "diag" else scale[0]
            covariances = covariances * unit**2
            chol = to_numpy(components.covariances().rsqrt()) / unit
            with np.errstate(over="ignore"):
                precisions = chol**2
        if not np.isfinite(precisions).all():
            raise ValueError(
                "The posterior precisions leave the range of float64; rescale the data, for "
                "example with StandardScaler."
            )
        self.covariances_ = covariances
        self.precisions_ = precisions
        self.precisions_cholesky_ = chol
        self.means_ = affine.shift + scale * to_numpy(components.mean)
        self.mean_precision_ = to_numpy(components.kappa)
        dof = to_numpy(components.dof)
        self.degrees_of_freedom_ = float(dof[0]) if self.covariance_type == "tied" else dof
        weights = np.exp(to_numpy(posterior.weights.log_mean()[0]))
        self.weights_ = weights / weights.sum()
        parameters = tuple(vars(self._model.posterior.weights).values())
        self.weight_concentration_ = parameters[0] if len(parameters) == 1 else parameters
        counts = posterior.components.kappa - prior.components.kappa
        self.n_active_components_ = int((counts > EMPTY).sum())
        self.elbo_ = solution.bound
        self.kl_ = float(posterior.kl(prior))
        self.elbo_history_ = solution.history
        self.n_iter_ = solution.n_iter
        self.converged_ = solution.status is Status.CONVERGED

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Fit and return the most probable component of each row, as `predict` would."""
        return self.fit(X, sample_weight=sample_weight).predict(X)

    # -- what a fit can say about rows --------------------------------------------------------

    def _rows(self, X: Any) -> Rows:
        """Validate X and return its rows in fitted units."""
        check_is_fitted(self)
        door = self._door(X, reset=False)
        self._check_reach(door.X, self._model.affine)
        return Rows(door.X, self._model.affine, door.device)

    def _per_row(
        self,
        rows: Rows,
        function: Callable[[Posterior, Posterior, torch.Tensor], torch.Tensor],
        width: Callable[[Components], int] = bound.floats_per_row,
    ) -> np.ndarray:
        """Apply ``function(posterior, prior, x)``, (B, D) -> (..., B), block by block.

        Returns
        -------
        ndarray of shape (..., n_samples)
        """
        posterior, prior = self._model.on(rows.device)
        blocks = rows.blocks(width(posterior.components))
        return np.concatenate(
            [function(posterior, prior, x).cpu().numpy() for _, x, _ in blocks], axis=-1
        )

    def _check_reach(self, X: np.ndarray, affine: Affine) -> None:
        with np.errstate(over="ignore"):
            far = np.maximum(X.max(0) - affine.shift, affine.shift - X.min(0)) / affine.scale
        if not (far < _LARGEST_FITTED).all():
            raise ValueError(
                f"Features {np.flatnonzero(~(far < _LARGEST_FITTED)).tolist()} of X lie more "
                f"than {_LARGEST_FITTED:g} times the spread of the training data away from it; "
                "squared distances leave the range of float64. Check the units of X."
            )

    def elbo_terms(self, X: Any) -> ElboTerms[np.ndarray]:
        """Return the terms of the local bound of each row, in nats.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ElboTerms
            ``reconstruction - kl = energy + entropy = score_samples(X)``, each of shape
            (n_samples,). The kl is against ``exp E[log pi]``, which is not normalised.
        """
        reconstruction, kl, energy, entropy = self._per_row(
            self._rows(X), lambda posterior, _, x: torch.stack(bound.elbo_terms(posterior, x))
        )
        log_scale = self._model.affine.log_abs_det
        return ElboTerms(reconstruction - log_scale, kl, energy - log_scale, entropy)

    def score_samples(self, X: Any) -> np.ndarray:
        r"""Return the local bound of each row under the fitted posterior, in nats.

        .. math::
            \log \sum_k \exp(E[\log \pi_k] + E[\log N(x_n | \mu_k, \Lambda_k^{-1})])
            \le \log E_q[p(x_n | \pi, \mu, \Lambda)]

        The right-hand side is `log_predictive`, up to the mass beyond the truncation.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        local = self._per_row(
            self._rows(X), lambda posterior, _, x: bound.local_bound(posterior, x)
        )
        return local - self._model.affine.log_abs_det

    def log_predictive(self, X: Any) -> np.ndarray:
        """Return the log posterior predictive density of each row, in nats.

        A mixture of Student-t densities that integrates to one, never below `score_samples`.
        Under a Dirichlet process the mass beyond the truncation goes to the prior predictive.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        density = self._per_row(
            self._rows(X), bound.log_predictive, bound.predictive_floats_per_row
        )
        return density - self._model.affine.log_abs_det

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the weighted mean of `score_samples`: the bound in nats per row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
            Higher is better; comparable across truncations, priors and model families.
        """
        local = self.score_samples(X)
        return weighted_mean(local, self._weights(sample_weight, local))

    def transform(self, X: Any) -> np.ndarray:
        """Return the responsibilities ``q(z_n = k)`` of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            In the dtype of X (float64 or float32).
        """
        rows = self._rows(X)
        resp = self._per_row(rows, lambda posterior, _, x: bound.responsibilities(posterior, x))
        return np.ascontiguousarray(resp.T, dtype=rows.dtype)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the responsibilities of each row, as `transform` does."""
        return self.transform(X)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable component of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), int64
        """
        return self._per_row(
            self._rows(X), lambda posterior, _, x: bound.responsibilities(posterior, x).argmax(0)
        )

    def sample(self, n_samples: int = 1, random_state: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows from the posterior predictive.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            None uses the estimator's `random_state`; an int there gives the same rows every time.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
        Z : ndarray of shape (n_samples,)
            The component of each row. Under a Dirichlet process a few rows may come from beyond
            the truncation; their label is ``n_components``.
        """
        check_is_fitted(self)
        n_samples = check_count(n_samples, "n_samples")
        seed = draw_seed(self.random_state if random_state is None else random_state)
        _, prior, posterior = self._model
        x, labels = bound.sample(posterior, prior, n_samples, make_rng(seed))
        return self._model.affine.shift + self._model.affine.scale * x, labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _correlation_eigenvalues(covariance: np.ndarray) -> np.ndarray:
    """Eigenvalues, ascending, of the correlation matrix: what scaling features cannot mend."""
    spread = np.sqrt(covariance.diagonal())
    return np.linalg.eigvalsh(covariance / spread / spread[:, None])


def _constant_message(features: Any) -> str:
    return (
        f"Features {list(features)} of X are constant over the rows of positive weight, so the "
        "default covariance_prior is singular and the density of X unbounded. Drop them "
        "(with sklearn.feature_selection.VarianceThreshold, say), or pass a covariance_prior."
    )
