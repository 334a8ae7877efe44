"""Pruning the weights of any tree of parameters."""

import dataclasses
import functools
import itertools
import logging

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from modules import PRUNED, LinenCNN, linen_cnn
from reference import assert_close, damped, eps_of, solve_roundings
from test_calibrate import flax_promotes, linear, normal
from tiers import rest

import prox24
from prox24 import ConjugateGradients, DenseTargets, Recipe, Status, Wanda
from prox24 import prune_params as prune
from prox24._trees.calibrate import Stream, gather, survey_products
from prox24._trees.segments import Walk
from prox24.errors import CalibrationError, RecipeError, SolverError
from prox24.optax import by_path, keep_pattern

WANDA, SPARSEGPT = Recipe.wanda(), Recipe.sparsegpt()
MLP = ("first", "second", "third")
ORDERS = ("one-shot", "sequential")


def mlp():
    return {name: {"kernel": normal(8, 8, seed=seed)} for seed, name in enumerate(MLP)}


def apply_mlp(params, x):
    for name in MLP:
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def solve_by_hand(kernel, x, recipe):
    """The kernel (in, out), pruned for inputs (rows, in)."""
    gram = jnp.matmul(x.T, x, precision="highest")
    methods = recipe.solver, recipe.refit
    return prox24.solve(kernel, gram, *methods, pattern=recipe.pattern, axis=0).weight


# The refit solves a linear system to rounding, whatever the solver did.
EXACT = Recipe(refit=ConjugateGradients(100, 0.0), targets=None)


def roundings(x):
    """Of the solution of a linear system for inputs (rows, in)."""
    x = np.asarray(x, np.float64)
    return solve_roundings(damped(x.T @ x, EXACT.damping))


def assert_only_chosen_leaves_changed(before, after, leaves, pattern=(2, 4)):
    assert jax.tree.structure(before) == jax.tree.structure(after)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), leaves, strict=True)
    for old, new, leaf in pairs:
        if not leaf.pruned:
            assert new is old
            continue
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert prox24.is_sparse(new, pattern, leaf.axis)
        assert np.count_nonzero(new) == old.size * pattern[0] // pattern[1]


def linen_model():
    ones = jnp.ones(8, jnp.float32)
    rest = {"batch_stats": {"BatchNorm_0": {"mean": 0 * ones, "var": ones}}}
    params = flax.core.freeze(linen_cnn())
    return lambda p, x: LinenCNN().apply({"params": p} | rest, x), params, normal(4, 4, 4, 3)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        x = self.attention(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.dropout(self.norm(x)))


@functools.cache
def nnx_model():
    return NnxModel(nnx.Rngs(0))


def nnx_module():
    return lambda model, x: model(x), nnx_model(), normal(4, 5, 8)


def nnx_state():
    graph, params, rest = nnx.split(nnx_model(), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params, normal(4, 5, 8)


def equinox_model():
    model = eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0))
    return lambda model, x: jax.vmap(model)(x), model, normal(20, 8)


def nested():
    params = [{"w": normal(8, 4)}, (normal(4, 4), None)]
    return lambda params, x: x @ params[0]["w"] @ params[1][0], params, normal(20, 8)


LAYERS = {f"attention/{name}/kernel": 0 for name in ("query", "key", "value")}
LAYERS |= {"attention/out/kernel": 1, "layers/0/kernel": 0, "layers/1/kernel": 0}
CONTAINERS = {
    linen_model: PRUNED[linen_cnn],
    nnx_state: LAYERS,
    nnx_module: LAYERS,
    equinox_model: {f"layers/{i}/weight": 1 for i in range(3)},
    nested: {"0/w": 0, "1/0": 0},
}


@flax_promotes
@pytest.mark.parametrize(
    ("make", "order"),
    list(zip(CONTAINERS, itertools.cycle(ORDERS))),
    ids=lambda x: getattr(x, "__name__", x),
)
def test_every_container_keeps_its_kind_and_what_is_not_pruned(make, order):
    apply, params, x = make()
    pruned = prune(apply, params, [x], WANDA, order=order)
    assert {leaf.path: leaf.axis for leaf in pruned.leaves if leaf.pruned} == CONTAINERS[make]
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)
    reported = {report.name.partition("[")[0] for report in pruned.reports}
    assert reported == set(CONTAINERS[make])
    assert apply(pruned.params, x).shape == apply(params, x).shape


