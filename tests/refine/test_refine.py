"""Training the kept weights of a block on its output."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import contents, error_line, files, printed_json, write_workspace
from commands import run as run_command
from reference import masked_least_squares
from tiers import slow
from tiny import pruned_by, tokens, write_edited, write_tiny

import prox24
from prox24 import Recipe, Wanda, refine
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._core.precision import COMPUTE_DTYPES
from prox24._jobs.forward import all_linears, load_model
from prox24._jobs.native import native_runner
from prox24._models.spec import tensor_shapes
from prox24._pruning.loop import prune_stages
from prox24.errors import CalibrationError, CheckpointError
from prox24.refine import BlockRefinement, Outcome

BATCHES = 6
UNIT = 2.0**-24
"""What float32 rounds by, relative to a number."""


pytestmark = pytest.mark.usefixtures("standard_promotion")


def two_layers(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


@pytest.fixture
def pruned():
    """A pruned block, inputs, and the dense block's outputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    dense = {
        "first": {"kernel": jax.random.normal(keys[0], (16, 32), jnp.float32) / 4},
        "second": {"kernel": jax.random.normal(keys[1], (32, 8), jnp.float32) / 6},
    }

    def sparse(kernel):
        return jnp.where(prox24.top_mask(jnp.abs(kernel), axis=0), kernel, 0)

    inputs = list(jax.random.normal(keys[2], (BATCHES, 64, 16), jnp.float32))
    return jax.tree.map(sparse, dense), inputs, [two_layers(dense, x) for x in inputs]


def trained(block, optimizer, apply=two_layers, **more):
    return refine.train_block(apply, *block, optimizer, **more)


def error_of(params, block):
    """On the batch that is held out."""
    _, inputs, targets = block
    weights = refine.feature_weights(targets)
    return float(refine.relative_error(two_layers(params, inputs[-1]), targets[-1], weights))


def rounding(loss):
    """Relative, of an error by the products of `two_layers`, whose 32 terms round by sqrt(32) UNIT.

    The root of the error is the size of a difference, which rounds as its two parts of size 1 do,
    and is squared. Three standard deviations.
    """
    return 3 * 2 * np.sqrt(2 * 32 / loss) * UNIT


def assert_same_zeros(params, given):
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(given), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new == 0, old == 0)


def test_the_error_falls_and_the_zeros_stay(pruned):
    refined = trained(pruned, optax.adam(3e-3), passes=20)
    assert refined.outcome is Outcome.IMPROVED
    assert refined.steps == 20 * (BATCHES - 1)
    assert len(refined.losses) == 21
    assert min(refined.losses) < 0.6 * refined.losses[0]
    assert_same_zeros(refined.params, pruned[0])
    best = min(refined.losses)
    assert error_of(refined.params, pruned) == pytest.approx(best, rel=rounding(best))


def test_micro_batches_make_one_step(pruned):
    params, *batches = pruned
    halves = [params, *([half for x in each for half in jnp.split(x, 2)] for each in batches)]
    optimizer = optax.sgd(0.1)  # whose step a sum in place of a mean would double
    whole = trained(pruned, optimizer, passes=3)
    parts = trained(halves, optimizer, passes=3, held_out=2, micro_batches=2)
    assert parts.steps == whole.steps
    assert whole.losses[-1] < whole.losses[0]
    # The relative error is a mean over tokens: that of a batch is the mean of its halves'. Each
    # step rounds sums over 64 tokens, in both runs.
    moved = 2 * whole.steps * np.sqrt(64) * UNIT
    rtol = rounding(whole.losses[-1]) + 2 * moved / np.sqrt(whole.losses[-1])
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=rtol)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=moved * np.abs(b).max())
    with pytest.raises(ValueError, match="11 batches are no whole number of steps of 2"):
        trained(halves, optimizer, micro_batches=2)


