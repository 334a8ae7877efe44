"""Prunes a small convolutional network of Flax linen, trained on digits, in one shot.

The digits are scikit-learn's. Every kernel whose input channels come in fours is pruned to 2:4
along them, by the Gram of its inputs on the training images. Nothing is trained afterwards. A loss
is the squared error of a weight's output, relative to the output. Losses and accuracies are means
over seeds. A seed chooses the initial weights, the batches and the held-out images.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import prox24

SEEDS, EPOCHS, BATCH, CHANNELS = 5, 30, 64, 8
METHODS = {
    "wanda": prox24.Recipe.wanda(),
    "sparsegpt": prox24.Recipe.sparsegpt(),
    "admm with the prox + refit": prox24.Recipe(),
}


class Network(nn.Module):
    """Three convolutions, of which two halve the image, and two dense layers."""

    @nn.compact
    def __call__(self, images):
        """From images (batch, 8, 8) to logits (batch, 10)."""
        x = nn.relu(nn.Conv(CHANNELS, (3, 3))(images[..., None]))
        x = nn.relu(nn.Conv(CHANNELS, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(CHANNELS, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(2 * CHANNELS)(x.reshape(len(images), -1)))
        return nn.Dense(10)(x)


def apply(params, images):
    """The network as a function of its parameters."""
    return Network().apply({"params": params}, images)


@jax.jit
def accuracy(params, images, labels):
    """Percentage of the images whose label has the largest logit."""
    return 100 * jnp.mean(jnp.argmax(apply(params, images), axis=-1) == labels)


@jax.jit
def train(key, images, labels):
    """The parameters after some epochs of Adam."""
    optimizer = optax.adam(3e-3)

    def loss(params, batch):
        logits = apply(params, images[batch])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]))

    def step(state, key):
        params, memory = state
        gradient = jax.grad(loss)(params, jax.random.choice(key, len(images), (BATCH,)))
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    params = Network().init(key, images[:1])["params"]
    keys = jax.random.split(key, EPOCHS * len(images) // BATCH)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def main():
    """Trains for every seed, prunes by every method and prints the table."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    accuracies = {name: [] for name in ("dense", *METHODS)}
    losses = {name: [] for name in METHODS}
    for seed in range(SEEDS):
        split = train_test_split(images, labels, test_size=1 / 3, random_state=seed)
        train_images, test_images, train_labels, test_labels = split
        test = functools.partial(accuracy, images=test_images, labels=test_labels)
        params = train(jax.random.key(seed), train_images, train_labels)
        accuracies["dense"].append(test(params))
        grams = prox24.calibrate(apply, params, [train_images])
        for name, recipe in METHODS.items():
            pruned = prox24.prune_params(apply, params, recipe=recipe, grams=grams)
            accuracies[name].append(test(pruned.params))
            losses[name] += [report.statistics.relative_loss for report in pruned.reports]

    print(*(leaf for leaf in pruned.leaves if leaf.path.endswith("kernel")), sep="\n")
    print(f"\n{'method':26}  accuracy  spread     mean loss")
    for name, values in accuracies.items():
        loss = f"{np.mean(losses[name]):12.4f}" if name in losses else ""
        print(
            f"{name:26}  {np.mean(values):7.2f}%  {np.std(values, ddof=1):5.2f}%  {loss}".rstrip()
        )


if __name__ == "__main__":
    main()
