"""Likelihoods p(x|z): what the decoder's output means, for columns of one kind and for tables."""

from skvi.models.vae.likelihoods.base import Likelihood, Marginals
from skvi.models.vae.likelihoods.tables import LIKELIHOODS, Block, Mixed, build_likelihood

__all__ = ["LIKELIHOODS", "Block", "Likelihood", "Marginals", "Mixed", "build_likelihood"]
