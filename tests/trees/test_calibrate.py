"""Grams of the inputs of every weight, wherever a model multiplies it with them."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import normal
from reference import assert_close, eps_of

from prox24 import calibrate, prune_params, tap
from prox24._trees.calibrate import Stream, gather
from prox24._trees.layout import Layout, from_matrices, to_matrices
from prox24.errors import CalibrationError

flax_promotes = pytest.mark.usefixtures("standard_promotion")


def assert_gram_of(x, gram, layers=0):
    """Roundings of sums over rows add like a root; those of a layer are sums of WIDTH terms."""
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    exact = rows.T @ rows
    error = np.linalg.norm(np.asarray(gram, np.float64) - exact) / np.linalg.norm(exact)
    assert error <= (len(rows) ** 0.5 + 2 * layers * x.shape[-1]) * eps_of("float32")


def initial(model, x):
    """Parameters of a linen model, without running its initialisers, which takes seconds."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        structure, [normal(*leaf.shape, seed=seed) / 4 for seed, leaf in enumerate(leaves)]
    )


def linear(params, x):
    return x @ params["kernel"]


# Layers, as a function, its only kernel and an input; the function is linear in the kernel.


def linen(layer, *shape):
    def make():
        x = normal(*shape)
        params = initial(layer, x)
        return lambda params, x: layer.apply({"params": params}, x), params, x

    return make


def equinox_conv():
    model = eqx.nn.Conv2d(4, 6, (3, 2), stride=2, use_bias=False, key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    return lambda model, x: jax.vmap(model)(x), model, normal(2, 4, 5, 6)


WINDOWS = {"strides": (2, 3), "padding": ((2, 0), (1, 3)), "kernel_dilation": 2}
LAYERS = {
    "dense": linen(nn.Dense(6, use_bias=False), 5, 3, 8),
    "general": linen(nn.DenseGeneral((5, 2), axis=(-1, 1), use_bias=False), 3, 4, 6, 8),
    "einsum": linen(nn.Einsum((5, 8, 4), "nta,hab->nthb", use_bias=False), 3, 6, 8),
    "einsum by expert": linen(nn.Einsum((3, 8, 4), "eta,eab->teb", use_bias=False), 3, 6, 8),
    "conv in one dimension": linen(nn.Conv(6, 3, padding="CAUSAL", use_bias=False), 2, 7, 4),
    "windows": linen(nn.Conv(6, (3, 2), use_bias=False, **WINDOWS), 2, 9, 8, 4),
    "groups": linen(nn.Conv(6, (3, 2), feature_group_count=2, use_bias=False), 2, 5, 6, 8),
    "transposed": linen(nn.ConvTranspose(6, (3, 2), strides=(2, 2), use_bias=False), 2, 5, 6, 4),
    "equinox conv": equinox_conv,
}


@flax_promotes
@pytest.mark.parametrize("name", LAYERS)
def test_the_gram_gives_the_squared_error_of_the_layers_output(name):
    apply, params, x = LAYERS[name]()
    calibration = calibrate(apply, params, [x])
    ((gram, rows, layout, _),) = calibration.grams.values()
    (kernel,) = (leaf for leaf in jax.tree.leaves(params) if leaf is not None)
    other = normal(*kernel.shape, seed=1)
    replaced = jax.tree.map(lambda leaf: other, params)
    with jax.default_matmul_precision("highest"):
        difference = np.asarray(apply(params, x) - apply(replaced, x), np.float64)
    matrices = np.asarray(to_matrices(kernel - other, layout), np.float64)
    loss = np.einsum("poi,pij,poj->", matrices, np.asarray(gram, np.float64), matrices)
    # Sums over inputs, which count two times, and over rows, whose roundings add like a root.
    roundings = 2 * (matrices.shape[-1] + sum(rows) ** 0.5)
    assert_close(loss, np.sum(difference**2), roundings, "float32")
    # Patches that lie outside of the image are zero and do not count.
    assert len(rows) == len(matrices)
    assert 0.1 * difference.size < sum(rows) * matrices.shape[1] <= difference.size
    assert np.array_equal(from_matrices(to_matrices(kernel, layout), layout, kernel.shape), kernel)


def test_four_inputs_of_a_convolution_are_channels_at_one_place():
    kernel = normal(3, 2, 4, 6)

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params, (2, 1), "SAME", dimension_numbers=numbers)

    layout = calibrate(apply, kernel, [normal(2, 5, 6, 4)]).grams[""].layout
    assert np.array_equal(to_matrices(kernel, layout)[0][5, 8:12], kernel[1, 0, :, 5])


