"""Variational Joint Embedding in Pyro."""
