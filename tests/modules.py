"""Parameters as every library holds them, and which of their leaves are pruned."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.Conv(8, (3, 3))(nn.BatchNorm(use_running_average=True)(x))
        x = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(8, name="head")(nn.Dense(8)(x))


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def filled(shapes):
    """Numbers without a zero, since running the initialisers of a model takes seconds."""
    return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)


@functools.cache
def linen_cnn():
    inputs = jnp.ones((1, 4, 4, 3), jnp.float32)
    return filled(jax.eval_shape(LinenCNN().init, jax.random.key(0), inputs)["params"])


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 16, rngs=rngs)


def nnx_model():
    model = nnx.eval_shape(lambda: NnxTransformer(nnx.Rngs(0)))
    nnx.update(model, filled(nnx.state(model, nnx.Param)))
    return model


@functools.cache
def nnx_state():
    return nnx.state(nnx_model(), nnx.Param)


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP
    embedding: eqx.nn.Embedding

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(8, 4, 3, key=key)
        self.mlp = eqx.nn.MLP(8, 8, 8, 1, key=key)
        self.embedding = eqx.nn.Embedding(4, 8, key=key)


@functools.cache
def equinox_model():
    shapes = eqx.filter_eval_shape(EquinoxNet, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf if callable(leaf) else normal(*leaf.shape), shapes)


def equinox_params():
    return eqx.filter(equinox_model(), eqx.is_inexact_array)


def hugging_face():
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": normal(16, 8),
        layer + "self_attn.q_proj.weight": normal(8, 8),
        layer + "self_attn.q_proj.bias": normal(8),
        layer + "input_layernorm.weight": normal(8),
        layer + "mlp.down_proj.weight": normal(8, 8),
        layer + "mlp.odd_proj.weight": normal(8, 6),
        "lm_head.weight": normal(16, 8),
    }


ATTENTION = {"key": 0, "out": 1, "query": 0, "value": 0}
# The axis of every leaf that is pruned. Layers of three and of six inputs are not.
PRUNED = {
    linen_cnn: {"Conv_1/kernel": 2, "Dense_0/kernel": 0}
    | {f"MultiHeadDotProductAttention_0/{k}/kernel": axis for k, axis in ATTENTION.items()},
    nnx_state: {"layers/0/kernel": 0, "layers/1/kernel": 0}
    | {f"attention/{k}/kernel": axis for k, axis in ATTENTION.items()},
    equinox_params: {"conv/weight": 1, "mlp/layers/0/weight": 1, "mlp/layers/1/weight": 1},
    hugging_face: {
        "model.layers.0.self_attn.q_proj.weight": 1,
        "model.layers.0.mlp.down_proj.weight": 1,
    },
}
every_model = pytest.mark.parametrize("make", PRUNED, ids=lambda make: make.__name__)
