"""Prunes a Flax NNX model while it trains, with a checkpoint by orbax in the middle.

A growing penalty prunes. One run is whole. Another one stops halfway and goes on from what orbax
wrote: model, moments, and the count that sets the penalty. Then the kept weights are trained on.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

import prox24
from prox24.optax import check, keep_pattern, proximal

STEPS, TUNING, INPUTS, WIDTH = 600, 300, 16, 64
PENALTY = prox24.Exponential(1e-3, 1.025)


class Network(nnx.Module):
    """A perceptron. What is called `head` stays dense."""

    def __init__(self, rngs):
        self.up = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
        self.middle = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        """From inputs (batch, INPUTS) to outputs (batch, 1)."""
        return self.head(nnx.gelu(self.middle(nnx.gelu(self.up(x)))))


def loss(model, key):
    """Mean squared error on random inputs."""
    x = jax.random.normal(key, (128, INPUTS))
    return jnp.mean((model(x) - jnp.sin(x[:, :1]) * x[:, 1:2]) ** 2)


@nnx.jit
def step(model, optimizer, key):
    """One step, in place."""
    optimizer.update(model, nnx.grad(loss)(model, key))


def train(model, optimizer, steps):
    """Takes these steps, a range, in place."""
    for i in steps:
        step(model, optimizer, jax.random.key(i))


def main():
    """Trains with and without an interruption, tunes, and prints the losses and the report."""
    models = [Network(nnx.Rngs(0)) for _ in range(3)]
    pruning = optax.chain(optax.adam(3e-3), proximal(PENALTY))
    check(pruning, nnx.state(models[0], nnx.Param))
    whole, half, again = ((each, nnx.Optimizer(each, pruning, wrt=nnx.Param)) for each in models)
    train(*whole, range(STEPS))

    train(*half, range(STEPS // 2))
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
        manager.save(STEPS // 2, args=ocp.args.StandardSave(nnx.state(half)))
        like = ocp.args.StandardRestore(nnx.state(again))
        nnx.update(again, manager.restore(manager.latest_step(), args=like))
    train(*again, range(STEPS // 2, STEPS))
    equal = jax.tree.map(jnp.array_equal, nnx.state(whole), nnx.state(again))
    print("the interrupted run ends with the same weights:", all(jax.tree.leaves(equal)))

    model, key = whole[0], jax.random.key(STEPS + TUNING)
    print(f"half    loss {loss(half[0], key):.4f}\npruned  loss {loss(model, key):.4f}")
    tuning = nnx.Optimizer(model, keep_pattern(optax.adam(1e-3)), wrt=nnx.Param)
    train(model, tuning, range(STEPS, STEPS + TUNING))
    print(f"tuned   loss {loss(model, key):.4f}")
    print(prox24.report(nnx.state(model, nnx.Param)))


if __name__ == "__main__":
    main()