# Whole models


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x)))


class Transformer(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 8, name="embed")
        x = embed(tokens)
        for index in range(2):
            x = self.block(name=f"block_{index}")(x)
        return embed.attend(x)


def transformer(block=Block):
    model, tokens = Transformer(block), np.arange(24).reshape(2, 12) % 12
    params = initial(model, tokens)
    return lambda params, x: model.apply({"params": params}, x), params, [tokens]


@flax_promotes
def test_weights_come_in_the_order_of_the_calls_also_in_lifted_layers():
    found = calibrate(*transformer())
    attention = [f"attention/{name}" for name in ("query", "key", "value", "out")]
    names = [f"block_{i}/{name}/kernel" for i in range(2) for name in (*attention, "up", "down")]
    assert list(found.grams) == names
    assert found.left_out["embed/embedding"] == "used by gather"
    assert "used by" in found.left_out["block_0/LayerNorm_0/scale"]
    for wrap in (nn.remat, nn.jit):
        lifted = calibrate(transformer(wrap(Block))[0], *transformer()[1:]).grams
        assert list(lifted) == names
        for path, own in found.grams.items():
            # Up to eight layers in a row, with sums of eight terms.
            assert_close(lifted[path].gram, own.gram, 2 * 8 * 8)


def test_layers_that_a_scan_runs_over_have_grams_of_their_own():
    params, x = {"query": normal(3, 8, 2, 4) / 4, "out": normal(3, 2, 4, 8) / 4}, normal(20, 8)

    def apply(params, x):
        """The output, and the inputs of the weights."""

        def layer(x, w):
            heads = jnp.einsum("td,dhk->thk", x, w["query"])
            y = jnp.tanh(jnp.einsum("thk,hkd->td", heads, w["out"]))
            return y, {"query": x, "out": heads.reshape(20, 8)}

        return jax.lax.scan(layer, x, params)

    found = calibrate(apply, params, [x]).grams
    assert list(found) == ["query", "out"]
    for name, seen in apply(params, x)[1].items():
        gram, rows, layout, _ = found[name]
        assert rows == (20, 20, 20)
        kernels = params[name].reshape(3, 8, 8)
        assert np.array_equal(to_matrices(params[name], layout), kernels.transpose(0, 2, 1))
        for own, inputs in zip(gram, seen, strict=True):
            assert_gram_of(inputs, own, layers=3)


def test_a_weight_that_a_scan_hands_on_is_the_weight():
    stack, x = normal(3, 4, 4), normal(5, 4)

    def apply(params, x):
        x, handed_on = jax.lax.scan(jax.checkpoint(lambda x, w: (x @ w, w)), x, params["w"])
        return x @ handed_on[0] if params["again"].size else x

    (path,) = calibrate(apply, {"w": stack, "again": jnp.ones(0)}, [x]).grams
    assert path == "w"
    used = calibrate(apply, {"w": stack, "again": jnp.ones(1)}, [x])
    assert used.left_out["w"] in ("used by squeeze", "used by slice", "used by gather")


