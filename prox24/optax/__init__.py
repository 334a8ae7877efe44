"""optax transforms that prune to N:M while training, and keep the pattern while fine-tuning.

`proximal` ends a chain with the proximal step of the penalty. `check` finds chains that undo this
step. `keep_pattern` wraps an optimizer so that the zeros of pruned parameters stay zero. `describe`
lists which parameters are pruned, along which axis, and why.
"""

from prox24.optax._check import check
from prox24.optax._leaves import Leaf, by_path, describe
from prox24.optax._transforms import (
    KeepPatternState,
    ProximalState,
    keep_pattern,
    kept_entries,
    proximal,
)

__all__ = [
    "KeepPatternState",
    "Leaf",
    "ProximalState",
    "by_path",
    "check",
    "describe",
    "keep_pattern",
    "kept_entries",
    "proximal",
]
