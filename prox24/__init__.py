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
    from prox24._core import planes as planes
    from prox24._core.masks import count_violations, is_sparse, top_mask
    from prox24._core.pattern import Pattern, Unstructured
    from prox24._core.penalty import penalty
    from prox24._core.prox import prox
    from prox24._jobs.distill import distill
    from prox24._jobs.evaluate import perplexity
    from prox24._jobs.load import load
    from prox24._jobs.plan import plan
    from prox24._jobs.prune import prune
    from prox24._jobs.text import Text
    from prox24._jobs.torchax import from_torch
    from prox24._jobs.verify import verify
    from prox24._pruning.recipe import DenseTargets, Recipe
    from prox24._solvers.admm import ADMM
    from prox24._solvers.hyperparameters import hyperparameters
    from prox24._solvers.problem import (
        Candidate,
        LayerProblem,
        Normalized,
        Refitted,
        Solution,
        Status,
        correct_inputs,
    )
    from prox24._solvers.protocol import Patterns, Refit, Solver
    from prox24._solvers.proximal import ProximalGradient
    from prox24._solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
    from prox24._solvers.schedules import Exponential
    from prox24._solvers.scores import Magnitude, Wanda
    from prox24._solvers.solve import solve
    from prox24._solvers.sparsegpt import SparseGPT
    from prox24._solvers.swaps import Swaps
    from prox24._trees.calibrate import Calibration, calibrate
    from prox24._trees.params import PrunedParams, prune_params
    from prox24._trees.tap import tap
    from prox24.refine._blocks import BlockRefinement
    from prox24.refine._model import ModelRefinement

_PLACES = {
    "_core.masks": ("count_violations", "is_sparse", "top_mask"),
    "_core.pattern": ("Pattern", "Unstructured"),
    "_core.penalty": ("penalty",),
    "_core.prox": ("prox",),
    "_jobs.distill": ("distill",),
    "_jobs.evaluate": ("perplexity",),
    "_jobs.load": ("load",),
    "_jobs.plan": ("plan",),
    "_jobs.prune": ("prune",),
    "_jobs.text": ("Text",),
    "_jobs.torchax": ("from_torch",),
    "_jobs.verify": ("verify",),
    "_pruning.recipe": ("DenseTargets", "Recipe"),
    "refine._blocks": ("BlockRefinement",),
    "refine._model": ("ModelRefinement",),
    "_solvers.admm": ("ADMM",),
    "_solvers.hyperparameters": ("hyperparameters",),
    "_solvers.problem": (
        "Candidate",
        "LayerProblem",
        "Normalized",
        "Refitted",
        "Solution",
        "Status",
        "correct_inputs",
    ),
    "_solvers.protocol": ("Patterns", "Refit", "Solver"),
    "_solvers.proximal": ("ProximalGradient",),
    "_solvers.refit": ("ConjugateGradients", "GradientSteps", "LeastSquares"),
    "_solvers.schedules": ("Exponential",),
    "_solvers.scores": ("Magnitude", "Wanda"),
    "_solvers.solve": ("solve",),
    "_solvers.sparsegpt": ("SparseGPT",),
    "_solvers.swaps": ("Swaps",),
    "_trees.calibrate": ("Calibration", "calibrate"),
    "_trees.params": ("PrunedParams", "prune_params"),
    "_trees.tap": ("tap",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
_SUBMODULES = {
    "planes": "_core.planes",
    "optax": "optax",
    "refine": "refine",
    "packed": "packed",
    "lora": "_trees.lora",
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
    "from_torch",
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
        try:
            found = getattr(importlib.import_module(f"prox24.{_PLACE_OF[name]}"), name)
        except ModuleNotFoundError as error:
            from prox24.errors import missing_package

            missing = missing_package(f"prox24.{name}", error)
            if missing is None:
                raise
            raise missing from error
    else:
        raise AttributeError(f"module 'prox24' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACE_OF, *_SUBMODULES])