def test_a_weight_that_every_step_of_a_scan_uses_has_the_rows_of_all():
    def apply(weight, x):
        """The output, and the inputs of the weight."""
        return jax.lax.scan(lambda h, row: (jnp.tanh(h @ weight + row), h), x[0], x)

    weight, x = normal(8, 8), normal(6, 8)
    gram, rows, *_ = calibrate(apply, weight, [x]).grams[""]
    assert rows == (6,)
    assert_gram_of(apply(weight, x)[1], gram[0], layers=5)


def test_a_weight_that_a_scan_runs_over_and_uses_whole_has_both_grams():
    weight, x = normal(3, 8, 8), normal(5, 8)

    def apply(weight, x):
        def step(h, w):
            experts = jnp.einsum("ebi,eio->ebo", jnp.stack([h] * 3), weight)
            return jnp.tanh(h @ w + jnp.sum(experts, 0)), h

        return jax.lax.scan(step, x, weight)

    inputs = apply(weight, x)[1]
    gram, rows, layout, _ = calibrate(apply, weight, [x]).grams[""]
    assert (rows, layout) == ((20, 20, 20), Layout((0,), (2,), (1,)))
    for own, seen in zip(gram, inputs, strict=True):
        assert_gram_of(jnp.concatenate([seen, *inputs]), own, layers=3)


def test_a_scan_leaves_no_traced_value_behind():
    def apply(weight, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weight)

    with jax.checking_leaks():
        assert calibrate(apply, normal(3, 8, 8), [normal(5, 8)]).grams[""].rows == (5, 5, 5)


def sorted_by_expert(params, x):
    """The output, and the expert of each row."""
    expert = jnp.argmax(x @ params["router"], axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=3)
    return jax.lax.ragged_dot(x[order], params["experts"], sizes), expert


def test_experts_of_a_ragged_product_have_the_rows_sent_to_them():
    params, x = {"router": normal(8, 3), "experts": normal(3, 8, 4)}, normal(20, 8)
    gram, rows, layout, _ = calibrate(sorted_by_expert, params, [x]).grams["experts"]
    assert layout == Layout((0,), (2,), (1,))
    for own, count, expert in zip(gram, rows, range(3), strict=True):
        sent = x[sorted_by_expert(params, x)[1] == expert]
        assert count == len(sent) > 0
        assert_gram_of(sent, own)


def test_rows_sorted_by_another_model_are_not_paired_with_its_own():
    x = normal(20, 8)
    params, dense = (
        {"router": normal(8, 3, seed=seed), "experts": normal(3, 8, 4)} for seed in (0, 1)
    )
    found = gather(sorted_by_expert, Stream(params, [x]), Stream(dense, [x])).grams
    for gram, cross in zip(found["experts"].gram, found["experts"].cross, strict=True):
        # A product of rows with themselves takes the half above the diagonal, the other does not.
        assert_close(cross, gram, 20)
        assert jnp.count_nonzero(gram)


def test_a_weight_that_is_used_twice_has_the_sum_of_its_grams():
    weight, x = normal(8, 8), normal(20, 8)
    gram, rows, *_ = calibrate(lambda w, x: jnp.tanh(x @ w) @ w, weight, [x]).grams[""]
    assert rows == (40,)
    second = np.tanh(np.asarray(x, np.float64) @ np.asarray(weight, np.float64))
    assert_gram_of(np.concatenate([x, second]), gram[0], layers=1)


# Functions, in strict mode


def test_what_a_weight_goes_through_before_its_product():
    weight, x = normal(8, 4), normal(5, 8)
    for apply in (
        lambda w, x: x @ w,
        lambda w, x: (w.T @ x.T).T,
        lambda w, x: jnp.einsum("io,bi->bo", w, x),
        lambda w, x: jax.vmap(lambda row: row @ w)(x),
        lambda w, x: jax.vmap(lambda row: w.T @ row, in_axes=1)(x.T),
        lambda w, x: x.astype(jnp.float64) @ w.astype(jnp.float64),
        lambda w, x: x @ jax.lax.stop_gradient(w),
        lambda w, x: jax.jit(jnp.matmul)(x, w),
        lambda w, x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x),
        lambda w, x: x @ jax.jit(lambda w: w.T.astype(jnp.float32))(w).T,
    ):
        found = calibrate(lambda params, x, apply=apply: apply(params["w"], x), {"w": weight}, [x])
        gram, rows, layout, _ = found.grams["w"]
        assert (rows, layout.summed, layout.outputs) == ((5,), (0,), (1,))
        assert_gram_of(x, gram[0])


