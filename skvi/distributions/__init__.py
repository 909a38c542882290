"""Exact expectations, entropies and KL divergences, in nats, with every constant."""
