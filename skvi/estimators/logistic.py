"""Bayesian logistic regression with the weights and their precisions learnt jointly."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, TransformerMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from skvi.estimators._base import (
    Door,
    VariationalEstimator,
    as_tensors,
    check_count,
    check_reach,
    map_record,
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
from skvi.models.linear.horseshoe import HorseshoePrior
from skvi.models.linear.reduction import Statistics, reduce_rows
from skvi.models.linear.weights import covariance, variances
from skvi.models.logistic import predictive
from skvi.models.logistic.bound import local_bound, local_divergence
from skvi.models.logistic.climb import (
    Prior,
    State,
    column_precision,
    coordinate_update,
    evaluate,
    improve,
    start,
)
from skvi.models.logistic.predictive import Posterior
from skvi.models.logistic.weights import Design, factorise
from skvi.models.terms import ElboTerms
from skvi.runtime.blocks import Affine, Rows, block_rows, row_slices
from skvi.runtime.moments import weighted_moments
from skvi.runtime.random import draw_seed, make_rng

# Tilts to begin with: Polya-Gamma means of 1/4, the largest there are.
_FIRST_TILT = 1e-3


class _Model(NamedTuple):
    """What a fit found, in fitted units ``(x - shift) / scale``; NumPy arrays only.

    Attributes
    ----------
    kind : str
        The `prior` parameter it was fitted with.
    x : Affine
    alpha : ndarray of shape (M, H)
        E[alpha] in the units of the data.
    scale : ndarray of shape (M,)
        What `State.scale` is.
    posterior : Posterior
    """

    kind: str
    x: Affine
    alpha: np.ndarray
    scale: np.ndarray
    posterior: Posterior


class _Progress(NamedTuple):
    """A climb on its way: the state, and the binary models that still rise, shape (K,)."""

    state: State
    active: Tensor


class BayesianLogisticVI(ClassifierMixin, TransformerMixin, VariationalEstimator):
    r"""Bayesian logistic regression by variational inference.

    The model of two classes, with :math:`t = 1` for the second and :math:`t = -1` for the first:

    .. math::
        P(t_i | x_i) = \sigma(t_i [(x_i - \bar x)'w + b]), \quad
        w_j \sim N(0, \alpha_j^{-1}), \quad \alpha_j \sim \mathrm{Gam}(c_0, d_0), \quad
        b \sim N(0, \tau^2)

    The posterior :math:`q(w, b)\, q(\alpha)` maximises the bound of Jaakkola and Jordan, which is
    also that of variational Bayes with Polya-Gamma variables. More than two classes have one such
    model each, class against rest, and

    .. math:: P(k | x) = \frac{E_q[\sigma(a_k)]}{\sum_j E_q[\sigma(a_j)]}

    The defaults know no units: multiplying a column by a constant divides its weight by it
    ("ard", "horseshoe"), and so for all columns with a shared precision. Data that a plane
    separates are no problem, because every prior is proper.

    Parameters
    ----------
    prior : {"ridge", "ard", "horseshoe", "fixed"}, default="ridge"
        One learnt weight precision for all features (or for each of the `groups`); one for each
        feature (automatic relevance determination: useless features are shrunk away); the
        horseshoe, half-Cauchy scales of each weight and of all, which shrinks noise and leaves
        strong signals alone; or one given number.
    groups : array-like of shape (n_features,), default=None
        Labels for ``prior="ridge"``: features with the same label share a precision. None is one
        group of all. An error with another prior.
    weight_precision : float, default=1.0
        The alpha of ``prior="fixed"``, in the units of X squared; ignored otherwise. The same
        penalty as that of ``LogisticRegression(C=1 / weight_precision)``.
    weight_shape : float, default=0.5
        c0 of the learnt weight precisions.
    weight_rate : float, default=1e-3
        d0 in units of one over the variance of the feature ("ard") or over the mean variance of
        the features of the group ("ridge"), mean squares without an intercept; for a constant
        column its square stands in. With the default shape a weight's prior is a Cauchy law of
        half-width ``sqrt(2 weight_rate)``, in log odds per standard deviation of the feature:
        heavy tails, a sharp peak.
    global_scale : float, default=1.0
        tau0 of ``prior="horseshoe"``: half-width of the half-Cauchy law of the scale that all
        weights share, in log odds per standard deviation of the feature.
    intercept_scale : float, default=10.0
        tau: standard deviation of the normal prior of b, the log odds at the mean of X. A flat
        prior would have no bound for few rows of a class; this one is nearly flat where
        probabilities differ from 0 and 1. At most 1e8, which leaves eight digits of b.
    fit_intercept : bool, default=True
        Add b, and take the mean out of X. Without it X is used as it is.
    max_iter : int, default=1000
        Limit of the passes. A pass evaluates two or three posteriors, each of which visits the
        rows twice.
    tol : float, default=1e-8
        The fit has converged when a pass raises the bound by less than `tol` nats per row (per
        unit of total weight).
    device : str or torch.device, default="auto"
        "auto": the device of X if it is a tensor, else CUDA if there is one, else the CPU. An
        explicit device that is missing is an error.
    warm_start : bool, default=False
        Continue from the posterior of the previous fit.
    verbose : int, default=0
        1 prints the bound every tenth pass and at convergence, 2 every pass.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    coef_ : ndarray of shape (n_models, n_features)
        Posterior mean of w; n_models is 1 for two classes, else the number of classes.
    intercept_ : ndarray of shape (n_models,)
        Posterior mean of the log odds at ``x = 0``; 0 without an intercept.
    coef_cov_ : ndarray of shape (n_models, n_features, n_features)
        Posterior covariance of w; built when asked for.
    coef_std_ : ndarray of shape (n_models, n_features)
        Posterior standard deviations of w.
    coef_snr_ : ndarray of shape (n_models, n_features)
        ``|coef_| / coef_std_``: importance for :class:`sklearn.feature_selection.SelectFromModel`.
    relevance_ : ndarray of shape (n_models, n_features)
        ``1 - E[alpha_j] V_jj``, in [0, 1]: how much of what is known about a weight comes from
        the rows (1) and not from its prior (0).
    weight_precision_ : ndarray of shape (n_models,) or (n_models, n_features)
        E[alpha], the prior precision of a weight. One number a model for "ridge" without groups
        and "fixed", else one for each feature.
    elbo_ : float
        The bound on the log probability of all labels in nats, summed over models:
        ``sum_n s_n score_samples(X, y)[n] - kl_``.
    kl_ : float
        ``KL(q(w, b, alpha) || p)`` in nats, summed over models.
    elbo_history_ : list of float
        The bound after each pass; the last entry is ``elbo_``.
    n_iter_ : int
        Number of passes.
    converged_ : bool
        Whether the fit reached `tol`.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only if X had feature names that are all strings.

    See Also
    --------
    BayesianLinearVI : The same priors for a regression.
    sklearn.linear_model.LogisticRegression : The mode of the posterior under "fixed".

    Notes
    -----
    ``score`` is the mean evidence lower bound of the rows, not the accuracy: see
    :meth:`accuracy_score`.

    The averages over q in the probabilities are integrals of a sigmoid under a normal law, taken
    to rounding by an accelerated series (not by nodes of a quadrature).

    With more than two classes the bound is that of independent models of the indicators of the
    classes. It is a bound for the law above as well, whose probabilities are never smaller.

    "ridge" and "fixed" shrink all features alike, so features should have comparable spreads.
    Hyper-parameters without units lie between 1e-100 and 1e100.

    References
    ----------
    Jaakkola and Jordan (2000), Bayesian parameter estimation via variational methods, Statistics
    and Computing 10. Durante and Rigon (2019), Conditionally conjugate mean-field variational
    Bayes for logistic models, arXiv:1711.06999. Drugowitsch (2013), arXiv:1310.5438.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from skvi import BayesianLogisticVI
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = BayesianLogisticVI(prior="ard").fit(X, y)
    >>> round(model.accuracy_score(X, y), 2)
    0.98
    >>> bool(abs(model.elbo_ - (model.score_samples(X, y).sum() - model.kl_)) < 1e-8)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "prior": [StrOptions({"ridge", "ard", "horseshoe", "fixed"})],
        "groups": ["array-like", None],
        "weight_precision": [Interval(Real, 0.0, None, closed="neither")],
        "weight_shape": [HYPERPARAMETER],
        "weight_rate": [HYPERPARAMETER],
        "global_scale": [HYPERPARAMETER],
        "intercept_scale": [Interval(Real, 1e-100, 1e8, closed="both")],
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
        weight_shape: float = 0.5,
        weight_rate: float = 1e-3,
        global_scale: float = 1.0,
        intercept_scale: float = 10.0,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-8,
        device: str | torch.device = "auto",
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.prior = prior
        self.groups = groups
        self.weight_precision = weight_precision
        self.weight_shape = weight_shape
        self.weight_rate = weight_rate
        self.global_scale = global_scale
        self.intercept_scale = intercept_scale
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.warm_start = warm_start
        self.verbose = verbose

    # -- fitting ----------------------------------------------------------------------------------

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Maximise the bound on the log probability of the labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Finite numbers, float64 or float32; computed in float64.
        y : array-like of shape (n_samples,)
            Labels of two or more classes, numbers or strings.
        sample_weight : array-like of shape (n_samples,), default=None
            How often each row counts: an integer weight equals that many repeated rows, zero
            equals removal.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For invalid parameters or data; for labels of one class only; for data whose answer
            leaves the range of float64; for a `warm_start` from a fit of another prior or shape,
            or other feature names.
        """
        with self._all_or_nothing():
            door = self._fit_door(X, y, labels=True)
            weight = self._weights(sample_weight, door.X)
            X, y, weight = without_weightless(weight, door.X, door.y)
            classes, codes = np.unique(y, return_inverse=True)
            if len(classes) < 2:
                raise ValueError(
                    f"The rows that count have one class only, {classes[0]!r}, and nothing tells "
                    "it from another; give labels of two or more classes."
                )
            before = getattr(self, "classes_", np.empty(0))
            self.classes_ = classes
            group = group_of_features(self.prior, self.groups, X.shape[1])
            mean, std = weighted_moments(X, weight)
            x, spread = fitted_units(mean, std, group, intercept=self.fit_intercept)
            prior = Prior(self._prior_of_precisions(spread, group), self.intercept_scale**-2)
            prior = as_tensors(prior, door.device)
            sign = _signs(codes, len(classes))
            rows = Rows(X, x, door.device, weight)
            with np.errstate(over="ignore", under="ignore"):
                statistics = _principal_axes(rows, sign, weight, self.fit_intercept)
                design, basis = self._design(rows, sign, weight, statistics)
                first = self._start(design, prior, statistics, x, group, X, before)
                solution = self._climb(design, prior, first)
                self._publish(design, prior, basis, x, group, solution)
        self._warn_unless_converged()
        return self

    def _prior_of_precisions(self, spread: np.ndarray, group: np.ndarray) -> Any:
        return prior_of_precisions(
            self.prior,
            spread,
            group,
            weight_shape=self.weight_shape,
            weight_rate=self.weight_rate,
            global_scale=self.global_scale,
        )

    def _design(
        self, rows: Rows, sign: np.ndarray, weight: np.ndarray, statistics: Statistics
    ) -> tuple[Design, Tensor | None]:
        """Return the design and, where its columns are not the features, their directions.

        A shared precision sees no more than the span of the rows, and that is smaller where
        features outnumber rows.
        """
        n_rows, n_features = rows.n_rows, rows.n_features
        shared = self.prior in {"ridge", "fixed"} and self.groups is None
        device = rows.device
        basis = None
        if shared and n_features > n_rows and statistics.spectrum.numel() > 0:
            basis = statistics.basis
            coordinates = np.concatenate(
                [to_numpy(x @ basis) for _, x, _ in rows.blocks(2 * n_features)]
            )
            rows = Rows(coordinates, _identity(coordinates.shape[1]), device, weight)
        return (
            Design(
                rows=rows,
                weight=torch.as_tensor(weight, device=device),
                sign=torch.as_tensor(sign, device=device),
                n_features=n_features,
                intercept=self.fit_intercept,
            ),
            basis,
        )

    def _start(
        self,
        design: Design,
        prior: Prior,
        statistics: Statistics,
        x: Affine,
        group: np.ndarray,
        X: np.ndarray,
        classes_before: np.ndarray,
    ) -> State:
        """Return the first state: the best shared precision, or where the last fit ended."""
        n_models, scale_x = design.sign.shape[1], scale_of_groups(x, group)
        device = design.sign.device
        shape = (n_models, len(scale_x))
        scale = torch.ones(n_models, dtype=torch.float64, device=device)
        tilt = torch.full_like(design.sign, _FIRST_TILT)
        if self._continues():
            model = self._model
            same_classes = np.array_equal(classes_before, self.classes_)
            if (model.kind, *model.alpha.shape) != (self.prior, *shape) or (
                not same_classes or len(model.x.scale) != design.n_features
            ):
                raise ValueError(
                    "warm_start=True cannot continue the previous fit: prior, the classes, the "
                    "number of features or of groups has changed. Set warm_start=False, or fit a "
                    "clone."
                )
            alpha = torch.as_tensor(model.alpha / scale_x / scale_x, device=device)
            scale = torch.as_tensor(model.scale, device=device)
            odds = self._per_row(Door(X, None, device), _odds)  # (N, M, 2)
            tilt = torch.as_tensor(np.hypot(odds[..., 0], odds[..., 1]), device=device)
            return evaluate(design, prior, alpha, scale, tilt.clamp(min=_FIRST_TILT))
        if self.prior == "fixed":
            known = np.full(shape, self.weight_precision) / scale_x / scale_x
            return evaluate(design, prior, torch.as_tensor(known, device=device), scale, tilt)
        alpha = start(design, prior, statistics)
        if isinstance(prior.weight, HorseshoePrior):
            scale = alpha[:, 0] / prior.weight.unit.mean()
            return evaluate(design, prior, scale[:, None] * prior.weight.unit, scale, tilt)
        return evaluate(design, prior, alpha.expand(shape).contiguous(), scale, tilt)

    def _climb(self, design: Design, prior: Prior, first: State) -> Solution[State]:
        total = float(design.weight.sum())
        monitor = Monitor(self.tol, scale=total, verbose=self.verbose, name="BayesianLogisticVI")
        # The first tilts are the same for all rows, and no direction to extrapolate from.
        first = evaluate(design, prior, *coordinate_update(design, prior, first))
        smallest_rise = self.tol * total / len(first.alpha)

        def step(progress: _Progress) -> tuple[_Progress, float]:
            state, active = progress
            if not len(active):
                return progress, float(state.bound.sum())
            better = improve(design, prior, state, active)
            still = (better.bound - state.bound)[active] >= smallest_rise
            return _Progress(better, active[still]), float(better.bound.sum())

        everything = torch.arange(len(first.alpha), device=first.alpha.device)
        solution = climb(
            step, _Progress(first, everything), max_iter=self.max_iter, monitor=monitor
        )
        return Solution(solution.state.state, solution.history, solution.status)

    def _publish(
        self,
        design: Design,
        prior: Prior,
        basis: Tensor | None,
        x: Affine,
        group: np.ndarray,
        solution: Solution[State],
    ) -> None:
        """Set the fitted attributes, in the units of the data."""
        if solution.status is Status.NON_FINITE:
            raise ValueError(
                "The bound left the range of float64. Rescale X or sample_weight, or choose less "
                "extreme prior parameters."
            )
        state = solution.state
        precision = column_precision(design, prior, state.alpha)
        factor = factorise(design, state.tilt, precision, state.weights.mean, basis)
        posterior = map_record(to_numpy, Posterior(factor, self.fit_intercept))
        n_features, scale_x = design.n_features, scale_of_groups(x, group)
        mean = posterior.factor.mean[:, :n_features]
        variance = to_numpy(variances(as_tensors(posterior, "cpu").factor))[:, :n_features]
        std = np.sqrt(variance)
        alpha = to_numpy(state.alpha)
        relevance = 1.0 - (alpha[:, group] if alpha.shape[1] > 1 else alpha) * variance
        alpha = alpha * scale_x * scale_x
        coef = mean / x.scale
        intercept = np.zeros(len(coef))
        if self.fit_intercept:
            intercept = posterior.factor.mean[:, n_features] - coef @ x.shift
        for name, values in {
            "coef_": coef,
            "intercept_": intercept,
            "coef_std_": std / x.scale,
            "weight_precision_": alpha,
        }.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{name} leaves the range of float64 in the units of the data; rescale X, for "
                    "example with StandardScaler."
                )
        self.coef_ = coef
        self.intercept_ = intercept
        self.coef_std_ = std / x.scale
        self.coef_snr_ = np.abs(mean) / std
        self.relevance_ = relevance.clip(0.0, 1.0)
        one_each = self.prior in {"ard", "horseshoe"} or self.groups is not None
        self.weight_precision_ = alpha[:, group] if one_each else alpha[:, 0]
        self.elbo_ = solution.bound
        self.kl_ = float(state.kl.sum())
        self.elbo_history_ = solution.history
        self.n_iter_ = solution.n_iter
        self.converged_ = solution.status is Status.CONVERGED
        self._model = _Model(self.prior, x, alpha, to_numpy(state.scale), posterior)

    @property
    def coef_cov_(self) -> np.ndarray:
        """Posterior covariance of w."""
        check_is_fitted(self)
        model = self._model
        V = to_numpy(covariance(as_tensors(model.posterior, "cpu").factor))
        n_features = len(model.x.scale)
        return V[:, :n_features, :n_features] / model.x.scale[:, None] / model.x.scale

    # -- predictions ------------------------------------------------------------------------------

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of :meth:`predict_proba`, to rounding for small ones as well.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
        """
        check_is_fitted(self)
        return self._per_row(self._door(X, reset=False), predictive.log_proba)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the posterior predictive probabilities of the classes.

        ``E_q[sigmoid(a)]`` with ``a = x'w + b``, exactly; with more than two classes those of the
        models of single classes, divided by their sum.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of ``classes_``.
        """
        return np.exp(self.predict_log_proba(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the log odds of each class against the rest, after averaging over q.

        ``log E_q[sigmoid(a)] - log E_q[sigmoid(-a)]``: for two classes the log odds of
        :meth:`predict_proba`. The log odds before averaging are in :meth:`transform`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes)
            For two classes, those of the second one.
        """
        check_is_fitted(self)

        def odds(posterior: Posterior, x: Tensor) -> Tensor:
            log_yes, log_no = predictive.log_proba_of_models(posterior, x)
            return log_yes - log_no

        values = self._per_row(self._door(X, reset=False), odds)
        return values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        values = self.decision_function(X)
        best = (values > 0.0).astype(np.intp) if values.ndim == 1 else values.argmax(axis=1)
        return self.classes_[best]

    def transform(self, X: Any) -> np.ndarray:
        """Return the posterior mean and standard deviation of the log odds as columns.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, 2 * n_models)
            Of the second of two classes, or of the first class against the rest, then of the
            second, and so on.
        """
        check_is_fitted(self)
        values = self._per_row(self._door(X, reset=False), _odds)
        return values.reshape(len(values), -1)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns of :meth:`transform`.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Only checked against the features seen in fit.

        Returns
        -------
        ndarray of str
            ``bayesianlogisticvi_mean`` and ``bayesianlogisticvi_std``; with more than two classes
            ``bayesianlogisticvi_mean0``, ``bayesianlogisticvi_std0`` and so on.
        """
        check_is_fitted(self)
        check_feature_names_in(self, input_features, generate_names=False)
        n_classes = len(self.classes_)
        suffixes = [""] if n_classes == 2 else [str(k) for k in range(n_classes)]
        stem = type(self).__name__.lower()
        names = [f"{stem}_{kind}{suffix}" for suffix in suffixes for kind in ("mean", "std")]
        return np.asarray(names, dtype=object)

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw labels from the posterior predictive.

        All rows of one draw share the weights, drawn from q.

        Parameters
        ----------
        X : array-like of shape (n_query, n_features)
        n_samples : int, default=1
            Number of draws.
        random_state : int, RandomState, Generator or None, default=0
            Seeds the draws, as in ``GaussianProcessRegressor.sample_y``. None is fresh entropy.

        Returns
        -------
        ndarray of shape (n_query, n_samples)
            Members of ``classes_``. With more than two classes the frequencies approach
            ``E_q[sigmoid(a_k) / sum_j sigmoid(a_j)]``, of which :meth:`predict_proba` averages
            numerator and denominator apart.

        Raises
        ------
        ValueError
            If `n_samples` is not a positive integer.
        """
        check_is_fitted(self)
        n_samples = check_count(n_samples, "n_samples")
        door = self._door(X, reset=False)
        rng = make_rng(draw_seed(random_state))
        posterior = as_tensors(self._model.posterior, door.device)
        coef = predictive.draw_coefficients(posterior, n_samples, rng)

        def labels(posterior: Posterior, x: Tensor) -> Tensor:
            return predictive.draw_labels(posterior, coef, x, rng)

        codes = self._per_row(door, labels, extra=3 * n_samples * coef.shape[1])
        return self.classes_[codes]

    # -- scores -----------------------------------------------------------------------------------

    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        r"""Return the local bound of each row.

        .. math:: \tfrac12 (t \mu - \xi) + \log\sigma(\xi), \qquad \xi = \sqrt{\mu^2 + v}

        of log odds with mean mu and variance v under q.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), default=None
            Members of ``classes_``. None stands for labels that were not observed, about which
            the model says ``log p = 0`` exactly.

        Returns
        -------
        ndarray of shape (n_samples,)
            Nats, summed over models.
        """
        check_is_fitted(self)
        if y is None:
            return np.zeros(len(self._door(X, reset=False).X))
        return self._of_labels(X, y, local_bound)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the weighted mean of :meth:`score_samples`: higher is better, in nats per row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
        """
        check_is_fitted(self)
        values = self._of_labels(X, y, local_bound)
        return weighted_mean(values, self._weights(sample_weight, values[:, None]))

    def elbo_terms(self, X: Any, y: Any) -> ElboTerms[np.ndarray]:
        """Return the terms of the local bound of each row, in nats, summed over models.

        The latent variables of a row are its Polya-Gamma variables omega, with densities relative
        to their prior law: ``energy`` is then ``reconstruction = E_q[log p(y | omega, w, b)]``,
        and ``entropy = -kl``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)

        Returns
        -------
        ElboTerms
            Of arrays of shape (n_samples,).
        """
        check_is_fitted(self)
        values, kl = self._of_labels(
            X,
            y,
            lambda sign, mean, variance: torch.stack(
                [local_bound(sign, mean, variance), local_divergence(mean, variance)]
            ),
        )
        reconstruction = values + kl
        return ElboTerms(reconstruction, kl, energy=reconstruction.copy(), entropy=-kl)

    def log_predictive(self, X: Any, y: Any) -> np.ndarray:
        """Return the log posterior predictive probability of each label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)

        Returns
        -------
        ndarray of shape (n_samples,)
            Nats: :meth:`predict_log_proba` at the label; never below :meth:`score_samples`.
        """
        check_is_fitted(self)
        door = self._door(X, y, reset=False, labels=True)
        codes = self._codes(door.y)
        return self._per_row(door, predictive.log_proba)[np.arange(len(codes)), codes]

    def accuracy_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy of :meth:`predict`, which is what ``score`` is for other classifiers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
        """
        labels = self.predict(X)
        return float(accuracy_score(to_host(y), labels, sample_weight=to_host(sample_weight)))

    # -- helpers ----------------------------------------------------------------------------------

    def _per_row(self, door: Door, function: Callable[..., Tensor], extra: int = 0) -> np.ndarray:
        """Apply ``function(posterior, x) -> (B, ...)`` to blocks of rows."""
        posterior = as_tensors(self._model.posterior, door.device)
        floats = predictive.floats_per_row(posterior) + extra
        rows = Rows(door.X, self._model.x, door.device, keep="never")
        blocks = row_slices(rows.n_rows, block_rows(floats, door.device))
        values = np.concatenate([to_numpy(function(posterior, rows[block][0])) for block in blocks])
        check_reach(values)
        return values

    def _of_labels(self, X: Any, y: Any, function: Callable[..., Tensor]) -> np.ndarray:
        """Sum ``function(sign, mean, variance)`` of the log odds over models, (..., N)."""
        door = self._door(X, y, reset=False, labels=True)
        sign = torch.from_numpy(_signs(self._codes(door.y), len(self.classes_)))
        odds = torch.from_numpy(self._per_row(door, _odds))  # (N, M, 2)
        values = function(sign, odds[..., 0], odds[..., 1].square()).sum(-1).numpy()
        check_reach(values)
        return values

    def _codes(self, y: Any) -> np.ndarray:
        """Return the positions of labels in ``classes_``."""
        known = np.isin(y, self.classes_)
        if not known.all():
            raise ValueError(
                f"y has labels that were not seen in fit: {np.unique(np.asarray(y)[~known])}; "
                f"the classes are {self.classes_}."
            )
        return np.searchsorted(self.classes_, y)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # what comes out depends on y and is float64, whatever X is
        tags.transformer_tags.preserves_dtype = []
        return tags


def _identity(n_columns: int) -> Affine:
    return Affine(np.zeros(n_columns), np.ones(n_columns))


def _signs(codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return t, shape (N, M): 1 for the class that a model is about, else -1."""
    about = np.array([1]) if n_classes == 2 else np.arange(n_classes)
    return np.where(codes[:, None] == about, 1.0, -1.0)


def _odds(posterior: Posterior, x: Tensor) -> Tensor:
    """Return mean and standard deviation of the log odds, (B, M, 2)."""
    mean, variance = predictive.log_odds(posterior, x)
    return torch.stack([mean, variance.sqrt()], dim=-1)


def _principal_axes(
    rows: Rows, sign: np.ndarray, weight: np.ndarray, intercept: bool
) -> Statistics:
    """Return the principal axes of the rows, and half the signs along these."""
    targets = Rows(0.5 * sign, _identity(sign.shape[1]), rows.device, weight)
    return reduce_rows(rows, targets, intercept=intercept)
