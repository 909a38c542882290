"""Bayesian linear regression with the noise, the weights and their precisions learnt jointly."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from scipy import sparse
from sklearn.base import RegressorMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from skvi.estimators._base import (
    Door,
    VariationalEstimator,
    as_arrays,
    as_tensors,
    check_count,
    check_reach,
    to_host,
    to_numpy,
    weighted_mean,
    without_weightless,
)
from skvi.estimators._compat import Interval, StrOptions, check_feature_names_in, fit_context
from skvi.estimators._precisions import (
    HYPERPARAMETER,
    fitted_units,
    group_of_features,
    prior_of_precisions,
    scale_of_groups,
)
from skvi.inference.loop import Solution, climb
from skvi.inference.monitor import Monitor, Status
from skvi.models.linear import evidence, predictive, robust, stream
from skvi.models.linear.climb import (
    Prior,
    State,
    evaluate,
    improve,
    noise_shape,
    start,
)
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.predictive import Posterior
from skvi.models.linear.reduction import (
    Statistics,
    collect,
    is_safe,
    provisional_mean,
    reduce_rows,
    reduce_to_units,
)
from skvi.models.linear.robust import Data, RobustState
from skvi.models.linear.sparse import SparseRows, canonical, reduce_sparse_rows, sparse_moments
from skvi.models.linear.weights import covariance, variances
from skvi.models.terms import ElboTerms
from skvi.runtime.blocks import Affine, Keep, Rows, block_rows, row_slices
from skvi.runtime.moments import weighted_moments
from skvi.runtime.random import draw_seed, make_rng

_CANNOT_CONTINUE = (
    "warm_start=True cannot continue the previous fit: prior, the number of outputs, of features "
    "or of groups has changed. Set warm_start=False, or fit a clone."
)
# The rows in fitted units; these units and the spreads in them, of X and of y.
Reduced = tuple[Statistics, tuple[Affine, np.ndarray], tuple[Affine, np.ndarray]]


class _Model(NamedTuple):
    """What a fit found, in fitted units ``(x - shift) / scale``; NumPy arrays only.

    Attributes
    ----------
    kind : str
        The `prior` parameter it was fitted with.
    single : bool
        Whether y was one-dimensional.
    x, y : Affine
    alpha : ndarray of shape (M, H)
        E[alpha] in the units of the data.
    scale : ndarray of shape (M,)
        What `State.scale` is.
    posterior : Posterior
    prior : Prior
    statistics : Statistics
        Of all rows seen: for the exact evidence and for `partial_fit`.
    """

    kind: str
    single: bool
    x: Affine
    y: Affine
    alpha: np.ndarray
    scale: np.ndarray
    posterior: Posterior
    prior: Prior
    statistics: Statistics


def _takes_streams(estimator: "BayesianLinearVI") -> bool:
    if estimator.noise == "student_t":
        raise AttributeError(
            'partial_fit is for noise="gaussian": the climb of noise="student_t" reads all rows in '
            "every pass; fit on all rows."
        )
    return True


class BayesianLinearVI(RegressorMixin, TransformerMixin, VariationalEstimator):
    r"""Bayesian linear regression by variational inference.

    The model, for each output and with prior precisions relative to the noise:

    .. math::
        y_i \sim N(x_i'w + b, \beta^{-1}), \quad w_j \sim N(0, (\beta \alpha_j)^{-1}), \quad
        \beta \sim \mathrm{Gam}(a_0, b_0), \quad \alpha_j \sim \mathrm{Gam}(c_0, d_0), \quad
        p(b) = 1

    The posterior :math:`q(w, b, \beta)\, q(\alpha)` keeps w, b and beta together, so that
    predictions are Student-t, and with known precisions the bound *is* the log evidence.
    The defaults know no units: multiplying X or y by a constant multiplies the answer accordingly.

    With ``noise="student_t"`` each row has a noise precision of its own, so that outliers count
    little:

    .. math::
        y_i \sim N(x_i'w + b, (u_i \beta)^{-1}), \quad
        u_i \sim \mathrm{Gam}(\nu/2, \nu/2), \quad
        q(w, b, \beta)\, q(\alpha) \textstyle\prod_i q(u_i)

    Its bound is exact, too, but has no evidence to compare with; the climb reads the rows in
    every pass.

    Parameters
    ----------
    prior : {"ridge", "ard", "horseshoe", "fixed", "flat"}, default="ridge"
        One learnt weight precision for all features (or for each of the `groups`); one for each
        feature (automatic relevance determination: useless features are shrunk away); the
        horseshoe, half-Cauchy scales of each weight and of all, which shrinks noise and leaves
        strong signals alone; one given number; or no shrinkage, ``p(w) = 1``: least squares with
        its classical Student-t posterior, which needs linearly independent columns.
    groups : array-like of shape (n_features,), default=None
        Labels for ``prior="ridge"``: features with the same label share a precision. None is one
        group of all. An error with another prior.
    weight_precision : float, default=1.0
        The alpha of ``prior="fixed"``, in the units of X squared; ignored otherwise.
    noise : {"gaussian", "student_t"}, default="gaussian"
        The law of the noise. "student_t" is for data with outliers in y. It takes one output,
        dense X, every prior but "flat", and no :meth:`partial_fit`.
    noise_dof : float or None, default=4.0
        nu, the degrees of freedom of ``noise="student_t"``; ignored otherwise. None is a point
        estimate: in every pass the nu with the highest bound between 1 and 1e6, without a prior.
    noise_shape : float, default=1e-3
        a0: half the number of rows that the prior of the noise precision is worth.
    noise_rate : float, default=1e-9
        b0 in units of the variance of y (its mean square without an intercept; the square of its
        mean where y is constant).
    weight_shape : float, default=0.5
        c0 of the learnt weight precisions.
    weight_rate : float, default=1e-3
        d0 in units of one over the variance of the feature ("ard") or over the mean variance of
        the features of the group ("ridge"), with the same conventions as `noise_rate`. With the
        default shape a weight's prior is a Cauchy law of half-width ``sqrt(2 weight_rate)``, in
        noise standard deviations per standard deviation of the feature: heavy tails, a sharp
        peak.
        Much smaller shapes make "ard" explain every row when features outnumber rows.
    global_scale : float, default=1.0
        tau0 of ``prior="horseshoe"``: half-width of the half-Cauchy law of the scale that all
        weights share, in noise standard deviations per standard deviation of the feature. With p0
        of p features expected to matter, ``p0 / (p - p0) / sqrt(n)`` is the customary choice
        (Piironen and Vehtari 2017, arXiv:1707.01694).
    fit_intercept : bool, default=True
        Add an intercept with a flat prior, integrated exactly.
    max_iter : int, default=1000
        Limit of the passes; a pass does not touch the rows with Gaussian noise.
    tol : float, default=1e-10
        The fit has converged when a pass raises the bound by less than `tol` nats per row (per
        unit of total weight).
    device : str or torch.device, default="auto"
        "auto": the device of X if it is a tensor, else CUDA if there is one, else the CPU. An
        explicit device that is missing is an error.
    warm_start : bool, default=False
        Continue from the weight precisions of the previous fit.
    verbose : int, default=0
        1 prints the bound every tenth pass and at convergence, 2 every pass.

    Attributes
    ----------
    coef_ : ndarray of shape (n_features,) or (n_outputs, n_features)
        Posterior mean of w.
    intercept_ : float or ndarray of shape (n_outputs,)
        Posterior mean of b; 0 without an intercept.
    coef_cov_ : ndarray of shape (n_features, n_features) or (n_outputs, n_features, n_features)
        Posterior covariance of w, ``V b / (a - 1)``; built when asked for. With a <= 1 there is
        no such attribute.
    coef_std_ : ndarray, shape of `coef_`
        Posterior standard deviations of w; infinite with a <= 1.
    coef_snr_ : ndarray, shape of `coef_`
        ``|coef_| / coef_std_``: importance for :class:`sklearn.feature_selection.SelectFromModel`.
    relevance_ : ndarray, shape of `coef_`
        ``1 - E[alpha_j] V_jj``, in [0, 1]: how much of what is known about a weight comes from
        the rows (1) and not from its prior (0). The sum is the effective number of weights.
    relevance_path_ : ndarray of shape (n_iter_, n_precisions) or (n_iter_, n_outputs, n_precisions)
        How many weights of those that share a precision the rows determine, after each pass: with
        "ard" and "horseshoe" the relevance of each feature, so that it shows which features fade
        and when; with "ridge" the effective number of weights, of each group in the order of the
        sorted labels. The last pass adds up to what `relevance_` does.
    noise_precision_ : float or ndarray of shape (n_outputs,)
        E[beta]. With Student-t noise ``beta**-0.5`` is the scale of that law.
    noise_dof_ : float
        nu: as given or estimated; infinite with Gaussian noise.
    weight_precision_ : float, ndarray of shape (n_features,), or with n_outputs in front
        E[alpha]; the prior precision of a weight is ``beta alpha``. One number an output for
        "ridge" without groups, "fixed" and "flat" (0), else one for each feature.
    elbo_ : float
        The bound on ``log p(y | X)`` in nats, summed over outputs:
        ``sum_n s_n score_samples(X, y)[n] - kl_``.
    kl_ : float
        ``KL(q(w, b, beta, alpha) || p)`` in nats, summed over outputs. The flat intercept counts
        with density 1 in the units of y, so its share, minus the entropy of q(b | w, beta), may
        be negative and depends on those units. So do flat weights.
    elbo_history_ : list of float
        The bound after each pass; the last entry is ``elbo_``.
    log_evidence_ : float
        The exact ``log p(y | X)`` in nats, summed over outputs: ``log_evidence_ - elbo_`` is the
        gap of the bound. By quadrature over alpha for "ridge", equal to the bound for "fixed" and
        "flat"; there is no such attribute for "ard", "horseshoe", with several groups and with
        Student-t noise. With
        flat weights it is a log evidence up to the constant of that improper prior: it compares
        noise priors, but not sets of features.
    evidence_gap_ : float
        ``log_evidence_ - elbo_``, never negative beyond rounding: the Kullback-Leibler divergence
        of the approximate from the exact posterior, in nats. Exists where `log_evidence_` does.
    n_samples_seen_ : float
        Sum of the sample weights of all rows of the last `fit` and of `partial_fit` since.
    n_iter_ : int
        Number of passes.
    converged_ : bool
        Whether the fit reached `tol`.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only if X had feature names that are all strings.

    See Also
    --------
    sklearn.linear_model.BayesianRidge : Type-II maximum likelihood for "ridge".
    sklearn.linear_model.ARDRegression : Type-II maximum likelihood for "ard".

    Notes
    -----
    ``score`` is the mean evidence lower bound of the rows, not R^2: see :meth:`r2_score`.

    "ridge" and "fixed" shrink all features alike, so features should have comparable spreads: one
    whose spread is below about 1e-7 of the largest is taken as constant. The other priors have
    no such need, and with `groups` it is one inside each group. Hyper-parameters without units
    lie between 1e-100 and 1e100.

    References
    ----------
    Drugowitsch (2013), Variational Bayesian inference for linear and logistic regression,
    arXiv:1310.5438. Bishop (2006), Pattern Recognition and Machine Learning, section
    10.3. Tipping and Lawrence (2005), Variational inference for Student-t models:
    ``noise="student_t"``.

    Examples
    --------
    >>> import numpy as np
    >>> from skvi import BayesianLinearVI
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(50, 3))
    >>> y = 2.0 * X[:, 0] - X[:, 1] + 3.0 + 0.1 * rng.normal(size=50)
    >>> model = BayesianLinearVI(prior="ard").fit(X, y)
    >>> model.coef_.round(1).tolist()[:2], round(float(model.intercept_), 1)
    ([2.0, -1.0], 3.0)
    >>> mean, std = model.predict(X[:2], return_std=True)
    >>> bool(abs(model.elbo_ - (model.score_samples(X, y).sum() - model.kl_)) < 1e-9)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "prior": [StrOptions({"ridge", "ard", "horseshoe", "fixed", "flat"})],
        "groups": ["array-like", None],
        "weight_precision": [Interval(Real, 0.0, None, closed="neither")],
        "noise": [StrOptions({"gaussian", "student_t"})],
        "noise_dof": [HYPERPARAMETER, None],
        "noise_shape": [HYPERPARAMETER],
        "noise_rate": [HYPERPARAMETER],
        "weight_shape": [HYPERPARAMETER],
        "weight_rate": [HYPERPARAMETER],
        "global_scale": [HYPERPARAMETER],
        "fit_intercept": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "device": [str, torch.device],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        *,
        prior: str = "ridge",
        groups: Any = None,
        weight_precision: float = 1.0,
        noise: str = "gaussian",
        noise_dof: float | None = 4.0,
        noise_shape: float = 1e-3,
        noise_rate: float = 1e-9,
        weight_shape: float = 0.5,
        weight_rate: float = 1e-3,
        global_scale: float = 1.0,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-10,
        device: str | torch.device = "auto",
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.prior = prior
        self.groups = groups
        self.weight_precision = weight_precision
        self.noise = noise
        self.noise_dof = noise_dof
        self.noise_shape = noise_shape
        self.noise_rate = noise_rate
        self.weight_shape = weight_shape
        self.weight_rate = weight_rate
        self.global_scale = global_scale
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.warm_start = warm_start
        self.verbose = verbose

    # -- fitting ----------------------------------------------------------------------------------

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Maximise the bound on ``log p(y | X)``.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            Finite numbers, float64 or float32; statistics are accumulated in float64. Sparse rows
            (CSR; other formats are converted) are never made dense as a whole if they outnumber
            the features; predictions and scores take them as well, block by block.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Each output has its own noise and weights.
        sample_weight : array-like of shape (n_samples,), default=None
            How often each row counts: an integer weight equals that many repeated rows, zero
            equals removal.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For invalid parameters or data; for weights that sum to less than the one row that
            the intercept takes; for data whose answer leaves the range of float64; for a
            `warm_start` from a fit of another prior, shape or other feature names; for columns
            that are linearly dependent with ``prior="flat"``; for several outputs, sparse X or
            ``prior="flat"`` with ``noise="student_t"``.
        """
        if self.noise == "student_t":
            self._fit_robust(X, y, sample_weight)
            self._warn_unless_converged()
            return self
        with self._all_or_nothing():
            # The products of the rows tell whether all values are finite and in range. Weights
            # could hide some, and sparse rows are cheaper to look at than to multiply.
            look_first = sample_weight is not None or sparse.issparse(X)
            door = self._fit_door(X, y, target=True, check_values=look_first)
            rows, outputs, weight = self._seen_rows(door, sample_weight)
            group = self._group(rows.shape[1])
            reduced = self._reduce_in_one_pass(rows, outputs, weight, group, door.device)
            if reduced is None:
                if not look_first:
                    door = self._fit_door(X, y, target=True)
                reduced = self._reduce(rows, outputs, weight, group, door.device)
            statistics, (x, spread_x), (y, spread_y) = reduced
            self._fit(door, statistics, self._hyperparameters(spread_x, spread_y, group), x, y)
        self._warn_unless_converged()
        return self

    def _fit_robust(self, X: Any, y: Any, sample_weight: Any) -> None:
        if self.prior == "flat":
            raise ValueError(
                'noise="student_t" needs a proper prior of the weights: rows of little precision '
                'could leave flat weights without a posterior. Use prior="ridge" or "fixed" '
                'instead of prior="flat".'
            )
        shape: tuple[int, ...] = getattr(y, "shape", ())
        if len(shape) == 2 and shape[1] > 1:
            raise ValueError(
                f'noise="student_t" takes one output, but y has {shape[1]}: each would have '
                "precisions of the rows of its own. Fit one model each, for example with "
                "sklearn.multioutput.MultiOutputRegressor."
            )
        if sparse.issparse(X):
            raise ValueError(
                'noise="student_t" does not take sparse X in fit, because the rows are read in '
                "every pass; pass X.toarray() if it fits into memory."
            )
        with self._all_or_nothing():
            door = self._fit_door(X, y, target=True, multi_output=False)
            rows, outputs, weight = self._seen_rows(door, sample_weight)
            group = self._group(rows.shape[1])
            x, spread_x = self._units(*weighted_moments(rows, weight), group)
            y_units, spread_y = self._units(*weighted_moments(outputs, weight), np.arange(1))
            data = Data(
                x=Rows(rows, x, door.device, weight, keep="rows"),
                y=Rows(outputs, y_units, door.device, weight, keep="rows"),
                weight=torch.as_tensor(weight, device=door.device),
                intercept=self.fit_intercept,
            )
            prior = self._hyperparameters(spread_x, spread_y, group)
            precision = torch.ones_like(data.weight)
            if self._continues():
                precision = self._precision_before(rows, outputs, door.device)
            statistics = robust.reweigh(data, precision)
            self._fit(door, statistics, prior, x, y_units, data)

    def _precision_before(self, X: np.ndarray, outputs: np.ndarray, device: torch.device) -> Tensor:
        """Return E[u] of rows under the previous fit."""
        model = self._model
        if (len(model.x.scale), len(model.y.scale)) != (X.shape[1], 1):
            raise ValueError(_CANNOT_CONTINUE)
        if model.posterior.noise_dof is None:
            return torch.ones(len(X), dtype=torch.float64, device=device)

        def precision(q: Posterior, x: Tensor, y: Tensor) -> Tensor:
            shape, rate = predictive.row_precision(q, x, y)
            return shape / rate

        y = Rows(outputs, model.y, device)
        values = self._per_row(Door(X, None, device), precision, y=y)
        return torch.as_tensor(values[:, 0], device=device)

    @available_if(_takes_streams)
    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Add rows to those seen before, and maximise the bound for all of them.

        Exact: any split of the rows into any number of blocks in any order gives the posterior of
        one :meth:`fit` on all rows, up to rounding. What is kept of the rows seen is their number,
        their means and a root of their scatter matrix; memory O(block + D^2) and a decomposition
        of D^3 operations each call, so blocks should have more rows than features. The units of
        the priors, var(y) and var(x), are those of all rows so far. Continues after `fit` as well.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Of the same form in each call.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in :meth:`fit`, on all rows so far: ``prior="flat"`` needs a first block with full
            column rank. If the number of features or outputs, or `fit_intercept`, has changed.
            The estimator then stays as it was before the call. After a fit with
            ``noise="student_t"``, which keeps no summary of its rows.

        Notes
        -----
        There is no such method with ``noise="student_t"``.
        """
        self._validate_params()  # scikit-learn looks at those of the first call only
        if self._is_robust():
            raise ValueError(
                'partial_fit cannot continue a fit with noise="student_t", which keeps no summary '
                "of its rows. Fit a clone."
            )
        with self._all_or_nothing():
            model: _Model | None = getattr(self, "_model", None)
            door = self._door(X, y, reset=model is None, target=True)
            X, outputs, weight = self._seen_rows(door, sample_weight)
            if model is not None:
                self._check_continues(model, door, outputs)
            summary = self._merge(model, X, outputs, weight, door.device)
            mean = to_numpy(summary.origin + summary.mean)
            std = to_numpy(stream.spread(summary))
            n_features, group = X.shape[1], self._group(X.shape[1])
            own = np.arange(outputs.shape[1])
            x, spread_x = self._units(mean[:n_features], std[:n_features], group)
            y, spread_y = self._units(mean[n_features:], std[n_features:], own)
            statistics = stream.reduce_summary(summary, x, y, intercept=self.fit_intercept)
            self._fit(door, statistics, self._hyperparameters(spread_x, spread_y, group), x, y)
        self._warn_unless_converged()
        return self

    def _seen_rows(
        self, door: Door, sample_weight: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return X, outputs (N, M) and weights of the rows whose weight is not zero."""
        assert door.y is not None  # the door was opened with target=True
        weight = self._weights(sample_weight, door.X)
        outputs = door.y.reshape(len(door.y), -1)
        X, outputs, weight = without_weightless(weight, door.X, outputs)
        return X, outputs, weight

    def _reduce(
        self,
        X: Any,
        outputs: np.ndarray,
        weight: np.ndarray,
        group: np.ndarray,
        device: torch.device,
    ) -> Reduced:
        """Find the units first, then reduce the rows in these units: for any rows."""
        moments = sparse_moments if sparse.issparse(X) else weighted_moments
        x, spread_x = self._units(*moments(X, weight), group)
        y, spread_y = self._units(*weighted_moments(outputs, weight), np.arange(outputs.shape[1]))
        rows, targets = _rows(X, x, device, weight), Rows(outputs, y, device, weight)
        if isinstance(rows, SparseRows):
            statistics = reduce_sparse_rows(rows, targets, intercept=self.fit_intercept)
        else:
            statistics = reduce_rows(rows, targets, intercept=self.fit_intercept)
        return statistics, (x, spread_x), (y, spread_y)

    def _reduce_in_one_pass(
        self,
        X: Any,
        outputs: np.ndarray,
        weight: np.ndarray,
        group: np.ndarray,
        device: torch.device,
    ) -> Reduced | None:
        """Read the units off what one pass over the rows has found, and change to them.

        None where that would cost digits, and for sparse rows.
        """
        if sparse.issparse(X):
            return None
        n_features = X.shape[1]
        shift_x, shift_y = np.zeros(n_features), np.zeros(outputs.shape[1])
        if self.fit_intercept:
            with np.errstate(invalid="ignore", over="ignore"):  # X has not been looked at
                shift_x, shift_y = provisional_mean(X), provisional_mean(outputs)
        rows = Rows(X, Affine(shift_x, np.ones_like(shift_x)), device, weight)
        targets = Rows(outputs, Affine(shift_y, np.ones_like(shift_y)), device, weight)
        found = collect(rows, targets, intercept=self.fit_intercept)
        if not is_safe(found):
            return None
        mean, std = to_numpy(found.mean), to_numpy((found.squares / found.total).sqrt())
        x, spread_x = self._units(shift_x + mean[:n_features], std[:n_features], group)
        own = np.arange(outputs.shape[1])
        y, spread_y = self._units(shift_y + mean[n_features:], std[n_features:], own)
        shift = np.concatenate([x.shift - shift_x, y.shift - shift_y])
        scale = np.concatenate([x.scale, y.scale])
        statistics = reduce_to_units(
            found,
            rows,
            targets,
            shift=torch.as_tensor(shift, device=device),
            scale=torch.as_tensor(scale, device=device),
        )
        return statistics, (x, spread_x), (y, spread_y)

    def _check_continues(self, model: _Model, door: Door, outputs: np.ndarray) -> None:
        assert door.y is not None
        if (outputs.shape[1], door.y.ndim == 1) != (len(model.y.scale), model.single):
            raise ValueError(
                f"y has {outputs.shape[1]} output(s) and {door.y.ndim} dimension(s), unlike the y "
                f"of the rows seen before, which had {len(model.y.scale)} output(s); pass a y of "
                "the same form, or fit a clone."
            )
        if model.statistics.intercept != self.fit_intercept:
            raise ValueError(
                "fit_intercept has changed since the rows seen before were summarised; partial_fit "
                "cannot continue with another one. Fit a clone."
            )

    def _merge(
        self,
        model: _Model | None,
        X: np.ndarray,
        outputs: np.ndarray,
        weight: np.ndarray,
        device: torch.device,
    ) -> stream.Summary:
        """Summarise the rows, and those of `model` if there is one."""
        seen = None
        # The first row, or later the mean: a constant column keeps a spread of exactly zero.
        zero = Affine(np.zeros(X.shape[1]), np.ones(X.shape[1]))
        origin_x = _rows(X[:1], zero, torch.device("cpu"))[slice(0, 1)][0][0].numpy()
        origin_y = outputs[0]
        if not self.fit_intercept:
            origin_x, origin_y = np.zeros_like(origin_x), np.zeros_like(origin_y)
        elif model is not None:
            origin_x, origin_y = model.x.shift, model.y.shift
        if model is not None:
            statistics = as_tensors(model.statistics, device)
            seen = stream.restore_summary(statistics, model.x, model.y)
        block = stream.summarise(
            _rows(X, Affine(origin_x, np.ones_like(origin_x)), device, weight),
            Rows(outputs, Affine(origin_y, np.ones_like(origin_y)), device, weight),
            torch.as_tensor(np.concatenate([origin_x, origin_y]), device=device),
            intercept=self.fit_intercept,
        )
        return block if seen is None else stream.merge(seen, block)

    def _fit(
        self,
        door: Door,
        statistics: Statistics,
        prior: Prior,
        x: Affine,
        y: Affine,
        data: Data | None = None,
    ) -> None:
        """Climb and set the fitted attributes; `data` are the rows for Student-t noise."""
        prior, group = as_tensors(prior, door.device), self._group(len(x.scale))
        n_features, rank = statistics.basis.shape
        if prior.n_flat and rank < n_features:
            raise ValueError(
                f'prior="flat" needs linearly independent columns, but the rows (the last call has '
                f"n_samples={door.X.shape[0]}) have {n_features} columns of rank {rank}. Remove "
                'columns, add rows, or use prior="ridge".'
            )
        if noise_shape(statistics, prior) <= 0.0:
            raise ValueError(
                f"The sample weights sum to {statistics.n_rows:g}, but the coefficients without a "
                f"proper prior take {self.fit_intercept + prior.n_flat} row(s): the noise has no "
                "posterior. Weights count how often a row was seen; rescale them, or set "
                "fit_intercept=False or a larger noise_shape."
            )
        # alpha has the units of x squared
        scale_x = scale_of_groups(x, group)
        assert door.y is not None
        with np.errstate(over="ignore", under="ignore"):
            first = self._start(statistics, prior, scale_x)
            if data is None:
                solution, path = self._climb(statistics, prior, x, y, first)
                self._publish(door, statistics, prior, x, y, solution)
            else:
                found, path = self._climb_robust(data, statistics, prior, y, first)
                top = found.state
                solution = Solution(top.linear, found.history, found.status)
                self._publish(door, top.statistics, prior, x, y, solution, top.dof)
            self.relevance_path_ = path[:, 0] if door.y.ndim == 1 else path

    def _group(self, n_features: int) -> np.ndarray:
        """Return which of the precisions 0, ..., H - 1 each feature has, shape (D,)."""
        return group_of_features(self.prior, self.groups, n_features)

    def _units(
        self, mean: np.ndarray, std: np.ndarray, group: np.ndarray
    ) -> tuple[Affine, np.ndarray]:
        """Return the fitted units of the columns and their spread in these units."""
        return fitted_units(mean, std, group, intercept=self.fit_intercept)

    def _hyperparameters(
        self,
        spread_x: np.ndarray,
        spread_y: np.ndarray,
        group: np.ndarray,
    ) -> Prior:
        noise_rate = torch.from_numpy(self.noise_rate * spread_y**2)
        weight = prior_of_precisions(
            self.prior,
            spread_x,
            group,
            weight_shape=self.weight_shape,
            weight_rate=self.weight_rate,
            global_scale=self.global_scale,
        )
        n_flat = len(group) if self.prior == "flat" else 0
        return Prior(float(self.noise_shape), noise_rate, weight, n_flat)

    def _start(self, statistics: Statistics, prior: Prior, scale_x: np.ndarray) -> State:
        """Return the first state, from E[alpha] in fitted units, shape (M, H)."""
        n_outputs = statistics.target.shape[0]
        shape = (n_outputs, len(scale_x))
        device = statistics.target.device
        if self.prior == "flat":
            alpha = torch.zeros(n_outputs, 1, dtype=torch.float64, device=device)
            return evaluate(statistics, prior, alpha)
        if self.prior == "fixed":
            known = np.full(shape, self.weight_precision) / scale_x / scale_x
            return evaluate(statistics, prior, torch.as_tensor(known, device=device))
        if not self._continues():
            alpha = start(statistics, prior)
            if isinstance(prior.weight, HorseshoePrior):
                scale = alpha[:, 0] / prior.weight.unit.mean()
                return evaluate(statistics, prior, scale[:, None] * prior.weight.unit, scale)
            return evaluate(statistics, prior, alpha.expand(shape).contiguous())
        model = self._model
        n_features = statistics.basis.shape[0]
        before = (model.kind, *model.posterior.factor.mean.shape, *model.alpha.shape)
        if before != (self.prior, n_outputs, n_features, *shape):
            raise ValueError(_CANNOT_CONTINUE)
        alpha = torch.as_tensor(model.alpha / scale_x / scale_x, device=device)
        return evaluate(statistics, prior, alpha, torch.as_tensor(model.scale, device=device))

    def _climb(
        self, statistics: Statistics, prior: Prior, x: Affine, y: Affine, first: State
    ) -> tuple[Solution[State], np.ndarray]:
        """Return what the climb found, and the relevance after each pass, (n_iter, M, H)."""
        # densities of y, and of flat coefficients, in their own units
        log_units = _log_units_of_flat(prior, x, y) - statistics.n_observed * y.log_abs_det
        monitor = Monitor(
            self.tol, scale=statistics.total, verbose=self.verbose, name="BayesianLinearVI"
        )
        smallest_rise = self.tol * statistics.total / len(first.alpha)
        path: list[np.ndarray] = []

        def step(state: State) -> tuple[State, float]:
            if prior.weight is not None:
                state = improve(statistics, prior, state, smallest_rise)
            path.append(to_numpy(state.weights.relevance))
            return state, float(state.bound.sum()) + log_units

        if prior.weight is not None:
            solution = climb(step, first, max_iter=self.max_iter, monitor=monitor)
            return solution, np.stack(path)
        # Nothing to iterate: q(w, b, beta) is the exact posterior.
        solution = climb(step, first, max_iter=1, monitor=monitor)
        finite = solution.status is not Status.NON_FINITE
        solution = solution._replace(status=Status.CONVERGED) if finite else solution
        return solution, np.stack(path)

    def _climb_robust(
        self, data: Data, statistics: Statistics, prior: Prior, y: Affine, first: State
    ) -> tuple[Solution[RobustState], np.ndarray]:
        """Return what the climb over all rows found, and the relevance after each pass."""
        n_rows, learn_dof = statistics.n_rows, self.noise_dof is None
        dof = robust.FIRST_DOF if self.noise_dof is None else float(self.noise_dof)
        if learn_dof and self.warm_start and self._is_robust():
            dof = min(max(self.noise_dof_, robust.DOF_RANGE[0]), robust.DOF_RANGE[1])
        log_units = -statistics.n_observed * y.log_abs_det
        monitor = Monitor(self.tol, scale=n_rows, verbose=self.verbose, name="BayesianLinearVI")
        path: list[np.ndarray] = []

        def step(state: RobustState) -> tuple[RobustState, float]:
            better = robust.improve(data, prior, state, self.tol * n_rows, learn_dof=learn_dof)
            path.append(to_numpy(better.linear.weights.relevance))
            return better, float(better.bound) + log_units

        start_at = robust.measure(data, prior, statistics, first, dof, learn_dof=learn_dof)
        solution = climb(step, start_at, max_iter=self.max_iter, monitor=monitor)
        return solution, np.stack(path)

    def _publish(
        self,
        door: Door,
        statistics: Statistics,
        prior: Prior,
        x: Affine,
        y: Affine,
        solution: Solution[State],
        noise_dof: float | None = None,
    ) -> None:
        """Set the fitted attributes, in the units of the data."""
        if solution.status is Status.NON_FINITE:
            raise ValueError(
                "The bound left the range of float64. Rescale X, y or sample_weight, or choose "
                "less extreme prior parameters."
            )
        assert door.y is not None
        state, single = solution.state, door.y.ndim == 1
        posterior = predictive.make_posterior(statistics, prior, state, noise_dof)
        noise_variance = to_numpy(predictive.noise_variance(posterior))
        posterior, statistics = as_arrays(posterior), as_arrays(statistics)

        mean, per_feature = posterior.factor.mean, y.scale[:, None] / x.scale
        V_diag = to_numpy(variances(as_tensors(posterior, "cpu").factor))  # (M, D)
        std = np.sqrt(V_diag) * np.sqrt(noise_variance)[:, None]
        group = self._group(len(x.scale))
        scale_x = scale_of_groups(x, group)
        alpha = to_numpy(state.alpha)
        relevance = 1.0 - (alpha[:, group] if alpha.shape[1] > 1 else alpha) * V_diag
        alpha = alpha * scale_x * scale_x
        coef = mean * per_feature
        centre_x, centre_y = x.shift + posterior.centre_x * x.scale, y.shift
        intercept = centre_y + posterior.centre_y * y.scale - coef @ centre_x
        noise_precision = posterior.noise_shape / posterior.noise_rate / y.scale / y.scale

        for name, values in {
            "coef_": coef,
            "intercept_": intercept,
            "noise_precision_": noise_precision,
            "weight_precision_": alpha,
        }.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{name} leaves the range of float64 in the units of the data; rescale X or "
                    "y, for example with StandardScaler."
                )
        outputs: Any = 0 if single else slice(None)
        self.coef_ = coef[outputs]
        self.intercept_ = (intercept if self.fit_intercept else np.zeros_like(intercept))[outputs]
        self.coef_std_ = (std * per_feature)[outputs]
        self.coef_snr_ = (np.abs(mean) / std)[outputs]
        self.relevance_ = relevance.clip(0.0, 1.0)[outputs]
        self.noise_precision_ = noise_precision[outputs]
        self.noise_dof_ = np.inf if noise_dof is None else noise_dof
        one_each = self.prior in {"ard", "horseshoe"} or self.groups is not None
        self.weight_precision_ = (alpha[:, group] if one_each else alpha[:, 0])[outputs]
        self.elbo_ = solution.bound
        # q(b | w, beta) has a density in the units of y, its prior has none; likewise flat weights
        flat_units = float(statistics.intercept) * y.log_abs_det + _log_units_of_flat(prior, x, y)
        self.kl_ = float(state.kl.sum()) - flat_units
        self.elbo_history_ = solution.history
        self.n_samples_seen_ = statistics.n_rows
        self.n_iter_ = solution.n_iter
        self.converged_ = solution.status is Status.CONVERGED
        self._model = _Model(
            kind=self.prior,
            single=single,
            x=x,
            y=y,
            alpha=alpha,
            scale=to_numpy(state.scale),
            posterior=posterior,
            prior=as_arrays(prior),
            statistics=statistics,
        )

    # -- attributes built when asked for ----------------------------------------------------------

    @property
    def coef_cov_(self) -> np.ndarray:
        """Posterior covariance of w."""
        check_is_fitted(self)
        # hasattr and notebooks, which look at every attribute, pass over an AttributeError only
        self._require_variance(AttributeError)
        model = self._model
        posterior = as_tensors(model.posterior, "cpu")
        scale = predictive.noise_variance(posterior).sqrt()[:, None, None]
        per_feature = torch.from_numpy(model.y.scale[:, None] / model.x.scale)  # (M, D)
        root = scale * per_feature[:, :, None]
        cov = to_numpy(root * covariance(posterior.factor) * root.mT)
        return cov[0] if model.single else cov

    @property
    def log_evidence_(self) -> float:
        """Exact ``log p(y | X)`` in nats."""
        check_is_fitted(self)
        model = self._model
        if self._is_robust():
            raise AttributeError(
                'log_evidence_ does not exist with noise="student_t", where every row has a latent '
                "precision; elbo_ bounds it from below."
            )
        if model.prior.weight is None:
            return self.elbo_
        if model.kind == "horseshoe" or model.alpha.shape[1] > 1:
            raise AttributeError(
                "log_evidence_ does not exist for several learnt precisions, where the evidence "
                "has no closed form or low-dimensional integral; it does for prior='ridge' "
                "without groups, 'fixed' and 'flat'."
            )
        statistics = as_tensors(model.statistics, "cpu")
        in_fitted_units = evidence.log_evidence(statistics, as_tensors(model.prior, "cpu"))
        return float(in_fitted_units.sum()) - statistics.n_observed * model.y.log_abs_det

    @property
    def evidence_gap_(self) -> float:
        """What the bound gives away, ``log_evidence_ - elbo_``, in nats."""
        return self.log_evidence_ - self.elbo_

    # -- predictions ------------------------------------------------------------------------------

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:
        """Return the mean of the posterior predictive, with its spread on request.

        The spread includes the noise and the uncertainty of noise, weights and intercept.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        return_std : bool, default=False
            Also return the standard deviation of a new response at each row.
        return_cov : bool, default=False
            Also return the covariance of new responses at all rows, which share weights,
            intercept and noise precision.

        Returns
        -------
        mean : ndarray of shape (n_samples,) or (n_samples, n_outputs)
        std : ndarray, shape of `mean`
            Only with `return_std`.
        cov : ndarray of shape (n_samples, n_samples) or (n_outputs, n_samples, n_samples)
            Only with `return_cov`.

        Raises
        ------
        ValueError
            If both are asked for; if the predictive Student-t has no variance (a <= 1, or
            ``noise_dof_ <= 2``).
        """
        check_is_fitted(self)
        if return_std and return_cov:
            raise ValueError(
                "return_std and return_cov cannot both be True: the standard deviation is the "
                "square root of the diagonal of the covariance. Choose one."
            )
        if return_std or return_cov:
            self._require_variance()
            if not self.noise_dof_ > 2.0:
                raise ValueError(
                    f"Student-t noise with {self.noise_dof_:g} degrees of freedom has no variance; "
                    "predict_interval gives quantiles. Or fit with noise_dof above 2."
                )
        door = self._door(X, reset=False)
        scale = self._model.y.scale
        mean = self._per_row(door, lambda q, x: predictive.mean(q, x))
        mean = self._squeeze(self._model.y.shift + scale * mean)
        if return_std:
            std = self._per_row(door, lambda q, x: predictive.variance(q, x).sqrt())
            return mean, self._squeeze(scale * std)
        if return_cov:
            posterior = as_tensors(self._model.posterior, door.device)
            x, _ = _rows(door.X, self._model.x, door.device)[slice(None)]
            cov = to_numpy(predictive.covariance(posterior, x)) * scale[:, None, None] ** 2
            check_reach(cov)
            return mean, cov[0] if self._model.single else cov
        return mean

    def predict_interval(self, X: Any, level: float = 0.9) -> np.ndarray:
        r"""Return central intervals that hold a new response with probability `level`.

        Quantiles of the posterior predictive, a Student-t with 2a degrees of freedom:

        .. math:: \mu \pm t_{2a}\left(\tfrac{1 + \mathrm{level}}2\right) \sqrt{\tfrac ba (1 + k)}

        They exist even where the predictive has no variance. With Student-t noise the quantiles
        of its scale mixture, see :meth:`log_predictive`, found by bracketed Newton steps.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        level : float, default=0.9
            Between 0 and 1, both excluded.

        Returns
        -------
        ndarray of shape (n_samples, 2) or (n_samples, n_outputs, 2)
            Lower and upper end, in the units of y, for each row and output by itself.

        Raises
        ------
        ValueError
            For a `level` outside (0, 1); for ends beyond the range of float64.
        """
        check_is_fitted(self)
        if not isinstance(level, Real) or not 0.0 < level < 1.0:
            raise ValueError(f"level={level!r} must be a probability between 0 and 1.")
        door = self._door(X, reset=False)

        def ends(q: Posterior, x: Tensor) -> Tensor:
            centre, reach = predictive.mean(q, x), predictive.half_width(q, x, float(level))
            return torch.stack([centre - reach, centre + reach], dim=-1)

        units = self._model.y
        values = self._per_row(door, ends)  # (N, M, 2)
        return self._squeeze(units.shift[:, None] + units.scale[:, None] * values)

    def transform(self, X: Any) -> np.ndarray:
        """Return predictive mean and standard deviation as columns.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, 2 * n_outputs)
            Mean and standard deviation of the first output, then of the second, and so on.

        Raises
        ------
        ValueError
            If the predictive Student-t has no variance (a <= 1, or ``noise_dof_ <= 2``).
        """
        mean, std = self.predict(X, return_std=True)
        return np.stack([mean, std], axis=-1).reshape(len(mean), -1)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns of :meth:`transform`.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Only checked against the features seen in fit.

        Returns
        -------
        ndarray of str
            ``bayesianlinearvi_mean`` and ``bayesianlinearvi_std``; with several outputs,
            ``bayesianlinearvi_mean0``, ``bayesianlinearvi_std0`` and so on.
        """
        check_is_fitted(self)
        check_feature_names_in(self, input_features, generate_names=False)
        stem = type(self).__name__.lower()
        n_outputs = len(self._model.y.scale)
        suffixes = [""] if self._model.single else [str(m) for m in range(n_outputs)]
        names = [f"{stem}_{kind}{suffix}" for suffix in suffixes for kind in ("mean", "std")]
        return np.asarray(names, dtype=object)

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw responses from the posterior predictive.

        All rows of one draw share one noise precision, one weight vector and one intercept, drawn
        from their exact joint posterior.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_query, n_features)
        n_samples : int, default=1
            Number of draws.
        random_state : int, RandomState, Generator or None, default=0
            Seeds the draws, as in ``GaussianProcessRegressor.sample_y``. None is fresh entropy.

        Returns
        -------
        ndarray of shape (n_query, n_samples) or (n_query, n_outputs, n_samples)

        Raises
        ------
        ValueError
            If `n_samples` is not a positive integer; if so few rows were seen that draws of the
            noise overflow.
        """
        check_is_fitted(self)
        n_samples = check_count(n_samples, "n_samples")
        door = self._door(X, reset=False)
        rng = make_rng(draw_seed(random_state))
        posterior = as_tensors(self._model.posterior, door.device)
        lines = predictive.draw_lines(posterior, n_samples, rng)
        if not bool(lines.noise_scale.isfinite().all()):
            raise ValueError(
                "The noise is hardly known, and a draw of it left the range of float64. Fit on "
                "more rows, or choose a larger noise_shape and noise_rate."
            )
        (mixing,) = rng.spawn(1)
        draws = self._per_row(
            door,
            lambda q, x: predictive.draw_responses(q, lines, x, rng, mixing),
            extra=n_samples,
        )
        draws = self._model.y.shift[:, None] + self._model.y.scale[:, None] * draws
        return draws[:, 0] if self._model.single else draws

    # -- scores -----------------------------------------------------------------------------------

    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        """Return the local bound ``E_q[log p(y_n | x_n, w, b, beta)]`` of each row.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            None stands for responses that were not observed, about which the model says
            ``log p = 0`` exactly.

        Returns
        -------
        ndarray of shape (n_samples,)
            Nats, summed over outputs.
        """
        check_is_fitted(self)
        if y is None:
            return np.zeros(self._door(X, reset=False).X.shape[0])
        return self._log_density(X, y, predictive.local_bound)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the weighted mean of :meth:`score_samples`: higher is better, in nats per row.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
        """
        check_is_fitted(self)
        values = self._log_density(X, y, predictive.local_bound)
        return weighted_mean(values, self._weights(sample_weight, values[:, None]))

    def elbo_terms(self, X: Any, y: Any) -> ElboTerms[np.ndarray]:
        """Return the terms of the local bound of each row, in nats, summed over outputs.

        With Gaussian noise a row has no latent variable of its own: ``reconstruction`` and
        ``energy`` are :meth:`score_samples`, ``kl`` and ``entropy`` are zero. With Student-t noise
        it has its precision u, with the best q(u) for the row: ``kl`` is large for outliers.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        ElboTerms
            Of arrays of shape (n_samples,).
        """
        check_is_fitted(self)
        values = self._log_density(X, y, predictive.local_bound)
        if self._is_robust():
            kl = self._sum_over_outputs(X, y, predictive.precision_divergence)
            entropy = self._sum_over_outputs(X, y, predictive.precision_entropy)
            return ElboTerms(values + kl, kl, values - entropy, entropy)
        zero = np.zeros_like(values)
        return ElboTerms(reconstruction=values, kl=zero, energy=values.copy(), entropy=zero.copy())

    def log_predictive(self, X: Any, y: Any) -> np.ndarray:
        r"""Return the log posterior predictive density of each row, a Student-t.

        With Student-t noise a mixture of these, :math:`\mathrm{St}(2a, \mu, \frac ba (1/u + k))`
        over :math:`u \sim \mathrm{Gam}(\nu/2, \nu/2)`, by quadrature over log u to a relative
        error below 1e-9.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        ndarray of shape (n_samples,)
            Nats, summed over outputs; never below :meth:`score_samples`.
        """
        check_is_fitted(self)
        return self._log_density(X, y, predictive.log_predictive)

    def r2_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R^2 of :meth:`predict`, which is what ``score`` is for other regressors.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
            Averaged over outputs.
        """
        return float(r2_score(to_host(y), self.predict(X), sample_weight=to_host(sample_weight)))

    # -- helpers ----------------------------------------------------------------------------------

    def _door(
        self, X: Any, y: Any = None, *, reset: bool, target: bool = False, **check_params: Any
    ) -> Door:
        if sparse.issparse(X):
            X = canonical(X.tocsr())  # SciPy would merge repeated entries in the caller's arrays
        check_params = {"accept_sparse": "csr", **check_params}
        return super()._door(X, y, reset=reset, target=target, **check_params)

    def _require_variance(self, error: type[Exception] = ValueError) -> None:
        shape = float(self._model.posterior.noise_shape)
        if shape <= 1.0:
            raise error(
                f"The predictive Student-t has {2.0 * shape:g} degrees of freedom, and with 2 or "
                "fewer it has no variance. Fit on more rows (about three more than the intercept "
                "takes), or choose a larger noise_shape and noise_rate."
            )

    def _per_row(
        self, door: Door, function: Callable[..., Tensor], extra: int = 0, y: Rows | None = None
    ) -> np.ndarray:
        """Apply ``function(posterior, x[, y]) -> (B, M, ...)`` to blocks of rows."""
        model = self._model
        posterior = as_tensors(model.posterior, door.device)
        floats = predictive.floats_per_row(posterior) + extra * len(model.y.scale)
        rows = _rows(door.X, model.x, door.device, keep="never")
        pieces = []
        for block in row_slices(rows.n_rows, block_rows(floats, door.device)):
            x, _ = rows[block]
            targets = () if y is None else (y[block][0],)
            pieces.append(to_numpy(function(posterior, x, *targets)))
        values = np.concatenate(pieces)
        check_reach(values)
        return values

    def _is_robust(self) -> bool:
        """Whether the fit there is, if any, has Student-t noise; whatever `noise` says now."""
        return hasattr(self, "_model") and self._model.posterior.noise_dof is not None

    def _log_density(self, X: Any, y: Any, function: Callable[..., Tensor]) -> np.ndarray:
        """Sum ``function`` over outputs and take it to the units of y, shape (N,)."""
        return self._sum_over_outputs(X, y, function) - self._model.y.log_abs_det

    def _sum_over_outputs(self, X: Any, y: Any, function: Callable[..., Tensor]) -> np.ndarray:
        door = self._door(X, y, reset=False, target=True)
        assert door.y is not None
        outputs = door.y.reshape(len(door.y), -1)
        model = self._model
        if outputs.shape[1] != len(model.y.scale):
            raise ValueError(
                f"y has {outputs.shape[1]} output(s), but the model was fitted with "
                f"{len(model.y.scale)}; pass a y of the same form."
            )
        return self._per_row(door, function, y=Rows(outputs, model.y, door.device)).sum(axis=1)

    def _squeeze(self, values: np.ndarray) -> np.ndarray:
        return values[:, 0] if self._model.single else values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # score is a bound in nats, not R^2
        tags.regressor_tags.poor_score = True
        tags.target_tags.multi_output = self.noise == "gaussian"
        tags.input_tags.sparse = self.noise == "gaussian"
        # what comes out depends on y and is float64, whatever X is
        tags.transformer_tags.preserves_dtype = []
        return tags


def _rows(
    X: Any,
    affine: Affine,
    device: torch.device,
    weight: np.ndarray | None = None,
    *,
    keep: Keep = None,
) -> Rows:
    if sparse.issparse(X):
        return SparseRows(X, affine, device, weight)
    return Rows(X, affine, device, weight, keep=keep)


def _log_units_of_flat(prior: Prior, x: Affine, y: Affine) -> float:
    """Log of the volume that a unit cube of fitted flat weights has in the units of the data."""
    if not prior.n_flat:
        return 0.0
    return prior.n_flat * y.log_abs_det - len(y.scale) * x.log_abs_det
