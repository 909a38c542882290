"""Variational autoencoder as a scikit-learn transformer and density estimator."""

import hashlib
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor

from skvi.estimators._base import (
    VariationalEstimator,
    check_count,
    to_host,
    to_numpy,
    weighted_mean,
    without_weightless,
)
from skvi.estimators._columns import (
    by_rows,
    check_observed,
    check_support,
    extremes,
    fitted_units,
    requested_blocks,
    standardised_columns,
    with_levels,
    without_levels,
)
from skvi.estimators._compat import Interval, StrOptions, fit_context
from skvi.inference.checkpoint import Checkpoint
from skvi.inference.gradient import (
    Descent,
    Patience,
    Schedule,
    State,
    adam,
    descend,
    export_state,
)
from skvi.inference.monitor import Status, announce_epoch
from skvi.models.linear.sparse import canonical
from skvi.models.terms import ElboTerms
from skvi.models.vae import objective, start
from skvi.models.vae.likelihoods import LIKELIHOODS, Block
from skvi.models.vae.networks import (
    ACTIVATIONS,
    VAE,
    Architecture,
    Custom,
    build,
    checked_custom,
    export,
    restore,
    widths_of,
)
from skvi.models.vae.objective import split_missing
from skvi.models.vae.posteriors import POSTERIORS
from skvi.models.vae.priors import HALF_WIDTH, MOMENT_DRAWS, PRIORS
from skvi.runtime.blocks import Affine, Rows, block_rows, row_slices
from skvi.runtime.device import has_fast_bfloat16, resolve_device
from skvi.runtime.graph import recorder
from skvi.runtime.random import draw_seed, make_generator, make_rng, matched_noise, shared_noise

# The budget of max_iter=None: at least so many optimiser steps, at least so many epochs, but the
# epochs end where this many steps are spent.
_MIN_STEPS, _MIN_EPOCHS, _MAX_STEPS = 2000, 20, 20_000
# early_stopping="auto" holds rows out from this many rows on; below, the few held-out rows would
# choose the epoch by chance.
_MIN_ROWS_TO_HOLD_OUT = 1000
_VALIDATION_DRAWS = 8
# precision="auto": so many multiplications in the largest product of a step; below, converting
# numbers costs more time than narrow products save.
_LEAST_PRODUCT_FOR_BFLOAT16 = 20_000_000
# A checkpoint may be continued under other values of these: no bit of training depends on them.
_FREE_TO_CHANGE = {"checkpoint", "n_mc", "verbose"}
# With which the posterior of a row is refined; other than those of its score.
_REFINING_DRAWS = 16
# So many draws of a block of rows are decoded at a time at most, and fewer of wide networks.
_MOST_DRAWS_PER_BLOCK = 64
_ROWS_PER_BLOCK = 64
_WARMUP_STEPS = 20
# Without held-out rows: training has settled when a window gains less, in nats per row.
_TRAINING_TOL = 0.01
# A floor above this (a tenth of the variance) tells of a constant or almost constant feature, not
# of a network that explains too much.
_ORDINARY_FLOOR = math.sqrt(0.1)
# Predicted deviations are compared with it in about so many rows.
_FLOOR_ROWS = 1000
# Attributes that only some likelihoods have.
_LEARNED = ("noise_std", "noise_floor", "dof", "dispersion")
# Priors with components.
_LEARNED_PRIORS = ("mixture", "vamp")
# Rows further out than this, in units of the spread, have squares outside the dtype's range.
_REACH = {torch.float32: 1e12, torch.float64: 1e100}

# What the door lets in besides finite dense numbers.
_ACCEPTED: dict[str, Any] = {"accept_sparse": "csr", "ensure_all_finite": "allow-nan"}

# Maps row indices (B,) to the rows, (B, D), and to the mask of their observed cells, if any miss.
_Reader = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class _Model(NamedTuple):
    """What a fit found: NumPy arrays and plain numbers only."""

    architecture: Architecture
    affine: Affine
    weights: dict[str, np.ndarray]
    optimizer: list[dict[str, np.ndarray]]
    seed: int
    n_epochs: int  # made so far, over all calls: seeds the draws of the next one

    def on(self, device: torch.device, dtype: torch.dtype) -> VAE:
        """Return the network on `device` in `dtype`; its values are copies."""
        return restore(self.architecture, self.weights, device, dtype)

    def draws_per_block(self, device: torch.device) -> int:
        """Return how many draws of each row of a block are decoded at a time.

        It does not depend on the rows. What does not fit the memory of a block is got from the
        system and given back for every block, which takes longer than what is computed there.
        """
        floats = _ROWS_PER_BLOCK * self.architecture.floats_per_draw
        return min(block_rows(floats, device, at_least=1), _MOST_DRAWS_PER_BLOCK)

    def noise(self, n_draws: int, like: Tensor, *, matched: bool = True) -> Tensor:
        """Return the draws that all rows of all calls share, shape (S, k).

        Averages are best over `matched` ones; of importance weights the mean must be right.
        """
        make = matched_noise if matched else shared_noise
        return make(n_draws, self.architecture.n_components, self.seed).to(like)


