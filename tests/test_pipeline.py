import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prox24.pipeline import collect, prune
from safetensors.numpy import load_file
from tiny import (
    byte_tokenizer,
    config_dict,
    random_weights,
    seen_by_linears,
    tokens,
    write_folder,
    write_tiny,
)

from prox24 import pipeline
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.checkpoints.writer import write_checkpoint
from prox24.cli.main import main
from prox24.core.masks import is_sparse, top_mask
from prox24.errors import CalibrationError, CheckpointError, SolverError
from prox24.jobs.forward import all_linears, batch_size, load_model
from prox24.jobs.perplexity import from_losses
from prox24.jobs.text import first_windows, spread_windows, start_tokens, tokenize
from prox24.solvers.problem import Candidate
from prox24.solvers.proximal import ProximalGradient
from prox24.solvers.refit import ConjugateGradients
from prox24.solvers.scores import Magnitude, Wanda
from prox24.solvers.solve import SOLVERS, solve_program
from prox24.solvers.sparsegpt import SparseGPT

WINDOWS = tokens(batch=8, length=32)


def prune_folder(folder, solver, refit=None, **options):
    return collect(prune(open_checkpoint(folder), WINDOWS, solver, refit, **options))


@pytest.mark.parametrize("method", SOLVERS)
def test_every_linear_is_sparse_and_nothing_else_changes(tmp_path, method):
    weights = write_tiny(tmp_path / "source", "grouped_heads", shards=2)
    checkpoint = open_checkpoint(tmp_path / "source")
    pruned = collect(prune(checkpoint, WINDOWS, SOLVERS[method](), None))
    names = [linear.tensor for linear in all_linears(load_model(checkpoint).config)]
    assert list(pruned.tensors) == names == [report.name for report in pruned.reports]
    write_checkpoint(checkpoint, tmp_path / "out", pruned.tensors.items())
    written = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(shard)
    for name, values in weights.items():
        if name in names:
            assert is_sparse(jnp.asarray(written[name]))
            assert np.count_nonzero(written[name]) == values.size // 2
        else:
            assert written[name].tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_see_the_weights_before_them_as_they_are_written(tmp_path, monkeypatch, dtype):
    write_tiny(tmp_path / "source", dtype="bfloat16")
    seen = []

    def run_in_place(model, index, weights, hidden):
        seen.append(weights)
        pipeline_run_in_place(model, index, weights, hidden)

    pipeline_run_in_place = pipeline.run_in_place
    monkeypatch.setattr(pipeline, "run_in_place", run_in_place)
    pruned = prune_folder(tmp_path / "source", Wanda(), ConjugateGradients(), dtype=np.dtype(dtype))
    for name, values in pruned.tensors.items():
        index, weight = name.removeprefix("model.layers.").split(".", 1)
        np.testing.assert_array_equal(seen[int(index)][weight], values.astype(dtype))


def relative_losses_by_hand(weights, pruned, config_json, layer_index):
    """The losses of one layer's linears, with every layer before it pruned and itself dense."""
    before = {n: w for n, w in pruned.items() if int(n.split(".")[2]) < layer_index}
    losses = {}
    inputs = seen_by_linears(config_json, weights | before, WINDOWS, layer_index)
    for name, x in inputs.items():
        change = (pruned[name].astype(np.float64) - weights[name]) @ x.T
        losses[name] = np.sum(change**2) / np.sum((weights[name] @ x.T) ** 2)
    return losses


@pytest.mark.parametrize("solver", [Wanda(), ProximalGradient()])
def test_each_layer_is_calibrated_on_the_output_of_the_pruned_ones(tmp_path, solver):
    weights = write_tiny(tmp_path / "source")
    pruned = prune_folder(tmp_path / "source", solver, ConjugateGradients())
    reported = {report.name: report.statistics.relative_loss for report in pruned.reports}
    for index in range(2):
        expected = relative_losses_by_hand(weights, pruned.tensors, config_dict(), index)
        for name, loss in expected.items():
            assert reported[name] == pytest.approx(loss, rel=1e-3), name


