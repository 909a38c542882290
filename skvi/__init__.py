"""Variational inference for scikit-learn users.

Estimators that fit, transform, sample and score by the evidence lower bound (ELBO), in nats, with
every constant: ``score(X)`` is the mean bound of a row, never above its log predictive density.
"""

from skvi.estimators.gmm import VariationalGMM
from skvi.estimators.linear import BayesianLinearVI
from skvi.estimators.logistic import BayesianLogisticVI
from skvi.estimators.vae import VAETransformer

__all__ = [
    "BayesianLinearVI",
    "BayesianLogisticVI",
    "VAETransformer",
    "VariationalGMM",
    "__version__",
]

__version__ = "0.1.0"