def test_a_kernel_of_many_axes_is_solved_as_the_matrix_it_is():
    heads, out = normal(30, 2, 4), normal(2, 4, 6, seed=2)

    def apply(params, x):
        return jnp.einsum("bhd,hdo->bo", x, params["out"])

    pruned = prune(apply, {"out": out}, [heads], SPARSEGPT)
    inputs = heads.reshape(-1, 8)
    expected = solve_by_hand(out.reshape(8, 6), inputs, SPARSEGPT)
    assert_close(pruned.params["out"], expected.reshape(out.shape), roundings(inputs))


def test_every_matrix_of_a_stack_is_solved_and_reported():
    experts, x = normal(3, 8, 4), normal(3, 20, 8, seed=1).at[2].set(0)
    pruned = prune(linear, {"kernel": experts}, [x], WANDA)
    seen = [(report.name, report.tokens) for report in pruned.reports]
    assert seen == [("kernel[0]", 20), ("kernel[1]", 20), ("kernel[2]", 0)]
    for i in range(2):
        expected = solve_by_hand(experts[i], x[i], WANDA)
        np.testing.assert_array_equal(pruned.params["kernel"][i], expected)
    # What no row has met keeps its largest entries.
    kept = pruned.params["kernel"][2] != 0
    np.testing.assert_array_equal(kept, prox24.top_mask(abs(experts[2]), axis=0))


def test_weights_keep_their_dtype_or_have_that_of_the_recipe():
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        params, x = {"kernel": normal(8, 4, dtype=dtype)}, normal(20, 8, dtype=dtype)
        half = dataclasses.replace(WANDA, dtype="float16")
        for recipe, expected in ((WANDA, dtype), (half, "float16")):
            pruned = prune(linear, params, [x], recipe).params["kernel"]
            assert pruned.dtype == expected
            assert prox24.is_sparse(pruned, axis=0)
            # Wanda does not change what it keeps.
            kept = jnp.where(pruned != 0, params["kernel"], 0).astype(expected)
            assert np.array_equal(pruned, kept)


@pytest.mark.parametrize("pattern", [(1, 4), prox24.Unstructured(0.7)])
def test_other_patterns(pattern):
    # 5 outputs, and without a pattern 6 inputs: no length is a multiple of 4.
    width = 8 if pattern == (1, 4) else 6
    params, x = {"kernel": normal(width, 5)}, normal(64, width, seed=1)
    recipe = dataclasses.replace(SPARSEGPT, pattern=pattern)
    pruned = prune(linear, params, [x], recipe)
    expected = solve_by_hand(params["kernel"], x, recipe)
    assert np.array_equal(pruned.params["kernel"], expected)
    assert np.count_nonzero(expected) < params["kernel"].size / 2


def test_what_is_not_pruned_says_why():
    shapes = {"embed": (12, 8), "narrow": (6, 8), "mlp": (8, 6), "head": (8, 12), "empty": (0, 8)}
    shapes |= dict.fromkeys(("masked", "skipped", "spare"), (8, 8))
    params = {name: normal(*shape) for name, shape in shapes.items()}
    params |= {"norm": {"scale": normal(8)}, "count": jnp.arange(4).reshape(2, 2)}
    params["weight"] = normal(8, 8).astype(jnp.int8)

    def apply(params, tokens):
        x = params["embed"][tokens] * params["norm"]["scale"][None, :]
        x = x @ params["skipped"] @ jnp.abs(params["masked"]) @ params["weight"].astype(x.dtype)
        x = x + x[:, :0] @ params["empty"]
        return (x @ params["mlp"]) @ params["narrow"] @ params["head"]

    recipe = dataclasses.replace(WANDA, skip="skipped")
    calibration = prox24.calibrate(apply, params, [jnp.arange(12)])
    pruned = prune(apply, params, recipe=recipe, grams=calibration)
    assert {leaf.path: leaf.reason for leaf in pruned.leaves} == {
        "count": "it is not a floating array",
        "embed": "embedding",
        "empty": "it is empty",
        "head": "head",
        "masked": "no Gram: used by abs",
        "mlp": "default",
        "narrow": "axis 0 is not divisible by 4",
        "norm/scale": "fewer than two dimensions",
        "skipped": "dense by the recipe",
        "spare": "no Gram: unused",
        "weight": "it is not a floating array",
    }
    assert [str(leaf).split()[0] for leaf in pruned.leaves].count("pruned") == 1
    assert str(pruned).splitlines() == [*map(str, pruned.leaves), str(pruned.reports[0])]
    # A leaf without a Gram has the axis of its name.
    assert (pruned.axis("mlp"), pruned.axis("spare")) == (0, 1)
    with pytest.raises(ValueError, match="model/mlp is no leaf of the pruned tree"):
        pruned.axis("model/mlp")
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)
    mask = by_path(lambda path: path != "mlp")
    chosen = prune(apply, params, recipe=recipe, grams=calibration, mask=mask)
    reasons = {leaf.path: leaf.reason for leaf in chosen.leaves}
    expected = {"head": "in mask", "mlp": "not in mask", "skipped": "dense by the recipe"}
    expected |= {"spare": "no Gram: unused", "weight": "it is not a floating array"}
    assert reasons.items() >= expected.items()
    assert [report.name for report in chosen.reports] == ["head"]
    nothing = prune(apply, params, recipe=recipe, grams=calibration, mask=False)
    assert nothing.params is params
    assert nothing.reports == []
    narrow = {"w": normal(6, 3)}
    with pytest.raises(RecipeError, match=r"no leaf can be pruned \(w: axis 0 is not divisible by"):
        prune(lambda params, x: x @ params["w"], narrow, [normal(9, 6)], WANDA)


