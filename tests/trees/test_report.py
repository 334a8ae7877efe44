"""What is pruned in trees and checkpoints, those of other libraries too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config_dict, random_weights, write_folder

import prox24
from prox24.optax import keep_pattern


def kernels(axis):
    """A Flax tree, whose kernels (in, out) are pruned by magnitude along an axis."""

    def pruned(seed, shape):
        kernel = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        return jnp.where(prox24.top_mask(jnp.abs(kernel), axis=axis), kernel, 0)

    return {
        "embed": {"embedding": jnp.ones((10, 8), jnp.float32)},
        "layer": {"up": {"kernel": pruned(0, (8, 16)), "bias": jnp.ones(16, jnp.float32)}},
        "down": {"kernel": pruned(1, (16, 8))},
        "step": 3,
    }


def test_a_pruned_tree_is_reported_leaf_by_leaf():
    found = prox24.report(kernels(0) | {"unused": jnp.zeros((0, 8))})
    assert found.sparse
    zeros = {each.leaf.path: each.zeros for each in found.leaves}
    assert zeros == {
        "down/kernel": 0.5,
        "embed/embedding": 0.0,
        "layer/up/bias": 0.0,
        "layer/up/kernel": 0.5,
        "step": 0.0,
        "unused": 0.0,
    }
    assert str(found).splitlines()[-1] == "2 of 2 leaves to prune are 2:4 along their axes"
    assert not prox24.report({"bias": jnp.ones(4)}).sparse  # nothing to prune
    keys = jax.random.split(jax.random.key(0), 3)
    assert prox24.report(kernels(0) | {"keys": keys}).sparse


def test_a_tree_that_was_pruned_along_the_outputs_is_found_and_explained():
    # As Qwix and MaxText do by default: in blocks of the last axis of a kernel (in, out).
    found = prox24.report(kernels(1))
    assert not found.sparse
    down, *_, up, _ = found.leaves
    assert (down.other_axes, up.other_axes) == ((1,), (1,))
    assert up.violations == int(
        prox24.count_violations(kernels(1)["layer"]["up"]["kernel"], axis=0)
    )
    assert "it has the pattern along axis 1: give axis=1 if the layer sums over it" in str(up)
    assert prox24.report(kernels(1), axis=1).sparse
    half = kernels(0) | {"down": {"kernel": jnp.ones((16, 8))}}
    assert [each.other_axes for each in prox24.report(half).leaves] == [()] * 5


def test_verify_explains_a_checkpoint_that_was_pruned_along_the_outputs(tmp_path):
    config, weights = config_dict(), random_weights(config_dict())
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            weights[name] = weight * np.asarray(prox24.top_mask(abs(weight), axis=0))
    write_folder(tmp_path / "model", config, weights)
    problems = prox24.verify(tmp_path / "model").problems
    assert len(problems) == 14
    assert all("it has the pattern along axis 0, over which" in x for x in problems.values())


@pytest.mark.usefixtures("standard_promotion")
def test_a_mask_goes_to_other_libraries_and_comes_back():
    params = {name: value for name, value in kernels(0).items() if name != "step"}
    mask = prox24.mask_of(params)
    assert jax.tree.all(jax.tree.map(lambda m, w: m.shape == w.shape, mask, params))
    moved = jax.tree.map(lambda w: w + 1, params)
    masked = jax.tree.map(lambda w, m: w * m, moved, mask)
    assert prox24.report(masked).sparse
    optimizer = keep_pattern(optax.sgd(0.1), trainable=mask)
    state = optimizer.init(params)
    updates, _ = optimizer.update(moved, state, params)
    trained = optax.apply_updates(params, updates)
    assert prox24.report(trained).sparse
    assert not jnp.array_equal(trained["down"]["kernel"], params["down"]["kernel"])


def prune(params):
    return prox24.prune_params(lambda p, x: x @ p["up"]["kernel"], params, [jnp.ones((3, 8))])


@pytest.mark.parametrize("look", [prox24.report, prox24.mask_of, prune])
def test_a_tree_of_shapes_has_no_zeros_to_look_at(look):
    shapes = jax.eval_shape(lambda: {"up": {"kernel": jnp.zeros((8, 4))}})
    with pytest.raises(ValueError, match="up/kernel has no value: give arrays"):
        look(shapes)