def test_a_weight_may_lose_an_axis_of_length_one():
    weight, x = normal(1, 8, 4), normal(5, 8)
    gram, _, layout, _ = calibrate(lambda w, x: x @ jax.lax.squeeze(w, [0]), weight, [x]).grams[""]
    assert_gram_of(x, gram[0])
    assert np.array_equal(to_matrices(weight, layout), weight.mT)
    assert np.array_equal(from_matrices(weight.mT, layout, weight.shape), weight)


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (lambda w, x: x @ (w * 2), "used by mul"),
        (lambda w, x: x @ w.reshape(2, 8).reshape(4, 4), "used by reshape"),
        (lambda w, x: x @ w + jnp.sum(w), "used by reduce_sum"),
        (lambda w, x: jnp.tanh(x @ w) @ w.T, "summed over different axes by different products"),
        (lambda w, x: x @ (w @ w), "used by dot_general"),
        (lambda w, x: jax.lax.fori_loop(0, x.shape[0], lambda i, x: x @ w, x), None),
        (lambda w, x: jax.lax.while_loop(lambda x: x.any(), lambda x: x @ w, x), "used by while"),
        (lambda w, x: jax.lax.cond(x[0, 0] > 9, lambda: x, lambda: x @ w), "used by cond"),
        (lambda w, x: x.astype("complex64") @ w.astype("complex64"), "its inputs are complex"),
        (lambda w, x: jax.lax.scan(lambda x, _: (x @ w, w.T), x, None, 2)[1], "used by scan"),
        (lambda w, x: x, None),
    ],
)  # fmt: skip
def test_weights_without_a_gram_say_why(apply, reason):
    found = calibrate(lambda params, x: apply(params["w"], x), {"w": normal(4, 4)}, [normal(5, 4)])
    assert found.left_out == ({} if reason is None else {"w": reason})
    assert reason is None or found.grams == {}


def test_rows_are_counted_over_batches_of_any_size():
    batches = [normal(3, 8), normal(2, 5, 8), normal(8)]
    gram, rows, *_ = calibrate(linear, {"kernel": normal(8, 4)}, iter(batches)).grams["kernel"]
    assert rows == (14,)
    assert_gram_of(np.concatenate([x.reshape(-1, 8) for x in batches]), gram[0])


def test_a_bfloat16_model_has_float32_grams_of_what_it_multiplies():
    x = normal(64, 8, dtype=jnp.bfloat16)
    gram = calibrate(linear, {"kernel": normal(8, 4, dtype=jnp.bfloat16)}, [x]).grams["kernel"].gram
    assert gram.dtype == jnp.float32
    assert_gram_of(x, gram[0])


def test_random_numbers_are_those_of_the_model():
    x = normal(16, 8)

    def noisy(x):
        with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
            return x + jax.random.normal(jax.random.key(0), x.shape, x.dtype)

    params = {"kernel": normal(8, 4)}
    found = calibrate(lambda params, x: linear(params, noisy(x)), params, [x])
    assert_gram_of(noisy(x), found.grams["kernel"].gram[0], layers=1)


