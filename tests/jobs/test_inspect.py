"""What `prox24 inspect` says of a checkpoint without looking at a single weight."""

import math

import numpy as np
import pytest
from commands import printed_json, run
from safetensors.numpy import save_file
from tiny import config_dict, random_weights, write_folder, write_tiny

from prox24._core.pattern import Pattern, Unstructured
from prox24._jobs.inspect import inspect_model, sparse_bytes
from prox24._jobs.output import table
from prox24._pruning.recipe import Recipe


def test_the_listing_adds_up(tmp_path, capsys):
    weights = write_tiny(tmp_path / "model", "biases", dtype="bfloat16")
    printed = printed_json(capsys, "inspect", tmp_path / "model")
    assert printed["model_type"] == "llama"
    assert printed["parameters"] == sum(values.size for values in weights.values())
    assert printed["bytes"] == 2 * printed["parameters"]
    pruned = [entry for entry in printed["tensors"] if entry["decision"] == "pruned"]
    assert {entry["name"] for entry in pruned} == {
        name for name in weights if name.endswith("_proj.weight")
    }
    # In bfloat16 a block of 8 bytes becomes two values and four bits.
    saved = sum(entry["size"] for entry in pruned) * 7 / 16
    assert printed["bytes"] - printed["sparse_bytes"] == saved


def test_config_json_alone_gives_the_listing_of_the_whole_model(tmp_path, capsys):
    write_tiny(tmp_path / "model", "gpt2", dtype="bfloat16")
    whole = printed_json(capsys, "inspect", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    found = printed_json(capsys, "inspect", tmp_path / "model")
    assert (whole.pop("described_by"), found.pop("described_by")) == (None, "config.json")
    listed, expected = (sorted(each.pop("tensors"), key=str) for each in (found, whole))
    assert listed == expected
    assert found == whole
    assert run("inspect", tmp_path / "model") == 0
    assert "no weights, described by" in capsys.readouterr().out


def test_every_decision_has_its_reason(tmp_path):
    config = config_dict("mixtral", intermediate_size=46)
    weights = random_weights(config) | {"buffer": np.zeros(3, np.float32)}
    write_folder(tmp_path / "model", config, weights)
    found = inspect_model(tmp_path / "model", Recipe(skip="v_proj"))
    decisions = {entry.name: entry.decision for entry in found.tensors}
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": "dense: embedding",
        "lm_head.weight": "dense: head",
        "model.norm.weight": "dense: norm",
        f"{layer}input_layernorm.weight": "dense: norm",
        f"{layer}self_attn.q_proj.weight": "pruned",
        f"{layer}self_attn.v_proj.weight": "dense: by the recipe",
        f"{layer}block_sparse_moe.gate.weight": "dense: router",
        f"{layer}block_sparse_moe.experts.3.w1.weight": "pruned",
        f"{layer}block_sparse_moe.experts.3.w2.weight": "refused: width 46 does not fit 2:4",
        "buffer": "dense: not used by the computation",
    }
    assert {name: decisions[name] for name in expected} == expected


def test_a_long_path_does_not_cut_the_names_beside_it():
    name = "cut to the pattern at the last step"
    lines = table(["written", "/" + "folder/" * 40], [[name, "none"]]).splitlines()
    assert {len(line) for line in lines} == {120}
    assert any(name in line and "none" in line for line in lines)


def test_a_narrow_table_cuts_nothing(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    cells = ["model.layers.0.mlp.up_proj.weight", "1,234,567", "bfloat16", "dense: by the recipe"]
    printed = table(["tensors", "shape", "dtype", "decision"], [cells])
    assert max(map(len, printed.splitlines())) <= 40
    assert "…" not in printed
    for char in "".join(cells).replace(" ", ""):
        assert printed.count(char) >= "".join(cells).count(char)


def test_tables_are_for_people_and_list_tensors_of_unknown_dtypes(tmp_path, capsys):
    weights = write_tiny(tmp_path / "model")
    extra = {"model.scale": np.zeros(4, np.complex64)}
    save_file(weights | extra, tmp_path / "model" / "model.safetensors")
    assert run("inspect", tmp_path / "model") == 0
    printed = capsys.readouterr().out
    for said in ("model.scale", "model.layers.*.self_attn.q_proj.weight", "32 x 32"):
        assert said in printed
    assert run("inspect", tmp_path / "model", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_linears_stored_the_other_way_are_pruned_along_their_input(tmp_path):
    write_tiny(tmp_path / "model", "gpt2")
    found = inspect_model(tmp_path / "model", Recipe(pattern=(2, 32)))
    pruned = {entry.name: entry.shape for entry in found.tensors if entry.decision == "pruned"}
    # The output projection of the MLP has 48 inputs, of which 32 is no divisor.
    assert pruned["transformer.h.0.attn.c_attn.weight"] == (32, 96)
    assert "transformer.h.0.mlp.c_proj.weight" not in pruned


@pytest.mark.parametrize(
    ("pattern", "width", "share"),
    [
        (Pattern(2, 4), 2, 9 / 16),
        (Pattern(1, 4), 4, 17 / 64),
        (Unstructured(0.5), 2, 9 / 16),
        (Pattern(2, 4, 2), 2, 17 / 32),
    ],
)
def test_sizes_without_zeros(pattern, width, share):
    assert sparse_bytes(1024 * width, width, pattern) == math.ceil(1024 * width * share)
