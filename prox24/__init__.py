"""prox24: prunes models to 2:4 sparsity in JAX, by the exact proximal operator of a penalty.

`prune` and its companions work on checkpoints of Hugging Face; `prune_params` on the parameters of
any JAX model; `solve` on one layer; `prox` is the operator. `prox24.optax` has the operator as a
gradient transformation, `prox24.refine` trains what is kept, `prox24.packed` multiplies with 2:4
weights. A name is imported when it is used first: `import prox24` imports no other package.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from prox24.core import planes as planes
    from prox24.core.masks import count_violations, is_sparse, top_mask
    from prox24.core.pattern import Pattern, Unstructured
    from prox24.core.penalty import penalty
    from prox24.core.prox import prox
    from prox24.jobs.distill import distill
    from prox24.jobs.evaluate import perplexity
    from prox24.jobs.load import load
    from prox24.jobs.plan import plan
    from prox24.jobs.prune import prune
    from prox24.jobs.text import Text
    from prox24.jobs.verify import verify
    from prox24.pruning.recipe import DenseTargets, Recipe
    from prox24.refine.blocks import BlockRefinement
    from prox24.refine.model import ModelRefinement
    from prox24.solvers.admm import ADMM
    from prox24.solvers.hyperparameters import hyperparameters
    from prox24.solvers.problem import (
        Candidate,
        LayerProblem,
        Normalized,
        Refitted,
        Solution,
        Status,
        correct_inputs,
    )
    from prox24.solvers.protocol import Patterns, Refit, Solver
    from prox24.solvers.proximal import ProximalGradient
    from prox24.solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
    from prox24.solvers.schedules import Exponential
    from prox24.solvers.scores import Magnitude, Wanda
    from prox24.solvers.solve import solve
    from prox24.solvers.sparsegpt import SparseGPT
    from prox24.solvers.swaps import Swaps
    from prox24.trees.calibrate import Calibration, calibrate
    from prox24.trees.params import PrunedParams, prune_params
    from prox24.trees.tap import tap

_PLACES = {
    "core.masks": ("count_violations", "is_sparse", "top_mask"),
    "core.pattern": ("Pattern", "Unstructured"),
    "core.penalty": ("penalty",),
    "core.prox": ("prox",),
    "jobs.distill": ("distill",),
    "jobs.evaluate": ("perplexity",),
    "jobs.load": ("load",),
    "jobs.plan": ("plan",),
    "jobs.prune": ("prune",),
    "jobs.text": ("Text",),
    "jobs.verify": ("verify",),
    "pruning.recipe": ("DenseTargets", "Recipe"),
    "refine.blocks": ("BlockRefinement",),
    "refine.model": ("ModelRefinement",),
    "solvers.admm": ("ADMM",),
    "solvers.hyperparameters": ("hyperparameters",),
    "solvers.problem": (
        "Candidate",
        "LayerProblem",
        "Normalized",
        "Refitted",
        "Solution",
        "Status",
        "correct_inputs",
    ),
    "solvers.protocol": ("Patterns", "Refit", "Solver"),
    "solvers.proximal": ("ProximalGradient",),
    "solvers.refit": ("ConjugateGradients", "GradientSteps", "LeastSquares"),
    "solvers.schedules": ("Exponential",),
    "solvers.scores": ("Magnitude", "Wanda"),
    "solvers.solve": ("solve",),
    "solvers.sparsegpt": ("SparseGPT",),
    "solvers.swaps": ("Swaps",),
    "trees.calibrate": ("Calibration", "calibrate"),
    "trees.params": ("PrunedParams", "prune_params"),
    "trees.tap": ("tap",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
_SUBMODULES = {
    "planes": "core.planes",
    "optax": "optax",
    "refine": "refine",
    "packed": "packed",
    "lora": "trees.lora",
    "errors": "errors",
}

__all__ = [
    "ADMM",
    "BlockRefinement",
    "Calibration",
    "Candidate",
    "ConjugateGradients",
    "DenseTargets",
    "Exponential",
    "GradientSteps",
    "LayerProblem",
    "LeastSquares",
    "Magnitude",
    "ModelRefinement",
    "Normalized",
    "Pattern",
    "Patterns",
    "ProximalGradient",
    "PrunedParams",
    "Recipe",
    "Refit",
    "Refitted",
    "Solution",
    "Solver",
    "SparseGPT",
    "Status",
    "Swaps",
    "Text",
    "Unstructured",
    "Wanda",
    "calibrate",
    "correct_inputs",
    "count_violations",
    "distill",
    "hyperparameters",
    "is_sparse",
    "load",
    "penalty",
    "perplexity",
    "plan",
    "planes",
    "prox",
    "prune",
    "prune_params",
    "solve",
    "tap",
    "top_mask",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        found = importlib.import_module(f"prox24.{_SUBMODULES[name]}")
    elif name in _PLACE_OF:
        found = getattr(importlib.import_module(f"prox24.{_PLACE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'prox24' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACE_OF, *_SUBMODULES])
