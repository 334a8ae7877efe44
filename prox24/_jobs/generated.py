"""Windows of tokens that the model itself writes, for calibration without a text."""

import itertools

import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._jobs.forward import all_weights, load_model
from prox24._jobs.progress import progress_bar
from prox24._models.generate import generate

CACHE_BYTES = 2**30
"""The most bytes of the keys and values of a batch. A larger batch takes less time per window."""


def generated_windows(
    checkpoint: Checkpoint,
    first: int,
    count: int,
    length: int,
    seed: int = 0,
    *,
    quiet: bool = True,
) -> NDArray[np.int32]:
    """Windows of shape (count, length), drawn from the model's own probabilities.

    Each window begins with the token `first`, and continues after the end of a text.

    Raises:
      UnsupportedModelError: the model has no forward pass here.
    """
    model = load_model(checkpoint)
    weights = all_weights(model)
    heads = [layer.attention for layer in model.config.layers]
    of_token = sum(2 * 4 * own.key_value_heads * own.head_dim for own in heads)  # in float32
    most = max(1, CACHE_BYTES // (of_token * length))
    size = -(-count // -(-count // most))  # equal batches
    batches = range(0, count, size)
    prompts = np.full((size, 1), first, np.int32)
    windows = []
    steps = {begin: [f"windows.{begin}.{n}" for n in range(1, length)] for begin in batches}
    with progress_bar("write", list(itertools.chain(*steps.values())), quiet) as advance:
        for begin, names in steps.items():
            tokens = [prompts[:, 0]]
            following = generate(
                model.config,
                weights,
                prompts,
                length - 1,
                temperature=1.0,
                seed=int(np.random.SeedSequence([seed, begin]).generate_state(1)[0]),
            )
            for name, drawn in zip(names, following, strict=True):
                tokens.append(drawn)
                advance(name, None)
            windows.append(np.stack(tokens, axis=1))
    return np.concatenate(windows)[:count]
