"""prox24: prunes models to 2:4 sparsity in JAX, by the exact proximal operator of a penalty.

`prune` works on checkpoints of Hugging Face, `prune_params` on the parameters of any JAX model, and
`solve` on one layer. `prox` is the operator. `prox24.optax` has the operator as a gradient
transformation, `prox24.refine` trains the kept weights, and `prox24.packed` multiplies with 2:4
weights. A name is imported at its first use: `import prox24` imports no other package.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from prox24 import planes as planes
    from prox24._core.masks import count_violations as count_violations
    from prox24._core.masks import is_sparse as is_sparse
    from prox24._core.masks import top_mask as top_mask
    from prox24._core.pattern import Pattern as Pattern
    from prox24._core.pattern import Unstructured as Unstructured
    from prox24._core.penalty import penalty as penalty
    from prox24._core.prox import prox as prox
    from prox24._jobs.distill import distill as distill
    from prox24._jobs.evaluate import perplexity as perplexity
    from prox24._jobs.load import load as load
    from prox24._jobs.plan import plan as plan
    from prox24._jobs.prune import prune as prune
    from prox24._jobs.text import Text as Text
    from prox24._jobs.torchax import from_torch as from_torch
    from prox24._jobs.verify import verify as verify
    from prox24._pruning.recipe import DenseTargets as DenseTargets
    from prox24._pruning.recipe import HeadBasis as HeadBasis
    from prox24._pruning.recipe import Recipe as Recipe
    from prox24._solvers.admm import ADMM as ADMM
    from prox24._solvers.descent import Descended as Descended
    from prox24._solvers.descent import Descent as Descent
    from prox24._solvers.descent import proximal_gradient as proximal_gradient
    from prox24._solvers.hyperparameters import hyperparameters as hyperparameters
    from prox24._solvers.problem import Candidate as Candidate
    from prox24._solvers.problem import LayerProblem as LayerProblem
    from prox24._solvers.problem import Normalized as Normalized
    from prox24._solvers.problem import Refitted as Refitted
    from prox24._solvers.problem import Solution as Solution
    from prox24._solvers.problem import Status as Status
    from prox24._solvers.problem import correct_inputs as correct_inputs
    from prox24._solvers.protocol import Patterns as Patterns
    from prox24._solvers.protocol import Refit as Refit
    from prox24._solvers.protocol import Solver as Solver
    from prox24._solvers.proximal import ProximalGradient as ProximalGradient
    from prox24._solvers.refit import ConjugateGradients as ConjugateGradients
    from prox24._solvers.refit import GradientSteps as GradientSteps
    from prox24._solvers.refit import LeastSquares as LeastSquares
    from prox24._solvers.schedules import Exponential as Exponential
    from prox24._solvers.scores import Magnitude as Magnitude
    from prox24._solvers.scores import Wanda as Wanda
    from prox24._solvers.solve import solve as solve
    from prox24._solvers.sparsegpt import SparseGPT as SparseGPT
    from prox24._solvers.swaps import Swaps as Swaps
    from prox24._trees.calibrate import Calibration as Calibration
    from prox24._trees.calibrate import calibrate as calibrate
    from prox24._trees.params import PrunedParams as PrunedParams
    from prox24._trees.params import prune_params as prune_params
    from prox24._trees.report import mask_of as mask_of
    from prox24._trees.report import report as report
    from prox24._trees.tap import tap as tap
    from prox24.refine._blocks import BlockRefinement as BlockRefinement
    from prox24.refine._model import ModelRefinement as ModelRefinement

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
    "_pruning.recipe": ("DenseTargets", "HeadBasis", "Recipe"),
    "refine._blocks": ("BlockRefinement",),
    "refine._model": ("ModelRefinement",),
    "_solvers.admm": ("ADMM",),
    "_solvers.descent": ("Descended", "Descent", "proximal_gradient"),
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
    "_trees.report": ("mask_of", "report"),
    "_trees.tap": ("tap",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
_SUBMODULES = ("basis", "errors", "lora", "optax", "packed", "planes", "refine")

__all__ = sorted([*_PLACE_OF, "planes"])


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        found = importlib.import_module(f"prox24.{name}")
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
    listed = {*globals(), *_PLACE_OF, *_SUBMODULES}
    if importlib.util.find_spec("transformers") is None:  # help() would fail at names of jobs
        listed -= {name for name, place in _PLACE_OF.items() if place.startswith("_jobs.")}
    return sorted(listed)
