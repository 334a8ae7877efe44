"""Which leaves are pruned, along which axis, in the containers of every library."""

import re
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from modules import (
    PRUNED,
    equinox_model,
    equinox_params,
    every_model,
    linen_cnn,
    nnx_model,
    nnx_state,
    normal,
)
from test_optax import nonzeros, updated
from tiers import rest

from prox24 import prune_params
from prox24.optax import by_path, check, describe, keep_pattern, proximal

pytestmark = pytest.mark.usefixtures("standard_promotion")


def pruned_axes(leaves):
    return {leaf.path: leaf.axis for leaf in leaves if leaf.pruned}


@every_model
def test_the_input_axis_of_the_layers_is_pruned_and_the_rest_left_dense(make):
    assert pruned_axes(describe(make())) == PRUNED[make]


def test_leaves_are_listed_in_order_whatever_holds_them():
    params = linen_cnn()
    assert [leaf.shape for leaf in describe(params)] == [w.shape for w in jax.tree.leaves(params)]
    assert describe(flax.core.freeze(params)) == describe(params)
    assert describe(jax.eval_shape(lambda tree: tree, params)) == describe(params)
    state = nnx_state()
    assert describe(nnx.to_pure_dict(state)) == describe(state)
    params = [{"weight": normal(8, 8)}, (normal(4, 8), normal(8))]
    assert [leaf.path for leaf in describe(params)] == ["0/weight", "1/0", "1/1"]
    assert pruned_axes(describe(params)) == {"0/weight": 1, "1/0": 1}


DENSE = """
    wte/weight transformer.wpe.weight Embed_0/embedding position_embeddings/weight pos_embed
    lm_head/kernel head/weight heads/head/kernel classification_head/dense/weight
    Classifier/weight score.weight logits/kernel output_projection/kernel
    layers/input_layernorm/weight LayerNorm_0/scale h/ln_1/weight h/ln2/weight
    attention/query/bias
"""
ALIKE = "headline/kernel up_proj/weight learn/kernel rescale/kernel logits_mlp/w"


def test_embeddings_heads_biases_norms_and_what_is_no_matrix_are_left_dense():
    params = {path: normal(8, 8) for path in f"{DENSE} {ALIKE}".split()}
    others = normal(8), normal(), normal(8, 8, dtype=jnp.int32)
    params |= {f"other_{i}/weight": leaf for i, leaf in enumerate(others)}
    assert pruned_axes(describe(params)).keys() == set(ALIKE.split())


def test_default_axis():
    params = {
        "kernel": (normal(8, 4), 0),
        "Conv_0/kernel": (normal(3, 8, 4), 1),
        "weight": (normal(4, 8), 1),
        "conv.weight": (normal(4, 8, 3, 3), 1),
        "attention/self/query/kernel": (normal(8, 4), 0),
        "query/kernel": (normal(8, 2, 4), 0),
        "stacked/query/kernel": (normal(2, 8, 2, 4), 1),
        "query/out/kernel": (normal(8, 2, 4), 1),
    }
    found = describe({path: leaf for path, (leaf, _) in params.items()}, (1, 2))
    assert pruned_axes(found) == {path: axis for path, (_, axis) in params.items()}


def test_kernels_of_keras():
    params = {
        "lstm/recurrent_kernel": jnp.ones((8, 32)),
        "conv/pointwise_kernel": jnp.ones((1, 1, 8, 12)),
        "conv/depthwise_kernel": jnp.ones((3, 3, 8, 4)),
        "conv2d_transpose_1/kernel": jnp.ones((3, 3, 12, 8)),
    }
    found = {leaf.path: (leaf.pruned, leaf.axis, leaf.reason) for leaf in describe(params)}
    assert found["lstm/recurrent_kernel"] == (True, 0, "default")
    assert found["conv/pointwise_kernel"] == (True, 2, "default")
    assert found["conv2d_transpose_1/kernel"] == (True, 3, "default")
    assert found["conv/depthwise_kernel"][::2] == (False, "depthwise")


def test_axis_may_be_one_number_or_a_function_and_the_pattern_must_divide():
    params = {"a": normal(8, 6), "b": normal(6, 8)}
    assert pruned_axes(describe(params)) == {"b": 1}
    assert pruned_axes(describe(params, axis=0)) == {"a": 0}
    assert pruned_axes(describe(params, axis=-1)) == {"b": 1}
    assert pruned_axes(describe(params, axis={"a": 0, "b": -1}.get)) == {"a": 0, "b": 1}
    assert pruned_axes(describe(params, (4, 8))) == {"b": 1}
    assert pruned_axes(describe(params, (1, 2))) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="axis of b is None: give an integer, or a function of"):
        describe(params, axis={"a": 0}.get)


def test_mask_may_be_a_tree_a_prefix_or_a_function():
    params = {"a": {"weight": normal(8, 8)}, "lm_head": {"weight": normal(8, 8)}}
    tree = {"a": {"weight": False}, "lm_head": {"weight": np.True_}}
    # What a predicate returns need not be a bool.
    by_name = by_path(re.compile("lm_head/").match)
    for mask in (tree, {"a": False, "lm_head": True}, lambda params: tree, by_name):
        assert pruned_axes(describe(params, mask=mask)) == {"lm_head/weight": 1}
    assert pruned_axes(describe(params, mask=True)) == {"a/weight": 1, "lm_head/weight": 1}
    assert pruned_axes(describe(params, mask=False)) == {}
    # A module can be called too.
    params = equinox_params().mlp
    mask = jax.tree.map(lambda w: w.shape == (8, 8), params)
    assert callable(mask)
    chosen = {"layers/0/weight": 1, "layers/1/weight": 1}
    assert pruned_axes(describe(params, mask=mask)) == chosen


