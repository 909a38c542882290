"""Variational inference for scikit-learn users.

Estimators that fit, transform, sample and score by the evidence lower bound (ELBO), in nats, with
every constant: ``score(X)`` is the mean over rows of a lower bound on ``log p(x)``.
"""

__version__ = "0.1.0"
