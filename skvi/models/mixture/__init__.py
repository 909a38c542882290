"""Bayesian Gaussian mixture: weights x components, bound, predictive."""
