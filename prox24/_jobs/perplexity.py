"""Perplexity on non-overlapping windows."""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._jobs import forward
from prox24._models import decoder
from prox24._models.spec import Config
from prox24.errors import CalibrationError

LARGEST_LOSS = math.log(sys.float_info.max)


def native_perplexity(
    checkpoint: Checkpoint,
    windows: NDArray[np.int32],
    on_step: Callable[[int], None] = lambda index: None,
) -> float:
    """`prox24.perplexity` of a native decoder; `on_step` is called after each layer."""
    model = forward.load_model(checkpoint)
    hidden = list(forward.embed_windows(model, windows))
    for index in range(len(model.config.layers)):
        forward.run_into(model, index, forward.layer_weights(model, index), hidden, hidden)
        on_step(index)
    weights = forward.head_weights(model)
    batches = windows.reshape(len(hidden), -1, windows.shape[1])
    losses = [
        window_losses(model.config, weights, states, jnp.asarray(tokens))
        for states, tokens in zip(hidden, batches, strict=True)
    ]
    return from_losses(checkpoint.path, windows, np.concatenate(losses))


def from_losses(path: Path, windows: NDArray[np.int32], losses: NDArray[np.floating[Any]]) -> float:
    """The perplexity of windows (count, length) with these negative log-likelihoods, (count,)."""
    mean = losses.astype(np.float64).sum() / (windows.size - len(windows))
    if not mean < LARGEST_LOSS:
        raise CalibrationError(f"{path}: the loss on the text is {mean}")
    return math.exp(mean)


@functools.partial(jax.jit, static_argnums=0)
def window_losses(config: Config, weights: dict[str, Array], hidden: Array, tokens: Array) -> Array:
    """Summed negative log-likelihood of each window, shape (batch,).

    Windows run one at a time: the logits of a window have length * vocabulary entries.
    """

    def loss(window: tuple[Array, Array]) -> Array:
        states, targets = window
        return sequence_loss(decoder.logits(config, weights, states[None])[0], targets)

    return lax.map(loss, (hidden, tokens))


def sequence_loss(logits: Array, tokens: Array) -> Array:
    """Summed negative log-likelihood of tokens (length,), of logits (length, vocabulary)."""
    # The last token has no next token, so its loss is left out. A slice of logits would be a copy.
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1))
    return jnp.sum(losses[:-1])
