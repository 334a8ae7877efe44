"""Training what pruning kept: layer by layer, or the whole model on what the dense one predicts.

The squared error of one linear is not what matters of it. Here all kept weights of a block, its
norms and biases are trained together on the block's output, or those of a whole model on the dense
model's predictions, by any optax optimizer, and the zeros stay zeros.
"""

from prox24.refine._blocks import BlockRefinement, relative_error, train_block
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
    "relative_error",
    "train_block",
    "train_model",
]