def test_crosses_pair_rows_with_those_of_the_dense_model():
    params, dense = {"kernel": normal(2, 8, 8)}, {"kernel": normal(2, 8, 8, seed=1)}
    x, y = (np.array(normal(2, 5, 8, seed=seed)) for seed in (2, 3))
    y[1, 3] = 0
    found = gather(linear, Stream(params, [x, x]), Stream(dense, [y, y])).grams["kernel"]
    given = np.where(np.any(y != 0, -1, keepdims=True), y, x)
    for problem in range(2):
        # Two batches of five rows.
        assert_close(found.gram[problem], 2 * x[problem].T @ x[problem], 10)
        assert_close(found.cross[problem], 2 * given[problem].T @ x[problem], 10)
    assert calibrate(linear, params, [x]).grams["kernel"].cross is None


def test_only_the_named_weights_are_calibrated():
    params, x = {"a": normal(8, 8), "b": normal(8, 8)}, normal(5, 8)
    found = calibrate(lambda params, x: x @ params["a"] @ params["b"], params, [x], names=["b"])
    assert list(found.grams) == ["b"]
    assert found.left_out == {"a": "not in names"}
    assert_gram_of(x @ params["a"], found.grams["b"].gram[0], layers=1)


def test_what_a_model_returns_besides_arrays_does_not_matter():
    def apply(params, x):
        return {"logits": linear(params, x), "name": "mlp"}

    params, x = {"kernel": normal(8, 4)}, normal(5, 8)
    assert_gram_of(x, calibrate(apply, params, [x]).grams["kernel"].gram[0])


def test_errors_name_the_weight():
    params, x = {"kernel": normal(8, 4), "bias": normal(4)}, normal(5, 8)

    def apply(params, x):
        return x @ params["kernel"] + params["bias"][None, :]

    with pytest.raises(CalibrationError, match="no batch"):
        calibrate(apply, params, [])
    with pytest.raises(CalibrationError, match="kernel has no products: used by an empty product"):
        calibrate(apply, params, [x[:0]], names=["kernel"])
    with pytest.raises(CalibrationError, match=r"names is one text: .* as \['kernel'\]"):
        calibrate(apply, params, [x], names="kernel")
    with pytest.raises(CalibrationError, match="bias has no products: used by"):
        calibrate(apply, params, [x], names=["bias"])
    with pytest.raises(CalibrationError, match="NaN or Inf in the inputs of kernel"):
        calibrate(apply, params, [x, x.at[2, 3].set(jnp.nan)])


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (lambda p, x: x @ p["a"].T, "sums over other axes of a than the first"),
        (lambda p, x: x @ p["a"] + jnp.sum(p["a"]), "a has no products: used by reduce_sum"),
        (lambda p, x: x @ p["a"] @ p["b"], "uses b, the first does not: begin with a batch of all"),
    ],
)
@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_a_later_batch_uses_a_weight_in_the_same_way(later, said, order):
    params = {"a": normal(8, 8), "b": normal(8, 8)}

    def apply(params, x):
        return later(params, x) if x.ndim > 2 else x @ params["a"]

    with pytest.raises(CalibrationError, match=said):
        prune_params(apply, params, [normal(5, 8), normal(2, 5, 8)], order=order)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_a_later_batch_may_use_fewer_weights(order):
    params = {"a": normal(8, 8), "b": normal(8, 8)}

    def apply(params, x):
        return x @ params["a"] @ params["b"] if x.ndim > 2 else x @ params["a"]

    found = prune_params(apply, params, [normal(2, 5, 8), normal(5, 8)], order=order)
    assert [report.tokens for report in found.reports] == [15, 10]


def test_each_weight_has_a_path_of_its_own():
    with pytest.raises(ValueError, match="a/b is the path of 2 leaves"):
        calibrate(lambda p, x: x, {"a": {"b": normal(4, 4)}, "a/b": normal(4, 4)}, [normal(4)])


# tap


def masked(params, x):
    x = tap("layers/0/kernel", x)
    return x @ (params["layers"][0]["kernel"] * 2)


