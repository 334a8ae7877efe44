"""Values that are known only when a program runs."""

from typing import Any

import jax


def is_traced(value: Any) -> bool:
    """Whether JAX traces a value: it has a shape and a dtype, and no number to check."""
    return isinstance(value, jax.core.Tracer)
