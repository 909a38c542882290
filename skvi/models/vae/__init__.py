"""Variational autoencoder: networks, likelihoods, objective, and where to start from."""
