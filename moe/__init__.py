"""Mixture-of-experts layers for JAX."""
