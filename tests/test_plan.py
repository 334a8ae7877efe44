"""What is said of memory and work before a model is pruned."""

import json
import re

import jax
import numpy as np
import pytest
from tiny import config_dict, random_weights, write_folder, write_tiny

from prox24 import plan
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.main import main
from prox24.errors import Prox24Error
from prox24.jobs.forward import layer_linears, load_model
from prox24.refine import BlockRefinement
from prox24.solvers.solve import SparseGPT, Wanda

WANDA = plan.Method(Wanda(), None)
TEXT = "Calibration text for a model that reads bytes. " * 60


@pytest.fixture
def model(tmp_path):
    write_tiny(tmp_path / "model")
    return load_model(open_checkpoint(tmp_path / "model"))


def test_memory_counts_weights_grams_and_the_micro_batch(model):
    one, four = (plan.layer_memory(model, 0, (n, 32), WANDA) for n in (1, 4))
    shapes = {
        name: tensor.shape
        for name, tensor in model.checkpoint.tensors.items()
        if name.startswith("model.layers.0.")
    }
    assert one.weights == sum(4 * int(np.prod(shape)) for shape in shapes.values())
    config = config_dict()
    hidden, width = config["hidden_size"], config["intermediate_size"]
    assert one.grams == 4 * (3 * hidden**2 + width**2)
    # The Grams, what compensates for their rounding, and the weights.
    assert one.gather > 2 * one.grams + one.weights
    assert four.gather >= one.gather + 3 * 32 * hidden * 4
    assert one.solve == four.solve > 2 * one.weights + one.grams


def test_rows_of_a_weight_are_divided_among_devices(model):
    one, two = (plan.layer_memory(model, 0, (1, 32), WANDA, n) for n in (1, 2))
    assert two.solve < one.solve
    # Which none of the numbers of rows is divisible by.
    assert plan.layer_memory(model, 0, (1, 32), WANDA, 7).solve == one.solve


def test_columns_of_grams_are_divided_among_devices(model):
    method = WANDA._replace(shard_grams=True)
    one, rows = (plan.layer_memory(model, 0, (1, 32), WANDA, n) for n in (1, 2))
    columns = plan.layer_memory(model, 0, (1, 32), method, 2)
    assert columns.grams == one.grams // 2
    assert columns.gather < rows.gather
    assert columns.solve < rows.solve
    # Which neither of the widths is divisible by: devices have copies, and send one another tokens.
    copies = plan.layer_memory(model, 0, (1, 32), method, 7)
    assert (copies.grams, copies.solve) == (one.grams, one.solve)
    assert copies.gather > one.gather
    budget = max(columns.gather, columns.solve)
    assert plan.fitting_micro_batch(model, (8, 32), method, budget, devices=2) == 2
    with pytest.raises(Prox24Error, match="--memory is too small"):
        plan.fitting_micro_batch(model, (8, 32), WANDA, budget, devices=2)


def test_the_largest_micro_batch_that_fits_is_found(model):
    sizes = (1, 2, 3, 4, 6, 12)
    needed = {n: plan.layer_memory(model, 0, (n, 64), WANDA).gather for n in sizes}
    for size in (1, 3, 12):
        budget = needed[size]
        assert plan.fitting_micro_batch(model, (12, 64), WANDA, budget) == size
    with pytest.raises(Prox24Error, match="--memory is too small: one window in layer 0"):
        plan.fitting_micro_batch(model, (12, 64), WANDA, needed[1] - 1)
    with pytest.raises(Prox24Error, match=r"--memory is too small: solving model\.layers\.0\."):
        plan.fitting_micro_batch(model, (12, 64), WANDA, 10)


