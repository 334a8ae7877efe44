"""Prunes an Equinox model while it trains, with a checkpoint by orbax in the middle.

A growing penalty prunes. One run is whole. Another one stops halfway and goes on from what orbax
wrote: model, moments, and the count that sets the penalty. Then the kept weights are trained on.
"""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import prox24
from prox24.optax import check, keep_pattern, proximal

STEPS, TUNING, INPUTS, WIDTH = 600, 300, 16, 64
IS_PARAM = eqx.is_inexact_array


class Network(eqx.Module):
    """A perceptron. What is called `head` stays dense."""

    body: eqx.nn.MLP
    head: eqx.nn.Linear

    def __call__(self, x):
        """From inputs (INPUTS,) to an output (1,)."""
        return self.head(jax.nn.gelu(self.body(x)))


def loss(model, key):
    """Mean squared error on random inputs."""
    x = jax.random.normal(key, (128, INPUTS))
    return jnp.mean((jax.vmap(model)(x) - jnp.sin(x[:, :1]) * x[:, 1:2]) ** 2)


def train(optimizer, model, state, steps):
    """The model and the optimizer's state after these steps, a range."""

    @eqx.filter_jit
    def step(model, state, key):
        gradients = eqx.filter_grad(loss)(model, key)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, IS_PARAM))
        return eqx.apply_updates(model, updates), state

    for i in steps:
        model, state = step(model, state, jax.random.key(i))
    return model, state


def main():
    """Trains with and without an interruption, tunes, and prints the losses and the report."""
    body = eqx.nn.MLP(INPUTS, WIDTH, WIDTH, depth=1, key=jax.random.key(0))
    model = Network(body, eqx.nn.Linear(WIDTH, 1, key=jax.random.key(1)))
    penalty = prox24.Exponential(1e-3, 1.025)
    optimizer = optax.chain(optax.adam(3e-3), proximal(penalty))
    check(optimizer, eqx.filter(model, IS_PARAM))
    begun = model, optimizer.init(eqx.filter(model, IS_PARAM))
    pruned, _ = train(optimizer, *begun, range(STEPS))

    half = train(optimizer, *begun, range(STEPS // 2))
    like, rest = eqx.partition(begun, eqx.is_array)
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
        manager.save(STEPS // 2, args=ocp.args.StandardSave(eqx.filter(half, eqx.is_array)))
        saved = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    again, _ = train(optimizer, *eqx.combine(saved, rest), range(STEPS // 2, STEPS))
    print("the interrupted run ends with the same weights:", bool(eqx.tree_equal(pruned, again)))
    tuning = keep_pattern(optax.adam(1e-3))
    state = tuning.init(eqx.filter(pruned, IS_PARAM))
    tuned, _ = train(tuning, pruned, state, range(STEPS, STEPS + TUNING))
    for name, each in ("half", half[0]), ("pruned", pruned), ("tuned", tuned):
        print(f"{name:7} loss {loss(each, jax.random.key(STEPS + TUNING)):.4f}")
    print(prox24.report(tuned))


if __name__ == "__main__":
    main()
