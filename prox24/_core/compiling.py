"""How programs are compiled that run once, or never."""

import jax


def quick_options() -> dict[str, bool | str | int | float] | None:
    """Options of XLA for a program whose compilation takes longer than its run; None for no CPU.

    On a CPU half of the time goes to LLVM's optimisations.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