def test_pruned_weights_count_in_their_own_dtype(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    model = load_model(open_checkpoint(tmp_path / "model"))
    linears = sum(int(np.prod(linear.shape)) for linear in layer_linears(model.config, 0))
    wide = WANDA._replace(dtype=np.dtype(np.float32))
    both = [plan.layer_memory(model, 0, (1, 32), method).solve for method in (wide, WANDA)]
    assert both[0] - both[1] == 2 * linears


@pytest.fixture
def standard_promotion():
    """Optax's optimizers mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_dense_model_alongside_and_a_training_count(model, standard_promotion):
    refining = WANDA._replace(refinement=BlockRefinement())
    plain, alongside, refined = (
        plan.layer_memory(model, 0, (1, 32), method)
        for method in (WANDA, WANDA._replace(dense_targets=True), refining)
    )
    training = plan.refining_memory(model, 0, (1, 32), refining, 1)
    # Cross-Grams, and what compensates for their rounding.
    assert alongside.gather >= plain.gather + 2 * plain.grams
    assert alongside.solve >= plain.solve + plain.grams
    assert plan.refining_memory(model, 0, (1, 32), WANDA, 1) == 0
    assert refined.gather == plain.gather
    # Dense, pruned, best, master, two moments and a gradient.
    assert training > 7 * plain.weights
    # A sum of gradients is there if a step has several micro-batches, as it has of 16 windows.
    parts, whole = (16, 32), (8, 32)
    assert plan.fitting_micro_batch(model, whole, refining, training) == 1
    for method, windows, needed in (
        (WANDA._replace(dense_targets=True), parts, alongside.gather),
        (refining, parts, training + plain.weights),
    ):
        assert plan.fitting_micro_batch(model, windows, method, needed) == 1
        with pytest.raises(Prox24Error, match="one window in layer 0 takes"):
            plan.fitting_micro_batch(model, windows, method, needed - 1)


def test_a_width_that_does_not_fit_the_pattern_is_named(tmp_path, capsys):
    write_tiny(tmp_path / "model")
    command = ["plan", str(tmp_path / "model"), "--method", "wanda", "--pattern", "2:5"]
    assert main(command) == 2
    assert "q_proj.weight has input width 32, not divisible by 5" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "prune"])
@pytest.mark.parametrize("method", [["sparsegpt"], ["admm", "--refit", "exact"], ["prox"]])
def test_methods_that_need_whole_grams_do_not_share_their_columns(
    model, tmp_path, capsys, command, method
):
    places = [str(tmp_path / "model"), *[str(tmp_path / "pruned")] * (command == "prune")]
    assert main([command, *places, "--shard-grams", "--method", "wanda"]) == 2
    assert "--shard-grams is for several devices" in capsys.readouterr().err
    assert main([command, *places, "--shard-grams", "--method", *method]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the whole Gram on every device: only magnitude, wanda and admm" in line


def test_operations_are_those_of_the_products(model):
    counted = plan.operations(model, 100, plan.SolverCost(factor=3, steps=7))
    shapes = [
        tensor.shape
        for name, tensor in model.checkpoint.tensors.items()
        if name.endswith("proj.weight")
    ]
    assert counted.forward == 2 * 100 * sum(2 * out * width for out, width in shapes)
    assert counted.factor == 3 * sum(2 * width**3 for _, width in shapes)
    assert counted.solve == 7 * sum(2 * out * width**2 for out, width in shapes)
    hidden, width = config_dict()["hidden_size"], config_dict()["intermediate_size"]
    assert counted.grams == 100 * 2 * (2 * (3 * hidden**2 + width**2))
    # With dense targets a second model runs.
    both = plan.operations(model, 100, plan.SolverCost(factor=3, steps=7), streams=2)
    twice = {"forward": 2 * counted.forward, "grams": 2 * counted.grams}
    assert both._asdict() == counted._asdict() | twice
    # Every device factors by itself what all of them share otherwise.
    one, eight = (counted.seconds(1e6, devices) for devices in (1, 8))
    assert one == {name: count / 1e6 for name, count in counted._asdict().items()}
    assert eight == {name: taken / (1 if name == "factor" else 8) for name, taken in one.items()}
    # But where they share the columns of a Gram.
    assert counted.seconds(1e6, 8, shard_grams=True) == {n: t / 8 for n, t in one.items()}


def test_equal_layers_are_looked_at_once(tmp_path):
    write_tiny(tmp_path / "model", "qwen2")  # whose first layer has no window
    mixed = load_model(open_checkpoint(tmp_path / "model"))
    assert plan.distinct_layers(mixed) == [0, 1]
    config = config_dict(num_hidden_layers=5)
    write_folder(tmp_path / "equal", config, random_weights(config))
    assert plan.distinct_layers(load_model(open_checkpoint(tmp_path / "equal"))) == [0]


def test_measured_rates_are_positive():
    assert plan.product_rate(size=64, repetitions=1) > 0
    # Also with a pattern that does not divide the width.
    assert sum(plan.solver_cost(plan.Method(SparseGPT(), None, (1, 3)), width=64)) > 0


def test_dense_targets_cost_an_inverse_and_two_products(monkeypatch):
    seconds = iter([2.0, 20.0, 8.0] * 2)  # of a product, all rows and a quarter of them
    monkeypatch.setattr(plan, "_median_seconds", lambda run, repetitions: next(seconds))
    assert plan.solver_cost(WANDA, width=64) == (2.0, 8.0)
    assert plan.solver_cost(WANDA._replace(dense_targets=True), width=64) == (3.0, 10.0)


def test_a_plan_has_the_targets_that_pruning_has(model, tmp_path, capsys):
    arguments = ["plan", str(tmp_path / "model"), "--rate", "1e9", "--json"]

    def activations(*choices):
        assert main([*arguments, *choices]) == 0
        return json.loads(capsys.readouterr().out)["activation_bytes"]

    own = activations("--targets", "pruned")
    assert activations() == activations("--method", "prox") == 2 * own
    assert activations("--method", "sparsegpt") == own


def test_the_command_says_what_pruning_takes(model, tmp_path, capsys):
    arguments = ["plan", str(tmp_path / "model"), "--method", "wanda", "--rate", "1e9"]
    arguments += ["--samples", "16", "--sequence-length", "32"]
    assert main([*arguments, "--json", "--memory", "1GB"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["peak_bytes"] == max(said["gather_bytes"], said["solve_bytes"])
    assert said["activation_bytes"] == 16 * 32 * 32 * 4
    assert said["checkpoint_bytes"] == sum(
        tensor.dtype.itemsize * int(np.prod(tensor.shape))
        for tensor in model.checkpoint.tensors.values()
    )
    assert said["hours"]["forward"] == pytest.approx(said["operations"]["forward"] / 1e9 / 3600)
    assert main([*arguments, "--memory", "10KB", "--devices", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fits into 0.000 GB +. +no ", printed)
    assert "plan for 2 devices" in printed
    # As many devices as divide the windows, and windows as many as fit.
    four = plan.layer_memory(model, 0, (2, 32), WANDA)
    budget = f"{max(four.gather, four.solve) / 1000 + 0.001:.3f}KB"
    assert main([*arguments, "--json", "--memory", budget, "--devices", "7"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["devices"], said["micro_batch_windows"], said["fits"]) == (4, 4, True)
    assert said["fitting_micro_batch_windows"] == 2
    rows = said
    assert main([*arguments, "--json", "--devices", str(10**12)]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 16
    assert main([*arguments, "--json", "--devices", "4", "--shard-grams"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layer_gram_bytes"] == rows["layer_gram_bytes"] / 4
    assert said["hours"]["factor"] == pytest.approx(said["operations"]["factor"] / 4e9 / 3600)
    assert main([*arguments, "--json", "--devices", "4", "--targets", "dense"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["activation_bytes"] == 2 * rows["activation_bytes"]
    assert said["gather_bytes"] >= rows["gather_bytes"] + 2 * rows["layer_gram_bytes"]
    assert said["operations"]["forward"] == 2 * rows["operations"]["forward"]


def test_a_budget_changes_the_micro_batch_and_not_the_masks(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--calibration", tmp_path / "text.txt", "--sequence-length", "32", "--samples", "8"]
    one = plan.layer_memory(model, 0, (1, 32), WANDA)
    budget = f"{max(one.gather, one.solve) / 1000 + 0.001:.3f}KB"
    command = ["prune", tmp_path / "model", "--method", "wanda", "--quiet", *options]
    for name, more in (("plain", []), ("small", ["--memory", budget])):
        every = [*command[:2], tmp_path / name, *command[2:], *more]
        assert main([str(argument) for argument in every]) == 0
    manifest = json.loads((tmp_path / "small" / "prox24.json").read_text())
    assert manifest["micro_batch"] == 1
    plain, small = (open_checkpoint(tmp_path / name) for name in ("plain", "small"))
    for name in plain.tensors:
        np.testing.assert_allclose(plain.read(name), small.read(name), rtol=1e-5, atol=1e-6)
