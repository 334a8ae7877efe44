"""prox24: prunes models to 2:4 sparsity in JAX, by the exact proximal operator of a penalty.

The names here are the mathematics: patterns, the penalty, its proximal operator, and the layer-wise
problem with its solvers; and what prunes a model of your own: `calibrate`, `prune_params` and
`prune_in_order`. They import only jax, numpy and optax. Checkpoints, models and the pipeline are in
the submodules.
"""

from prox24.calibration.calibrate import Calibration, InputGram, calibrate
from prox24.calibration.tap import tap
from prox24.core import planes
from prox24.core.diagnostics import GramDiagnostics, diagnose
from prox24.core.masks import count_violations, is_sparse, top_mask
from prox24.core.pattern import Pattern, Unstructured
from prox24.core.penalty import penalty
from prox24.core.prox import prox
from prox24.params import PrunedParams, WeightReport, prune_in_order, prune_params
from prox24.solvers.admm import ADMM
from prox24.solvers.problem import LayerProblem, Solution, Statistics, Status, correct_inputs
from prox24.solvers.proximal import ProximalGradient
from prox24.solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
from prox24.solvers.schedules import Exponential
from prox24.solvers.scores import Magnitude, Wanda
from prox24.solvers.solve import solve
from prox24.solvers.sparsegpt import SparseGPT
from prox24.solvers.swaps import Swaps

__all__ = [
    "ADMM",
    "Calibration",
    "ConjugateGradients",
    "Exponential",
    "GradientSteps",
    "GramDiagnostics",
    "InputGram",
    "LayerProblem",
    "LeastSquares",
    "Magnitude",
    "Pattern",
    "ProximalGradient",
    "PrunedParams",
    "Solution",
    "SparseGPT",
    "Statistics",
    "Status",
    "Swaps",
    "Unstructured",
    "Wanda",
    "WeightReport",
    "calibrate",
    "correct_inputs",
    "count_violations",
    "diagnose",
    "is_sparse",
    "penalty",
    "planes",
    "prox",
    "prune_in_order",
    "prune_params",
    "solve",
    "tap",
    "top_mask",
]
