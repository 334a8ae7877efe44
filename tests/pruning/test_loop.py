"""The one loop, on checkpoints that prox24's own decoder runs."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, eps_of
from tiers import rest
from tiny import (
    byte_tokenizer,
    config_dict,
    load_folder,
    pruned_by,
    random_weights,
    seen_by_linears,
    tokens,
    write_edited,
    write_folder,
    write_tiny,
)

import prox24
from prox24 import ConjugateGradients, DenseTargets, Magnitude, Recipe, Wanda
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._core.masks import is_sparse, top_mask
from prox24._jobs.forward import all_linears, batch_size, load_model
from prox24._jobs.native import NativeRunner, native_runner
from prox24._jobs.perplexity import from_losses
from prox24._pruning import loop
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Candidate
from prox24._solvers.protocol import Patterns
from prox24._solvers.solve import solve_program
from prox24.errors import CalibrationError, CheckpointError, RecipeError, SolverError

WINDOWS = tokens(batch=8, length=32)
MAGNITUDE = Recipe.magnitude()


def runner_of(folder, recipe, windows=WINDOWS, **options):
    return native_runner(open_checkpoint(folder), windows, recipe, **options)


def prune_folder(folder, recipe):
    return pruned_by(runner_of(folder, recipe), recipe)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "source"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def weights(source):
    return load_folder(source)


def relative_losses(pruned):
    return {report.name: report.statistics.relative_loss for report in pruned.reports}


# What is pruned


@pytest.mark.parametrize("recipe", [*rest(Recipe()), Recipe.wanda()], ids=["admm", "wanda"])
def test_every_linear_is_pruned_and_the_solver_compiled_once_for_each_shape(
    tmp_path, source, weights, recipe
):
    checkpoint = open_checkpoint(source)
    linears = all_linears(load_model(checkpoint).config)
    solve_program.clear_cache()
    pruned = prune_folder(source, recipe)
    assert solve_program._cache_size() == len({linear.shape for linear in linears})
    names = [linear.tensor for linear in linears]
    assert list(pruned.tensors) == names == [report.name for report in pruned.reports]
    write_checkpoint(checkpoint, tmp_path / "out", pruned.tensors.items())
    written = load_folder(tmp_path / "out")
    for name, values in weights.items():
        if name in names:
            assert is_sparse(jnp.asarray(written[name]))
            assert np.count_nonzero(written[name]) == values.size // 2
        else:
            assert written[name].tobytes() == values.tobytes()


def test_names_choose_the_tensors_and_their_patterns(source):
    pattern = (("down_proj", "dense"), ("mlp", (4, 8)), ("[qkv]_proj", (2, 4)))
    recipe = dataclasses.replace(MAGNITUDE, pattern=pattern, only=r"layers\.1", skip="v_proj")
    pruned = prune_folder(source, recipe).tensors
    expected = {"self_attn.q": (2, 4), "self_attn.k": (2, 4), "mlp.gate": (4, 8), "mlp.up": (4, 8)}
    assert pruned.keys() == {f"model.layers.1.{name}_proj.weight" for name in expected}
    for name, values in expected.items():
        weight = jnp.asarray(pruned[f"model.layers.1.{name}_proj.weight"])
        assert is_sparse(weight, values)
        assert np.mean(weight == 0) == 0.5
    with pytest.raises(
        RecipeError, match=r"'lm_head' is found in none of the 14 linears; .* model\.la"
    ):
        prune_folder(source, dataclasses.replace(MAGNITUDE, only="lm_head"))


@pytest.mark.parametrize("share", [3, 0.2])
def test_those_that_lose_most_in_the_dense_model_stay_dense(source, weights, share):
    recipe = Recipe(Wanda(), None, skip="gate_proj", keep_dense=share, targets=None)
    losses = {}
    for index in range(2):
        for name, x in seen_by_linears(config_dict(), weights, WINDOWS, index).items():
            problem = jnp.asarray(weights[name]), jnp.asarray(x.T @ x, jnp.float32)
            losses[name] = prox24.solve(*problem, Wanda(), None).statistics.relative_loss
    chosen = [name for name in losses if "gate_proj" not in name]
    count = 3 if share == 3 else round(0.2 * len(chosen))
    runner = runner_of(source, recipe)
    dense, effect = loop.most_lossy(runner, recipe)
    worst = sorted(chosen, key=losses.get, reverse=True)[:count]
    assert list(dense) == worst
    rel = 2 * (WINDOWS.size + 64 + 2 * 7 * 64) * eps_of("float32")
    np.testing.assert_allclose(list(dense.values()), [losses[name] for name in worst], rtol=rel)
    of_all, of_worst = (sum(losses[name] for name in names) for names in (chosen, worst))
    sizes = [sum(weights[name].size for name in names) for names in (worst, chosen)]
    assert effect == {
        "share_of_weights": sizes[0] / sizes[1],
        "mean_loss_all_pruned": pytest.approx(of_all / len(chosen), rel=rel),
        "mean_loss": pytest.approx((of_all - of_worst) / len(chosen), rel=rel),
    }
    assert pruned_by(runner, recipe, dense=dense).tensors.keys() == set(chosen) - dense.keys()
    every = dataclasses.replace(recipe, keep_dense=len(chosen))
    with pytest.raises(RecipeError, match="keep_dense 12 leaves none of 12 weights to prune"):
        loop.most_lossy(runner, every)
    small = dataclasses.replace(recipe, keep_dense=0.01)
    assert list(loop.most_lossy(runner, small).losses) == worst[:1]


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_reported(tmp_path):
    config = config_dict("mixtral")
    weights = random_weights(config)
    for index in range(2):
        router = weights[f"model.layers.{index}.block_sparse_moe.gate.weight"]
        # Of the two largest of a, -a, 0, 0 the last is never one.
        router[1], router[2:] = -router[0], 0
    write_folder(tmp_path / "source", config, weights)
    # It has no dense output to reproduce either.
    pruned = prune_folder(tmp_path / "source", Recipe(Wanda(), None))
    seen = {report.name: report.tokens for report in pruned.reports}
    for expert, unused in ((0, False), (1, False), (2, False), (3, True)):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        assert (seen[name] == 0) == unused
    weight = jnp.asarray(weights[name])
    expected = jnp.where(top_mask(jnp.abs(weight)), weight, 0)
    np.testing.assert_array_equal(pruned.tensors[name], expected)
    assert seen["model.layers.1.self_attn.q_proj.weight"] == WINDOWS.size


def test_dead_input_features_are_reported(tmp_path):
    norm = "model.layers.0.input_layernorm.weight"
    write_edited(tmp_path / "source", norm, [1, 5, 6], 0)
    for report in prune_folder(tmp_path / "source", Recipe(Wanda(), None)).reports:
        reads_dead = "layers.0" in report.name and report.name.split(".")[-2][:-5] in "qkv"
        assert report.statistics.dead_features == (3 if reads_dead else 0)


# What a layer sees


class Recording(NativeRunner):
    """Notes what each layer is run with."""

    seen: dict

    def advance(self, index, weights, state):
        self.seen.update(weights)
        return super().advance(index, weights, state)


@pytest.mark.parametrize("dtype", ["float32", "float16", None])
def test_layers_see_the_weights_before_them_as_they_are_written(tmp_path, dtype):
    write_tiny(tmp_path / "source", dtype="bfloat16")
    recipe = Recipe(Wanda(), dtype=dtype)
    runner = Recording(**vars(runner_of(tmp_path / "source", recipe)))
    object.__setattr__(runner, "seen", {})
    pruned = pruned_by(runner, recipe)
    assert pruned.tensors
    for name, values in pruned.tensors.items():
        assert values.dtype == dtype or (dtype is None and values.dtype == jnp.bfloat16)
        np.testing.assert_array_equal(runner.seen[name], values)


def test_each_layer_is_calibrated_on_the_output_of_the_pruned_ones(source, weights):
    pruned = prune_folder(source, Recipe(Wanda(), targets=None, basis=None))
    reported, before = relative_losses(pruned), {}
    for index in range(2):
        # Every layer before it is pruned, and it is dense.
        seen = seen_by_linears(config_dict(), weights | before, WINDOWS, index)
        for name, x in seen.items():
            before[name] = pruned.tensors[name]
            change = (before[name].astype(np.float64) - weights[name]) @ x.T
            loss = np.sum(change**2) / np.sum((weights[name] @ x.T) ** 2)
            # Squares of sums of 256 tokens and 64 features, after two layers of seven products.
            rel = 2 * (WINDOWS.size + 64 + 2 * 7 * 64) * eps_of("float32")
            assert reported[name] == pytest.approx(loss, rel=rel), name


def test_dense_targets_lower_the_error_against_the_dense_model(source, weights):
    seen = seen_by_linears(config_dict(), weights, WINDOWS, 1)
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    found, errors = [], []
    for targets in (None, DenseTargets(0.003)):
        recipe = Recipe(Magnitude(), ConjugateGradients(100, 0.0), targets=targets)
        tensors = prune_folder(source, recipe).tensors
        behind = seen_by_linears(config_dict(), weights | tensors, WINDOWS, 1)
        # |W X' - W0 X|^2 of the linears that read the input of a layer, behind the pruned one.
        differences = [behind[n] @ tensors[n].T - seen[n] @ weights[n].T for n in names]
        errors.append([np.sum(difference**2) for difference in differences])
        found.append(tensors)
    for name in (name for name in found[0] if "layers.0." in name):
        # The correction of nothing has those of the difference of two Grams, over the pull.
        assert_close(found[1][name], found[0][name], 3 / 0.003)
    assert np.all(np.array(errors[1]) < 0.95 * np.array(errors[0]))


# The run


def test_a_linear_is_given_out_before_the_next_layer_is_read(source):
    checkpoint, read = open_checkpoint(source), []

    def recording(name, source):
        return source._replace(read=lambda: (read.append(name), source.read())[1])

    tensors = {name: recording(name, source) for name, source in checkpoint.tensors.items()}
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    for linear in loop.prune_stages(native_runner(checkpoint, WINDOWS, MAGNITUDE), MAGNITUDE):
        own = linear.name.split(".")[2]
        assert {name.split(".")[2] for name in read if "layers" in name} <= {"0", own}
    assert not any("lm_head" in name for name in read)


def test_micro_batches_divide_the_windows():
    for windows in range(1, 40):
        for length in (2, 512, 4096):
            size = batch_size(windows, length)
            assert windows % size == 0
            assert size == 1 or size * length <= 2048


# Errors


@hyperparameters
class Broken:
    patterns, needs_definite, shares_columns = Patterns.ANY, False, True

    def __call__(self, problem, pattern, damping):
        mask = jnp.ones(problem.weight.shape, bool)
        return Candidate.of(jnp.nan * problem.weight, mask, damping)


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        (
            dataclasses.replace(MAGNITUDE, pattern=(2, 5)),
            CheckpointError,
            r"layers\.0\.self_attn\.q_proj\.weight.*32.*by 5",
        ),
        (Recipe(pattern=(4, 8)), RecipeError, r"supports 1:M and 2:M, not 4:8.*SparseGPT"),
        (Recipe(Broken(), None), SolverError, r"layers\.0\.self_attn\.q_proj.*use more damping"),
    ],
)
def test_patterns_and_solutions_that_do_not_do_are_named(source, recipe, error, said):
    with pytest.raises(error, match=said):
        prune_folder(source, recipe)


def test_one_window_that_is_not_finite_is_enough_to_be_named(tmp_path):
    (token,) = byte_tokenizer()("~")["input_ids"]
    # Gemma scales its embeddings.
    write_edited(tmp_path / "source", "model.embed_tokens.weight", token, 3e38, "gemma")
    windows = np.where(token == WINDOWS, token - 1, WINDOWS)
    windows[5, 3] = token
    runner = runner_of(tmp_path / "source", MAGNITUDE, windows, micro_batch=2)
    with pytest.raises(CalibrationError, match=r"NaN or Inf in .* attention_input of layer 0"):
        pruned_by(runner, MAGNITUDE)


@pytest.mark.parametrize("loss", [np.nan, np.inf, 1e5])
def test_a_loss_that_has_no_perplexity_is_refused(loss):
    with pytest.raises(CalibrationError, match="model: the loss on the text is"):
        from_losses(Path("model"), np.zeros((2, 3), np.int32), np.array([1.0, 4 * loss]))
