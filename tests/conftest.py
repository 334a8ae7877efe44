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


# Many modules compile the same programs of the same tiny models.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Of this process alone, since an entry that another one writes could be read half-written."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """Whether the programs of a module's tests are optimized; none outlives its module."""
    quick = request.module.__name__ not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))  # for processes
    yield
    jax.clear_caches()
