"""What is said of memory and work before a model is pruned."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TEXT, printed_json, run
from tiny import config_dict, random_weights, write_folder, write_tiny

import prox24
from prox24 import basis
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs import memory
from prox24._jobs.forward import layer_linears, load_model
from prox24._jobs.memory import Setup
from prox24.errors import Prox24Error

WANDA = prox24.Recipe.wanda()


@pytest.fixture
def model(tmp_path):
    write_tiny(tmp_path / "model")
    return load_model(open_checkpoint(tmp_path / "model"))


def layer_memory(model, size=1, recipe=WANDA, *sharing, length=32):
    return memory.layer_memory(model, 0, (size, length), Setup(recipe, *sharing))


def changed(recipe=WANDA, **fields):
    return dataclasses.replace(recipe, **fields)


def test_memory_counts_weights_grams_and_the_micro_batch(model):
    one, four = (layer_memory(model, size) for size in (1, 4))
    tensors = model.checkpoint.tensors
    layer = [tensors[name].shape for name in tensors if name.startswith("model.layers.0.")]
    assert one.weights == sum(4 * int(np.prod(shape)) for shape in layer)
    hidden, width = config_dict()["hidden_size"], config_dict()["intermediate_size"]
    assert one.grams == 4 * (3 * hidden**2 + width**2)
    # The Grams, what compensates for their rounding, and the weights.
    assert one.gather > 2 * one.grams + one.weights
    assert four.gather >= one.gather + 3 * 32 * hidden * 4
    assert one.solve == four.solve > 2 * one.weights + one.grams
    # What stays dense has no Gram.
    skipped = layer_memory(model, 1, changed(skip="mlp"))
    assert (skipped.weights, skipped.grams) == (one.weights, 4 * 2 * hidden**2)
    assert layer_memory(model, 1, changed(only="no such name"))[1::2] == (0, 2 * one.weights)


def test_devices_divide_the_rows_of_weights_or_the_columns_of_grams(model):
    one, rows = (layer_memory(model, 1, WANDA, devices) for devices in (1, 2))
    columns = layer_memory(model, 1, WANDA, 2, True)
    assert rows.solve < one.solve
    assert columns.grams == one.grams // 2
    assert columns.gather < rows.gather
    assert columns.solve < rows.solve
    # By 7 none of the numbers of rows is divisible,
    assert layer_memory(model, 1, WANDA, 7).solve == one.solve
    # nor a width: devices have copies, and send one another tokens.
    copies = layer_memory(model, 1, WANDA, 7, True)
    assert (copies.grams, copies.solve) == (one.grams, one.solve)
    assert copies.gather > one.gather
    budget = max(columns.gather, columns.solve)
    assert memory.fitting_micro_batch(model, (8, 32), Setup(WANDA, 2, True), budget) == 2
    with pytest.raises(Prox24Error, match="memory is too small"):
        memory.fitting_micro_batch(model, (8, 32), Setup(WANDA, 2), budget)


def test_the_largest_micro_batch_that_fits_is_found(model):
    needed = {size: layer_memory(model, size, length=64).gather for size in (1, 3, 12)}
    for size, budget in needed.items():
        assert memory.fitting_micro_batch(model, (12, 64), Setup(WANDA), budget) == size
    with pytest.raises(Prox24Error, match="memory is too small: one window in layer 0"):
        memory.fitting_micro_batch(model, (12, 64), Setup(WANDA), needed[1] - 1)
    with pytest.raises(Prox24Error, match=r"memory is too small: solving model\.layers\.0\."):
        memory.fitting_micro_batch(model, (12, 64), Setup(WANDA), 10)


def test_pruned_weights_count_in_their_own_dtype(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    model = load_model(open_checkpoint(tmp_path / "model"))
    linears = sum(int(np.prod(linear.shape)) for linear in layer_linears(model.config, 0))
    wide, own = (layer_memory(model, 1, changed(dtype=dtype)) for dtype in ("float32", None))
    assert wide.solve - own.solve == 2 * linears


def test_learning_a_basis_counts_and_xla_needs_no_more(model):
    attention = changed(only="self_attn")
    turned = changed(attention, basis=prox24.HeadBasis())
    hidden = config_dict()["hidden_size"]
    copies = memory.TURNING * 4 * 2 * hidden**2
    with_basis, without = (layer_memory(model, recipe=r).solve for r in (turned, attention))
    assert without < with_basis <= without + copies
    skipped = (changed(recipe, skip="v_proj") for recipe in (turned, attention))
    assert len({layer_memory(model, recipe=recipe).solve for recipe in skipped}) == 1
    for heads, members, width, inputs in ((3, 3, 64, 576), (8, 1, 128, 1024)):
        places = basis.places_of(heads, width), basis.places_of(heads, width, members)
        queries = places[1].size
        shapes = (places[0].size, inputs), (inputs, queries)
        weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        grams = [jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (inputs, queries)]

        def learn(weights, grams, places=places):
            parts = [basis.Part(*each) for each in zip(weights, grams, (0, 1), places, strict=True)]
            return basis.learn(parts)

        needed = memory._needed(jax.jit(learn).lower(weights, grams))
        entries = sum(weight.size for weight in weights)
        # Beside weights and Grams, as the plan counts them.
        own = 4 * (entries + sum(gram.size for gram in grams))
        assert needed - own <= memory.TURNING * 4 * entries


def test_a_dense_model_alongside_and_a_training_count(model, standard_promotion):
    dense = changed(targets=prox24.DenseTargets())
    refining = changed(refine=prox24.BlockRefinement())
    plain, alongside, refined = (
        layer_memory(model, 1, recipe) for recipe in (WANDA, dense, refining)
    )
    training = memory.refining_memory(model, 0, (1, 32), refining, 1)
    # Cross-Grams, and what compensates for their rounding.
    assert alongside.gather >= plain.gather + 2 * plain.grams
    assert alongside.solve >= plain.solve + plain.grams
    assert memory.refining_memory(model, 0, (1, 32), WANDA, 1) == 0
    # The dense model runs alongside, without cross-Grams.
    assert plain.gather < refined.gather < alongside.gather
    # Dense, pruned, best, master, two moments and a gradient.
    assert training > 7 * plain.weights
    # A sum of gradients is there if a step has several micro-batches, as it has of 16 windows.
    parts, whole = (16, 32), (8, 32)
    assert memory.fitting_micro_batch(model, whole, Setup(refining), training) == 1
    for recipe, windows, needed in (
        (dense, parts, alongside.gather),
        (refining, parts, training + plain.weights),
    ):
        assert memory.fitting_micro_batch(model, windows, Setup(recipe), needed) == 1
        with pytest.raises(Prox24Error, match="one window in layer 0 takes"):
            memory.fitting_micro_batch(model, windows, Setup(recipe), needed - 1)


def test_operations_are_those_of_the_products(model):
    counted = memory.operations(model, 100, WANDA)
    tensors = model.checkpoint.tensors
    shapes = [tensors[name].shape for name in tensors if name.endswith("proj.weight")]
    assert counted["forward"] == 2 * 100 * sum(2 * out * width for out, width in shapes)
    hidden, width = config_dict()["hidden_size"], config_dict()["intermediate_size"]
    assert counted["grams"] == 100 * 2 * (2 * (3 * hidden**2 + width**2))
    # The dense layers run once more, and with dense targets there are cross-Grams.
    both = memory.operations(model, 100, changed(targets=prox24.DenseTargets()))
    assert both == {"forward": 1.5 * counted["forward"], "grams": 2 * counted["grams"]}
    refined = memory.operations(model, 100, changed(refine=prox24.BlockRefinement()))
    assert refined == {"forward": both["forward"], "grams": counted["grams"]}


def test_equal_layers_are_looked_at_once(tmp_path):
    write_tiny(tmp_path / "model", "qwen2")  # whose first layer has no window
    mixed = load_model(open_checkpoint(tmp_path / "model"))
    assert memory.distinct_layers(mixed) == [0, 1]
    config = config_dict(num_hidden_layers=5)
    write_folder(tmp_path / "equal", config, random_weights(config))
    assert memory.distinct_layers(load_model(open_checkpoint(tmp_path / "equal"))) == [0]


def test_the_command_says_what_pruning_takes(model, tmp_path, capsys):
    plan = ["plan", tmp_path / "model", "--method", "wanda"]
    plan += ["--samples", "16", "--sequence-length", "32"]
    planned = functools.partial(printed_json, capsys, *plan)
    said = planned("--memory", "1GB")
    assert said["fits"] is True
    assert said["peak_bytes"] == max(said["gather_bytes"], said["solve_bytes"])
    assert said["activation_bytes"] == 16 * 32 * 32 * 4
    tensors = model.checkpoint.tensors.values()
    sizes = [tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in tensors]
    assert said["checkpoint_bytes"] == sum(sizes)
    options = {"samples": 16, "sequence_length": 32, "memory": 10**9}
    assert prox24.plan(tmp_path / "model", WANDA, **options).to_dict() == said
    assert run(*plan, "--memory", "10KB", "--devices", "2") == 0
    printed = capsys.readouterr().out
    assert re.search(r"fits into 0.00 GB +. +no ", printed)
    assert "plan for 2 devices" in printed
    # The devices divide the windows, and the windows fit.
    four = layer_memory(model, 2, WANDA)
    budget = f"{max(four.gather, four.solve) / 1000 + 0.001:.3f}KB"
    rows = planned("--memory", budget, "--devices", "7")
    assert (rows["devices"], rows["micro_batch_windows"], rows["fits"]) == (4, 4, True)
    assert rows["fitting_micro_batch_windows"] == 2
    assert planned("--devices", str(10**12))["devices"] == 16
    columns = planned("--devices", "4", "--shard-grams")
    assert columns["layer_gram_bytes"] == rows["layer_gram_bytes"] / 4
    dense = planned("--devices", "4", "--targets", "dense")
    assert dense["activation_bytes"] == 2 * rows["activation_bytes"]
    assert dense["gather_bytes"] >= rows["gather_bytes"] + 2 * rows["layer_gram_bytes"]
    assert dense["operations"]["forward"] == 1.5 * rows["operations"]["forward"]


def test_a_budget_changes_the_micro_batch_and_not_the_masks(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    text = prox24.Text(tmp_path / "text.txt", samples=8, sequence_length=32)
    one = layer_memory(model)
    for name, budget in (("plain", None), ("small", max(one.gather, one.solve))):
        prox24.prune(tmp_path / "model", tmp_path / name, WANDA, calibration=text, memory=budget)
    manifest = json.loads((tmp_path / "small" / "prox24.json").read_text())
    assert manifest["micro_batch"] == 1
    plain, small = (open_checkpoint(tmp_path / name) for name in ("plain", "small"))
    for name in plain.tensors:
        np.testing.assert_array_equal(plain.read(name), small.read(name))
