"""Compiler options for programs that run once, or never."""

import jax


def quick_options() -> dict[str, bool | str | int | float] | None:
    """Options of XLA for programs that take longer to compile than to run; None if not on a CPU.

    On a CPU, LLVM's optimisations take half of the compile time. These options reduce them.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