@pytest.mark.parametrize("order", ORDERS)
def test_those_that_lose_most_stay_dense(order):
    params, x = mlp(), normal(64, 8, seed=9)
    every = prune(apply_mlp, params, [x], WANDA)
    losses = {report.name: report.statistics.relative_loss for report in every.reports}
    recipe = dataclasses.replace(WANDA, keep_dense=2)
    pruned = prune(apply_mlp, params, [x], recipe, order=order)
    assert [report.name for report in pruned.reports] == [min(losses, key=losses.get)]
    kept = [leaf.path for leaf in pruned.leaves if leaf.reason == "among those that lose most"]
    assert set(kept) == losses.keys() - {min(losses, key=losses.get)}
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)


@pytest.mark.parametrize("pattern", [(2, 4), prox24.Unstructured(0.5)])
def test_a_training_keeps_the_zeros_whatever_chose_them(pattern):
    params = {"first": normal(16, 8), "head": normal(8, 10, seed=1), "bias": normal(10)}
    everything = by_path(lambda path: path != "bias")
    recipe = dataclasses.replace(WANDA, pattern=pattern)

    def apply(params, x):
        return jnp.tanh(x @ params["first"]) @ params["head"] + params["bias"][None]

    pruned = prune(apply, params, [normal(64, 16, seed=2)], recipe, mask=everything)
    optimizer = keep_pattern(optax.sgd(0.1), pruned.trainable)
    steps = jax.tree.map(jnp.ones_like, params)
    steps, _ = optimizer.update(steps, optimizer.init(pruned.params), pruned.params)
    assert np.mean(pruned.params["first"] == 0) == np.mean(pruned.params["head"] == 0) == 0.5
    assert all(np.array_equal(steps[name] == 0, pruned.params[name] == 0) for name in params)


def test_a_second_call_keeps_the_zeros_of_the_first():
    params, x = mlp(), [normal(64, 8)]
    first = prune(apply_mlp, params, x, dataclasses.replace(WANDA, only="first"))
    both = prune(apply_mlp, first.params, x, dataclasses.replace(WANDA, skip="first"))
    assert prox24.report(both.params, axis=both.axis, mask=both.mask).sparse
    optimizer = keep_pattern(optax.sgd(0.1), both.trainable)
    ones = jax.tree.map(jnp.ones_like, params)
    steps, _ = optimizer.update(ones, optimizer.init(both.params), both.params)
    for layer in ("first", "second"):
        kernel = both.params[layer]["kernel"]
        assert np.mean(kernel == 0) == 0.5
        assert np.array_equal(steps[layer]["kernel"] == 0, kernel == 0)


def test_the_mask_leaves_out_what_stayed_dense():
    params = mlp()
    pruned = prune(apply_mlp, params, [normal(64, 8)], dataclasses.replace(WANDA, skip="first"))
    assert not prox24.report(pruned.params, axis=pruned.axis).sparse
    assert prox24.report(pruned.params, axis=pruned.axis, mask=pruned.mask).sparse