def test_a_linear_block_reaches_least_squares():
    keys = jax.random.split(jax.random.key(1), 2)
    weight = jax.random.normal(keys[0], (8, 4), jnp.float32)
    mask = prox24.top_mask(jnp.abs(weight), axis=0)
    scale = jnp.linspace(1, 3, 8, dtype=jnp.float32)
    x = jax.random.normal(keys[1], (256, 8), jnp.float32) * scale[None]
    # The held-out batch is the one of the training: the best is the least squares.
    block = {"kernel": jnp.where(mask, weight, 0)}, [x] * 2, [x @ weight] * 2
    rate = optax.exponential_decay(0.05, 1, 0.98)
    refined = trained(
        block,
        optax.adam(rate),
        lambda params, x: x @ params["kernel"],
        passes=300,
        loss=lambda output, target: jnp.mean(jnp.square(output - target)),
    )
    gram = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    exact = masked_least_squares(weight.T, gram, mask.T)
    # Adam's steps are about as long as the rate, and end as near as some of the last ones.
    atol = 20 * rate(300)
    np.testing.assert_allclose(refined.params["kernel"].T, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("rate", [0.0, -0.1])
def test_without_an_improvement_the_weights_are_those_that_were_given(pruned, rate):
    refined = trained(pruned, optax.sgd(rate), passes=2)
    assert refined.outcome is Outcome.UNCHANGED
    jax.tree.map(np.testing.assert_array_equal, refined.params, pruned[0])


def test_divergence_rolls_back_to_the_best(pruned):
    rate = optax.piecewise_constant_schedule(3e-3, {3 * (BATCHES - 1): 1e30})
    refined = trained(pruned, optax.sgd(rate), passes=9)
    assert refined.outcome is Outcome.DIVERGED
    assert not np.isfinite(refined.losses[-1])
    best = np.nanmin(refined.losses)
    assert error_of(refined.params, pruned) == pytest.approx(best, rel=rounding(best))


def test_weights_that_a_loss_hides_do_not_count_as_better():
    params = {"kernel": jnp.full((4, 2), 0.1, jnp.float32), "bias": jnp.zeros(2, jnp.float32)}
    inputs = [jnp.full((3, 4), size, jnp.float32) for size in (1.0, 2.0, 3.0)]

    def apply(params, x):
        return jax.nn.relu(x @ params["kernel"] + params["bias"][None])

    def loss(output, target):
        return 10 * jnp.mean(jnp.square(output - target))

    block = params, inputs, [jnp.zeros((3, 2), jnp.float32)] * 3
    refined = trained(block, optax.sgd(3e38), apply, trainable=True, loss=loss)
    assert refined.outcome is Outcome.DIVERGED
    np.testing.assert_array_equal(refined.params["kernel"], params["kernel"])


def test_16_bit_parameters_are_trained_in_float32(pruned):
    params, *batches = pruned
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def apply(params, x):
        return two_layers(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x)

    # Steps too small for bfloat16 to take one by one.
    refined = trained((half, *batches), optax.sgd(1e-3), apply, passes=60)
    assert refined.outcome is Outcome.IMPROVED
    assert_same_zeros(refined.params, half)


def test_the_error_is_computed_in_float32():
    target = jnp.full((1, 4096), 4, jnp.float16)  # whose squares sum to more than float16 holds
    with jax.numpy_dtype_promotion("strict"):
        weights = refine.feature_weights([target])
        error = refine.relative_error(target / jnp.float16(2), target, weights)
        gap = refine.divergence(target, target)
    assert (float(error), float(gap[0])) == (0.25, 0)
    assert error.dtype == gap.dtype == jnp.float32


def test_a_target_of_zero_counts_by_the_size_of_the_others():
    target = jnp.array([[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]])  # sizes 4, 0, 16: mean 20 / 3
    output = target + jnp.array([[1.0, 1.0]])
    expected = (2 / 4 + 2 / (20 / 3) + 2 / 16) / 3
    # A dozen operations.
    found = refine.relative_error(output, target)
    assert float(found) == pytest.approx(expected, rel=12 * UNIT)
    # An expert without tokens.
    without = refine.relative_error(output, jnp.zeros_like(target))
    assert float(without) == pytest.approx((10 + 2 + 26) / 3, rel=12 * UNIT)


@pytest.fixture
def one_large(pruned):
    """The block, with one output feature of most of the squared size."""
    params, inputs, targets = pruned
    factors = jnp.ones(8, "float32").at[3].set(32)
    params = params | {"second": {"kernel": params["second"]["kernel"] * factors}}
    return params, inputs, [target * factors for target in targets]


def test_features_are_weighted_by_their_share_of_the_size(one_large):
    targets = np.asarray(one_large[2], np.float64)
    shares = np.mean(targets**2 / np.sum(targets**2, axis=-1, keepdims=True), axis=(0, 1))
    assert shares[3] > 0.8
    # Features below the mean have a weight of one.
    expected = 1 / np.maximum(8 * shares, 1)
    assert np.all((expected == 1) == (np.arange(8) != 3))
    targets = jnp.asarray(targets, "float32")
    # All terms are positive, so that each addition adds a rounding at most, and so do ten others.
    terms = targets.size + 10
    found = refine.feature_weights(list(targets))
    np.testing.assert_allclose(found, expected, rtol=terms * UNIT)
    outputs = targets + jax.random.normal(jax.random.key(1), targets.shape, "float32")
    parts = [expected * np.asarray(x, np.float64) ** 2 for x in (outputs - targets, targets)]
    error = np.mean(np.sum(parts[0], axis=-1) / np.sum(parts[1], axis=-1))
    found = refine.relative_error(outputs, targets, jnp.asarray(expected, "float32"))
    assert float(found) == pytest.approx(error, rel=terms * UNIT)


def test_weights_need_targets():
    with pytest.raises(ValueError, match="no batch of targets"):
        trained(({"kernel": jnp.ones((4, 4))}, [], []), optax.sgd(0.1))


def test_a_large_feature_does_not_hide_the_others(one_large):
    def error_of_others(loss):
        refined = trained(one_large, optax.adam(1e-2), passes=40, loss=loss)
        difference = two_layers(refined.params, one_large[1][-1]) - one_large[2][-1]
        return float(jnp.sum(jnp.square(difference.at[:, 3].set(0))))

    assert error_of_others(None) < 0.8 * error_of_others(refine.relative_error)


def test_optimizers_that_keep_the_first_parameters(pruned):
    optimizer = optax.contrib.mechanize(optax.contrib.prodigy(1e-2))  # twice
    refined = trained(pruned, optimizer, passes=3)
    assert refined.outcome is not Outcome.DIVERGED
    assert refined.steps == 3 * (BATCHES - 1)


def test_arrays_of_an_optimizer_are_left_to_their_owner(pruned):
    rate, key = jnp.float32(1e-3), jax.random.key(7)
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
    optimizer = optax.chain(optax.add_noise(0.01, 0.55, key), adam)
    first, again = (trained(pruned, optimizer, passes=1) for _ in range(2))
    assert first.losses == again.losses
    assert float(rate) == np.float32(1e-3)
    assert jax.random.normal(key).shape == ()


def test_targets_of_another_shape_are_refused(pruned):
    params, inputs, targets = pruned
    block = params, inputs, [target[:1] for target in targets]
    with pytest.raises(ValueError, match=r"output has shape \(64, 8\), its target \(1, 8\)"):
        trained(block, optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"logits has shape \(3, 4\), its target \(1, 4\)"):
        refine.divergence(jnp.zeros((3, 4)), jnp.zeros((1, 4)))


def test_parameters_in_float64_are_trained_in_float64(pruned):
    params, *data = jax.tree.map(lambda x: x.astype("float64"), pruned)
    # In float32, the step would be lost.
    refined = trained((params, *data), optax.sgd(1e-12), passes=1)
    assert refined.outcome is Outcome.IMPROVED
    assert_same_zeros(refined.params, params)


def test_a_leaf_without_a_gradient_is_refused_by_name(pruned):
    params, *data = pruned
    with pytest.raises(ValueError, match=r"step is int64, not floating-point: close over it"):
        trained(({**params, "step": jnp.arange(4)}, *data), optax.sgd(0.1))


def test_a_loss_of_more_numbers_than_one_is_refused(pruned):
    def loss(output, target):
        return jnp.square(output - target)

    with pytest.raises(ValueError, match=r"loss has shape \(64, 8\): return a scalar"):
        trained(pruned, optax.sgd(0.1), loss=loss)


def test_an_output_of_several_arrays_is_refused(pruned):
    with pytest.raises(ValueError, match="output is a tuple: return one array"):
        trained(pruned, optax.sgd(0.1), lambda params, x: (two_layers(params, x), None))


OTHER_SHAPES = {name: {"kernel": jnp.ones((3, 3))} for name in ("first", "second")}


@pytest.mark.parametrize(
    ("targets", "given", "said"),
    [
        (6, {"held_out": 0}, "6 batches: 0 held out"),
        (6, {"held_out": 6}, "6 batches: 6 held out"),
        (5, {}, "6 batches of inputs, but 5 of targets"),
        (6, {"trainable": OTHER_SHAPES}, "shape"),
        (6, {"passes": 0}, "passes 0 is not positive"),
        (6, {"passes": 1.5}, "passes 1.5 is not a whole number"),
        (6, {"held_out": 0.125}, "held_out 0.125 is not a whole number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pruned, targets, given, said):
    params, inputs, outputs = pruned
    with pytest.raises(ValueError, match=said):
        trained((params, inputs, outputs[:targets]), optax.sgd(0.1), **given)


def test_divergence_is_that_of_float64():
    target, logits = 8 * jax.random.normal(jax.random.key(0), (2, 64, 512), "float32")

    def log_softmax(x):
        x = np.asarray(x, np.float64)
        return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))

    of_target, of_logits = log_softmax(target), log_softmax(logits)
    parts = np.exp(of_target) * (of_target - of_logits)
    # Each number has a few roundings of its size, which is that of the logits.
    sizes = np.sum(np.abs(parts), axis=-1) + np.max(np.abs([target, logits]), axis=(0, 2))
    error = np.abs(refine.divergence(logits, target) - np.sum(parts, axis=-1))
    assert np.all(error <= 12 * UNIT * sizes)
    expected = np.exp(of_logits) - np.exp(of_target)
    gradient = jax.grad(lambda x: jnp.sum(refine.divergence(x, target)))(logits)
    # The derivative of an exponential multiplies the rounding of its argument.
    scale = (np.exp(of_logits) + np.exp(of_target)) * np.max(sizes)
    assert np.all(np.abs(gradient - expected) <= 12 * UNIT * scale)


def test_no_divergence_where_both_exclude_a_token():
    target, logits = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([1.0, 0.0, -jnp.inf])
    found, gradient = jax.value_and_grad(refine.divergence)(logits, target)
    expected, of_two = jax.value_and_grad(refine.divergence)(logits[:2], target[:2])
    # Each is of a dozen operations.
    np.testing.assert_allclose(found, expected, rtol=2 * 12 * UNIT)
    np.testing.assert_allclose(gradient, [*of_two, 0], rtol=2 * 12 * UNIT)
    assert refine.divergence(jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])) == jnp.inf