@pytest.mark.parametrize("mask", ["kernel", 1, {"a": normal(8, 8) != 0, "b": False}])
def test_an_entry_of_a_mask_that_is_no_bool_is_named(mask):
    params = {"a": normal(8, 8), "b": normal(8, 8)}
    with pytest.raises(
        ValueError, match=r"^mask has (.kernel.|1|an array .* \(8, 8\)) for a: give"
    ):
        describe(params, mask=mask)
    with pytest.raises(ValueError, match=r"^mask has "):
        prune_params(lambda p, x: x @ p["a"] @ p["b"], params, [normal(8, 8)], mask=mask)


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


@pytest.mark.parametrize("value", [normal(8, 8), None])
def test_a_parameter_that_is_called_value_keeps_its_name(value):
    params = {"attn": Attention(normal(8, 8), normal(8, 8), value)}
    names = ["attn/query", "attn/key", "attn/value"][: len(jax.tree.leaves(params))]
    assert [leaf.path for leaf in describe(params)] == names
    for left in (None, optax.MaskedNode()):
        alone = {"attn": Attention(left, left, normal(8, 8))}
        assert [leaf.path for leaf in describe(alone)] == ["attn/value"]


@pytest.mark.parametrize(
    ("leaf", "axis", "obstacle"),
    [
        (normal(8, 6), None, "axis 1 is not divisible by 4"),
        (normal(8), None, "it has no axis 1"),
        (normal(0, 8), None, "it is empty"),
        (normal(), -1, "it has no axis -1"),
        (normal(8, 8, dtype=jnp.int32), None, "it is not a floating array"),
        (normal(8, 8), 2, "it has no axis 2"),
        (normal(8, 8), -3, "it has no axis -3"),
    ],
)
def test_choosing_a_leaf_that_cannot_be_pruned_names_it(leaf, axis, obstacle):
    named = rf"^up/weight of shape {re.escape(str(leaf.shape))} .* axis -?\d: {obstacle}; .*mask"
    with pytest.raises(ValueError, match=named):
        describe({"up": {"weight": leaf}}, axis=axis, mask=True)
    assert pruned_axes(describe({"gate": normal(8)}, axis=-1, mask=True)) == {"gate": 0}


def test_printed_leaves_are_aligned_lines_that_end_in_the_path():
    leaves = describe(linen_cnn())
    lines = [str(leaf) for leaf in leaves]
    assert len({line.rindex(" ") for line in lines}) == 1
    for leaf, line in zip(leaves, lines, strict=True):
        verdict = "pruned" if leaf.pruned else "dense"
        shape = re.escape(str(leaf.shape))
        assert re.fullmatch(rf"{verdict} +{shape} .*{leaf.reason} +{re.escape(leaf.path)}", line)


@pytest.mark.parametrize("make", [*(x for x in PRUNED if x is not linen_cnn), *rest(linen_cnn)])
def test_both_transforms_take_every_container(make):
    params, axes = make(), PRUNED[make]
    zeros = jax.tree.map(jnp.zeros_like, params)
    params = optax.apply_updates(params, updated(proximal(1e30), params, zeros))
    assert jax.tree.structure(params) == jax.tree.structure(zeros)

    ones = jax.tree.map(jnp.ones_like, params)
    trained = optax.apply_updates(params, updated(keep_pattern(optax.sgd(0.1)), params, ones))
    triples = zip(describe(params), jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    for leaf, before, after in triples:
        before, after = np.asarray(before), np.asarray(after)
        assert leaf.path not in axes or nonzeros(before, axes[leaf.path]).max() == 2
        stays = (before == 0) & (leaf.path in axes)
        assert np.all(after[stays] == 0)
        assert np.all(after[~stays] != before[~stays])


def test_an_nnx_optimizer_prunes_its_model():
    model = nnx_model()
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), proximal(1e30)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert nonzeros(model.layers[0].kernel[...]).max() == 2
    assert np.all(np.asarray(model.embed.embedding[...]) != 0)


def test_an_equinox_model_is_pruned_by_filtered_gradients():
    model, whole, optimizer = equinox_params(), equinox_model(), proximal(1e30)
    gradients = jax.tree.map(jnp.ones_like, model)
    # Activation functions are leaves of the whole model, and None in its gradients.
    updates, _ = optimizer.update(gradients, optimizer.init(model), whole)
    pruned = eqx.apply_updates(whole, updates)
    assert nonzeros(pruned.mlp.layers[0].weight, 1).max() == 2


@pytest.mark.parametrize("make", [nnx_state, equinox_params])
def test_check_takes_models(make):
    mask = by_path(lambda path: re.search(r"layers/0/(kernel|weight)", path) is not None)
    check(optax.chain(optax.sgd(0.1), proximal(1.0, mask=mask)), make(), mask=mask)
    with pytest.raises(ValueError, match="layers/0/"):
        check(optax.chain(proximal(1.0, mask=mask), optax.sgd(0.1)), make(), mask=mask)
