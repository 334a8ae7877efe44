"""Strict JAX modes and a deterministic hypothesis profile for every test."""

import os

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

settings.register_profile("prox24", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("prox24")

# Most of the time of the tests is XLA's. Programs are optimized, as users have them, where the
# subject is rounding or a real model, and compiled in half of the time elsewhere.
OPTIMIZED = {"test_gram", "test_precision", "test_prox", "test_prox_properties", "test_smollm2"}


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """Whether the programs of a module's tests are optimized; none outlives its module."""
    quick = request.module.__name__ not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))  # for processes
    yield
    jax.clear_caches()