def test_equal_blocks_share_one_program(pruned):
    traces, optimizer = [], optax.adam(1e-3)

    def apply(params, x):
        traces.append(1)
        return two_layers(params, x)

    for _ in range(3):
        trained(pruned, optimizer, apply, passes=1)
    assert len(traces) == 2  # to train and to measure


def recipe_with(refinement=None, **changes):
    return Recipe(Wanda(), None, targets=None, refine=refinement, **changes)


def run(folder, windows, recipe, **options):
    """The tensors by name, and the reports."""
    return pruned_by(native_runner(open_checkpoint(folder), windows, recipe, **options), recipe)


@pytest.fixture
def folder(tmp_path):
    """Of a tiny model, beside a text."""
    return write_workspace(tmp_path)


@pytest.mark.parametrize(("variant", "linears_only"), [("qwen2", False), slow("gpt2", True)])
def test_a_pruned_layer_comes_nearer_to_the_dense_one(tmp_path, variant, linears_only):
    write_tiny(tmp_path / "model", variant)
    model, windows = load_model(open_checkpoint(tmp_path / "model")), tokens(batch=32, length=32)
    linears = [linear.tensor for linear in all_linears(model.config)]
    recipe = recipe_with(BlockRefinement(passes=6, linears_only=linears_only))
    tensors, reports = run(tmp_path / "model", windows, recipe, micro_batch=4)
    assert [report.name for report in reports] == linears
    for report in reports:
        assert report.refinement.outcome is Outcome.IMPROVED
        assert report.refinement.error < 0.95 * report.refinement.error_before
        assert report.refinement.steps == 6 * 7  # of two micro-batches
    in_layers = {name for name in tensor_shapes(model.config) if re.search(r"\.\d+\.", name)}
    # Biases are turned with queries, keys and values.
    turned = {f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
    assert tensors.keys() == ({*linears, *turned} if linears_only else in_layers)
    plain, _ = run(tmp_path / "model", windows, recipe_with(), micro_batch=4)
    np.testing.assert_array_equal(tensors[linears[0]] == 0, plain[linears[0]] == 0)
    axis = 0 if model.config.names.transposed else 1
    for name, values in tensors.items():
        assert np.any(values != model.checkpoint.read(name)), name
        assert name not in linears or prox24.is_sparse(values, axis=axis), name


def test_a_linear_that_stays_dense_is_trained_with_all_of_its_entries(tmp_path):
    dense = "model.layers.1.self_attn.q_proj.weight"
    weights = write_edited(tmp_path / "model", dense, (0, 0), 0)  # also this one
    recipe = recipe_with(BlockRefinement(passes=2, linears_only=True), skip="q_proj")
    tensors, reports = run(tmp_path / "model", tokens(batch=16, length=16), recipe)
    assert not any("q_proj" in report.name for report in reports)
    assert np.all(tensors[dense] != weights[dense])
    assert all(prox24.is_sparse(tensors[report.name]) for report in reports)


def test_a_layer_is_refined_in_bfloat16_as_it_is_in_float32(folder):
    errors, weights = [], []
    for dtype in COMPUTE_DTYPES:
        recipe = recipe_with(BlockRefinement(rate=3e-3, passes=2, compute_dtype=dtype))
        tensors, reports = run(folder / "model", tokens(batch=32, length=16), recipe)
        assert {report.refinement.outcome for report in reports} == {Outcome.IMPROVED}
        errors.append([report.refinement.error for report in reports])
        weights.append(tensors[reports[0].name])
    # Eight products in sequence round both operands by 2^-9; three standard deviations.
    np.testing.assert_allclose(*errors, rtol=3 * np.sqrt(2 * 8) * 2.0**-9)
    assert not np.array_equal(*weights)


def refining(folder, name, *more):
    """A command."""
    options = ["--method", "wanda", "--refine", "block", "--quiet", "--sequence-length", "32"]
    options += ["--calibration", folder / "text.txt"]
    return ["prune", folder / "model", folder / name, *options, *more]


def interrupted_after(count):
    """The loop, which ends with an interrupt after this number of tensors."""

    def pruned(*arguments, **keywords):
        yield from itertools.islice(prune_stages(*arguments, **keywords), count)
        raise KeyboardInterrupt

    return pruned


@pytest.mark.parametrize(
    ("dtype", "more", "count"),  # in the middle of the first layer, and of the second
    [
        ("bfloat16", "--refine-compute-dtype bfloat16", 3),
        slow(
            "float32", "--refine-linears-only --dtype bfloat16 --skip v_proj --activations disk", 10
        ),
    ],
)
def test_a_refined_run_goes_on_with_the_same_bytes(
    tmp_path, monkeypatch, capsys, dtype, more, count
):
    write_workspace(tmp_path, dtype=dtype)
    more = f"{more} --samples 8 --memory 1MB --refine-passes 2 --refine-rate 0.01".split()
    report = printed_json(capsys, *refining(tmp_path, "whole", *more))
    outcomes = {linear["refinement"]["outcome"] for linear in report["linears"]}
    assert outcomes <= {"improved", "unchanged"}
    with monkeypatch.context() as patch:
        patch.setattr("prox24._pruning.loop.prune_stages", interrupted_after(count))
        assert run_command(*refining(tmp_path, "out", *more)) == 130
    assert run_command(*refining(tmp_path, "out", *more)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    verify = ["verify", tmp_path / "whole", "--source", tmp_path / "model", "--quiet"]
    assert run_command(*verify) == 0


def test_the_tokens_and_the_held_out_share_of_a_step_are_chosen(folder, capsys):
    more = ["--refine-step-tokens", "32", "--refine-held-out", "0.25", "--refine-passes", "1"]
    more += ["--samples", "16", "--metrics", folder / "metrics.jsonl"]
    report = printed_json(capsys, *refining(folder, "out", *more))
    assert {linear["refinement"]["steps"] for linear in report["linears"]} == {12}
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [each for each in events if each.pop("event") == "step"]
    assert len(events) - len(steps) == len(report["linears"])
    assert [(each["layer"], each["step"]) for each in steps] == [
        (f"layers.{layer}", step) for layer in range(2) for step in range(1, 13)
    ]
    assert all(each["steps"] == 12 and 0 < each["loss"] < 1 for each in steps)


def test_windows_are_held_out_from_all_of_the_text(folder, monkeypatch):
    seen = []

    def caught(checkpoint, windows, *arguments, **keywords):
        seen.append(windows)
        raise KeyboardInterrupt

    monkeypatch.setattr("prox24._jobs.prune.native_runner", caught)
    for refined in ("none", "block"):
        assert run_command(*refining(folder, refined, "--refine", refined)) == 130
    plain, refined = seen
    np.testing.assert_array_equal(refined, np.random.default_rng(0).permutation(plain))
    assert not np.array_equal(refined, plain)


def test_a_weight_that_overflows_is_named_before_its_layer_is_refined(tmp_path, monkeypatch):
    write_edited(tmp_path / "source", "model.layers.0.self_attn.v_proj.weight", (0, 0), 1e5)
    recipe = recipe_with(BlockRefinement(passes=1), dtype="float16")
    monkeypatch.setattr("prox24._pruning.loop.train_block", None)
    with pytest.raises(
        CheckpointError, match=r"0\.self_attn\.v_proj\.weight overflows float16; choose"
    ):
        run(tmp_path / "source", tokens(batch=8, length=32), recipe)


def test_windows_that_are_too_few_are_refused_before_any_work(folder, capsys):
    recipe = recipe_with(BlockRefinement(held_out=1.0))
    with pytest.raises(CalibrationError, match="all 8 windows are held out"):
        native_runner(open_checkpoint(folder / "model"), tokens(batch=8, length=16), recipe)
    said = error_line(capsys, *refining(folder, "out", "--samples", "1"))
    assert "refining takes 2 calibration windows or more" in said
    assert files(folder) == ["model", "text.txt"]


def test_a_rate_is_relative_to_the_weights():
    weight = 30 * np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    params = {"weight": jnp.asarray(weight), "bias": jnp.zeros(4)}
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1 / 30), params)
    optimizer = BlockRefinement(rate=0.1).optimizer(8)
    first, _ = optimizer.update(gradient, optimizer.init(params), params)
    rms = np.sqrt(np.mean(np.square(weight)))
    # Adam's 1 - 0.999 in float32 is off by as much.
    rtol = UNIT / 0.001
    np.testing.assert_allclose(first["weight"], np.full((4, 8), -0.1 * rms), rtol=rtol)
    np.testing.assert_allclose(first["bias"], np.full(4, -0.1 * 0.001), rtol=rtol)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_devices_divide_a_step(devices):
    steps = [
        BlockRefinement(step_tokens=2048).step_windows(windows, length, devices)
        for windows, length in ((64, 512), (64, 500), (64, 64), (16, 512), (24, 1100), (24, 4096))
    ]
    expected = [4, 4, 8, 2, 1, 1]
    assert steps == [max(step, devices) for step in expected]
    # 11 would be enough, and 88 is all.
    assert BlockRefinement(step_tokens=11).step_windows(88, 1, 8) == 8
    with pytest.raises(CalibrationError, match=f"takes {2 * devices} calibration windows"):
        BlockRefinement().step_windows(devices, 512, devices)
