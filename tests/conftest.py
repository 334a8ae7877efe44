"""Strict JAX modes and a deterministic hypothesis profile for every test."""

import jax
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

settings.register_profile("prox24", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("prox24")