def test_the_default_with_refit_has_the_lowest_losses(tmp_path):
    write_tiny(tmp_path / "source")
    mean = {
        method: np.mean(
            [
                report.statistics.relative_loss
                for report in prune_folder(
                    tmp_path / "source", SOLVERS[method](), ConjugateGradients()
                ).reports
            ]
        )
        for method in SOLVERS
    }
    assert sorted(mean, key=mean.get)[:2] == ["admm", "prox"]


def test_a_width_that_the_pattern_does_not_divide_is_named(tmp_path):
    write_tiny(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight.*32.*by 5"):
        prune_folder(tmp_path / "source", Magnitude(), pattern=(2, 5))


def test_a_pattern_that_prox_cannot_do_says_what_can(tmp_path):
    write_tiny(tmp_path / "source")
    with pytest.raises(ValueError, match=r"supports 1:M and 2:M, not 4:8.*sparsegpt"):
        prune_folder(tmp_path / "source", ProximalGradient(), pattern=(4, 8))


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT()])
def test_baselines_do_other_patterns(tmp_path, solver):
    write_tiny(tmp_path / "source")
    pruned = prune_folder(tmp_path / "source", solver, ConjugateGradients(), pattern=(4, 8))
    assert all(is_sparse(jnp.asarray(w), (4, 8)) for w in pruned.tensors.values())
    assert {report.sparsity for report in pruned.reports} == {0.5}


def test_activations_that_are_not_finite_are_named(tmp_path):
    weights = random_weights(config_dict())
    weights["model.layers.1.input_layernorm.weight"][:] = 3e38
    write_folder(tmp_path / "source", config_dict(), weights)
    with pytest.raises(CalibrationError, match="attention_input of layer 1"):
        prune_folder(tmp_path / "source", Magnitude())


