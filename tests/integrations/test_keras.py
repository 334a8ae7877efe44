import os
import runpy

import jax
import numpy as np
import pytest
from printed import assert_documented, losses
from programs import ROOT, run

import prox24

os.environ["KERAS_BACKEND"] = "jax"
if "REQUIRE_KERAS" not in os.environ:
    pytest.importorskip("keras")
import keras
from keras import layers

pytestmark = pytest.mark.slow


def test_a_pruned_model_is_tuned_saved_and_loaded():
    output = run("examples/keras_mlp.py")
    found = losses(output)
    assert found["tuned"] < found["pruned"]
    assert found["loaded"] == found["tuned"]
    assert_documented(output)


def convolutions():
    return keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(8, 3, strides=2, name="conv"),
            layers.SeparableConv2D(8, 2, name="separable"),
        ]
    )


def attention():
    x = keras.Input((6, 16))
    return keras.Model(x, layers.MultiHeadAttention(2, 8, name="attention")(x, x))


def recurrent():
    return keras.Sequential([keras.Input((6, 16)), layers.LSTM(8, name="lstm")])


def einsum():
    named = layers.EinsumDense("abc,dc->abd", (5, 16), name="einsum")
    return keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(16, 8), named])


# The axis of every leaf that is pruned. A depthwise kernel sums over places alone.
PRUNED = {
    convolutions: {"conv/kernel": 2, "separable/pointwise_kernel": 2},
    attention: {f"attention/{name}/kernel": 0 for name in ("query", "key", "value")}
    | {"attention/attention_output/kernel": 1},
    recurrent: {"lstm/lstm_cell/kernel": 0, "lstm/lstm_cell/recurrent_kernel": 0},
    einsum: {"einsum/kernel": 1},
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", PRUNED)
def test_kernels_of_layers_are_pruned_along_the_axes_that_they_sum_over(make):
    with jax.enable_x64(False):
        keras.utils.set_random_seed(0)
        model = make()
        shape = (64, *model.input_shape[1:])
        rng = np.random.default_rng(0)
        x = rng.integers(16, size=shape) if make is einsum else rng.normal(size=shape)
        names = runpy.run_path(str(ROOT / "examples/keras_mlp.py"))
        apply, params = names["function_of"](model), names["params_of"](model)
        pruned = prox24.prune_params(apply, params, [x.astype(model.inputs[0].dtype)])
    prefix = f"{model.name}/"
    found = {leaf.path.removeprefix(prefix): leaf.axis for leaf in pruned.leaves if leaf.pruned}
    assert found == PRUNED[make]
    for leaf in pruned.leaves:
        if leaf.pruned:
            assert prox24.is_sparse(pruned.params[leaf.path], axis=leaf.axis)
