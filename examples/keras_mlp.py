"""Prunes a Keras 3 model on the JAX backend, trains it on with optax, and writes it back.

Keras trains the dense model. Its stateless call is a function of the parameters, for `prune_params`
and optax. What they make goes back into the variables, and the model into a .keras file.
"""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import optax
from keras import layers

import prox24
from prox24.optax import keep_pattern

ROWS, INPUTS, WIDTH, BATCH, STEPS = 8192, 16, 64, 128, 600


def params_of(model):
    """The trainable arrays by the paths of their variables."""
    return {variable.path: variable.value for variable in model.trainable_variables}


def function_of(model):
    """The model in evaluation as a function of its parameters, with the statistics of now."""
    paths = [variable.path for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]

    def apply(params, x):
        return model.stateless_call([params[path] for path in paths], others, x, training=False)[0]

    return apply


def main():
    """Trains, prunes, tunes, saves and loads; prints the losses and the report."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(2 * ROWS, INPUTS)).astype(np.float32)
    y = np.sin(x[:, :1]) * x[:, 1:2]
    test = {"x": x[ROWS:], "y": y[ROWS:], "verbose": 0}
    hidden = [layers.Dense(WIDTH, "gelu"), layers.BatchNormalization(), layers.Dense(WIDTH, "gelu")]
    model = keras.Sequential([keras.Input((INPUTS,)), *hidden, layers.Dense(1, name="head")])
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    model.fit(x[:ROWS], y[:ROWS], BATCH, epochs=20, verbose=0)
    print(f"dense   loss {model.evaluate(**test):.4f}")

    apply = function_of(model)
    pruned = prox24.prune_params(apply, params_of(model), [x[:ROWS]])
    optimizer = keep_pattern(optax.adam(1e-3), pruned.trainable)

    @jax.jit
    def step(params, state, x, y):
        gradients = jax.grad(lambda params: jax.numpy.mean((apply(params, x) - y) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = pruned.params, optimizer.init(pruned.params)
    for start in range(0, STEPS * BATCH, BATCH):
        rows = slice(start % ROWS, start % ROWS + BATCH)
        params, state = step(params, state, x[rows], y[rows])

    for name, each in {"pruned": pruned.params, "tuned": params}.items():
        for variable in model.trainable_variables:
            variable.assign(each[variable.path])
        print(f"{name:7} loss {model.evaluate(**test):.4f}")
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.saving.load_model(f"{folder}/model.keras")
    print(f"loaded  loss {loaded.evaluate(**test):.4f}")
    print(prox24.report(params_of(loaded)))


if __name__ == "__main__":
    main()
