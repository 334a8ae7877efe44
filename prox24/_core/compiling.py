"""Compiler options for programs that run once, or never."""

from importlib.metadata import version

import jax


def quick_options() -> dict[str, bool | str | int | float] | None:
    """Options of XLA for programs that take longer to compile than to run; None if not on a CPU.

    On a CPU, LLVM's optimisations take half of the compile time. These options reduce them. The
    older code generator, which jaxlib 0.10 still has, takes half of the remaining time.
    """
    if jax.default_backend() != "cpu":
        return None
    older = {"xla_cpu_use_fusion_emitters": False} if version("jaxlib").startswith("0.10.") else {}
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True, **older}
