"""Pruning the weights of any tree of parameters."""

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import prox24
from prox24 import ADMM, ConjugateGradients, LayerProblem, Magnitude, SparseGPT, Status, Wanda
from prox24.errors import CalibrationError, SolverError
from prox24.optax import by_path, keep_pattern

BASELINE = {"solver": Wanda(), "refit": None}
MLP = ("first", "second", "third")


@pytest.fixture
def standard_promotion():
    """Flax and Equinox promote dtypes and ranks in their layers and initialisers."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


flax_promotes = pytest.mark.usefixtures("standard_promotion")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def mlp():
    return {name: {"kernel": normal(8, 8, seed=seed)} for seed, name in enumerate(MLP)}


def apply_mlp(params, x):
    for name in MLP:
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def solve_by_hand(kernel, x, solver, refit=None):
    """The kernel (in, out), pruned for inputs (rows, in)."""
    gram = jnp.matmul(x.T, x, precision="highest")
    return prox24.solve(LayerProblem(kernel.T, gram), solver, refit).weight.T


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


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.Conv(8, (3, 3))(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(8, name="head")(nn.Dense(6)(x.reshape(len(x), -1)))


def linen_model():
    model, x = LinenModel(), normal(4, 4, 4, 3)
    return (
        lambda params, x: model.apply({"params": params}, x),
        model.init(jax.random.key(0), x)["params"],
        x,
    )


def frozen_model():
    apply, params, x = linen_model()
    return apply, flax.core.freeze(params), x


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)])
        self.head = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        x = self.attention(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def nnx_module():
    return lambda model, x: model(x), NnxModel(nnx.Rngs(0)), normal(4, 5, 8)


def nnx_state():
    graph, params = nnx.split(NnxModel(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params, normal(4, 5, 8)


def equinox_model():
    model = eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0))
    return lambda model, x: jax.vmap(model)(x), model, normal(20, 8)


def nested():
    def apply(params, x):
        return x @ params[0]["w"] @ params[1][0]

    return apply, [{"w": normal(8, 4)}, (normal(4, 4), None)], normal(20, 8)


CONTAINERS = {
    linen_model: {
        "Conv_1/kernel": 2,
        "grouped/kernel": 2,
        "attention/query/kernel": 0,
        "attention/key/kernel": 0,
        "attention/value/kernel": 0,
        "attention/out/kernel": 1,
        "Dense_0/kernel": 0,
    },
    nnx_state: {
        "attention/query/kernel": 0,
        "attention/key/kernel": 0,
        "attention/value/kernel": 0,
        "attention/out/kernel": 1,
        "layers/0/kernel": 0,
        "layers/1/kernel": 0,
    },
    equinox_model: {f"layers/{i}/weight": 1 for i in range(3)},
    nested: {"0/w": 0, "1/0": 0},
}
CONTAINERS |= {frozen_model: CONTAINERS[linen_model], nnx_module: CONTAINERS[nnx_state]}


@flax_promotes
@pytest.mark.parametrize("make", CONTAINERS, ids=lambda make: make.__name__)
def test_every_container_keeps_its_kind_and_what_is_not_pruned(make):
    apply, params, x = make()
    pruned = prox24.prune_params(params, prox24.calibrate(apply, params, [x]), Wanda(), None)
    assert {leaf.path: leaf.axis for leaf in pruned.leaves if leaf.pruned} == CONTAINERS[make]
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)
    reported = {report.name.partition("[")[0] for report in pruned.reports}
    assert reported == set(CONTAINERS[make])
    assert apply(pruned.params, x).shape == apply(params, x).shape


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT(), ADMM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("refit", [None, ConjugateGradients()], ids=["unrefitted", "refitted"])
def test_a_kernel_is_solved_like_the_same_problem_by_hand(solver, refit):
    kernel, x = normal(16, 8), normal(64, 16, seed=1)
    params = {"kernel": kernel}
    calibration = prox24.calibrate(lambda params, x: x @ params["kernel"], params, [x])
    pruned = prox24.prune_params(params, calibration, solver, refit)
    by_hand = solve_by_hand(kernel, x, solver, refit)
    np.testing.assert_allclose(pruned.params["kernel"], by_hand, rtol=1e-4, atol=1e-6)


def test_kernels_of_many_axes_are_solved_as_the_matrices_they_are():
    images, kernel = normal(2, 6, 6, 4), normal(3, 3, 4, 5, seed=1)
    heads, out = normal(30, 2, 4), normal(2, 4, 6, seed=2)

    def apply(params, inputs):
        images, heads = inputs
        numbers = ("NHWC", "HWIO", "NHWC")
        jax.lax.conv_general_dilated(images, params["conv"], (1, 1), "VALID", None, None, numbers)
        return jnp.einsum("bhd,hdo->bo", heads, params["out"])

    params = {"conv": kernel, "out": out}
    calibration = prox24.calibrate(apply, params, [(images, heads)])
    pruned = prox24.prune_params(params, calibration, SparseGPT(), None).params
    patches = np.stack(
        [images[n, i : i + 3, j : j + 3] for n in range(2) for i in range(4) for j in range(4)]
    ).reshape(-1, 36)
    expected = solve_by_hand(kernel.reshape(36, 5), jnp.asarray(patches), SparseGPT())
    np.testing.assert_allclose(pruned["conv"], expected.reshape(kernel.shape), atol=1e-5)
    expected = solve_by_hand(out.reshape(8, 6), heads.reshape(-1, 8), SparseGPT())
    np.testing.assert_allclose(pruned["out"], expected.reshape(out.shape), atol=1e-5)


def test_every_matrix_of_a_stack_is_solved_and_reported():
    experts, x = normal(3, 8, 4), normal(3, 20, 8, seed=1)
    params = {"experts": experts}
    calibration = prox24.calibrate(lambda params, x: x @ params["experts"], params, [x])
    pruned = prox24.prune_params(params, calibration)
    assert [report.name for report in pruned.reports] == [f"experts[{i}]" for i in range(3)]
    for i in range(3):
        expected = solve_by_hand(experts[i], x[i], ADMM(), ConjugateGradients())
        np.testing.assert_allclose(pruned.params["experts"][i], expected, atol=1e-5)


def test_a_matrix_that_no_row_has_met_keeps_its_largest_entries():
    experts, x = normal(2, 8, 4), normal(2, 20, 8, seed=1).at[1].set(0)
    params = {"experts": experts}
    calibration = prox24.calibrate(lambda params, x: x @ params["experts"], params, [x])
    pruned = prox24.prune_params(params, calibration, Wanda(), None)
    assert [report.rows for report in pruned.reports] == [20, 0]
    kept = pruned.params["experts"][1] != 0
    np.testing.assert_array_equal(kept, prox24.top_mask(abs(experts[1]), axis=0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_weights_keep_their_dtype(dtype):
    params, x = {"kernel": normal(8, 4, dtype=dtype)}, normal(20, 8, dtype=dtype)
    calibration = prox24.calibrate(lambda params, x: x @ params["kernel"], params, [x])
    pruned = prox24.prune_params(params, calibration)
    assert pruned.params["kernel"].dtype == dtype
    assert prox24.is_sparse(pruned.params["kernel"], axis=0)


@pytest.mark.parametrize("pattern", [(1, 4), (2, 8), (1, 2)])
def test_other_patterns(pattern):
    params, x = mlp(), normal(20, 8)
    calibration = prox24.calibrate(apply_mlp, params, [x])
    pruned = prox24.prune_params(params, calibration, pattern=pattern)
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves, pattern)


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT()])
def test_without_a_pattern_every_matrix_has_its_fraction_of_zeros(solver):
    # 5 outputs and 6 inputs: no length is a multiple of 4.
    params, x = {"kernel": normal(6, 5)}, normal(64, 6, seed=1)
    pattern = prox24.Unstructured(0.7)
    calibration = prox24.calibrate(lambda params, x: x @ params["kernel"], params, [x])
    pruned = prox24.prune_params(params, calibration, solver, None, pattern=pattern)
    gram = jnp.matmul(x.T, x, precision="highest")
    problem = LayerProblem(params["kernel"].T, gram)
    expected = prox24.solve(problem, solver, None, pattern=pattern).weight.T
    assert np.array_equal(pruned.params["kernel"], expected)
    assert np.count_nonzero(expected) < params["kernel"].size / 2


def test_what_is_not_pruned_says_why():
    params = {
        "embed": normal(12, 8),
        "narrow": normal(6, 8),
        "norm": {"scale": normal(8)},
        "masked": normal(8, 8),
        "mlp": normal(8, 6),
        "spare": normal(8, 8),
        "head": normal(8, 12),
        "count": jnp.arange(4).reshape(2, 2),
    }

    def apply(params, tokens):
        x = params["embed"][tokens] * params["norm"]["scale"][None, :]
        x = x @ jnp.abs(params["masked"])
        return (x @ params["mlp"]) @ params["narrow"] @ params["head"]

    calibration = prox24.calibrate(apply, params, [jnp.arange(12)])
    pruned = prox24.prune_params(params, calibration, Magnitude(), None)
    assert {leaf.path: leaf.reason for leaf in pruned.leaves} == {
        "count": "it is not a floating array",
        "embed": "embedding",
        "head": "head",
        "masked": "no Gram: used by abs",
        "mlp": "default",
        "narrow": "axis 0 is not divisible by 4",
        "norm/scale": "fewer than two dimensions",
        "spare": "no Gram: unused",
    }
    assert [str(leaf).split()[0] for leaf in pruned.leaves].count("pruned") == 1
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)
    chosen = prox24.prune_params(
        params, calibration, Magnitude(), None, mask=by_path(lambda path: path != "mlp")
    )
    reasons = {leaf.path: leaf.reason for leaf in chosen.leaves}
    assert reasons["head"] == "in mask"
    assert reasons["mlp"] == "not in mask"
    assert reasons["spare"] == "no Gram: unused"
    assert [report.name for report in chosen.reports] == ["head"]


@pytest.mark.parametrize("pattern", [(2, 4), prox24.Unstructured(0.5)])
def test_a_training_keeps_the_zeros_whatever_chose_them(pattern):
    def apply(params, x):
        return jnp.tanh(x @ params["first"]) @ params["head"] + params["bias"][None]

    params = {
        "first": normal(16, 8),
        "head": normal(8, 10, seed=1),
        "bias": jnp.zeros(10, jnp.float32),
    }
    calibration = prox24.calibrate(apply, params, [normal(64, 16, seed=2)])
    everything = by_path(lambda path: path != "bias")
    pruned = prox24.prune_params(params, calibration, pattern=pattern, mask=everything, **BASELINE)
    optimizer = keep_pattern(optax.sgd(0.1), pruned.kept)
    steps = jax.tree.map(jnp.ones_like, params)
    steps, _ = optimizer.update(steps, optimizer.init(pruned.params), pruned.params)
    for name in ("first", "head"):
        assert np.mean(pruned.params[name] == 0) == 0.5
        assert np.array_equal(steps[name] == 0, pruned.params[name] == 0)
    assert np.all(steps["bias"] != 0)


def test_too_few_rows_are_reported_and_only_damped():
    params = {"kernel": normal(16, 4)}
    few, enough = (
        prox24.prune_params(
            params,
            prox24.calibrate(lambda params, x: x @ params["kernel"], params, [normal(rows, 16)]),
        )
        for rows in (5, 16)
    )
    (report,) = few.reports
    assert (report.rows, report.width, report.status) == (5, 16, Status.SPARSE)
    assert "5 rows of 16, too few" in str(report)
    assert "too few" not in str(enough.reports[0])
    assert report.statistics.damping > 0


def test_a_solution_that_is_not_finite_names_its_weight():
    params, x = mlp(), normal(20, 8)
    calibration = prox24.calibrate(apply_mlp, params, [x])
    broken = calibration.grams["second/kernel"]
    calibration.grams["second/kernel"] = broken._replace(gram=broken.gram * jnp.nan)
    with pytest.raises(SolverError, match=r"^the Gram of second/kernel holds NaN or Inf"):
        prox24.prune_params(params, calibration)
    calibration.grams["second/kernel"] = broken._replace(gram=-broken.gram)
    with pytest.raises(SolverError, match="Gram of second/kernel is not positive semidefinite"):
        prox24.prune_params(params, calibration, Wanda(), None)
    calibration.grams["second/kernel"] = broken
    params["second"]["kernel"] = params["second"]["kernel"].at[3, 2].set(jnp.nan)
    with pytest.raises(SolverError, match=r"^second/kernel holds NaN or Inf"):
        prox24.prune_params(params, calibration)


def test_a_calibration_of_another_model_is_refused():
    calibration = prox24.calibrate(apply_mlp, mlp(), [normal(20, 8)])
    other = mlp() | {"first": {"kernel": normal(12, 8)}}
    with pytest.raises(ValueError, match=r"\(8, 12\)"):
        prox24.prune_params(other, calibration)


# In the order of the calls


def test_in_order_is_pruning_each_layer_for_what_the_pruned_ones_put_out():
    params, x = mlp(), normal(64, 8, seed=9)
    batches = [x[:32], x[32:]]
    pruned = prox24.prune_in_order(apply_mlp, params, batches)
    expected = {}
    for name in MLP:
        kernel = solve_by_hand(params[name]["kernel"], x, ADMM(), ConjugateGradients())
        expected[name] = {"kernel": kernel}
        x = jnp.tanh(x @ kernel)
        np.testing.assert_allclose(pruned.params[name]["kernel"], kernel, rtol=1e-3, atol=1e-5)
    assert [report.name for report in pruned.reports] == [f"{name}/kernel" for name in MLP]
    one_shot = prox24.prune_params(
        params, prox24.calibrate(apply_mlp, params, [normal(64, 8, seed=9)])
    )
    assert pruned.leaves == one_shot.leaves
    first, *later = (
        np.allclose(one_shot.params[name]["kernel"], pruned.params[name]["kernel"], atol=1e-5)
        for name in MLP
    )
    assert first
    assert not any(later)


def test_in_order_counts_weights_that_share_an_input_as_one_step(monkeypatch):
    def apply(params, x):
        hidden = jnp.tanh(x @ params["q"] + x @ params["k"]) @ params["twice"]
        return hidden @ params["out"] + x @ params["v"] + jnp.tanh(hidden) @ params["twice"]

    params = {name: normal(8, 8) for name in ("q", "k", "v", "twice", "out")}
    groups = []
    calibrate = prox24.trees.params.calibrate

    def record(*arguments, names):
        groups.append(names)
        return calibrate(*arguments, names=names)

    monkeypatch.setattr(prox24.trees.params, "calibrate", record)
    pruned = prox24.prune_in_order(
        apply, params, [normal(20, 8)], Wanda(), None, mask={name: name != "k" for name in params}
    )
    assert groups == [["q"], ["twice"], ["out"], ["v"]]
    assert prox24.trees.calibrate.survey_products(apply, params, normal(20, 8)).groups == [
        ["q", "k"], ["twice"], ["out"], ["v"]
    ]  # fmt: skip
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)


def test_in_order_needs_a_batch():
    with pytest.raises(CalibrationError, match="no batch"):
        prox24.prune_in_order(apply_mlp, mlp(), iter(()))


@flax_promotes
@pytest.mark.parametrize("make", [linen_model, nnx_state], ids=lambda make: make.__name__)
def test_in_order_takes_models_of_flax(make):
    apply, params, x = make()
    pruned = prox24.prune_in_order(apply, params, [x], Wanda(), None)
    assert {leaf.path: leaf.axis for leaf in pruned.leaves if leaf.pruned} == CONTAINERS[make]
    assert_only_chosen_leaves_changed(params, pruned.params, pruned.leaves)