class VAETransformer(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, VariationalEstimator
):
    r"""Variational autoencoder: a non-linear factor model with an amortised posterior.

    The model, for rows :math:`x_n \in R^D` and codes :math:`z_n \in R^k`:

    .. math::
        z_n \sim N(0, I), \quad x_n | z_n \sim p(x | f(z_n)), \quad
        q(z_n | x_n) = N(\mu(x_n), \mathrm{diag}\, \sigma^2(x_n)),

    or another `prior` of z and a richer law q (`posterior_type`).
    The decoder f and the encoder :math:`(\mu, \log\sigma^2)` are each a linear map plus a
    multilayer perceptron. Training starts at factor analysis, the best model without the
    perceptrons (under another prior than the normal one, near it), at the posterior that the
    likelihood gives it, and climbs the bound on :math:`\log p(X)` by Adam with reparameterised
    gradients (Kingma & Welling 2014; Rezende et al. 2014). The weights that bend the networks have
    a normal prior of precision 20 (in fitted units), which holds for a hundred rows and fades for
    many; it enters no reported number.

    Parameters
    ----------
    n_components : int, default=2
        Length k of the code.
    hidden_layer_sizes : int or array-like of int, default=(256,)
        Hidden layers of the encoder; the decoder mirrors them. ``()``: both are linear, and the
        model is factor analysis.
    activation : {"logistic", "relu", "silu", "tanh"}, default="silu"
        Of the hidden layers.
    encoder, decoder : torch.nn.Module or callable, default=None
        Networks in place of the built-in ones. A module maps rows (N, n_in) to (N, n_out), or a
        callable ``(n_in, n_out)`` returns such a module, seeded by `random_state`. The
        encoder reads the columns in fitted units (n_in = n_features; categorical columns have one
        indicator per code) and returns k means, k unbounded log variances, then k (k - 1) / 2
        slopes for a "full" posterior or a context of k numbers for a "flow". The decoder reads
        k codes and returns one number per column ("gaussian": standardised means; "bernoulli":
        logits; "poisson": log rates; "gaussian_heteroscedastic" two per column; categorical
        columns one per code). Training starts from the values of a copy, not at factor analysis,
        and no prior acts on its weights; the module that was passed is never changed. Layers that
        mix rows or draw numbers (batch normalisation, dropout) are errors, and modules that
        torch.jit has compiled. Scores of a float64 X need networks that run in float64 too:
        constants belong into buffers.
    likelihood : str or dict, default="auto"
        What the decoder's output means, for all columns or, as a dict, for lists of them.

        - "gaussian": real numbers; one variance per column, learned unless `noise_std` gives it.
        - "gaussian_heteroscedastic": the decoder predicts mean and variance of every cell.
        - "student_t": real numbers with outliers; learned scale and degrees of freedom per column.
        - "bernoulli": values in {0, 1}.
        - "continuous_bernoulli": shares in [0, 1].
        - "poisson": counts 0, 1, 2, ... whose variance is their mean.
        - "negative_binomial": counts with more variance, ``m + dispersion m^2``.
        - "categorical": integer codes 0, 1, ..., K - 1 per column, as
          :class:`~sklearn.preprocessing.OrdinalEncoder` makes them; K is one more than the largest
          code of the column in `fit`. Means and reconstructions are the most probable code.
        - "auto": "bernoulli" if all values of X are 0 or 1, else "gaussian".

        A table of mixed columns has a dict from such names (without "auto") to lists of column
        names or indices, every column once:
        ``{"gaussian": ["age", "income"], "categorical": ["town"], "poisson": [7, 8]}``.
    noise_std : float or array-like of shape (n_features,), default=None
        Fixed standard deviations of Gaussian columns, in the units of X; entries of other columns
        are ignored. None: they are learned.
    prior : {"normal", "uniform", "mixture", "vamp"}, default="normal"
        Law p(z) of the codes.

        - "normal": standard normal.
        - "uniform": on the box from ``-sqrt(3)`` to ``sqrt(3)``, where codes have unit variance.
          The posterior is a normal one squashed into the box by the normal distribution function,
          and its KL is exact.
        - "mixture": a learned mixture of `n_prior_components` normals with diagonal covariances.
        - "vamp": a learned mixture of N(0, I) and of q(z|u) for `n_prior_components` learned
          pseudo-inputs u (Tomczak & Welling 2018), which begin at training rows.
    n_prior_components : int, default=20
        Components of the mixture or pseudo-inputs; other priors do not read it.
    posterior_type : {"diag", "full", "flow"}, default="diag"
        Law q(z|x) of a row's code: normal with a diagonal covariance; normal with a full one;
        or a diagonal normal pushed through four affine couplings (Dinh et al. 2017) that also
        read the row; one code alone stays normal.
    n_importance : int, default=1
        Draws K per row in training. Above 1, training climbs the importance-weighted bound
        ``E log 1/K sum_k p(x, z_k) / q(z_k|x)`` (Burda et al. 2016) by doubly reparameterised
        gradients (Tucker et al. 2019): a better decoder, at K times the work. `beta` and
        `kl_warmup` then are powers of ``p(z) / q(z|x)``; `free_bits` must be 0. Scores and `elbo_`
        remain the ELBO: :meth:`log_predictive` shows what was gained.
    beta : float, default=1.0
        Weight of the KL term in training (Higgins et al. 2017). Reported bounds have beta = 1.
    kl_warmup : int, default=0
        Epochs over which the weight of the KL rises linearly from 0 to `beta`, counted over all
        calls that continue a fit (Bowman et al. 2016; Sonderby et al. 2016).
    free_bits : float, default=0.0
        Nats per code and row, on average over a minibatch, that the KL may have without cost in
        training (Kingma et al. 2016): codes are then not given up early. A KL without a closed form
        (prior "mixture" or "vamp", posterior type "flow") has them for all codes together. Reported
        bounds have none.
    learning_rate_init : float, default=0.006
        Step of Adam after a warm-up of up to 20 steps in the first call; `fit` anneals it to zero
        along a cosine over its epochs, `partial_fit` keeps it.
    batch_size : int or "auto", default="auto"
        Rows per step. "auto": 128, or 256 from 10000 training rows on.
    max_iter : int, default=None
        Number of epochs of `fit`. None: as many as make 2000 optimiser steps, at least 20, but
        no more than make 20000 steps; one in any case.
    early_stopping : bool or "auto", default="auto"
        Whether to hold out rows, stop when their bound has not risen for `n_iter_no_change`
        epochs, and return to the epoch where it was highest; with ``n_importance > 1`` that is the
        importance-weighted bound, which training climbs. "auto": from 1000 rows on; fewer
        held-out rows would choose the epoch by chance. Without it all epochs are made.
    validation_fraction : float, default=0.1
        Share of the rows that early stopping holds out.
    n_iter_no_change : int, default=None
        Patience of early stopping, in epochs. Without held-out rows: the window that decides
        `converged_`. None: a fifth of the epochs, at least 10.
    n_mc : int, default=32
        Draws of z per row when scoring. From twice `n_components` on errors of scores are ten to
        two hundred times smaller; see :meth:`score_samples`.
    precision : {"auto", "bfloat16", "float32", "float64"}, default="auto"
        Of the arithmetic of training. "bfloat16": the products of the hidden layers read numbers
        of 8 binary digits, while weights, optimiser, losses and the recorded bounds stay
        float32. "auto": that, if the processor multiplies bfloat16 itself, if no column is a real
        number, and if `batch_size` times the largest matrix (such as 256 x 784 x 128) is at least
        20 million, from where it is faster; else "float32". "float64": everything. Custom networks
        multiply in float32 unless it is "float64". Scores and codes never use less than float32:
        see Notes.
    device : str or torch.device, default="auto"
        "auto": the device of X if it is a tensor, else CUDA if there is one, else the CPU. An
        explicit device that is missing is an error.
    random_state : int, RandomState instance or None, default=None
        Seeds the start, the minibatches, and the draws of training and of scoring. None takes
        fresh entropy. The global generators are neither read nor set; only while a callable
        builds a network torch's is set, for it to draw from, and then put back.
    warm_start : bool, default=False
        `fit` continues with the weights, the optimiser's moments, the units, the likelihood and
        the seed of the previous fit. The same X has the same rows held out again.
    checkpoint : str or path-like, default=None
        A file in which `fit` keeps its state: after the first epoch, then as often as takes a
        twentieth of the time. If the process is killed or the fit interrupted, the same call goes
        on from the file, on the same machine to the same bits. A file of a fit to other data or
        with other parameters, the values of a custom network included, is refused; a fit that ends
        deletes it. Fits at the same time, as in a parallel search, need files of their own.
        `partial_fit` takes no notice.
    verbose : int, default=0
        1 prints the bound every tenth epoch, 2 every epoch.

    Attributes
    ----------
    elbo_ : float
        The bound on ``log p(X)`` in nats: ``sum_n s_n score_samples(X)[n]``, over all rows given
        to `fit`. After `partial_fit` the last of `elbo_history_`, an estimate for its rows: the
        draws of their scores would take several times as long as their epoch.
    kl_ : float
        0.0: the weights are point estimates, so the parameters have no posterior to pay for.
    elbo_history_ : list of float
        One per epoch: the bound with beta = 1, estimated while the weights were changing, from
        `n_importance` draws per training row, averaged outside the logarithm: always the ELBO.
        Total nats: the mean times the total weight of X.
    validation_elbo_history_ : list of float
        One per epoch with early stopping, else empty: the bound of the held-out rows with fixed
        draws, on the same scale (mean times the total weight of X). With ``n_importance > 1`` the
        importance-weighted bound of so many draws.
    n_iter_ : int
        Epochs of the last `fit` and of the calls of `partial_fit` since.
    converged_ : bool
        True if early stopping ended the fit; if ``max_iter=None`` and its whole schedule was
        made; or if, without held-out rows, the last `n_iter_no_change` epochs gained less than
        0.01 nats per row on as many before. False after `partial_fit`.
    active_units_ : ndarray of bool, shape (n_components,)
        ``Var_x E_q[z] > 0.01 Var_p[z]`` (Burda et al. 2016, section 5.2): which codes are in use.
        The variance of the prior is 1 unless it is learned.
    likelihood_ : str or dict
        The name in use; of a mixed table, a dict from names to lists of column indices.
    noise_std_ : ndarray of shape (n_features,)
        Gaussian: standard deviation of each column given its code, in the units of X. Student's
        t: its scale. NaN for other columns of a mixed table; absent if there are only others.
    noise_floor_ : ndarray of shape (n_features,)
        Learned Gaussian, heteroscedastic and Student's t only: the lower limit of noise standard
        deviations, a 300th of the column's range in the first fit (Student's t: a 50th of its
        spread by the quartiles). A constant column has unit variance instead, since nothing
        informs it.
    dof_ : ndarray of shape (n_features,)
        Student's t only: degrees of freedom, between 1 and 100.
    dispersion_ : ndarray of shape (n_features,)
        Negative binomial only: the variance of a cell of mean m is ``m + dispersion m^2``.
    n_samples_seen_ : float
        Total weight of the rows of the last `fit` and of the calls of `partial_fit` since.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only if X had feature names that are all strings.

    Notes
    -----
    Real columns are standardised inside (for Student's t by median and quartiles), and every
    density is that of the X that was passed; scores of a mixed table add densities and masses.
    Cells that are NaN are missing at random: likelihoods are summed over the observed cells, the
    encoder reads the column's mean in place of the others, and a row without any observed cell
    has the prior as its posterior and the score 0 (Mattei & Frellsen 2019). Under a "mixture" or
    "vamp" prior it has a normal law with the prior's mean and variances, and a score a little below
    0.
    With these priors, and with "flow", the KL is an average over the draws of the score, and may
    come out below zero for a row. Means and standard deviations of a flow's codes are those of 256
    fixed draws.
    A scipy.sparse X gives what the same dense X gives. Every method that takes rows takes it, but
    `impute`, whose answer is dense; cells without an entry are zeros, entries may be NaN. Rows are
    made dense batch by batch whenever they are visited, so that memory grows with the entries and
    not with the cells, at the price of a conversion in each epoch.
    Networks train in float32 unless `precision` says otherwise; a float64 X is scored and
    transformed in float64, a float32 X in float32.

    References
    ----------
    Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114.
    Rezende, Mohamed & Wierstra (2014), Stochastic backpropagation, arXiv:1401.4082.
    Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519.
    Mattei & Frellsen (2018), Leveraging the exact likelihood of deep latent variable models,
    arXiv:1802.04826.
    Mattei & Frellsen (2019), MIWAE: deep generative modelling and imputation of incomplete data
    sets, arXiv:1812.02633.
    Lucas et al. (2019), Don't blame the ELBO!, arXiv:1911.02469.
    Tomczak & Welling (2018), VAE with a VampPrior, arXiv:1705.07120.
    Tucker et al. (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives,
    arXiv:1810.04152.
    Kim et al. (2018), Semi-amortized variational autoencoders, arXiv:1802.02550.
    Cremer, Li & Duvenaud (2018), Inference suboptimality in variational autoencoders,
    arXiv:1801.03558.
    Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803.
    Loaiza-Ganem & Cunningham (2019), The continuous Bernoulli, arXiv:1907.06845.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skvi import VAETransformer
    >>> X = load_iris().data
    >>> vae = VAETransformer(random_state=0).fit(X)
    >>> vae.transform(X).shape
    (150, 2)
    >>> bool(abs(vae.elbo_ - vae.score_samples(X).sum()) < 1e-9)
    True
    """

    _model: _Model
    elbo_history_: list[float]
    n_samples_seen_: float

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "encoder": [None, callable],
        "decoder": [None, callable],
        "likelihood": [StrOptions({"auto", *LIKELIHOODS}), dict],
        "noise_std": [None, Interval(Real, 0.0, None, closed="neither"), "array-like"],
        "prior": [StrOptions(set(PRIORS))],
        "n_prior_components": [Interval(Integral, 1, None, closed="left")],
        "posterior_type": [StrOptions(set(POSTERIORS))],
        "n_importance": [Interval(Integral, 1, None, closed="left")],
        "beta": [Interval(Real, 0.0, None, closed="left")],
        "kl_warmup": [Interval(Integral, 0, None, closed="left")],
        "free_bits": [Interval(Real, 0.0, None, closed="left")],
        "learning_rate_init": [Interval(Real, 0.0, None, closed="neither")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [None, Interval(Integral, 1, None, closed="left")],
        "early_stopping": [StrOptions({"auto"}), "boolean"],
        "validation_fraction": [Interval(Real, 0.0, 1.0, closed="neither")],
        "n_iter_no_change": [None, Interval(Integral, 1, None, closed="left")],
        "n_mc": [Interval(Integral, 1, None, closed="left")],
        "precision": [StrOptions({"auto", "float32", "bfloat16", "float64"})],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "checkpoint": [None, str, os.PathLike],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden_layer_sizes: Any = (256,),
        activation: str = "silu",
        encoder: Any = None,
        decoder: Any = None,
        likelihood: str | dict[str, Any] = "auto",
        noise_std: Any = None,
        prior: str = "normal",
        n_prior_components: int = 20,
        posterior_type: str = "diag",
        n_importance: int = 1,
        beta: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        learning_rate_init: float = 0.006,
        batch_size: int | str = "auto",
        max_iter: int | None = None,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = None,
        n_mc: int = 32,
        precision: str = "auto",
        device: str | torch.device = "auto",
        random_state: Any = None,
        warm_start: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.noise_std = noise_std
        self.prior = prior
        self.n_prior_components = n_prior_components
        self.posterior_type = posterior_type
        self.n_importance = n_importance
        self.beta = beta
        self.kl_warmup = kl_warmup
        self.free_bits = free_bits
        self.learning_rate_init = learning_rate_init
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.n_mc = n_mc
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.verbose = verbose

    # -- fitting ----------------------------------------------------------------------------------

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Maximise the bound on ``log p(X)``.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            Numbers, or NaN for cells that are missing; at least two rows of positive weight. Sparse
            rows (CSR; other formats are converted) are never made dense all at once: see Notes.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None
            How often each row counts, in the units of X, the losses, the bounds and against the
            prior of the networks' weights: an integer weight stands for that many repeated rows.
            Rows of weight zero are left out. Weights that sum to one are one row to that prior,
            which then keeps the networks nearly linear: scale them to sum to the number of rows.
            The automatic batch size, number of epochs and early stopping count rows as they are.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For invalid parameters or data; for values that their likelihood cannot explain; for a
            `warm_start` from a fit of another shape or other feature names; for a `checkpoint` of
            another fit; if training diverges.

        Warns
        -----
        ConvergenceWarning
            If an explicit `max_iter` ended the fit before it had converged (see `converged_`);
            if features sit on the noise floor; and if no code is in use (see `active_units_`).
        """
        with self._all_or_nothing():
            model = self._model if self._continues() else None
            door = self._fit_door(X, ensure_min_samples=2, **_ACCEPTED)
            weight = self._weights(sample_weight, door.X)
            X, weight = without_weightless(weight, _canonical(door.X))
            n_validation = self._n_validation(X.shape[0])
            n_train = X.shape[0] - n_validation
            batch_size = self._batch_size(n_train)
            n_batches = math.ceil(n_train / batch_size)
            n_epochs = self._n_epochs(n_batches)
            architecture = self._planned(X, model)
            keeper = self._keeper(X, weight, model, architecture, door.device)
            try:
                descent = self._train(
                    X,
                    weight,
                    door.device,
                    model,
                    architecture,
                    n_before=0.0,
                    n_validation=n_validation,
                    batch_size=batch_size,
                    n_epochs=n_epochs,
                    schedule=Schedule(_WARMUP_STEPS if model is None else 0, anneal=True),
                    patience=Patience(self._patience(n_epochs), _TRAINING_TOL),
                    keeper=keeper,
                )
                scores = self._score_rows(X, door.device)
                self._check_fitted_values(scores)
            except ValueError:
                # It would fail again; with other parameters the file would be refused.
                if keeper is not None:
                    keeper.remove()
                raise
            self.elbo_ = float(weight @ scores)
            self.n_iter_ = len(descent.history)
            self.converged_ = self.max_iter is None or descent.status is Status.CONVERGED
        if keeper is not None:
            keeper.remove()
        if not self.converged_:
            warnings.warn(
                f"max_iter={self.max_iter} epochs ended the fit before it had converged; "
                "increase max_iter, or use max_iter=None.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._warn_of_degeneracy(X, door.device)
        return self

    @fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Make one epoch over a block of rows.

        The first call decides the units and the likelihood from its block and finds the linear
        start there, so it should be representative: a few hundred rows in random order. Later
        calls continue with the optimiser's moments, at a constant learning rate; nothing is held
        out, and nothing scored: `elbo_` is what the epoch saw while it trained.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            At least two rows in the first call.
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As `fit`; and if the number of features or a parameter that shapes the network has
            changed since the first call.
        """
        self._validate_params()  # scikit-learn looks at those of the first call only
        with self._all_or_nothing():
            model = getattr(self, "_model", None)
            n_least = 2 if model is None else 1
            door = self._door(X, reset=model is None, ensure_min_samples=n_least, **_ACCEPTED)
            weight = self._weights(sample_weight, door.X)
            X, weight = without_weightless(weight, _canonical(door.X))
            history = [] if model is None else self.elbo_history_
            n_before = 0.0 if model is None else self.n_samples_seen_
            self._train(
                X,
                weight,
                door.device,
                model,
                self._planned(X, model),
                n_before=n_before,
                n_validation=0,
                batch_size=self._batch_size(X.shape[0]),
                n_epochs=1,
                schedule=Schedule(_WARMUP_STEPS if model is None else 0, anneal=False),
                patience=Patience(1, _TRAINING_TOL),
            )
            self.elbo_history_ = history + self.elbo_history_
            self.elbo_ = self.elbo_history_[-1]
            self.n_iter_ = len(self.elbo_history_)
            self.converged_ = False
        return self

    @torch.inference_mode(False)  # gradients, whatever mode the caller is in
    def _train(
        self,
        X: np.ndarray,
        weight: np.ndarray,
        device: torch.device,
        model: _Model | None,
        architecture: Architecture,
        *,
        n_before: float,
        n_validation: int,
        batch_size: int,
        n_epochs: int,
        schedule: Schedule,
        patience: Patience,
        keeper: Checkpoint | None = None,
    ) -> Descent:
        """Run epochs from `model` or from a fresh start, and publish what they found.

        What `keeper` has saved goes on instead, if there is anything.
        """
        saved = None if keeper is None else keeper.saved
        n_importance = int(self.n_importance)
        if model is None:
            affine, floor = fitted_units(X, weight, architecture.blocks)
            seed = draw_seed(self.random_state) if saved is None else int(saved["seed"])
            architecture, n_epochs_before = self._with_custom(architecture, seed), 0
        else:
            affine, seed, n_epochs_before = model.affine, model.seed, model.n_epochs
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        self._check_reach(X, architecture.blocks, affine, dtype)

        # Of the same X, a warm start holds the same rows out, so that they are never trained on: on
        # another device too, whose generator gives other numbers.
        sets = np.split(make_rng(seed).permutation(X.shape[0]), [n_validation])
        held_out, rows = (torch.from_numpy(part).to(device) for part in sets)
        n_trained = n_before + float(weight[sets[1]].sum())
        generator = make_generator(_derive_seed(seed, n_epochs_before), device)
        w = torch.tensor(weight, device=device)
        for part in (held_out, rows):
            w[part] = _of_mean_one(w[part])
        zero = None
        if issparse(X):
            cells = _read_sparse(X, affine, device, dtype)
            zero = torch.from_numpy((0.0 - affine.shift) / affine.scale).to(device, dtype)
        else:
            resident = split_missing(_resident(X, affine, device, dtype))
            cells = self._reader(*resident, generator)
        if model is None:
            net = build(architecture, device, dtype)
            noise_floor = torch.from_numpy(floor).to(device)
            training = start.TrainingRows(len(rows), lambda i: cells(rows[i]), device, zero)
            start.initialise(
                net, training, w[rows], noise_floor, generator, one_draw=n_importance == 1
            )
        else:
            net = model.on(device, dtype)
        w = w.to(dtype)
        net.set_product_dtype(self._product_dtype(architecture, batch_size, device))
        optimizer = adam(
            objective.parameter_groups(net, n_trained),
            self.learning_rate_init,
            None if model is None else model.optimizer,
        )

        n_batches = math.ceil(len(rows) / batch_size)
        if saved is not None:
            with torch.no_grad():
                for name, value in net.named_buffers():
                    value.copy_(torch.from_numpy(saved[f"buffer/{name}"]))

        def loss_and_bound(batch: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            beta: float | Tensor = self.beta
            if self.kl_warmup:
                n_steps = step + (n_epochs_before * n_batches + 1)
                beta = beta * (n_steps / (self.kl_warmup * n_batches + 1)).clamp_max(1.0)
            several = (n_importance,) if n_importance > 1 else ()
            noise = w.new_empty(*several, len(batch), architecture.n_components)
            noise.normal_(generator=generator)
            return objective.training_loss(
                net,
                *cells(batch),
                w.index_select(0, batch),
                noise,
                beta=beta,
                free_bits=self.free_bits,
            )

        total = float(weight.sum())
        # What brings mean bounds to the units of X. Sets of rows with holes differ in it.
        log_scale = np.broadcast_to(_log_scale(X, affine), X.shape[0])
        of_held_out, of_rows = (
            -weighted_mean(log_scale[part], weight[part]) if len(part) else 0.0 for part in sets
        )

        def report(epoch: int, bound: float, validation: float | None) -> None:
            validation = None if validation is None else validation + of_held_out
            name = type(self).__name__
            announce_epoch(name, epoch, bound + of_rows, validation, verbose=self.verbose)

        n_draws = math.ceil(_VALIDATION_DRAWS / n_importance) * n_importance
        make = matched_noise if n_importance == 1 else shared_noise
        noise = make(n_draws, architecture.n_components, seed).to(w)
        noise = noise.reshape(-1, n_importance, architecture.n_components)

        def validate() -> Tensor:
            return _mean_bound(net, cells, w, held_out, noise, architecture.floats_per_draw)

        def save(export: Callable[[], State]) -> None:
            if keeper is not None:
                buffers = {f"buffer/{n}": to_numpy(value) for n, value in net.named_buffers()}
                keeper.write(lambda: {**export(), **buffers, "seed": np.array(seed)})

        # Networks of the user's and sparse rows do on the host what a record cannot hold.
        is_own = architecture.encoder is None and architecture.decoder is None
        record = recorder(generator) if is_own and not issparse(X) else None
        descent = descend(
            loss_and_bound,
            [p for group in optimizer.param_groups for p in group["params"]],
            optimizer,
            rows,
            batch_size=batch_size,
            n_epochs=n_epochs,
            schedule=schedule,
            generator=generator,
            patience=patience,
            validate=validate if n_validation else None,
            report=report,
            state=saved,
            save=save,
            record=record,
        )
        if descent.status is Status.NON_FINITE:
            raise ValueError(
                f"Training diverged: the loss is not finite with learning_rate_init="
                f"{self.learning_rate_init:g}, nor with a 32nd of it. Lower "
                "learning_rate_init, or look for outliers in X and in sample_weight."
            )
        self._model = _Model(
            architecture,
            affine,
            export(net),
            export_state(optimizer),
            seed,
            n_epochs_before + len(descent.history),
        )
        self.n_samples_seen_ = n_before + total
        self.elbo_history_ = [total * (bound + of_rows) for bound in descent.history]
        self.validation_elbo_history_ = [
            total * (bound + of_held_out) for bound in descent.validation_history
        ]
        self._publish(X, weight, device)
        return descent

    def _reader(self, x: Tensor, observed: Tensor | None, generator: torch.Generator) -> _Reader:
        """Return what training and validation see of the resident rows.

        A subclass may draw afresh here, from `generator`, at every visit of a row.
        """

        def cells(batch: Tensor) -> tuple[Tensor, Tensor | None]:
            # index_select copies rows; indexing with brackets copies numbers.
            known = None if observed is None else observed.index_select(0, batch)
            return x.index_select(0, batch), known

        return cells

    def _publish(self, X: np.ndarray, weight: np.ndarray, device: torch.device) -> None:
        """Set the attributes that follow from the network and the rows it was fitted to."""
        self._n_features_out = self._model.architecture.n_components
        blocks = self._model.architecture.blocks
        self.likelihood_ = (
            {block.name: list(block.columns) for block in blocks}
            if isinstance(self.likelihood, dict) or len(blocks) > 1
            else blocks[0].name
        )
        for name in _LEARNED:
            self.__dict__.pop(f"{name}_", None)
        likelihood = self._model.on(torch.device("cpu"), torch.float64).likelihood
        scale = self._model.affine.scale
        for name, values in likelihood.learned().items():
            unit = scale if name.startswith("noise") else 1.0
            setattr(self, f"{name}_", unit * to_numpy(values))
        self.kl_ = 0.0
        means = self._encode(X, device)[0].astype(np.float64)
        self._check_fitted_values(means)
        centre = np.array([weighted_mean(column, weight) for column in means.T])
        spread = [weighted_mean(column, weight) for column in ((means - centre) ** 2).T]
        self.active_units_ = np.array(spread) > 0.01 * self._prior_variance()

    def _check_fitted_values(self, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise ValueError(
                "The fitted codes or scores are not finite: learning_rate_init="
                f"{self.learning_rate_init:g} is too large for these data."
            )

    def _prior_variance(self) -> np.ndarray:
        """Return the variance of each code under the prior, (k,)."""
        if self.prior not in _LEARNED_PRIORS:
            return np.ones(self._model.architecture.n_components)
        like = torch.empty(0, dtype=torch.float64)
        with torch.no_grad():
            law = self._model.on(like.device, like.dtype).prior_law(like)
            return to_numpy(law.moments()[1])

    def _warn_of_degeneracy(self, X: np.ndarray, device: torch.device) -> None:
        if not self.active_units_.any():
            warnings.warn(
                "No code is in use: the posterior of every row is the prior, and decoding ignores "
                "it. Lower beta or raise max_iter; if that does not help, the features of X have "
                "nothing in common that a code could explain.",
                ConvergenceWarning,
                stacklevel=4,
            )
        on_floor = self._on_floor(X, device)
        if on_floor.size:
            warnings.warn(
                f"The noise of features {on_floor.tolist()} is on its floor (see "
                "noise_floor_): they are an exact function of the code, and without the "
                "floor the bound would grow for ever. Drop duplicated or collinear features, "
                "lower n_components or hidden_layer_sizes, or read scores as relative to it.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _on_floor(self, X: np.ndarray, device: torch.device) -> np.ndarray:
        """Return the columns whose noise is on its floor; if it is predicted, in most rows."""
        if not hasattr(self, "noise_floor_"):
            return np.empty(0, dtype=int)
        std = getattr(self, "noise_std_", np.full_like(self.noise_floor_, np.nan))
        at_floor = std < math.sqrt(2.0) * self.noise_floor_
        predicted = np.isnan(std) & ~np.isnan(self.noise_floor_)
        if predicted.any():
            at_floor |= predicted & self._mostly_on_floor(X, device)
        ordinary = self.noise_floor_ < _ORDINARY_FLOOR * self._model.affine.scale
        return np.flatnonzero(at_floor & ordinary)

    def _mostly_on_floor(self, X: np.ndarray, device: torch.device) -> np.ndarray:
        """Return for every column whether its variance is near the floor in most of some rows."""
        some = X[:: math.ceil(X.shape[0] / _FLOOR_ROWS)]
        net = self._model.on(device, torch.float64)
        codes = torch.tensor(self._encode(some, device)[0], dtype=torch.float64, device=device)
        floor = torch.from_numpy(self.noise_floor_ / self._model.affine.scale).to(device)
        count = torch.zeros_like(floor)
        with torch.no_grad():
            for z in codes.split(block_rows(self._model.architecture.floats_per_draw, device)):
                count += (net.likelihood.variance(net.decoder(z)) < 2.0 * floor.square()).sum(0)
        return to_numpy(2.0 * count > len(codes))

    def _planned(self, X: np.ndarray, model: _Model | None) -> Architecture:
        """Return what is to be trained, without the networks passed, or raise if X does not fit.

        What continues `model` has its networks.
        """
        if self.n_importance > 1 and self.free_bits > 0:
            raise ValueError(
                f"free_bits={self.free_bits:g} spares a KL term, which the importance-weighted "
                f"bound of n_importance={self.n_importance} does not have; set free_bits=0 or "
                "n_importance=1."
            )
        if model is not None:
            self._check_continues(model, X)
            check_support(X, model.architecture.blocks, self._names())
            return model.architecture
        if X.shape[0] < 2:
            raise ValueError(
                "There is only 1 sample of positive weight; a spread needs at least two."
            )
        check_observed(X, self._names())
        blocks = self._blocks(X)
        check_support(X, blocks, self._names())
        return self._architecture(X.shape[1], with_levels(blocks, X))

    def _architecture(self, n_features: int, blocks: tuple[Block, ...]) -> Architecture:
        try:
            sizes = np.atleast_1d(np.asarray(self.hidden_layer_sizes))
        except ValueError:  # lists of several lengths
            sizes = np.empty((0, 0))
        if sizes.ndim != 1 or (sizes.size and (sizes.dtype.kind not in "iu" or sizes.min() < 1)):
            raise ValueError(
                f"hidden_layer_sizes={self.hidden_layer_sizes!r} must hold integers of at least 1."
            )
        hidden = tuple(int(size) for size in sizes)
        n_components = int(self.n_components)
        return Architecture(
            n_features,
            n_components,
            hidden,
            self.activation,
            blocks,
            self.prior,
            int(self.n_prior_components) if self.prior in _LEARNED_PRIORS else 0,
            self.posterior_type,
        )

    def _with_custom(self, architecture: Architecture, seed: int) -> Architecture:
        """Return `architecture` with copies of the networks that were passed."""
        customs: dict[str, Custom | None] = {}
        for name, (n_in, n_out) in zip(
            ("encoder", "decoder"), widths_of(architecture), strict=True
        ):
            given = getattr(self, name)
            if given is None:
                continue
            if isinstance(given, torch.nn.Module):
                module = given
            else:
                with torch.random.fork_rng(devices=[]):
                    # that of the CPU alone, which is put back; manual_seed would touch the GPU's
                    torch.default_generator.manual_seed(_derive_seed(seed, 0) + len(customs))
                    try:
                        module = given(n_in, n_out)
                    except Exception as error:
                        raise ValueError(
                            f"{name} fails when it is called with the widths ({n_in}, {n_out}), "
                            f"for which it must return a torch.nn.Module: {error}"
                        ) from error
            customs[name] = checked_custom(module, n_in, n_out, name)
        return architecture._replace(encoder=customs.get("encoder"), decoder=customs.get("decoder"))

    def _names(self) -> np.ndarray | None:
        return getattr(self, "feature_names_in_", None)

    def _blocks(
        self, X: np.ndarray, previous: tuple[Block, ...] | None = None
    ) -> tuple[Block, ...]:
        return requested_blocks(self.likelihood, self.noise_std, X, self._names(), previous)

    def _check_continues(self, model: _Model, X: np.ndarray) -> None:
        known = model.architecture._replace(blocks=without_levels(model.architecture.blocks))
        networks = known.encoder, known.decoder
        known = known._replace(encoder=None, decoder=None)
        changed = self._architecture(X.shape[1], self._blocks(X, known.blocks)) != known
        if not changed and any(
            value is not None for value in (self.encoder, self.decoder, *networks)
        ):
            now = self._with_custom(model.architecture._replace(encoder=None, decoder=None), 0)
            # what modules print is their structure; their values have moved on
            changed = repr((now.encoder, now.decoder)) != repr(networks)
        if changed:
            raise ValueError(
                "The previous fit cannot be continued: the number of features, n_components, "
                "hidden_layer_sizes, activation, encoder, decoder, likelihood, noise_std, prior, "
                "n_prior_components or posterior_type has changed. Restore them, set "
                "warm_start=False, or fit a clone."
            )

    def _keeper(
        self,
        X: np.ndarray,
        weight: np.ndarray,
        model: _Model | None,
        architecture: Architecture,
        device: torch.device,
    ) -> Checkpoint | None:
        """Return the checkpoint of this fit, if there is to be one."""
        if self.checkpoint is None:
            return None
        params = self.get_params(deep=False)
        identity = {
            name: _described(params[name]) for name in sorted(params.keys() - _FREE_TO_CHANGE)
        }
        # Not what was asked for: a state of generators is good for one kind of device.
        identity |= {"device": device.type}
        identity |= {"X": _digest(X), "sample_weight": _digest(weight)}
        # Two callables may print the same text: their networks are told apart by their values.
        bare = architecture._replace(encoder=None, decoder=None)
        built = self._with_custom(bare, 0)
        for name, custom in (("encoder", built.encoder), ("decoder", built.decoder)):
            if custom is not None:
                values = [_digest(to_numpy(v)) for v in custom.module.state_dict().values()]
                identity[name] = " ".join([_described(custom.module), *values])
        if model is not None:
            identity["the fit before it"] = " ".join(_digest(w) for w in model.weights.values())
        return Checkpoint(self.checkpoint, identity)

    def _n_validation(self, n_rows: int) -> int:
        hold_out = self.early_stopping
        if hold_out == "auto":
            hold_out = n_rows >= _MIN_ROWS_TO_HOLD_OUT
        if not hold_out:
            return 0
        n_validation = math.ceil(self.validation_fraction * n_rows)
        if n_rows - n_validation < 2:
            raise ValueError(
                f"early_stopping with validation_fraction={self.validation_fraction:g} leaves "
                f"{n_rows - n_validation} of {n_rows} rows for training, which needs at least 2; "
                "lower it, or set early_stopping=False."
            )
        return n_validation

    def _product_dtype(
        self, architecture: Architecture, batch_size: int, device: torch.device
    ) -> torch.dtype | None:
        """Return the dtype of the hidden layers' products in training; None: no other than all."""
        if self.precision != "auto":
            return torch.bfloat16 if self.precision == "bfloat16" else None
        widths = (architecture.n_outputs, *architecture.hidden_layer_sizes)
        largest = max((n * m for n, m in itertools.pairwise(widths)), default=0)
        pays = batch_size * largest >= _LEAST_PRODUCT_FOR_BFLOAT16
        # Real columns may be known to a 300th of their range: more digits than bfloat16 has.
        real = standardised_columns(architecture.blocks, architecture.n_features).any()
        narrow = pays and not real and has_fast_bfloat16(device)
        return torch.bfloat16 if narrow else None

    def _batch_size(self, n_train: int) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        return 128 if n_train < 10_000 else 256

    def _n_epochs(self, n_batches: int) -> int:
        if self.max_iter is not None:
            return int(self.max_iter)
        wanted = max(_MIN_EPOCHS, math.ceil(_MIN_STEPS / n_batches))
        return min(wanted, math.ceil(_MAX_STEPS / n_batches))

    def _patience(self, n_epochs: int) -> int:
        if self.n_iter_no_change is not None:
            return int(self.n_iter_no_change)
        return max(10, n_epochs // 5)

    # -- codes and rows ---------------------------------------------------------------------------

    def transform(self, X: Any, return_std: bool = False) -> Any:
        """Return the posterior mean of each row's code.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        return_std : bool, default=False
            Whether to return the posterior standard deviations as well.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components)
            In the dtype of X.
        std : ndarray of shape (n_samples, n_components)
            Only with `return_std`.
        """
        check_is_fitted(self)
        mean, std = self._encode(*self._checked(X))
        return (mean, std) if return_std else mean

    def inverse_transform(self, Z: Any) -> np.ndarray:
        """Return the decoder's mean ``E[x|z]`` in the units of X.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_components)

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            In the dtype of Z.

        Raises
        ------
        ValueError
            If Z has another number of columns, if the mean leaves the range of its dtype, or for
            codes outside the box of a uniform prior.
        """
        check_is_fitted(self)
        device = resolve_device(self.device, Z)
        Z = check_array(to_host(Z), dtype=[np.float64, np.float32], input_name="Z")
        if Z.shape[1] != self._model.architecture.n_components:
            raise ValueError(
                f"Z has {Z.shape[1]} columns, but {type(self).__name__} was fitted with "
                f"n_components={self._model.architecture.n_components}."
            )
        largest = np.abs(Z).max()
        if self._model.architecture.prior == "uniform" and largest > HALF_WIDTH * (1.0 + 1e-6):
            raise ValueError(
                f"Z has a code of magnitude {largest:g}, but the uniform prior ends at sqrt(3): "
                "codes outside its box have no meaning. Clip them to [-sqrt(3), sqrt(3)]."
            )
        return self._decode(Z, device)

    def reconstruct(self, X: Any) -> np.ndarray:
        """Return ``E[x|z]`` at the posterior mean of each row's code, in the units of X.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)

        Returns
        -------
        X_reconstructed : ndarray of shape (n_samples, n_features)
        """
        check_is_fitted(self)
        X, device = self._checked(X)
        return self._decode(self._encode(X, device)[0], device)

    def posterior(self, X: Any, *, refine: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of q(z|x), row by row.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        refine : int, default=0
            Steps of optimisation of each row's posterior; see :meth:`score_samples`.

        Returns
        -------
        means, stds : ndarray of shape (n_samples, n_components)
            In the dtype of X.
        """
        check_is_fitted(self)
        refine = check_count(refine, "refine", least=0)
        return self._encode(*self._checked(X), refine)

    def interpolate(self, x0: Any, x1: Any, n: int = 10) -> np.ndarray:
        """Return the decoded means of codes on the straight line between those of two rows.

        The line stays inside the box of a uniform prior; under a learned prior it may cross regions
        that no row uses.

        Parameters
        ----------
        x0, x1 : array-like of shape (n_features,) or (1, n_features)
        n : int, default=10
            Number of points; the first is ``reconstruct(x0)``, the last ``reconstruct(x1)``.

        Returns
        -------
        X : ndarray of shape (n, n_features)
            In the units of X.
        """
        check_is_fitted(self)
        n = check_count(n, "n")
        ends = []
        for row in (x0, x1):
            row = to_host(row)
            if np.ndim(row) == 1:
                # a row of a frame knows the names of its columns
                row = row.to_frame().T if hasattr(row, "iloc") else np.reshape(row, (1, -1))
            X, device = self._checked(row)
            if X.shape[0] != 1:
                raise ValueError(f"interpolate goes from one row to one row; got {X.shape[0]}.")
            ends.append(self._encode(X, device)[0])
        share = np.linspace(0.0, 1.0, n, dtype=ends[0].dtype)[:, None]
        return self._decode((1.0 - share) * ends[0] + share * ends[1], device)

    def impute(self, X: Any, n_importance: int = 1000, return_std: bool = False) -> Any:
        r"""Fill missing cells with their mean given the observed cells of the row.

        .. math::
            E[x_j | x_o] \approx \sum_s \bar w_s E[x_j | z_s], \qquad
            \bar w_s \propto \frac{p(x_o|z_s)\,p(z_s)}{q(z_s|x_o)}, \qquad z_s \sim q(z|x_o)

        Mattei & Frellsen (2019), equation 12. Categorical cells get their most probable code.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            NaN where cells are missing.
        n_importance : int, default=1000
            Number of draws, shared by all rows. Time grows with it, memory does not.
        return_std : bool, default=False
            Whether to return how uncertain each cell is.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            A copy; observed cells are as they were.
        std : ndarray of shape (n_samples, n_features)
            Only with `return_std`: standard deviations given the observed cells, in the units of
            X, zero for observed cells; for a code of probability p that of its indicator,
            ``sqrt(p (1 - p))``.
        """
        check_is_fitted(self)
        n_importance = check_count(n_importance, "n_importance")
        X, device = self._checked(X, accept_sparse=False)

        def evaluate(net: VAE, x: Tensor, observed: Tensor | None) -> tuple[Tensor, ...]:
            noise = self._model.noise(n_importance, x, matched=False)
            return objective.predictive_moments(net, x, observed, noise, n_draws)

        missing = np.isnan(X)
        filled, std = X.copy(), np.zeros_like(X)
        some = missing.any(axis=1)
        if some.any():
            # every cell of which has two moments
            n_draws = min(n_importance, max(1, self._model.draws_per_block(device) // 2))
            mean, var = self._evaluate(X[some], device, 2 * n_draws, evaluate)
            filled[missing] = self._original_units(mean)[missing[some]]
            std[missing] = (np.sqrt(var) * self._model.affine.scale)[missing[some]]
        return (filled, std) if return_std else filled

    def sample(
        self, n_samples: int = 1, random_state: Any = None, *, mean: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw codes from the prior and rows from the likelihood given them.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            None uses the estimator's `random_state`; an int there gives the same rows every time.
        mean : bool, default=False
            Whether rows are the likelihood's mean, ``inverse_transform(Z)``, without its noise. The
            codes are the same either way.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
        Z : ndarray of shape (n_samples, n_components)
            The code of each row.
        """
        check_is_fitted(self)
        n_samples = check_count(n_samples, "n_samples")
        seed = draw_seed(self.random_state if random_state is None else random_state)
        device = resolve_device(self.device)
        net = self._model.on(device, torch.float64)
        # Draws are the host's: the same on every device. CUDA's of large counts would use random
        # numbers twice, in one block and in the next (pytorch issue 136750).
        generator, cpu = make_generator(seed), torch.device("cpu")
        host = net if device == cpu else self._model.on(cpu, torch.float64)
        law = host.likelihood
        like = torch.empty(0, dtype=torch.float64, device=cpu)
        x = []
        with torch.no_grad():
            z = host.prior.code(host.prior_law(like).sample(n_samples, generator))
            for block in z.split(block_rows(self._model.architecture.floats_per_draw, cpu)):
                output = net.decoder(block.to(device)).cpu()
                x.append(to_numpy(law.mean(output) if mean else law.sample(output, generator)))
        return self._original_units(np.concatenate(x)), to_numpy(z)

    # -- scores -----------------------------------------------------------------------------------

    def score_samples(self, X: Any, *, refine: int = 0) -> np.ndarray:
        r"""Return each row's bound on ``log p(x)``.

        .. math:: \mathrm{ELBO}_n = E_q[\log p(x_n|z)] - \mathrm{KL}(q(z|x_n) \| p(z))

        The expectation is a mean over `n_mc` draws, chosen once and shared by all rows, so that
        a row's score does not depend on the rows beside it. Their second moments are those of the
        normal law if ``n_mc >= 2 * n_components``: the mean is then exact where ``log p(x|z)`` is
        quadratic in z, as for a linear Gaussian decoder, and close to exact elsewhere.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        refine : int, default=0
            Steps of gradient ascent that every row's posterior makes from the encoder's answer
            (Kim et al. 2018), by 16 draws other than those of the score. The better of before and
            after is kept, so that no row loses; a choice by the draws of the score, which makes
            it too high by less than their error. 100 steps cost 50 to 150 times the plain score.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            Nats, of densities of the X that was passed; of masses for discrete columns.
        """
        check_is_fitted(self)
        refine = check_count(refine, "refine", least=0)
        return self._score_rows(*self._checked(X), refine)

    def amortisation_gap(self, X: Any, refine: int = 100) -> np.ndarray:
        """Return how much of each row's bound the encoder gives away.

        The encoder answers for all rows at once; a posterior that is optimised for one row alone
        has a higher bound: ``score_samples(X, refine=refine) - score_samples(X)``. Where the gap is
        large, a larger encoder or more training would help (Cremer, Li & Duvenaud 2018).

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        refine : int, default=100
            Steps of optimisation; at least 1.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            Nats, never negative.
        """
        check_is_fitted(self)
        refine = check_count(refine, "refine")
        X, device = self._checked(X)
        gap = self._score_rows(X, device, refine) - self._score_rows(X, device)
        return np.maximum(gap, 0.0)  # the two are sums in other orders

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the weighted mean of :meth:`score_samples`, in nats per row.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
            Higher is better.
        """
        check_is_fitted(self)
        X, device = self._checked(X)
        return weighted_mean(self._score_rows(X, device), self._weights(sample_weight, X))

    def elbo_terms(self, X: Any, *, refine: int = 0) -> ElboTerms[np.ndarray]:
        """Return both readings of each row's bound.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        refine : int, default=0
            Steps of optimisation of each row's posterior; see :meth:`score_samples`.

        Returns
        -------
        ElboTerms of ndarrays of float64, shape (n_samples,)
            ``reconstruction - kl`` and ``energy + entropy`` equal :meth:`score_samples`. KL,
            entropy and the prior's part of the energy are exact for a normal or uniform prior
            and a normal posterior; else averages over the draws of the reconstruction (the
            entropy only for a flow).
        """
        check_is_fitted(self)
        refine = check_count(refine, "refine", least=0)
        return self._terms(*self._checked(X), refine)

    def log_predictive(self, X: Any, n_importance: int = 1000) -> np.ndarray:
        r"""Return the importance-weighted estimate of ``log p(x)`` of each row.

        .. math::
            \log \tfrac1K \sum_{k=1}^K \frac{p(x_n|z_k)\,p(z_k)}{q(z_k|x_n)},
            \qquad z_k \sim q(z|x_n)

        In expectation it lies between the bound of :meth:`score_samples` and ``log p(x)``, which it
        approaches as K grows (Burda et al. 2016, theorem 1, for independent draws; these come in
        antithetic pairs and are shared by all rows).

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        n_importance : int, default=1000
            K. Time grows with it, memory does not.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            Nats.
        """
        check_is_fitted(self)
        n_importance = check_count(n_importance, "n_importance")
        X, device = self._checked(X)

        def evaluate(net: VAE, x: Tensor, observed: Tensor | None) -> tuple[Tensor]:
            noise = self._model.noise(n_importance, x, matched=False)
            return (objective.log_predictive(net, x, observed, noise, n_draws),)

        n_draws = min(n_importance, self._model.draws_per_block(device))
        (values,) = self._evaluate(X, device, n_draws, evaluate)
        return values.astype(np.float64) - _log_scale(X, self._model.affine)

    # -- the way to the network and back ----------------------------------------------------------

    def _checked(self, X: Any, **check_params: Any) -> tuple[Any, torch.device]:
        """Validate rows for a fitted network: an array, or sparse rows if X is sparse."""
        door = self._door(X, reset=False, **_ACCEPTED | check_params)
        X, blocks = _canonical(door.X), self._model.architecture.blocks
        check_support(X, blocks, self._names())
        self._check_reach(X, blocks, self._model.affine, _torch_dtype(X))
        return X, door.device

    def _check_reach(
        self, X: np.ndarray, blocks: tuple[Block, ...], affine: Affine, dtype: torch.dtype
    ) -> None:
        """Raise if a real column is so far out that its squares leave the range of `dtype`."""
        with np.errstate(over="ignore"):
            low, high = extremes(X)
            above, below = high - affine.shift, affine.shift - low
            far = np.maximum(above, below) / affine.scale
        far[np.isnan(far)] = 0.0  # no cell of this column is observed
        far[~standardised_columns(blocks, X.shape[1])] = 0.0
        column = int(np.argmax(far))
        if not far[column] <= _REACH[dtype]:
            raise ValueError(
                f"Column {column} of X has values {far[column]:.3g} times its (weighted) spread "
                f"in training away from the centre: too far for {dtype}. Remove such rows, or "
                "weight them so that they count in the fit."
            )

    @torch.inference_mode(False)  # refining needs gradients, whatever mode the caller is in
    def _evaluate(
        self,
        X: np.ndarray,
        device: torch.device,
        n_draws: int,
        function: Callable[[VAE, Tensor, Tensor | None], tuple[Tensor, ...]],
    ) -> list[np.ndarray]:
        """Apply `function` to blocks of rows in fitted units and masks; concatenate the results.

        It has memory for `n_draws` codes of each row at a time.
        """
        dtype = _torch_dtype(X)
        net = self._model.on(device, dtype)
        rows = Rows(by_rows(X), self._model.affine, device, keep="never")
        out: list[np.ndarray] = []
        with torch.no_grad():
            for place, x, _ in rows.blocks(n_draws * self._model.architecture.floats_per_draw):
                parts = [v.cpu().numpy() for v in function(net, *split_missing(x.to(dtype)))]
                # Results of blocks that stay between the large arrays of the next ones would keep
                # the memory of these from being used again: gigabytes for 200000 rows.
                out = out or [np.empty((X.shape[0], *v.shape[1:]), v.dtype) for v in parts]
                for whole, part in zip(out, parts, strict=True):
                    whole[place] = part
        return out

    def _outputs(
        self, net: VAE, x: Tensor, observed: Tensor | None, refine: int, n_mc: int
    ) -> Tensor:
        """Return what stands for the posteriors of rows: the encoder's output, or better."""
        if refine == 0:
            return net.encoder(net.inputs(x, observed))
        model = self._model
        seed = _derive_seed(model.seed, 0)
        own_noise = matched_noise(_REFINING_DRAWS, model.architecture.n_components, seed).to(x)
        noise, n_draws = model.noise(n_mc, x), model.draws_per_block(x.device)
        return objective.refine(net, x, observed, refine, own_noise, noise, n_draws)

    def _encode(
        self, X: np.ndarray, device: torch.device, refine: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        n_mc = check_count(self.n_mc, "n_mc")

        def evaluate(net: VAE, x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
            output = self._outputs(net, x, observed, refine, n_mc)
            mean, var = net.prior.code_moments(net.posterior_of(output, observed))
            return mean, var.sqrt()

        n_draws = 1
        if refine:
            n_draws = max(_REFINING_DRAWS, min(n_mc, self._model.draws_per_block(device)))
        if self._model.architecture.posterior == "flow":  # which has no moments in closed form
            n_draws = max(n_draws, MOMENT_DRAWS)
        mean, std = self._evaluate(X, device, n_draws, evaluate)
        return mean, std

    def _decode(self, Z: np.ndarray, device: torch.device) -> np.ndarray:
        net = self._model.on(device, _torch_dtype(Z))
        with torch.no_grad():
            blocks = torch.tensor(Z, device=device).split(
                block_rows(self._model.architecture.floats_per_draw, device)
            )
            means = [to_numpy(net.likelihood.mean(net.decoder(z))) for z in blocks]
        with np.errstate(over="ignore", invalid="ignore"):
            X = self._original_units(np.concatenate(means)).astype(Z.dtype)
        if not np.isfinite(X).all():
            raise ValueError(
                f"The decoder's mean leaves the range of {Z.dtype}. Pass codes like those of "
                "transform (of the order of one), as float64 if the units of X are large."
            )
        return X

    def _original_units(self, x: np.ndarray) -> np.ndarray:
        shift, scale = self._model.affine
        return x * scale + shift

    def _terms(self, X: np.ndarray, device: torch.device, refine: int = 0) -> ElboTerms[np.ndarray]:
        n_mc = check_count(self.n_mc, "n_mc")  # may have been set since the fit

        def evaluate(net: VAE, x: Tensor, observed: Tensor | None) -> tuple[Tensor, ...]:
            output = self._outputs(net, x, observed, refine, n_mc)
            noise = self._model.noise(n_mc, x)
            return objective.elbo_terms(net, x, observed, noise, n_draws, output)

        n_draws = min(n_mc, self._model.draws_per_block(device))
        n_held = max(n_draws, _REFINING_DRAWS if refine else 1)
        terms = ElboTerms(
            *(v.astype(np.float64) for v in self._evaluate(X, device, n_held, evaluate))
        )
        change_of_units = _log_scale(X, self._model.affine)
        return terms._replace(
            reconstruction=terms.reconstruction - change_of_units,
            energy=terms.energy - change_of_units,
        )

    def _score_rows(self, X: np.ndarray, device: torch.device, refine: int = 0) -> np.ndarray:
        terms = self._terms(X, device, refine)
        return terms.reconstruction - terms.kl

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return torch.float32 if array.dtype == np.float32 else torch.float64


def _described(value: Any) -> str:
    """Return a text that is the same in every process and differs between parameters."""
    if isinstance(value, np.ndarray):
        value = value.tolist()  # the text of a long array leaves most of it out
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _digest(array: Any) -> str:
    if issparse(array):
        parts = array.data, array.indices, array.indptr
        return " ".join([f"sparse {array.shape}", *(_digest(part) for part in parts)])
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    for rows in row_slices(len(array), 1024) if array.ndim else [()]:
        digest.update(np.ascontiguousarray(array[rows]).tobytes())
    return digest.hexdigest()


def _derive_seed(seed: int, n_epochs: int) -> int:
    """Return a seed of its own for the run that begins after `n_epochs` epochs."""
    return int(np.random.SeedSequence([seed, n_epochs]).generate_state(1)[0])


def _canonical(X: Any) -> Any:
    """Return X; if it is sparse, with one entry a cell."""
    return canonical(X) if issparse(X) else X


def _log_scale(X: Any, affine: Affine) -> np.ndarray | float:
    """Return ``sum_j log scale_j`` over the observed cells of each row."""
    if issparse(X):
        entry = np.flatnonzero(np.isnan(X.data))
        row = np.searchsorted(X.indptr, entry, side="right") - 1
        lost = np.bincount(row, np.log(affine.scale)[X.indices[entry]], minlength=X.shape[0])
        return affine.log_abs_det - lost
    slices = list(row_slices(X.shape[0], 1024))
    if not any(np.isnan(X[rows]).any() for rows in slices):
        return affine.log_abs_det
    return np.concatenate([~np.isnan(X[rows]) @ np.log(affine.scale) for rows in slices])


def _resident(X: np.ndarray, affine: Affine, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return all rows in fitted units on the device."""
    x = torch.empty(X.shape, dtype=dtype, device=device)
    for rows, block, _ in Rows(X, affine, torch.device("cpu")).blocks(X.shape[1]):
        x[rows] = block.to(device, dtype)
    return x


def _read_sparse(X: Any, affine: Affine, device: torch.device, dtype: torch.dtype) -> _Reader:
    """Return what reads rows of a sparse matrix: to the same bits as resident ones are."""
    rows = Rows(by_rows(X), affine, torch.device("cpu"))
    some_missing = bool(np.isnan(X.data).any())

    def cells(batch: Tensor) -> tuple[Tensor, Tensor | None]:
        x = rows[batch.cpu().numpy()][0].to(device, dtype)
        return split_missing(x) if some_missing else (x, None)

    return cells


def _of_mean_one(weight: Tensor) -> Tensor:
    """Return positive weights of any magnitude, possibly none, as multiples of their mean."""
    return weight / weight.sum() * len(weight)


def _mean_bound(
    net: VAE,
    cells: _Reader,
    weight: Tensor,
    rows: Tensor,
    noise: Tensor,
    floats_per_draw: int,
) -> Tensor:
    """Return the weighted mean bound of some resident rows, in fitted units.

    `noise` has shape (G, K, k): the ELBO for K = 1, else the mean of G importance-weighted bounds.
    """
    n_groups, n_importance, _ = noise.shape
    total = weight.new_zeros(())
    floats_per_row = n_groups * n_importance * floats_per_draw
    for block in rows.split(block_rows(floats_per_row, rows.device)):
        x, observed = cells(block)
        if n_importance == 1:
            terms = objective.elbo_terms(net, x, observed, noise[:, 0], n_groups)
            bound = terms.reconstruction - terms.kl
        else:
            bounds = [objective.log_predictive(net, x, observed, g, n_importance) for g in noise]
            bound = torch.stack(bounds).mean(0)
        total += weight[block] @ bound
    return total / weight[rows].sum()