def test_too_few_rows_are_reported_and_only_damped():
    params = {"kernel": normal(16, 4)}
    few, enough = (prune(linear, params, [normal(rows, 16)]).reports[0] for rows in (5, 16))
    assert (few.tokens, few.inputs, few.status) == (5, 16, Status.SPARSE)
    assert "5 tokens of 16, too few" in str(few)
    assert "too few" not in str(enough)
    assert few.statistics.damping > 0


def test_a_solution_that_is_not_finite_names_its_weight():
    params = mlp()
    grams = prox24.calibrate(apply_mlp, params, [normal(20, 8)])
    kernel, given = params["second"]["kernel"], grams.grams["second/kernel"]
    for wrong, gram, said in (
        (kernel, given.gram * jnp.nan, "^the Gram of second/kernel holds NaN or Inf"),
        (kernel, -given.gram, "^the Gram of second/kernel is not positive semidefinite"),
        (kernel.at[3, 2].set(jnp.nan), given.gram, "^second/kernel holds NaN or Inf"),
    ):
        params["second"]["kernel"] = wrong
        grams.grams["second/kernel"] = given._replace(gram=gram)
        with pytest.raises(SolverError, match=said):
            prune(apply_mlp, params, [], recipe=WANDA, grams=grams)


def test_what_does_not_go_together_is_refused():
    params, x = mlp(), normal(20, 8)
    grams = prox24.calibrate(apply_mlp, params, [x])
    other = params | {"first": {"kernel": normal(12, 8)}}
    with pytest.raises(
        ValueError, match=r"first/kernel .* has Grams of shape \(1, 12, 12\), not \(1, 8, 8\)"
    ):
        prune(apply_mlp, other, grams=grams)
    other = params | {"first": {"kernel": normal(3, 3, 8, 12)}}
    with pytest.raises(ValueError, match=r"Gram of first/kernel is of a weight with 2 axes, the"):
        prune(apply_mlp, other, [], grams=grams)
    stacked = prox24.calibrate(
        lambda params, x: x @ params["w"], {"w": normal(3, 8, 8)}, [normal(3, 20, 8)]
    )
    with pytest.raises(
        ValueError,
        match=r"w of shape \(4, 8, 8\) has Grams of shape \(4, 8, 8\), not \(3, 8, 8\): give",
    ):
        prune(apply_mlp, {"w": normal(4, 8, 8)}, [], grams=stacked)
    for error, said, given in (
        (ValueError, "order 'random' is neither one-shot nor sequential", {"order": "random"}),
        (
            ValueError,
            "grams are of the dense model: .* takes batches",
            {"grams": grams, "order": "sequential"},
        ),
        (ValueError, "there are batches and grams: give one of the two", {"grams": grams}),
        (ValueError, "there are batches and grams", {"batches": x, "grams": grams}),
        (ValueError, "a Calibration is given by grams=", {"batches": grams}),
        (ValueError, "a Calibration is given by grams=", {"batches": (), "grams": {"w": x}}),
        (CalibrationError, "batches is one dict; give a list", {"batches": {"x": x}}),
        (RecipeError, "is no recipe: write prox24.Recipe", {"recipe": prox24.Wanda()}),
        (RecipeError, "is no recipe: write prox24.Recipe", {"recipe": Recipe}),
        (
            RecipeError,
            r"refine is for decoders.*prox24\.refine\.train_block",
            {"recipe": Recipe.best()},
        ),
        *(
            (CalibrationError, "no batch", {"batches": iter(()), "order": order})
            for order in ORDERS
        ),
    ):
        with pytest.raises(error, match=said):
            prune(apply_mlp, params, **({"batches": [x]} | given))


# In the order of the calls


