"""Three ways to a 2:4 network on scikit-learn's digits, at the same number of epochs.

The network is a perceptron with two hidden layers of 8 units. All kernels are pruned, along their
inputs. Each method has 80 epochs:

- "one-shot": all are dense. Then the two largest of every four weights are kept.
- "fine-tuned": half are dense. Then the same cut, and the kept weights are trained.
- "prox": half are dense. Then every step ends with the proximal step of a growing penalty, which
  makes all blocks 2:4. In the last 10 epochs the kept weights are trained.

One-shot loses more than half of the accuracy. Fine-tuning recovers most of the loss. Training with
the proximal step ends above fine-tuning. With 16 units both are near the dense accuracy, and the
difference is smaller.

The accuracy is on the held-out third of the images: the mean over 20 seeds. The spread is the
standard deviation. A seed chooses the initial weights, the batches and the held-out images. The
first 40 epochs of "fine-tuned" and "prox" are the same, so the last line compares them seed by
seed.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import prox24
import prox24.optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs/figures/digits.svg"
SEEDS = 20
BATCH, STEPS_PER_EPOCH = 64, 19
DENSE_EPOCHS, PROX_EPOCHS, KEPT_EPOCHS = 40, 30, 10
FIRST_PENALTY, LAST_PENALTY = 1e-3, 1e3


def load_splits():
    """Images (seeds, n, 64) and labels (seeds, n) to train on, and those to test on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    splits = [
        train_test_split(images, labels, test_size=1 / 3, random_state=seed)
        for seed in range(SEEDS)
    ]
    train_images, test_images, train_labels, test_labels = map(np.stack, zip(*splits, strict=True))
    return (train_images, train_labels), (test_images, test_labels)


def initial_params(key, hidden):
    """Two hidden layers and ten classes; kernels are (inputs, outputs)."""
    widths = (64, hidden, hidden, 10)
    initialize = jax.nn.initializers.he_normal()
    return [
        {"kernel": initialize(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}
        for key, inputs, outputs in zip(jax.random.split(key, 3), widths, widths[1:], strict=False)
    ]


def logits_of(params, images):
    """The network: one logit for each class."""
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ last["kernel"] + last["bias"]


def loss(params, images, labels):
    """Mean cross-entropy."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels)
    return jnp.mean(entropy)


def accuracy(params, images, labels):
    """Percentage of the images whose label has the largest logit."""
    return 100 * jnp.mean(jnp.argmax(logits_of(params, images), axis=-1) == labels)


@functools.partial(jax.jit, static_argnames=("optimizer", "epochs"))
def train(optimizer, epochs, params, train_set, test_set):
    """Trains the network of each seed: its parameters, and its accuracy after each epoch."""

    def train_one(key, params, train_set, test_set):
        def step(state, key):
            params, memory = state
            batch = jax.random.choice(key, len(train_set[0]), (BATCH,))
            gradient = jax.grad(loss)(params, *(array[batch] for array in train_set))
            updates, memory = optimizer.update(gradient, memory, params)
            return (optax.apply_updates(params, updates), memory), None

        def epoch(state, keys):
            (params, memory), _ = jax.lax.scan(step, state, keys)
            return (params, memory), accuracy(params, *test_set)

        keys = jax.random.split(key, (epochs, STEPS_PER_EPOCH))
        (params, _), accuracies = jax.lax.scan(epoch, (params, optimizer.init(params)), keys)
        return params, accuracies

    keys = jax.random.split(jax.random.key(1), SEEDS)
    return jax.vmap(train_one)(keys, params, train_set, test_set)


def cut(params):
    """Keeps the two largest magnitudes of every four inputs in each kernel."""

    def cut_kernel(kernel):
        return jnp.where(prox24.top_mask(jnp.abs(kernel), axis=-2), kernel, 0)

    return [layer | {"kernel": cut_kernel(layer["kernel"])} for layer in params]


def print_method(name, params, test_set):
    """Prints one line of the table."""
    accuracies = jax.vmap(accuracy)(params, *test_set)
    kernels = [layer["kernel"] for layer in params]
    zeros = 100 * np.mean(np.concatenate([np.ravel(kernel) for kernel in kernels]) == 0)
    sparse = all(prox24.is_sparse(kernel, axis=-2) for kernel in kernels)
    print(
        f"{name:10}  {np.mean(accuracies):7.2f}%  {np.std(accuracies, ddof=1):5.2f}%  "
        f"{zeros:5.1f}%  {'yes' if sparse else 'no'}"
    )


def draw(curves, output):
    """Draws the accuracies, (seeds, epochs) of each method, averaged over seeds."""
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="tight")
    for method, curve in curves.items():
        epochs = np.arange(1, curve.shape[1] + 1)
        shown = epochs > DENSE_EPOCHS // 2
        axes.plot(epochs[shown], np.mean(curve, axis=0)[shown], label=method)
    axes.axvline(DENSE_EPOCHS, color="0.5", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, metadata={"Date": None})


def main():
    """Trains by every method, prints the table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=8, help="width of the two hidden layers")
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
    arguments = parser.parse_args()

    train_set, test_set = load_splits()
    train_on_digits = functools.partial(train, train_set=train_set, test_set=test_set)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    start = jax.vmap(initial_params, in_axes=(0, None))(keys, arguments.hidden)

    adam = optax.adam(3e-3)
    keep = prox24.optax.keep_pattern(adam)
    growth = (LAST_PENALTY / FIRST_PENALTY) ** (1 / (PROX_EPOCHS * STEPS_PER_EPOCH))
    penalty = optax.exponential_decay(FIRST_PENALTY, 1, growth, end_value=1e30)
    prox = optax.chain(adam, prox24.optax.proximal(penalty))

    half, half_curve = train_on_digits(adam, DENSE_EPOCHS, start)
    dense, dense_curve = train_on_digits(adam, PROX_EPOCHS + KEPT_EPOCHS, half)
    tuned, tuned_curve = train_on_digits(keep, PROX_EPOCHS + KEPT_EPOCHS, cut(half))
    pruned, pruned_curve = train_on_digits(prox, PROX_EPOCHS, half)
    kept, kept_curve = train_on_digits(keep, KEPT_EPOCHS, pruned)

    print(f"{'method':10}  {'accuracy':>8}  {'spread':>6}  {'zeros':>6}  2:4")
    methods = {"dense": dense, "one-shot": cut(dense), "fine-tuned": tuned, "prox": kept}
    for name, params in methods.items():
        print_method(name, params, test_set)
    gain = np.asarray(kept_curve[:, -1] - tuned_curve[:, -1])
    error = np.std(gain, ddof=1) / np.sqrt(SEEDS)
    print(f"prox above fine-tuned by {np.mean(gain):.2f} points, standard error {error:.2f}")

    curves = {
        "dense": [dense_curve],
        "fine-tuned": [tuned_curve],
        "prox": [pruned_curve, kept_curve],
    }
    draw(
        {name: np.concatenate([half_curve, *rest], axis=1) for name, rest in curves.items()},
        arguments.output,
    )


if __name__ == "__main__":
    main()
