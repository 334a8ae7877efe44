"""Low-rank adapters that keep the pattern: what is trained is what is merged."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from modules import PRUNED, every_model
from reference import assert_close, eps_of

from prox24 import lora, refine
from prox24.lora import Adapter
from prox24.optax import by_path, describe

jitted_merge = jax.jit(lora.merge)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pruned(shape, axis, seed=0, dtype=jnp.float32):
    """The two largest of every four, by NumPy, since the tests have many shapes."""
    moved = np.moveaxis(np.random.default_rng(seed).normal(size=shape), axis, -1)
    blocks = moved.reshape(-1, 4)
    np.put_along_axis(blocks, np.argsort(np.abs(blocks), axis=1)[:, :2], 0, axis=1)
    return jnp.asarray(np.moveaxis(blocks.reshape(moved.shape), -1, axis), dtype)


def is_sparse(weight, axis):
    blocks = rows(weight, axis).reshape(-1, 4)
    return np.all(np.count_nonzero(blocks, axis=1) <= 2)


def adapter(shape, axis, rank, seed=1):
    """One that has been trained."""
    thin = (*shape[:axis], rank, *shape[axis + 1 :])
    return Adapter(normal((rank, shape[axis]), seed), normal(thin, seed + 1), axis)


def rows(tensor, axis):
    """As a float64 matrix whose columns run along the axis."""
    moved = np.moveaxis(np.asarray(tensor, np.float64), axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def merged_rows(weight, adapter, scale):
    """The definition, in NumPy and float64."""
    matrix = rows(weight, adapter.axis)
    update = rows(adapter.b, adapter.axis) @ np.asarray(adapter.a, np.float64)
    return matrix + scale * (matrix != 0) * update


def network(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["weight"].T


def pruned_network(dtype=jnp.float32):
    """A Flax kernel (in, out) and a PyTorch weight (out, in)."""
    return {
        "first": {"kernel": pruned((16, 32), 0, 0, dtype) / 4, "bias": jnp.zeros(32, dtype)},
        "second": {"weight": pruned((8, 32), 1, 1, dtype) / 6},
    }


@every_model
def test_a_new_adapter_changes_nothing_in_the_containers_of_every_library(make):
    params = make()
    adapters = lora.init(jax.random.key(0), params, 2)
    merged = lora.merge(params, adapters, 3.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    found = jax.tree.leaves(adapters, is_leaf=lambda node: isinstance(node, Adapter))
    axes = [leaf.axis for leaf in describe(params) if leaf.path in PRUNED[make]]
    assert [adapter.axis for adapter in found] == axes
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
    # Shapes suffice to start.
    of_shapes = lora.init(jax.random.key(0), jax.eval_shape(lambda: params), 2)
    jax.tree.map(np.testing.assert_array_equal, of_shapes, adapters)


def test_adapters_differ_and_are_of_the_size_of_their_inputs():
    adapters = lora.init(jax.random.key(0), pruned_network(), 8)
    first, second = adapters["first"]["kernel"], adapters["second"]["weight"]
    assert (first.a.shape, first.b.shape) == ((8, 16), (8, 32))
    assert (second.a.shape, second.b.shape) == ((8, 32), (8, 8))
    assert adapters["first"]["bias"] is None
    np.testing.assert_allclose(jnp.std(first.a), 1 / 4, rtol=0.2)
    np.testing.assert_allclose(jnp.std(second.a), 32**-0.5, rtol=0.2)
    assert not jnp.any(first.a[:, :8] == second.a[:, :8])
    assert not jnp.any(first.b)


every_place = pytest.mark.parametrize(
    ("shape", "axis"), [((8, 6), 0), ((6, 8), 1), ((2, 8, 3), 1), ((1, 5, 2, 12), 3)], ids=str
)


@every_place
def test_merging_is_what_numpy_computes_and_keeps_the_pattern(shape, axis):
    weight, trained = pruned(shape, axis), adapter(shape, axis, rank=3)
    for scale in (-2.0, 0.0, 0.5, 16.0):
        merged = np.asarray(jitted_merge(weight, trained, scale))
        expected = merged_rows(weight, trained, scale)
        # The terms of a sum, its product with the scale and the addition.
        assert_close(rows(merged, axis), expected, 3 + 2, "float32")
        assert is_sparse(merged, axis)
        np.testing.assert_array_equal(merged == 0, np.asarray(weight) == 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once_to_the_dtype_of_the_weight(dtype):
    weight, trained = pruned((16, 8), 0, dtype=dtype), adapter((16, 8), 0, 2)
    merged = lora.merge({"w": weight}, {"w": trained}, 0.25)["w"]
    whole = lora.merge(weight.astype(jnp.float32), trained, 0.25)
    assert merged.dtype == dtype
    np.testing.assert_array_equal(merged, whole.astype(dtype))
    # Zeros stay zero beside an update that is not finite.
    trained = Adapter(trained.a.at[:, 0].set(jnp.inf), trained.b, 0)
    np.testing.assert_array_equal(lora.merge(weight, trained, 1.0) == 0, weight == 0)


@every_place
def test_gradients_are_those_of_the_masked_product(shape, axis):
    weight, trained = pruned(shape, axis), adapter(shape, axis, 2)
    cotangent, scale = normal(shape, 5), 0.5

    @jax.grad
    def gradients(inputs):
        return jnp.sum(cotangent * lora.merge(inputs["w"], inputs["adapter"], scale))

    found = gradients({"w": weight, "adapter": trained})
    kept = rows(weight, axis) != 0
    seen = kept * rows(cotangent, axis)
    a, b = np.asarray(trained.a, np.float64), rows(trained.b, axis)
    np.testing.assert_array_equal(rows(found["w"], axis), seen)
    # As many as their sums have terms.
    of_b = rows(found["adapter"].b, axis)
    assert_close(found["adapter"].a, scale * b.T @ seen, len(seen))
    assert_close(of_b, scale * seen @ a.T, seen.shape[1], "float32")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_what_is_merged(dtype):
    params, x = pruned_network(dtype), normal((256, 16), 4)
    target = x @ normal((16, 8), 5) / 8
    adapters = lora.init(jax.random.key(0), params, 4)
    optimizer, traces = optax.adam(3e-2), []

    def error(params):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return jnp.mean(jnp.square(network(wide, x) - target))

    @jax.jit
    def loss(adapters, scale):
        traces.append(1)
        return error(lora.merge(params, adapters, scale))

    @jax.jit
    def step(adapters, state):
        updates, state = optimizer.update(jax.grad(loss)(adapters, 2.0), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state, before = optimizer.init(adapters), loss(adapters, 2.0)
    for _ in range(60):
        adapters, state = step(adapters, state)
    assert loss(adapters, 2.0) < 0.5 * before
    assert loss(adapters, 0.0) == before
    assert len(traces) == 1  # for every scale, by itself and with its gradient

    merged = jitted_merge(params, adapters, 2.0)
    # Sums of up to 32 terms.
    np.testing.assert_allclose(error(merged), loss(adapters, 2.0), rtol=32 * eps_of("float32"))
    for name, leaf, axis in (("first", "kernel", 0), ("second", "weight", 1)):
        weight, new = params[name][leaf], merged[name][leaf]
        assert new.dtype == dtype
        assert is_sparse(new, axis)
        np.testing.assert_array_equal(new == 0, weight == 0)
        assert jnp.all((new != weight) | (weight == 0)) or dtype == "bfloat16"
    np.testing.assert_array_equal(merged["first"]["bias"], params["first"]["bias"])


def test_leaves_and_axes_are_chosen_as_in_the_transforms():
    chosen = by_path(lambda path: path.startswith("first/kernel"))
    adapters = lora.init(jax.random.key(0), pruned_network(), 2, (1, 8), axis=1, mask=chosen)
    assert adapters["second"]["weight"] is None
    assert adapters["first"]["kernel"].axis == 1
    assert adapters["first"]["kernel"].a.shape == (2, 32)


RANKS = "second/weight of shape (8, 32) has adapters of rank 1 to 8 along axis 1, not "


@pytest.mark.parametrize(
    ("leaf", "rank", "more", "said"),
    [
        ("weight", 0, {}, re.escape(f"{RANKS}0")),
        ("weight", 9, {}, re.escape(f"{RANKS}9")),
        ("weight", 1.5, {}, "rank 1.5 is not a whole number"),
        ("bias", 1, {}, "no leaf is pruned"),
        ("bias", 1, {"axis": 1, "mask": True}, r"second/bias of shape .* cannot be pruned"),
    ],
)
def test_leaves_and_ranks_without_an_adapter_are_refused_by_name(leaf, rank, more, said):
    leaves = pruned_network()["second"] | {"bias": jnp.zeros(8, jnp.float32)}
    with pytest.raises(ValueError, match=said):
        lora.init(jax.random.key(0), {"second": {leaf: leaves[leaf]}}, rank, **more)


@pytest.mark.parametrize("other", [adapter((16, 8), 0, 2), adapter((32, 16), 1, 2)])
def test_adapters_of_another_weight_are_refused_by_its_name(other):
    params = {"dense": {"kernel": pruned((16, 32), 0)}}
    with pytest.raises(ValueError, match=re.escape("dense/kernel has shape (16, 32)")):
        lora.merge(params, {"dense": {"kernel": other}}, 1.0)
    with pytest.raises(ValueError, match=r"[Kk]ey"):
        lora.merge(params, {"other": {"kernel": other}}, 1.0)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\): give one number"):
        lora.merge(params, {"dense": {"kernel": other}}, np.ones(2))


def test_only_thin_arrays_are_kept_for_the_gradient():
    weight, start = pruned((64, 64), 0), adapter((64, 64), 0, 2)
    gradient = jax.vjp(functools.partial(lora.merge, weight, scale=2.0), start)[1]
    kept = [leaf for leaf in jax.tree.leaves(gradient) if leaf.size >= weight.size]
    for leaf in kept:
        np.testing.assert_array_equal(leaf, weight)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kept", [None, True])
def test_adapters_are_the_parameters_of_a_block_if_all_are_kept(kept):
    params, inputs = pruned_network(), list(normal((4, 64, 16)))
    adapters = lora.init(jax.random.key(0), params, rank=4)
    targets = [1.3 * network(params, x) for x in inputs]

    def apply(adapters, x):
        return network(lora.merge(params, adapters, scale=1.0), x)

    given = apply, adapters, inputs, targets, optax.adam(1e-2)
    refined = refine.train_block(*given, passes=20, trainable=kept)
    # By default a leaf that is wholly zero stays so.
    assert (refined.outcome is refine.Outcome.IMPROVED) == (kept is True)