def test_a_model_with_a_reference_is_pruned_in_one_shot_only():
    params, x = {"a": normal(8, 8), "b": normal(8, 4)}, normal(20, 8)

    def apply(params, x):
        hidden = jax.new_ref(x @ params["a"])
        hidden[...] = jnp.tanh(hidden[...])
        return hidden[...] @ params["b"]

    def without(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    found, expected = (prune(each, params, [x]).params for each in (apply, without))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    with pytest.raises(CalibrationError, match=r"jax\.Ref: prune it in the order .one-shot"):
        prune(apply, params, [x], order="sequential")


def test_in_order_is_pruning_each_layer_for_what_the_pruned_ones_put_out():
    params, x = mlp(), normal(64, 8, seed=9)
    pruned = prune(apply_mlp, params, [x[:32], x[32:]], EXACT, order="sequential")
    one_shot = prune(apply_mlp, params, [x], EXACT)
    assert pruned.leaves == one_shot.leaves
    assert [report.name for report in pruned.reports] == [f"{name}/kernel" for name in MLP]
    for number, name in enumerate(MLP):
        kernel = solve_by_hand(params[name]["kernel"], x, EXACT)
        found, other = (each.params[name]["kernel"] for each in (pruned, one_shot))
        limit = roundings(x)
        assert_close(found, kernel, limit)
        difference = float(jnp.max(jnp.abs(other - found)) / jnp.max(jnp.abs(found)))
        assert (difference <= limit * eps_of("float32")) == (number == 0)
        x = jnp.tanh(x @ kernel)


def test_in_order_equal_layers_that_call_other_functions_of_the_host_share_no_program():
    scales = [
        np.roll(np.r_[np.ones(4), np.full(4, 4)], turn).astype("float32") for turn in (0, 2, 4)
    ]

    def scaled(scale, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) * scale, shape, x)

    def apply(params, x):
        for name, scale in zip("abc", scales, strict=True):
            x = scaled(scale, jnp.tanh(x @ params[name]))
        return x @ params["d"]

    params = {name: normal(8, 8, seed=seed) for seed, name in enumerate("abcd")}
    x = normal(64, 8, seed=9)
    pruned = prune(apply, params, [x], EXACT, order="sequential").params
    for name, scale in zip("abcd", [*scales, 1], strict=True):
        assert_close(pruned[name], solve_by_hand(params[name], x, EXACT), roundings(x))
        x = np.tanh(x @ pruned[name]) * scale


def test_dense_targets_bring_a_model_pruned_in_order_nearer_to_the_dense_one():
    params = {"first": normal(16, 16), "second": normal(16, 8, seed=1)}
    batches = [normal(256, 16, seed=seed) for seed in (2, 3)]
    methods = Wanda(), ConjugateGradients(100, 0.0)

    def hidden(params):
        return jnp.tanh(jnp.concatenate(batches) @ params["first"] / 4)

    def apply(params, x):
        return jnp.tanh(x @ params["first"] / 4) @ params["second"]

    def pruned(targets, order="sequential"):
        return prune(apply, params, batches, Recipe(*methods, targets=targets), order=order).params

    def error(pruned):
        return sum(jnp.sum((apply(pruned, x) - apply(params, x)) ** 2) for x in batches)

    own, dense = pruned(None), pruned(DenseTargets(0.003))
    assert np.array_equal(own["first"], dense["first"])
    assert error(dense) < 0.95 * error(own)
    # By the definition: the output of the pruned layer has that of the dense one as its target.
    x, exact = hidden(own), hidden(params)
    corrected = prox24.correct_inputs(params["second"].T, x.T @ x, exact.T @ x, 0.003)
    by_hand = prox24.solve(corrected, x.T @ x, *methods).weight.T
    # The correction and the refit solve one system each; the pull is relative to the trace of 16.
    grown = np.linalg.cond(damped(x.T @ x, 16 * 0.003))
    assert_close(dense["second"], by_hand, grown * roundings(x))
    # In the other order the inputs are the dense model's.
    own, dense = pruned(None, "one-shot"), pruned(DenseTargets(0.003), "one-shot")
    assert all(np.array_equal(own[name], dense[name]) for name in params)


def test_in_order_counts_weights_that_share_an_input_as_one_step(monkeypatch):
    def apply(params, x):
        hidden = jnp.tanh(x @ params["q"] + x @ params["k"]) @ params["twice"]
        return hidden @ params["out"] + x @ params["v"] + jnp.tanh(hidden) @ params["twice"]

    params = {name: normal(8, 8) for name in ("q", "k", "v", "twice", "out")}
    groups, step = [], Walk.step

    def record(walk, index, streams, wanted):
        groups.append(sorted(wanted))
        return step(walk, index, streams, wanted)

    monkeypatch.setattr(Walk, "step", record)
    mask = {name: name != "k" for name in params}
    pruned = prune(apply, params, [normal(20, 8)], WANDA, order="sequential", mask=mask)
    assert groups == [["q"], ["twice"], ["out"], ["v"]]
    survey = survey_products(apply, params, normal(20, 8))
    assert survey.groups == [["q", "k"], *groups[1:]]
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)