def test_a_tap_says_what_a_weight_is_multiplied_with():
    params, x = {"layers": [{"kernel": normal(8, 4)}]}, normal(3, 5, 8)
    compiled = jax.jit(masked)
    compiled(params, x)
    for apply in (
        masked,
        compiled,
        jax.checkpoint(masked),
        jax.vmap(masked, in_axes=(None, 0)),
        # The mapped axis is the last one of what is tapped, but no feature.
        lambda params, x: jax.vmap(masked, in_axes=(None, 2))(params, jnp.moveaxis(x, 1, 2)),
        lambda params, x: jax.lax.map(lambda part: masked(params, part), x),
        # It takes the place of what would be found.
        lambda params, x: tap("layers/0/kernel", x) @ params["layers"][0]["kernel"],
    ):
        found = calibrate(apply, params, [x])
        gram, rows, layout, _ = found.grams["layers/0/kernel"]
        assert (rows, layout.summed, layout.outputs) == ((15,), (0,), (1,))
        assert_gram_of(x, gram[0])
        assert found.left_out == {}


def scanned(params, x, axis):
    """The output, and what is tapped."""

    def layer(x, w):
        return jnp.tanh(tap("kernel", x, axis) @ (2 * w).T), x

    return jax.lax.scan(layer, x, params["kernel"])


def test_a_tap_of_a_weight_that_a_scan_runs_over_has_a_gram_for_each_slice():
    params, x = {"kernel": normal(3, 8, 8) / 4}, normal(20, 8, seed=1)
    apply = functools.partial(scanned, axis=2)
    gram, rows, layout, _ = calibrate(apply, params, [x]).grams["kernel"]
    assert (rows, layout) == ((20, 20, 20), Layout((0,), (1,), (2,)))
    for own, inputs in zip(gram, apply(params, x)[1], strict=True):
        assert_gram_of(inputs, own, layers=2)


def test_an_axis_of_a_tap_may_be_of_numpy():
    def apply(weight, x):
        return tap("", x, np.int64(0)) @ weight

    x = normal(5, 8)
    assert_gram_of(x, calibrate(apply, normal(8, 4), [x]).grams[""].gram[0])


def test_a_tap_names_the_axes_that_are_summed_over():
    def apply(weight, x):
        return tap("", x, (2, 0)).reshape(-1, 8) @ weight.transpose(2, 0, 1).reshape(8, 5)

    weight, x = normal(2, 5, 4), normal(3, 4, 2)
    gram, rows, layout, _ = calibrate(apply, weight, [x]).grams[""]
    assert (gram.shape, rows) == ((1, 8, 8), (3,))
    expected = np.asarray(x.reshape(3, 8) @ to_matrices(weight, layout)[0].T)
    assert_close(apply(weight, x), expected, 8)  # terms of a sum


def test_a_tap_is_an_identity_to_every_transformation():
    x = normal(3, 4)

    def apply(x):
        return jnp.sum(jnp.sin(tap("w", x)))

    assert np.array_equal(tap("w", x), x)
    assert np.array_equal(jax.jit(functools.partial(tap, "w"))(x), x)
    assert np.array_equal(jax.grad(apply)(x), jnp.cos(x))
    assert np.array_equal(jax.vmap(jax.grad(apply))(x), jnp.cos(x))
    assert np.array_equal(jax.vmap(functools.partial(tap, "w"), 1, 1)(x), x)
    assert np.array_equal(jax.jvp(apply, (x,), (x,))[1], jnp.sum(jnp.cos(x) * x))


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (lambda params, x: masked({"layers": [params]}, x), "0/kernel, which is not in the param"),
        (lambda params, x: tap("kernel", x[:, :4]), "tap of kernel: the last axes"),
        (
            functools.partial(scanned, axis=0),
            "kernel sums over axis 0, which a scan runs over: count the axes of the whole weight",
        ),
    ],
)
def test_a_tap_that_fits_no_weight_is_refused(apply, said):
    with pytest.raises(CalibrationError, match=said):
        calibrate(apply, {"kernel": normal(8, 8, 8)}, [normal(20, 8)])