def test_one_window_that_is_not_finite_is_enough_to_be_named(tmp_path, capsys):
    config = config_dict("gemma")  # which scales its embeddings
    weights = random_weights(config)
    (token,) = byte_tokenizer()("~")["input_ids"]
    weights["model.embed_tokens.weight"][token] = 3e38
    write_folder(tmp_path / "source", config, weights)
    text = "Calibration text for a model that reads bytes. " * 20
    (tmp_path / "text.txt").write_text("~" + text)
    command = ["prune", tmp_path / "source", tmp_path / "out", "--method", "magnitude", "--quiet"]
    command += ["--calibration", tmp_path / "text.txt", "--sequence-length", "32"]
    assert main([*map(str, command), "--samples", "28"]) == 2
    printed = capsys.readouterr().err
    assert "NaN or Inf in the activations attention_input of layer 0" in printed
    assert printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_fewer_tokens_than_features_need_damping(tmp_path):
    write_tiny(tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    pruned = collect(prune(checkpoint, tokens(1, 8), ProximalGradient(), ConjugateGradients()))
    assert all(np.isfinite(values).all() for values in pruned.tensors.values())
    assert all(report.statistics.damping > 0 for report in pruned.reports)
    assert not any(report.statistics.damping_raised for report in pruned.reports)
    raised = collect(prune(checkpoint, tokens(1, 8), SparseGPT(), None, damping=0.0))
    assert all(
        report.statistics.damping_raised and report.statistics.damping > 0
        for report in raised.reports
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken:
    def __call__(self, problem, pattern, damping):
        mask = jnp.ones(problem.weight.shape, bool)
        return Candidate.of(jnp.nan * problem.weight, mask, damping)


def test_a_solution_that_is_not_finite_is_named(tmp_path):
    write_tiny(tmp_path / "source")
    with pytest.raises(SolverError, match=r"layers\.0\.self_attn\.q_proj.*--damping"):
        prune_folder(tmp_path / "source", Broken())


# Targets


def test_an_infinite_pull_to_the_dense_weight_is_no_correction(tmp_path):
    write_tiny(tmp_path / "source")
    pruned = prune_folder(tmp_path / "source", Wanda(), ConjugateGradients())
    pulled = prune_folder(tmp_path / "source", Wanda(), ConjugateGradients(), pull=1e9)
    for name, values in pruned.tensors.items():
        np.testing.assert_allclose(pulled.tensors[name], values, rtol=0, atol=1e-4)


def output_errors(weights, tensors, index):
    """|W X' - W0 X|^2 of the linears that read the input of a layer, behind the pruned ones."""
    dense, pruned = (
        seen_by_linears(config_dict(), source, WINDOWS, index)
        for source in (weights, weights | tensors)
    )
    names = [f"model.layers.{index}.self_attn.{part}_proj.weight" for part in "qkv"]
    return [np.sum((pruned[n] @ tensors[n].T - dense[n] @ weights[n].T) ** 2) for n in names]


def test_dense_targets_lower_the_error_against_the_dense_model(tmp_path):
    weights = write_tiny(tmp_path / "source")
    refit = ConjugateGradients(100, 0.0)
    own = prune_folder(tmp_path / "source", Magnitude(), refit)
    dense = prune_folder(tmp_path / "source", Magnitude(), refit, pull=0.003)
    first_layer = [name for name in own.tensors if "layers.0." in name]
    for name in first_layer:
        np.testing.assert_allclose(dense.tensors[name], own.tensors[name], rtol=0, atol=1e-4)
    for corrected, plain in zip(
        output_errors(weights, dense.tensors, 1),
        output_errors(weights, own.tensors, 1),
        strict=True,
    ):
        assert corrected < 0.95 * plain


@pytest.mark.parametrize("pull", [None, 1.0], ids=["pruned", "dense"])
@pytest.mark.parametrize("method", SOLVERS)
def test_a_model_compiles_its_solver_once_for_each_shape(tmp_path, method, pull):
    write_tiny(tmp_path / "source")
    model = load_model(open_checkpoint(tmp_path / "source"))
    shapes = {linear.shape for linear in all_linears(model.config)}
    solve_program.clear_cache()
    prune_folder(tmp_path / "source", SOLVERS[method](), ConjugateGradients(), pull=pull)
    assert solve_program._cache_size() == len(shapes)


def test_dead_input_features_are_reported(tmp_path):
    weights = random_weights(config_dict())
    weights["model.layers.0.input_layernorm.weight"][[1, 5, 6]] = 0
    write_folder(tmp_path / "source", config_dict(), weights)
    pruned = prune_folder(tmp_path / "source", ProximalGradient(), ConjugateGradients())
    dead = {report.name: report.statistics.dead_features for report in pruned.reports}
    for name, count in dead.items():
        reads_dead_features = name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        assert count == (3 if "layers.0" in name and reads_dead_features else 0)


def test_a_linear_is_given_out_before_the_next_layer_is_read(tmp_path):
    write_tiny(tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    read = []

    def recording(name, source):
        return source._replace(read=lambda: (read.append(name), source.read())[1])

    tensors = {name: recording(name, source) for name, source in checkpoint.tensors.items()}
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    for linear in prune(checkpoint, WINDOWS, Magnitude(), None):
        own = linear.report.name.split(".")[2]
        assert {name.split(".")[2] for name in read if "layers" in name} <= {"0", own}
    assert not any("lm_head" in name for name in read)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    write_tiny(tmp_path / "source")
    first = prune_folder(tmp_path / "source", ProximalGradient(), ConjugateGradients())
    second = prune_folder(tmp_path / "source", ProximalGradient(), ConjugateGradients())
    for name, values in first.tensors.items():
        assert values.tobytes() == second.tensors[name].tobytes()


def test_ids_without_an_embedding_are_refused():
    assert tokenize(byte_tokenizer(), "abc", 260).max() < 260
    with pytest.raises(CalibrationError, match=r"gives id \d+ but the model has 50 embeddings"):
        tokenize(byte_tokenizer(), "abc", 50)


@pytest.mark.parametrize("loss", [np.nan, np.inf, 1e5])
def test_a_loss_that_has_no_perplexity_is_refused(loss):
    with pytest.raises(CalibrationError, match="model: the loss on the text is"):
        from_losses(Path("model"), np.zeros((2, 3), np.int32), np.array([1.0, 4 * loss]))


def test_windows_do_not_overlap_and_say_what_is_missing():
    ids = np.arange(103, dtype=np.int32)
    assert first_windows(ids, None, 10).shape == (10, 10)
    spread = spread_windows(ids, 4, 10)
    assert spread[:, 0].tolist() == [0, 30, 60, 90]
    for windows in (first_windows, spread_windows):
        with pytest.raises(CalibrationError, match=r"103 tokens, but 11 windows of 10 need 110"):
            windows(ids, 11, 10)
    with pytest.raises(CalibrationError, match="1 windows of 200 need 200"):
        first_windows(ids, None, 200)
    with pytest.raises(CalibrationError, match="4 windows of 200 need 800"):
        spread_windows(ids, 4, 200)


def test_every_window_begins_with_the_start_tokens_and_none_of_the_text_is_lost():
    ids = np.arange(103, dtype=np.int32)
    windows = first_windows(ids, None, 10, [7, 8])
    assert windows.shape == (12, 10)
    assert np.all(windows[:, :2] == [7, 8])
    assert windows[:, 2:].ravel().tolist() == list(range(96))
    assert np.array_equal(spread_windows(ids, 12, 10, [7, 8]), windows)
    with pytest.raises(CalibrationError, match="windows of 2 have no room beside 2 start tokens"):
        first_windows(ids, 1, 2, [7, 8])


def test_a_tokenizer_whose_start_cannot_be_told_apart_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 9] if add_special_tokens else [8]}

    with pytest.raises(CalibrationError, match=r"encodes 'a' as \[8\], and as \[1, 9\]"):
        start_tokens(tokenizer, 16)


def test_micro_batches_divide_the_windows():
    for windows in range(1, 40):
        for length in (2, 512, 4096):
            size = batch_size(windows, length)
            assert windows % size == 0
            assert size == 1 or size * length <= 2048


@pytest.mark.parametrize("size", [3, 16])
def test_micro_batches_that_do_not_divide_the_windows_are_refused(tmp_path, size):
    write_tiny(tmp_path / "source")
    with pytest.raises(ValueError, match=f"micro-batches of {size} do not divide 8 windows"):
        prune_folder(tmp_path / "source", Magnitude(), micro_batch=size)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_reported(tmp_path):
    config = config_dict("mixtral")
    weights = random_weights(config)
    for index in range(2):
        router = weights[f"model.layers.{index}.block_sparse_moe.gate.weight"]
        # Of the two largest of a, -a, 0, 0 the last is never one.
        router[1], router[2:] = -router[0], 0
    write_folder(tmp_path / "source", config, weights)
    pruned = prune_folder(tmp_path / "source", Wanda())
    tokens_seen = {report.name: report.tokens for report in pruned.reports}
    for expert, unused in ((0, False), (1, False), (2, False), (3, True)):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        assert (tokens_seen[name] == 0) == unused
    expected = magnitude_pruned(weights[name])
    np.testing.assert_array_equal(pruned.tensors[name], expected)
    assert tokens_seen["model.layers.1.self_attn.q_proj.weight"] == WINDOWS.size


def magnitude_pruned(weight):
    return np.asarray(jnp.where(top_mask(jnp.abs(jnp.asarray(weight))), weight, 0))