def residual(params, batch):
    """Equal layers, with a branch and a weight that is tapped; a loop; a scan; calls."""
    x = batch["x"]
    for number, layer in enumerate(params["layers"]):
        hidden = jnp.tanh(x @ layer["q"]) + jnp.sin(x @ layer["k"])
        hidden = jax.lax.cond(hidden[0, 0] > 0, lambda h: h + 1, jnp.cos, hidden)
        hidden = prox24.tap(f"layers/{number}/out", hidden) @ (2 * layer["out"])
        x = x + jax.checkpoint(jnp.tanh)(hidden)
    x = jax.lax.fori_loop(0, 2, lambda _, x: jnp.sin(x), x)
    x = jnp.tanh(jnp.tanh(x @ params["twice"]) @ params["twice"])
    if "stack" in params:
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["a"]) @ w["b"], x), x, params["stack"])
    return jax.jit(lambda x: x @ params["last"])(x), x @ params["head"]


def residual_params(layers):
    params = {name: normal(8, 8, seed=seed) for seed, name in enumerate(("twice", "last", "head"))}
    names = "q", "k", "out"
    params["layers"] = [
        {name: normal(8, 8, seed=10 * i + j) / 3 for j, name in enumerate(names)}
        for i in range(1, layers + 1)
    ]
    return params


def group_by_group(apply, params, batches, recipe):
    """Each group by the Grams of a run of the whole model, whose groups before are pruned."""
    pruned, reports = params, []
    for number, group in enumerate(survey_products(apply, params, batches[0]).groups):
        dense = Stream(params, batches) if recipe.targets and number else None
        grams = gather(apply, Stream(pruned, batches), dense, names=group)
        if group != ["head"]:
            step = prune(apply, pruned, recipe=recipe, grams=grams)
            pruned, reports = step.params, reports + step.reports
    return pruned, reports


def assert_in_order(apply, params, batches, recipe):
    pruned = prune(apply, params, batches, recipe, order="sequential")
    expected, reports = group_by_group(apply, params, batches, recipe)
    assert [each.name for each in pruned.reports] == [each.name for each in reports]
    for found, own in zip(*map(jax.tree.leaves, (pruned.params, expected)), strict=True):
        assert np.array_equal(found == 0, own == 0)
        # Sums of 8 to 12 terms in a dozen layers, and the systems that are solved.
        assert_close(found, own, 2**12)


@pytest.mark.parametrize("targets", [None, *rest(DenseTargets())], ids=["own", "dense"])
def test_in_order_gives_what_running_the_whole_model_for_each_group_gives(targets):
    params = residual_params(2)
    params["stack"] = {"a": normal(2, 8, 12, seed=90) / 3, "b": normal(2, 12, 8, seed=91) / 3}
    # Two shapes, and a part that no input needs.
    batches = [{"x": normal(n, 8, seed=n), "label": normal(n)} for n in (64, 32, 64)]
    assert_in_order(residual, params, batches, dataclasses.replace(EXACT, targets=targets))


def test_layers_that_differ_by_what_a_call_holds_are_different_programs():
    held = [np.full(8, number, np.float32) for number in range(4)]

    def apply(params, x):
        for kernel, numbers in zip(params, held, strict=True):
            shift = jax.jit(lambda x, numbers=numbers: jnp.sin(x + numbers[None]))
            x = jax.lax.cond(x[0, 0] < 100, shift, jnp.cos, x @ kernel)
        return x

    params = [normal(8, 8, seed=seed) for seed in range(4)]
    assert_in_order(apply, params, [normal(64, 8, seed=9)], EXACT)


@pytest.mark.parametrize("order", rest(*ORDERS))
def test_as_much_is_compiled_for_many_equal_layers_as_for_few(order, caplog):
    def compiled(layers):
        jax.clear_caches()
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
            params, batches = residual_params(layers), [{"x": normal(20, 8)}]
            prune(residual, params, batches, SPARSEGPT, order=order)
        return [text for text in caplog.messages if "Finished XLA compilation" in text]

    assert len(compiled(5)) == len(compiled(3)) > 0
