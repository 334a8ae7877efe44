"""Fine-tunes a pruned language model on a text, and keeps it 2:4.

Pruning writes a folder, and the script trains its model:

- By default, Adam trains the kept weights of the layers, with their norms and biases.
- With `--lora RANK`, Adam trains low-rank adapters, cut to the kept weights. They are merged at the
  end.

Embedding and head do not change. The text is the packaged novel, or the file in `--text`. Its
last tenth is held out, in windows of 256 tokens. The table has its perplexity under the given
folder ("before") and under the written folder, read back ("after"). The dense model was not trained
on this text, so the table does not compare with a fine-tuned dense model.

The figure has the loss of each step, on the text of the step, and the held-out loss before and
after all steps. The rate falls to zero over the steps. `prox24 demo` downloads the GGUF file of
SmolLM2-135M-Instruct into `.cache`.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
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

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs/figures/finetune.svg"
STEPS = 8
BATCH = 2  # windows of a step
RATE, LORA_RATE = 2e-4, 1e-3  # at the start
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


def train(loss, optimizer, trained, fixed, windows, steps):
    """Minimises loss(trained, fixed, windows).

    Returns:
      The trained values, and the loss of each step.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, fixed, windows):
        value, gradient = jax.value_and_grad(loss)(trained, fixed, windows)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = optimizer.init(trained), []
    for batch in itertools.islice(batches(windows), steps):
        trained, state, value = step(trained, state, fixed, batch)
        losses.append(float(value))
    return trained, losses


def print_row(name, folder, windows):
    """Prints a line of the table.

    Returns:
      The perplexity of the folder.
    """
    checkpoint = open_checkpoint(folder)
    config = load_model(checkpoint).config
    tensors = (checkpoint.read(linear.tensor) for linear in all_linears(config))
    weights = [oriented(config, jnp.asarray(tensor)) for tensor in tensors]
    zeros = 1 - sum(map(jnp.count_nonzero, weights)) / sum(weight.size for weight in weights)
    sparse = all(prox24.is_sparse(weight, axis=1) for weight in weights)
    measured = native_perplexity(checkpoint, windows)
    print(f"{name:6}  {measured:10.2f}  {zeros:6.2%}  {'yes' if sparse else 'no'}", flush=True)
    return measured


def draw(losses, before, after, output):
    """Draws the loss of each step, and the held-out loss before and after them."""
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="tight")
    axes.plot(np.arange(1, len(losses) + 1), losses, marker="o", markersize=4, label="each step")
    axes.plot([0, len(losses)], np.log([before, after]), "s", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, metadata={"Date": None})


def main():
    """Measures, trains, writes, measures again and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a pruned folder")
    parser.add_argument("destination", type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; the packaged novel if not given")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of that rank")
    parser.add_argument("--rate", type=float, help=f"{RATE}, or {LORA_RATE} with --lora")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
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
    before = print_row("before", arguments.source, test_windows)

    model = load_model(checkpoint)
    config = model.config
    layers = [layer_weights(model, index) for index in range(len(config.layers))]
    outer = embedding_weights(model) | head_weights(model)
    rate = arguments.rate or (RATE if arguments.lora is None else LORA_RATE)
    adam = optax.adam(optax.linear_schedule(rate, 0.0, arguments.steps))
    if arguments.lora is None:
        # In float32, where small steps are not lost; they are rounded when they are written.
        trained = jax.tree.map(lambda weight: weight.astype(jnp.float32), layers)
        optimizer, fixed = keep_pattern(adam), (outer, None)
    else:
        trained = lora.init(jax.random.key(0), layers, arguments.lora)
        optimizer, fixed = adam, (outer, layers)

    def with_trained(layers, trained):
        return trained if layers is None else lora.merge(layers, trained, LORA_SCALE)

    def objective(trained, fixed, windows):
        outer, layers = fixed
        return loss(config, outer, with_trained(layers, trained), windows)

    trained, losses = train(objective, optimizer, trained, fixed, training_windows, arguments.steps)
    tensors = (
        (spec.layer_tensor(config.names, index, name), np.asarray(oriented(config, weight)))
        for index, weights in enumerate(with_trained(fixed[1], trained))
        for name, weight in weights.items()
    )
    write_checkpoint(checkpoint, arguments.destination, tensors, overwrite=arguments.overwrite)
    after = print_row("after", arguments.destination, test_windows)
    draw(losses, before, after, arguments.output)


if __name__ == "__main__":
    try:
        main()
    except Prox24Error as error:
        sys.exit(f"error: {error}")
