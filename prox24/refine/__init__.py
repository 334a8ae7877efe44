"""Training of kept weights: layer by layer, or the whole model on the dense model's predictions.

Solvers minimise the squared error of a single linear. Here an optax optimizer trains the kept
weights of many linears together, with norms and biases. `train_block` trains a block on the output
of the dense block. `train_model` trains a whole model on the dense model's predictions. Zeros stay
zero.
"""

from prox24.refine._blocks import BlockRefinement, feature_weights, relative_error, train_block
from prox24.refine._distillation import divergence, train_model
from prox24.refine._model import ModelRefinement
from prox24.refine._training import Outcome, Refined, Training

__all__ = [
    "BlockRefinement",
    "ModelRefinement",
    "Outcome",
    "Refined",
    "Training",
    "divergence",
    "feature_weights",
    "relative_error",
    "train_block",
    "train_model",
]
