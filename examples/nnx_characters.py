"""Prunes a small transformer of Flax NNX that predicts the characters of a text.

The transformer has 245,000 weights. It is trained on the speeches packaged with prox24; the last
tenth of the text is held out. All kernels of attention and of the feed-forward layers are pruned,
by the Grams of their inputs. The kernels of attention have three axes: (in, heads, head_dim) and
(heads, head_dim, out). Embeddings and the head stay dense. Nothing is trained afterwards.

The loss is for the next character, on the held-out text. In the last two rows the default
calibrates each layer on the outputs of the pruned layers before it. The targets are the layer's own
outputs there, or the dense model's. Calibration in order gains nothing here. The figure has the
loss above the dense model's.
"""

import argparse
import functools
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx

import prox24

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs/figures/nnx_characters.svg"
LAYERS, WIDTH, HEADS, LENGTH = 2, 96, 4, 64
STEPS, BATCH, RATE = 500, 32, 3e-3
CALIBRATION, TEST = 128, 256  # windows
METHODS = {
    "wanda": prox24.Recipe.wanda(),
    "sparsegpt": prox24.Recipe.sparsegpt(),
    "admm with the prox + refit": prox24.Recipe(),
}


class Block(nnx.Module):
    """Causal attention and a feed-forward layer, each added to its input."""

    def __init__(self, rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """Hidden states (batch, length, width)."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    """From characters to logits of the next ones."""

    def __init__(self, characters, rngs):
        self.embed = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.position_embed = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, tokens):
        """From tokens (batch, length) to logits (batch, length, characters)."""
        x = self.embed(tokens) + self.position_embed(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows(tokens, count):
    """Windows spread evenly over the text, with the next character, (count, length + 1)."""
    starts = np.linspace(0, len(tokens) - LENGTH - 1, count).astype(int)
    return tokens[starts[:, None] + np.arange(LENGTH + 1)]


def loss(apply, params, batch):
    """Mean cross-entropy of the characters in nats."""
    logits = apply(params, batch[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))


@functools.partial(jax.jit, static_argnums=0)
def train(apply, params, tokens):
    """The parameters after some steps of Adam at a falling rate."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(state, key):
        params, memory = state
        starts = jax.random.randint(key, (BATCH, 1), 0, len(tokens) - LENGTH)
        batch = tokens[starts + jnp.arange(LENGTH + 1)[None, :]]
        gradient = jax.grad(loss, argnums=1)(apply, params, batch)
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    keys = jax.random.split(jax.random.key(0), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def draw(increases, output):
    """Draws a bar for each method."""
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, axes = plt.subplots(figsize=(5, 3), layout="tight")
    axes.barh(list(increases), list(increases.values()))
    axes.invert_yaxis()
    axes.set_xlabel("loss above dense (nats per character)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, metadata={"Date": None})


def main():
    """Trains, prunes by every method, prints the table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
    output = parser.parse_args().output

    text = (resources.files("prox24") / "data/speeches.txt").read_text(encoding="utf-8")
    characters = sorted(set(text))
    tokens = np.searchsorted(characters, list(text)).astype(np.int32)
    train_tokens, test_tokens = np.split(tokens, [9 * len(tokens) // 10])

    graph, params = nnx.split(Transformer(len(characters), nnx.Rngs(0)))

    def apply(params, tokens):
        return nnx.merge(graph, params)(tokens)

    params = train(apply, params, jnp.asarray(train_tokens))
    batches = np.split(windows(train_tokens, CALIBRATION)[:, :-1], 4)
    test = functools.partial(
        jax.jit(functools.partial(loss, apply)), batch=windows(test_tokens, TEST)
    )

    grams = prox24.calibrate(apply, params, batches)
    pruned = {
        name: prox24.prune_params(apply, params, recipe=recipe, grams=grams)
        for name, recipe in METHODS.items()
    }
    for name, targets in (("own targets", None), ("dense targets", prox24.DenseTargets())):
        pruned[f"in order, {name}"] = prox24.prune_params(
            apply, params, batches, prox24.Recipe(targets=targets), order="sequential"
        )

    leaves = pruned["wanda"].leaves
    print(*(leaf for leaf in leaves if leaf.path.endswith(("kernel", "embedding"))), sep="\n")
    print(f"\n{'method':26}  nats per character     mean loss")
    dense = test(params)
    print(f"{'dense':26}  {dense:18.4f}")
    increases = {}
    for name, result in pruned.items():
        found = test(result.params)
        increases[name] = found - dense
        relative = np.mean([report.statistics.relative_loss for report in result.reports])
        print(f"{name:26}  {found:18.4f}  {relative:12.4f}")
    draw(increases, output)


if __name__ == "__main__":
    main()
