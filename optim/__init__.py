"""Optax transformations that act on the spectrum of gradients and weights."""
