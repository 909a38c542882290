"""Bayesian Gaussian mixture by coordinate-ascent variational inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from skvi.estimators._base import (
    LARGEST_VALUE,
    VariationalEstimator,
    check_count,
    to_host,
    to_numpy,
    weighted_mean,
    without_weightless,
)
from skvi.estimators._compat import Interval, StrOptions, fit_context, get_feature_names
from skvi.inference.loop import Solution, climb
from skvi.inference.monitor import Monitor, Status
from skvi.inference.search import search
from skvi.models.mixture import active, bound, start
from skvi.models.mixture.active import AlternatingAscent
from skvi.models.mixture.ascent import Ascent, CoordinateAscent, count_batches, laps_pay
from skvi.models.mixture.bound import Posterior, Share, State
from skvi.models.mixture.components import COMPONENTS, Components
from skvi.models.mixture.memoized import MemoizedAscent
from skvi.models.mixture.missing import Cells, IncompleteRows, has_missing
from skvi.models.mixture.moves import EMPTY, MOVES, Proposals
from skvi.models.mixture.stochastic import StochasticAscent
from skvi.models.mixture.weights import WEIGHTS, OrderedSticks, StickBreaking
from skvi.models.terms import ElboTerms
from skvi.runtime.batches import Batches
from skvi.runtime.blocks import Affine, Keep, Rows, block_rows, row_slices
from skvi.runtime.device import resolve_device
from skvi.runtime.linalg import inv_chol
from skvi.runtime.moments import weighted_moments
from skvi.runtime.random import draw_seed, make_rng

# A correlation matrix whose smallest eigenvalue is below this is singular to working precision.
_SINGULAR = 1e-13
# Below this the default covariance_prior is shrunk. Not "just enough", to 1e-8, say: squared
# distances in such a direction would keep half their digits and drown everything else.
_NEARLY_SINGULAR = 1e-8
# Statistics of a stream know the bound to six digits down to this eigenvalue.
_DRIFTED = 1e-11
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
    """What a fit found, in fitted units ``(x - shift) / scale``; NumPy arrays only.

    Attributes
    ----------
    affine : Affine
    prior, posterior : Posterior
    share : Share
        Statistics of all rows seen; the entropy is that of their responsibilities in the units
        of X, which is all that `partial_fit` needs to know of them.
    """

    affine: Affine
    prior: Posterior
    posterior: Posterior
    share: Share

    def on(self, device: torch.device) -> tuple[Posterior, Posterior]:
        """Return posterior and prior as tensors on `device`."""

        def to_tensor(array: np.ndarray) -> torch.Tensor:
            # Memory-mapped models are read-only, which torch cannot say of a tensor.
            array = array if array.flags.writeable else array.copy()
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

    Cells that are NaN are missing at random, in every method. "diag" and "spherical" sum over the
    observed cells. "full" and "tied" add :math:`q(x_{mis} | z)` to the posterior, normal and
    optimal for each row and component. A row with nothing observed scores 0 and has no effect on
    the fit.

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
        ``W - 1`` becomes ``W / 2``. With missing cells: the variances of the observed cells, and
        correlations that are shrunk by the share of cells observed together, W_ij / sqrt(W_i
        W_j), which keeps the matrix positive definite.
    init_params : {"k-means++", "kmeans", "random_from_data", "random"}, default="k-means++"
        First responsibilities: rows go to the nearest of the centres that greedy k-means++
        chose ("kmeans": refined by Lloyd's algorithm; "random_from_data": distinct random
        rows), or are random. Distances are taken in units of each feature's spread, except for
        "spherical". Every start gives integer `sample_weight` the effect of repeated rows.
    algorithm : {"auto", "cavi", "memoized", "svi"}, default="auto"
        How the bound is climbed. "cavi": coordinate ascent, passes over all rows. "memoized":
        laps over batches that update the posterior after each batch; the bound is exact and
        rises, and the summits are those of "cavi". "svi": stochastic natural-gradient steps on
        batches, whose length falls. "auto": "memoized" where it was measured to be faster, on the
        CPU with rows enough for ten batches of 5000 and at most 64 MB of float64, unless products
        are so long (1000 multiplications a row) that "cavi" can save more by leaving out
        negligible responsibilities; "cavi" otherwise.
    batch_size : int or "auto", default="auto"
        Weight of a batch of "memoized" and "svi": its number of rows, if every row counts once.
        Batches are random, but the same for repeated rows as for weighted ones. "auto" makes
        up to twenty, whose statistics take at most 64 MB. "cavi" has no batches.
    learning_offset : float, default=10.0
        tau of "svi", at least 1. Step t = 0, 1, ... has the length ``(t + tau) ** -kappa``, where 1
        stands for the update that the batch alone would make.
    learning_decay : float, default=0.7
        kappa of "svi", in (0.5, 1].
    n_init : int, default=1
        Number of starts; the fit with the highest bound is kept.
    max_iter : int, default=1000
        Limit of the passes over the data, per start, those spent on moves included.
    tol : float, default=1e-5
        A start has converged when a pass raises the bound by less than `tol` nats per row (per
        unit of total weight). Passes that update the posterior on the way, or leave something
        out, are followed by one that does neither: the limit counts it, and "cavi" and
        "memoized" go on if it does not confirm.
    moves : "auto", None or list or tuple of str, default="auto"
        What is tried once the ascent has converged, to leave a local optimum. "auto" is all of
        these, but only "reorder" with algorithm="svi"; None (or an empty list) is none:

        * "merge" makes one component of two or, where only that pays, of many;
        * "delete" takes a component away, and its rows go to the others;
        * "birth" splits a component by a small mixture of its rows, into empty components;
        * "reorder" puts large components first, in every pass, where the sticks of a Dirichlet
          process prefer that.

        Where no component is empty, a birth is paired with a merge or a deletion. A move is kept
        only if a pass over all rows finds a higher bound, so the bound of the first summit is never
        lost. The search ends when every proposal of a round has failed. A round looks for proposals
        on a sample (at most 8 MB of rows and responsibilities, or 250 rows a component in at most
        64 MB), where it fits small mixtures to the rows of each component (which `max_iter` does
        not count), and makes at most four passes for each of at most eleven proposals, or fourteen
        for "full" and "tied" with missing cells.
    device : str or torch.device, default="auto"
        "auto": the device of X if it is a tensor, else CUDA if there is one, else the CPU. An
        explicit device that is missing is an error.
    random_state : int, RandomState instance or None, default=None
        Seeds the starts and the batches. None draws fresh entropy; NumPy's global state is never
        touched.
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
        kappa_k. For "diag" and "spherical" fitted to missing cells (n_components, n_features),
        since each feature has another count.
    degrees_of_freedom_ : ndarray of shape (n_components,), or float for "tied"
        nu_k; (n_components, n_features) for "diag" fitted to missing cells. The gamma shape is
        ``nu_k / 2`` for "diag" and ``n_features nu_k / 2`` for "spherical".
    weight_concentration_prior_ : float
    mean_precision_prior_ : float
    mean_prior_ : ndarray of shape (n_features,)
    degrees_of_freedom_prior_ : float
    covariance_prior_ : ndarray or float
        The priors that were used, in the units of X.
    elbo_ : float
        The bound on ``log p(X)`` in nats: ``sum_n s_n score_samples(X)[n] - kl_``. After
        `partial_fit` of another block, see there.
    kl_ : float
        ``KL(q(pi, mu, Lambda) || p(pi, mu, Lambda))`` in nats.
    n_active_components_ : int
        Number of components that hold more than half a row's worth of weight: ``N_k > 1/2``,
        where ``N_k`` is the sum of responsibilities times sample weights. A component below that
        is the prior, whatever its share in `weights_`.
    elbo_history_ : list of float
        The bound after each pass of the kept start; the last entry is ``elbo_``. After a pass over
        batches it is the exact bound of the posterior then and of the responsibilities that each
        batch had at its visit. `partial_fit` adds an entry per call, on all rows so far.
        A pass spent on a proposal that was not (yet) better repeats the entry before it.
    n_iter_ : int
        Passes of the kept start; `partial_fit` makes one more per call.
    converged_ : bool
        Whether the kept start reached `tol`. False after `partial_fit` of another block, since
        no row is visited twice.
        A search for moves that `max_iter` cut short at such a state counts as converged.
    n_samples_seen_ : float
        Sum of the sample weights of all rows with something observed, of the last `fit` and of
        `partial_fit` since.
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
    Hughes & Sudderth (2013), Memoized online variational inference for Dirichlet process mixture
    models, NeurIPS. Hoffman, Blei, Wang & Paisley (2013), Stochastic variational inference.
    Broderick et al. (2013), Streaming variational Bayes. Ueda & Ghahramani (2002), Bayesian model
    search for mixture models, Neural Networks.

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
        "algorithm": [StrOptions({"auto", "cavi", "memoized", "svi"})],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_offset": [Interval(Real, 1.0, None, closed="left")],
        "learning_decay": [Interval(Real, 0.5, 1.0, closed="right")],
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
        algorithm: str = "auto",
        batch_size: int | str = "auto",
        learning_offset: float = 10.0,
        learning_decay: float = 0.7,
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
        self.algorithm = algorithm
        self.batch_size = batch_size
        self.learning_offset = learning_offset
        self.learning_decay = learning_decay
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
            Numbers, float64 or float32, or NaN for cells that are missing (at random);
            statistics are accumulated in float64.
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
            For invalid parameters or data; for features without an observed value; for
            constant features without a `covariance_prior`; for a `warm_start` from a fit of
            another shape or other feature names.
        """
        with self._all_or_nothing():
            self._fit(X, sample_weight)
        self._warn_unless_converged()
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        r"""Learn from the next block of a stream: streaming variational Bayes.

        The first block is fitted as by :meth:`fit`; it sets the units, the default priors and the
        start, so it should be large, or come with `mean_prior` and `covariance_prior`. Each later
        block is visited once: its statistics S under the current responsibilities (those of
        :meth:`transform`) are added to those of all rows before, and the posterior becomes

        .. math::
            q \propto p(\theta) \exp \langle \eta(\theta), S_1 + S_2 + \dots \rangle,

        so the posterior so far is the prior of the next block. The order of blocks matters only
        through the responsibilities, which is little once clusters are known. Continues after
        `fit` as well; `fit` starts anew.

        `elbo_` is then the exact bound of the posterior and of the responsibilities that each row
        had at its visit, on all rows so far: a lower bound of what another pass over them would
        say, ``sum_n s_n score_samples(X)[n] - kl_``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The first block needs two rows.
        y : Ignored
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in :meth:`fit`; if `n_components`, `covariance_type` or
            `weight_concentration_prior_type` has changed. The estimator then stays as it was.
        """
        self._validate_params()  # scikit-learn looks at those of the first call only
        first = not hasattr(self, "_model")
        with self._all_or_nothing():
            if first:
                self._fit(X, sample_weight)
            else:
                self._add_block(X, sample_weight)
        if first:
            self._warn_unless_converged()
        return self

    def _fit(self, X: Any, sample_weight: Any) -> None:
        door = self._fit_door(X, ensure_min_samples=2, ensure_all_finite="allow-nan")
        weight = self._weights(sample_weight, door.X)
        X, weight = without_weightless(weight, door.X)
        if has_missing(X):
            _check_observed(X)
            X, weight = _without_empty(X, weight)
        self._count_batches(float(weight.sum()), X.shape[1])  # refused here, not by each start
        try:
            if self._continues():
                self._fit_warm(X, weight, door.device)
            else:
                self._fit_cold(X, weight, door.device)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
            raise ValueError(_EXTREME) from error
        self.n_samples_seen_ = float(weight.sum())

    def _fit_cold(self, X: np.ndarray, weight: np.ndarray, device: torch.device) -> None:
        affine = self._fitted_units(X, weight)
        rows = _make_rows(X, affine, device, weight, keep=self._layout(X.shape[1]))
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
        rows, posterior, prior, hyper = self._resume("warm_start=True", X, weight, device)
        moments, _ = bound.expectation(posterior, rows)
        rng = make_rng(draw_seed(self.random_state))
        affine = self._model.affine
        solution = self._climb(prior, rows, State(posterior, moments), affine, weight, rng)
        self._publish(solution, prior, hyper, affine)

    def _add_block(self, X: Any, sample_weight: Any) -> None:
        """Visit the rows once, and add their share to that of the rows before."""
        door = self._door(X, reset=False, ensure_all_finite="allow-nan")
        weight = self._weights(sample_weight, door.X)
        X, weight = without_weightless(weight, door.X)
        if has_missing(X):
            X, weight = _without_empty(X, weight)
            self._check_resumable("partial_fit", X.shape[1])
            if not len(X):
                return  # rows with nothing observed say nothing
        affine = self._model.affine
        rows, posterior, prior, hyper = self._resume("partial_fit", X, weight, door.device)
        moments, local = bound.expectation(posterior, rows)
        block = bound.share(posterior, moments, local - _change_of_units(rows, weight, affine))
        seen = self._model.share.map(lambda array: torch.as_tensor(array, device=door.device))
        total = seen.merge(block, type(prior.components))
        total = total._replace(moments=prior.ordered(total.moments))
        try:
            posterior = prior.update(total.moments)
        except torch.linalg.LinAlgError as error:
            raise ValueError(_EXTREME) from error
        value = total.bound(posterior, prior)
        if not np.isfinite(value):
            raise ValueError(_EXTREME)
        if self.covariance_type in {"full", "tied"}:
            scales = to_numpy(posterior.components.inverse_scale())
            if min(_correlation_eigenvalues(scale)[0] for scale in scales) < _DRIFTED:
                raise ValueError(
                    "The block lies so far from the rows before it, in units of their spread, that "
                    "a covariance of all rows has too few digits left. Check the units of X, or "
                    "fit anew."
                )
        history = [*self.elbo_history_, value]
        state = State(posterior, total.moments)
        self._publish(Solution(state, history, Status.MAX_ITER), prior, hyper, affine)
        self.n_samples_seen_ += float(weight.sum())

    def _check_resumable(self, what: str, n_features: int) -> None:
        """Raise unless the parameters still describe a posterior of the fitted shape."""
        posterior = self._model.posterior
        wanted = (
            COMPONENTS[self.covariance_type],
            WEIGHTS[self.weight_concentration_prior_type],
            (self.n_components, n_features),
        )
        found = (
            type(posterior.components),
            type(posterior.weights),
            posterior.components.mean.shape,
        )
        if wanted != found:
            raise ValueError(
                f"{what} cannot continue the previous fit: covariance_type, "
                "weight_concentration_prior_type, n_components or the number of features has "
                "changed. Fit anew (with warm_start=False), or fit a clone."
            )

    def _resume(
        self, what: str, X: np.ndarray, weight: np.ndarray, device: torch.device
    ) -> tuple[Rows, Posterior, Posterior, _Hyperparameters]:
        """Return rows in the fitted units, the posterior, and the prior with new parameters."""
        self._check_resumable(what, X.shape[1])
        affine = self._model.affine
        posterior, _ = self._model.on(device)
        self._check_reach(X, affine)
        rows = _make_rows(X, affine, device, weight, keep=self._layout(X.shape[1]))
        before = _Hyperparameters(
            self.weight_concentration_prior_,
            self.mean_precision_prior_,
            self.mean_prior_,
            self.degrees_of_freedom_prior_,
            self.covariance_prior_,
        )
        hyper = self._hyperparameters(rows, affine, float(weight.sum()), before)
        return rows, posterior, self._prior(hyper, affine, device), hyper

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
        change_of_units = _change_of_units(rows, weight, affine)
        ascend = self._ascent(prior, rows, total, rng)
        full_pass = bound.coordinate_ascent(prior, rows)

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
            try:
                ascend.restart(self.max_iter - monitor.n_iter)
                left = self.max_iter - monitor.n_iter
                solution = climb(step, state, max_iter=left, monitor=monitor)
                converged = solution.status is Status.CONVERGED
                if converged and ascend.looked_at_everything and not ascend.rises:
                    # `max_iter` forced this pass, which keeps the posterior: its rise says nothing.
                    solution = solution._replace(status=Status.MAX_ITER)
                while solution.status is Status.CONVERGED and not ascend.looked_at_everything:
                    # Only a full pass may say so; after steps that rise and fall it is asked once.
                    ascend.look_at_everything()
                    left = self.max_iter - solution.n_iter if ascend.rises else 1
                    solution = climb(step, solution.state, max_iter=left, monitor=monitor)
                    if not ascend.rises and solution.status is Status.MAX_ITER:
                        solution = solution._replace(status=Status.CONVERGED)
                return solution
            finally:
                monitor.tol = self.tol

        solution = ascend_from(state, self.tol)
        kinds = self._kinds_of_moves() - {"reorder"}
        if kinds and solution.status is Status.CONVERGED:
            summit = solution.bound
            propose = Proposals(prior, rows, kinds, rng)

            def proposals(state: State) -> Iterator[State]:
                try:
                    yield from propose(state)
                except torch.linalg.LinAlgError:
                    return  # what cannot be predicted is not tried

            def climb_on(state: State, tol: float, if_it_fails: Status) -> Solution[State]:
                n_kept = monitor.n_iter
                try:
                    higher = ascend_from(state, tol)
                except torch.linalg.LinAlgError:
                    del monitor.history[n_kept:]  # the state they belonged to is lost
                    return Solution(state, monitor.history, if_it_fails)
                # What was reached before the bound left the finite numbers stays.
                failed = higher.status is Status.NON_FINITE
                return higher._replace(status=if_it_fails) if failed else higher

            solution = search(
                solution,
                proposals,
                attempt,
                lambda state: climb_on(state, max(self.tol, _ROUGH_TOL), Status.CONVERGED),
                max_iter=self.max_iter,
                monitor=monitor,
            )
            if solution.bound > summit:
                if monitor.n_iter < self.max_iter:
                    solution = climb_on(solution.state, self.tol, Status.MAX_ITER)
                elif self.tol < _ROUGH_TOL:
                    solution = solution._replace(status=Status.MAX_ITER)
        if solution.status is Status.NON_FINITE:
            raise ValueError(_EXTREME)
        return solution

    def _kinds_of_moves(self) -> frozenset[str]:
        """Return the moves to make."""
        if self.moves is None:
            return frozenset()
        wanted = MOVES if isinstance(self.moves, str) else tuple(self.moves)
        unknown = [kind for kind in wanted if kind not in MOVES]
        if unknown:
            raise ValueError(
                f'moves={self.moves!r} contains {unknown}; use "auto", None, or some of {MOVES}.'
            )
        kinds = frozenset(wanted)
        if self.algorithm != "svi" or kinds <= {"reorder"}:
            return kinds
        if isinstance(self.moves, str):
            return frozenset({"reorder"})
        raise ValueError(
            f'moves={self.moves!r} cannot be made: steps of algorithm="svi" do not climb to a '
            'summit. Use moves="auto".'
        )

    def _layout(self, n_features: int) -> Literal["rows", "columns"]:
        shape = COMPONENTS[self.covariance_type]
        return active.layout(shape, self.n_components, n_features)

    def _count_batches(self, total: float, n_features: int) -> int:
        return count_batches(
            self.batch_size,
            total,
            COMPONENTS[self.covariance_type],
            self.n_components,
            n_features,
            cached=self.algorithm != "svi",
        )

    def _ascent(
        self, prior: Posterior, rows: Rows, total: float, rng: np.random.Generator
    ) -> Ascent:
        """Return the steps of `algorithm` for rows of weight `total`."""
        shape, K, algorithm = type(prior.components), self.n_components, self.algorithm
        pairs_pay = active.pays(rows, shape, K)
        if algorithm == "auto":
            laps = not pairs_pay and laps_pay(rows, total, shape, K)
            algorithm = "memoized" if laps else "cavi"
        if algorithm == "cavi":
            if pairs_pay:
                # What passes over active components give away stays far below the tolerance.
                negligible = max(1e-3 * self.tol / K, 1e-16)
                return AlternatingAscent(prior, rows, max_iter=self.max_iter, negligible=negligible)
            return CoordinateAscent(prior, rows)
        batches = Batches(rows, self._count_batches(total, rows.n_features), rng)
        if algorithm == "memoized":
            return MemoizedAscent(prior, batches, max_iter=self.max_iter)
        return StochasticAscent(
            prior,
            batches,
            rng,
            offset=float(self.learning_offset),
            decay=float(self.learning_decay),
            max_iter=self.max_iter,
        )

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
        incomplete = isinstance(rows, IncompleteRows)
        seen = np.full(D, 0.0 if incomplete else total)  # weight of each feature's observed cells
        for _, x, weight in rows.blocks(3 * D):
            if isinstance(x, Cells):
                seen += to_numpy(weight @ x.observed.double())
                x = x.x
            if matrix:
                scatter += (weight[:, None] * x).T @ x
            else:
                scatter.diagonal().add_(weight @ x.square())
        # With missing cells this is a Gram matrix of zero-filled rows, scaled: still positive
        # semidefinite. The variances are those of the observed cells; correlations are shrunk by
        # the share of the cells that are observed together.
        divisor = np.sqrt(np.maximum(seen - 1.0, 0.5 * seen))
        fitted = to_numpy(scatter) / np.outer(divisor, divisor)
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
        if law is StickBreaking and "reorder" not in self._kinds_of_moves():
            law = OrderedSticks
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
        posterior, moments = solution.state
        kl = float(posterior.kl(prior))
        share = bound.share(posterior, moments, solution.bound + kl)
        records = (prior.map(to_numpy), posterior.map(to_numpy), share.map(to_numpy))
        self._model = _Model(affine, *records)
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
        parameters = tuple(array.copy() for array in vars(self._model.posterior.weights).values())
        self.weight_concentration_ = parameters[0] if len(parameters) == 1 else parameters
        counts = posterior.weights.counts(prior.weights)
        self.n_active_components_ = int((counts > EMPTY).sum())
        self.elbo_ = solution.bound
        self.kl_ = kl
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
        door = self._door(X, reset=False, ensure_all_finite="allow-nan")
        return self._fitted_rows(door.X, door.device)

    def _fitted_rows(self, X: np.ndarray, device: torch.device) -> Rows:
        """Return validated rows in fitted units."""
        self._check_reach(X, self._model.affine)
        return _make_rows(X, self._model.affine, device, keep="never")

    def _log_scale(self, rows: Rows) -> np.ndarray | float:
        """Return what a log density in fitted units exceeds that in the units of X by."""
        if isinstance(rows, IncompleteRows):
            return rows.log_abs_det()  # (N,), of the observed cells
        return self._model.affine.log_abs_det

    def _fill(
        self,
        out: np.ndarray,
        rows: Rows,
        make: Callable[[Posterior, Posterior], Callable[[Any], torch.Tensor]],
        width: Callable[[Components], int] = bound.floats_per_row,
    ) -> None:
        """Write ``make(posterior, prior)(x)``, (B, D) -> (..., B), into `out` (..., N).

        Block by block: what is in memory besides `out` does not grow with the rows.
        The x are tensors, or `Cells` if `rows` are incomplete.
        """
        posterior, prior = self._model.on(rows.device)
        function = make(posterior, prior)
        for where, x, _ in rows.blocks(width(posterior.components)):
            out[..., where] = function(x).cpu().numpy()

    def _check_reach(self, X: np.ndarray, affine: Affine) -> None:
        blocks = row_slices(len(X), block_rows(X.shape[1], torch.device("cpu")))
        extremes = np.array([(X[rows].min(), X[rows].max()) for rows in blocks], dtype=float)
        with np.errstate(over="ignore"):
            # As a rule no feature has to be looked at by itself, which takes several times longer.
            farthest = np.abs(extremes).max() + np.abs(affine.shift).max()
            if farthest / affine.scale.min() < _LARGEST_FITTED:
                return
            above, below = np.fmax.reduce(X) - affine.shift, affine.shift - np.fmin.reduce(X)
            far = np.maximum(above, below) / affine.scale
        far[np.isnan(far)] = 0.0  # no cell of this feature is observed
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
            (n_samples,). The kl is against ``exp E[log pi]``, which is not normalised. All are
            zero for a row with nothing observed.
        """
        rows = self._rows(X)
        out = np.empty((4, rows.n_rows))
        self._fill(out, rows, lambda q, _: lambda x: torch.stack(bound.elbo_terms(q, x)))
        terms = ElboTerms(*out)
        for part in (terms.reconstruction, terms.energy):
            part -= self._log_scale(rows)
        return terms

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
        rows = self._rows(X)
        local = np.empty(rows.n_rows)
        self._fill(local, rows, lambda q, _: bound.Scores(q, rows.workspace).local_bound)
        local -= self._log_scale(rows)
        return local

    def log_predictive(self, X: Any) -> np.ndarray:
        """Return the log posterior predictive density of each row, in nats.

        A mixture of Student-t densities that integrates to one, never below `score_samples`.
        With missing cells the density of the observed ones, exactly.
        Under a Dirichlet process the mass beyond the truncation goes to the prior predictive.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return self._log_predictive(self._rows(X))

    def _log_predictive(self, rows: Rows) -> np.ndarray:
        density = np.empty(rows.n_rows)
        self._fill(
            density,
            rows,
            lambda posterior, prior: partial(bound.log_predictive, posterior, prior),
            bound.predictive_floats_per_row,
        )
        density -= self._log_scale(rows)
        return density

    def impute(self, X: Any, return_std: bool = False) -> Any:
        r"""Fill missing cells with their mean given the observed cells of the row.

        .. math::
            E[x_m | x_o] = \sum_k w_k \hat x_k, \qquad w_k \propto E[\pi_k]\, t_k(x_o)

        with the Student-t densities of `log_predictive` and the conditional mean
        :math:`\hat x_k` of each component: exactly the mean of the posterior predictive.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            NaN where cells are missing.
        return_std : bool, default=False
            Whether to return how uncertain each cell is.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            A copy; observed cells are as they were.
        std : ndarray of shape (n_samples, n_features)
            Only with `return_std`: standard deviations given the observed cells, zero for
            observed ones. By the law of total variance over the components, each with the
            variance under its expected precision ``precisions_``; a component without rows
            would have no variance if its precision were integrated out.
        """
        check_is_fitted(self)
        door = self._door(X, reset=False, ensure_all_finite="allow-nan")
        filled, std = self._filled(door.X, door.device)
        return (filled, std) if return_std else filled

    def condition(self, X: Any, targets: Any, return_std: bool = False) -> Any:
        """Return the mean of some features given the others: mixture regression.

        That of :meth:`impute` with the cells of the targets taken as missing. Other cells of X
        may be missing as well.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, n_features - n_targets)
            All features, of which the targets are not looked at; or all but the targets, in
            the order of fit. A frame that lacks target columns is of the second kind.
        targets : int, str or list of these
            Positions or names of the features to predict.
        return_std : bool, default=False
            Whether to return standard deviations, as by :meth:`impute`.

        Returns
        -------
        mean : ndarray of shape (n_samples, n_targets)
        std : ndarray of shape (n_samples, n_targets)
            Only with `return_std`.

        Raises
        ------
        ValueError
            For targets that are unknown, repeated, none or all of the features.

        See Also
        --------
        log_conditional : The predictive density that this is the mean of.

        Examples
        --------
        >>> import numpy as np
        >>> from skvi import VariationalGMM
        >>> x = np.linspace(-3, 3, 200)
        >>> gmm = VariationalGMM(n_components=8, random_state=0).fit(np.column_stack([x, x**2]))
        >>> mean = gmm.condition([[-2.0], [0.0], [2.0]], targets=1)
        >>> bool(abs(mean[:, 0] - [4, 0, 4]).max() < 0.5)
        True
        """
        check_is_fitted(self)
        index = self._targets(targets)
        filled, std = self._filled(*self._masked(X, index))
        return (filled[:, index], std[:, index]) if return_std else filled[:, index]

    def log_conditional(self, X: Any, targets: Any) -> np.ndarray:
        """Return the log predictive density of some features given the others, in nats.

        ``log p(x) - log p(x without the targets)`` under the posterior predictive: a mixture of
        Student-t densities of the targets that integrates to one.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The targets are looked at here; missing ones are integrated out.
        targets : int, str or list of these
            Positions or names of the features that the density is of.

        Returns
        -------
        ndarray of shape (n_samples,)

        Raises
        ------
        ValueError
            For targets that are unknown, repeated, none or all of the features.
        """
        check_is_fitted(self)
        index = self._targets(targets)
        door = self._door(X, reset=False, ensure_all_finite="allow-nan")
        given = door.X.copy()
        given[:, index] = np.nan
        whole, rest = (
            self._log_predictive(self._fitted_rows(x, door.device)) for x in (door.X, given)
        )
        return whole - rest

    def _filled(self, X: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Return X without holes, and the standard deviation of each cell."""
        affine = self._model.affine
        missing = np.isnan(X)
        some = missing.any(axis=1)
        filled, std = X.copy(), np.zeros_like(X)
        if some.any():
            rows = self._fitted_rows(X[some], device)
            mean, var = moments = np.empty((2, rows.n_rows, rows.n_features))  # (M, D) each
            self._fill(
                moments.swapaxes(1, 2),
                rows,
                lambda q, prior: lambda x: torch.stack(bound.conditional(q, prior, x)).mT,
                bound.conditional_floats_per_row,
            )
            filled[missing] = (affine.shift + affine.scale * mean)[missing[some]]
            std[missing] = (affine.scale * np.sqrt(var))[missing[some]]
        return filled, std

    def _targets(self, targets: Any) -> np.ndarray:
        """Return the positions of features given by position or name."""
        D = self.n_features_in_
        names = list(getattr(self, "feature_names_in_", []))
        single = isinstance(targets, str) or not np.iterable(targets)
        wanted = [targets] if single else list(targets)
        index = []
        for target in wanted:
            if isinstance(target, str) and target in names:
                index.append(names.index(target))
            elif isinstance(target, Integral) and not isinstance(target, bool) and -D <= target < D:
                index.append(int(target) % D)
            else:
                raise ValueError(
                    f"targets={targets!r}: {target!r} is neither the position of one of the {D} "
                    f"features nor one of their names, {names or 'of which fit saw none'}."
                )
        if not 0 < len(set(index)) == len(index) < D:
            raise ValueError(
                f"targets={targets!r} must name some of the {D} features, each once, and leave "
                "at least one to condition on."
            )
        return np.array(index)

    def _masked(self, X: Any, index: np.ndarray) -> tuple[np.ndarray, torch.device]:
        """Return rows of all features with NaN for those of `index`, and the device."""
        D = self.n_features_in_
        others = np.setdiff1d(np.arange(D), index)
        X = X if hasattr(X, "shape") else np.asarray(X)
        if len(X.shape) != 2 or X.shape[1] != others.size:
            door = self._door(X, reset=False, ensure_all_finite="allow-nan")
            full = door.X.copy()
            full[:, index] = np.nan
            return full, door.device
        device = resolve_device(self.device, X)
        names, known = get_feature_names(X), getattr(self, "feature_names_in_", None)
        if names is not None and known is not None and list(names) != list(known[others]):
            raise ValueError(
                f"X has the features {list(names)}; all features of fit, or all but the targets "
                f"in their order, {list(known[others])}, were expected."
            )
        given = check_array(
            to_host(X),
            dtype=[np.float64, np.float32],
            ensure_all_finite="allow-nan",
            input_name="X",
        )
        full = np.full((len(given), D), np.nan, dtype=given.dtype)
        full[:, others] = given
        return full, device

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

        Those of a row with nothing observed are ``weights_``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            In the dtype of X (float64 or float32).
        """
        rows = self._rows(X)
        resp = np.empty((rows.n_rows, self._n_features_out), dtype=rows.dtype)
        self._fill(resp.T, rows, lambda q, _: bound.Scores(q, rows.workspace).responsibilities)
        return resp

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the responsibilities of each row, as `transform` does."""
        return self.transform(X)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable component of each row.

        Of components that are equal but for rounding, as empty ones may be, it is the first.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), int64
        """
        rows = self._rows(X)
        labels = np.empty(rows.n_rows, dtype=np.int64)
        self._fill(labels, rows, lambda q, _: bound.Scores(q, rows.workspace).labels)
        return labels

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
        prior, posterior = self._model.prior, self._model.posterior
        x, labels = bound.sample(posterior, prior, n_samples, make_rng(seed))
        return self._model.affine.shift + self._model.affine.scale * x, labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.input_tags.allow_nan = True
        return tags


def _make_rows(
    X: np.ndarray,
    affine: Affine,
    device: torch.device,
    weight: np.ndarray | None = None,
    *,
    keep: Keep = None,
) -> Rows:
    """Return rows of the kind that X needs."""
    kind = IncompleteRows if has_missing(X) else Rows
    return kind(X, affine, device, weight, keep=keep)


def _change_of_units(rows: Rows, weight: np.ndarray, affine: Affine) -> float:
    """Return what the bound of weighted rows in fitted units exceeds that in the units of X by."""
    if isinstance(rows, IncompleteRows):
        return float(weight @ rows.log_abs_det())
    return float(weight.sum()) * affine.log_abs_det


def _check_observed(X: np.ndarray) -> None:
    """Raise if nothing is observed of a feature."""
    unseen = np.flatnonzero(np.isnan(np.fmax.reduce(X)))
    if unseen.size:
        raise ValueError(
            f"Features {unseen.tolist()} of X have no observed value in the rows of positive "
            "weight. Drop them, or fit on rows that have some."
        )


def _without_empty(X: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the rows with nothing observed."""
    kept = ~np.isnan(X).all(axis=1)
    return (X, weight) if kept.all() else (X[kept], weight[kept])


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
