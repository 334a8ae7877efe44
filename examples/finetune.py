"""Fine-tunes a pruned language model on a text for two minutes, and keeps it 2:4.

The model is a folder that `prox24 demo` or `prox24 prune` wrote. Adam trains the kept weights of
its layers, with their norms and biases; with `--lora RANK` it trains low-rank adapters instead, cut
to the kept weights, which are merged at the end. Embedding and head stay as they are. The last
tenth of the text is held out: the table shows its perplexity under the given folder and under the
one that was written, read back.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import prox24
from prox24 import lora
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import check_destination, write_checkpoint
from prox24._jobs.forward import (
    all_linears,
    embedding_weights,
    head_weights,
    layer_weights,
    load_model,
    oriented,
)
from prox24._jobs.perplexity import native_perplexity, window_losses
from prox24._jobs.text import evaluation_windows
from prox24._models import spec, stacks
from prox24.errors import Prox24Error
from prox24.optax import keep_pattern

BATCH = 2  # windows of a step
RATE, LORA_RATE = 2e-4, 1e-3  # at the start; both fall to zero with the time that is left
LORA_SCALE = 2.0


def loss(config, outer, layers, windows):
    """Mean negative log-likelihood of the tokens of windows (count, length) after the first."""
    stacked = stacks.stacked(
        config, lambda index, name: layers[index][name], lambda name, tensors: jnp.stack(tensors)
    )
    hidden = stacks.features(config, stacked, outer, windows)
    losses = window_losses(config, outer, hidden, windows)
    return jnp.sum(losses) / (windows.size - len(windows))


def batches(windows):
    """Batches of windows without end, in another order at each pass."""
    size = min(BATCH, len(windows))
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(windows))
        for i in range(0, len(order) - size + 1, size):
            yield jnp.asarray(windows[order[i : i + size]])


def train(loss, optimizer, trained, fixed, windows, seconds):
    """Minimises loss(trained, fixed, windows) for some time, not counting the first step's.

    Returns:
      What was trained, and the number of steps.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, fixed, windows, left):
        gradient = jax.grad(loss)(trained, fixed, windows)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, optax.tree.scale(left, updates)), state

    state, left = optimizer.init(trained), 1.0
    for steps, batch in enumerate(batches(windows), start=1):
        trained, state = jax.block_until_ready(step(trained, state, fixed, batch, left))
        if steps == 1:  # compiled
            began = time.perf_counter()
        left = 1 - (time.perf_counter() - began) / seconds
        if left <= 0:
            return trained, steps


def print_row(name, folder, windows):
    """Prints the perplexity of a folder, the zeros of its linears, and whether they are 2:4."""
    checkpoint = open_checkpoint(folder)
    config = load_model(checkpoint).config
    tensors = (checkpoint.read(linear.tensor) for linear in all_linears(config))
    weights = [oriented(config, jnp.asarray(tensor)) for tensor in tensors]
    zeros = 1 - sum(map(jnp.count_nonzero, weights)) / sum(weight.size for weight in weights)
    sparse = all(prox24.is_sparse(weight, axis=1) for weight in weights)
    measured = native_perplexity(checkpoint, windows)
    print(f"{name:6}  {measured:10.2f}  {zeros:6.2%}  {'yes' if sparse else 'no'}", flush=True)


def main():
    """Measures, trains, writes and measures again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a pruned folder")
    parser.add_argument("destination", type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; the packaged novel if not given")
    parser.add_argument("--seconds", type=float, default=120, help="of training")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of that rank")
    parser.add_argument("--rate", type=float, help=f"{RATE}, or {LORA_RATE} with --lora")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a window")
    arguments = parser.parse_args()

    checkpoint = open_checkpoint(arguments.source)
    check_destination(arguments.destination, [checkpoint.path], arguments.overwrite)
    text = prox24.Text(arguments.text, None, arguments.sequence_length)
    windows = evaluation_windows(checkpoint, text)
    held_out = max(1, len(windows) // 10)
    if held_out == len(windows):
        parser.error("the text has a single window: give a longer text or shorter windows")
    training_windows, test_windows = np.split(windows, [-held_out])
    print(f"{training_windows.size} tokens to train on, {test_windows.size} held out\n")
    print(f"{'':6}  perplexity   zeros  2:4")
    print_row("before", arguments.source, test_windows)

    model = load_model(checkpoint)
    config = model.config
    layers = [layer_weights(model, index) for index in range(len(config.layers))]
    outer = embedding_weights(model) | head_weights(model)
    if arguments.lora is None:
        # In float32, where small steps are not lost; they are rounded when they are written.
        trained = jax.tree.map(lambda weight: weight.astype(jnp.float32), layers)
        optimizer = keep_pattern(optax.adam(arguments.rate or RATE))
        fixed = (outer, None)
    else:
        trained = lora.init(jax.random.key(0), layers, arguments.lora)
        optimizer = optax.adam(arguments.rate or LORA_RATE)
        fixed = (outer, layers)

    def with_trained(layers, trained):
        return trained if layers is None else lora.merge(layers, trained, LORA_SCALE)

    def objective(trained, fixed, windows):
        outer, layers = fixed
        return loss(config, outer, with_trained(layers, trained), windows)

    trained, steps = train(
        objective, optimizer, trained, fixed, training_windows, arguments.seconds
    )
    tensors = (
        (spec.layer_tensor(config.names, index, name), np.asarray(oriented(config, weight)))
        for index, weights in enumerate(with_trained(fixed[1], trained))
        for name, weight in weights.items()
    )
    write_checkpoint(checkpoint, arguments.destination, tensors, overwrite=arguments.overwrite)
    print_row("after", arguments.destination, test_windows)
    print(f"\n{steps} steps of {min(BATCH, len(training_windows))} windows")


if __name__ == "__main__":
    try:
        main()
    except Prox24Error as error:
        sys.exit(f"error: {error}")
