"""FP4 training arithmetic for JAX."""
