"""`prox24 convert`, and what the other commands share with it."""

import argparse
import json

import numpy as np
import pytest
from tiny import assert_same, config_dict, load_folder, random_weights, write_folder, write_tiny

from prox24._cli.main import main
from prox24._cli.options import size as parse_size

TEXT = "Calibration text for a model that reads bytes. " * 60


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_to_flax_and_back(tmp_path, capsys):
    weights = write_tiny(tmp_path / "source", dtype="bfloat16")
    assert convert(tmp_path / "source", tmp_path / "flax", "--format", "flax") == 0
    assert "flax" in capsys.readouterr().out
    assert convert(tmp_path / "flax", tmp_path / "back", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        path.name for path in (tmp_path / "source").iterdir()
    }
    assert_same(load_folder(tmp_path / "back"), weights)


def test_json_names_what_was_left_out(tmp_path, capsys):
    config = config_dict()
    weights = random_weights(config)
    write_folder(tmp_path / "source", config, weights | {"model.position_ids": np.arange(4)})
    arguments = [tmp_path / "source", tmp_path / "out", "--format", "flax", "--json"]
    assert convert(*arguments) == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": str(tmp_path / "source"),
        "destination": str(tmp_path / "out"),
        "format": "flax",
        "tensors": len(weights),
        "left_out": ["model.position_ids"],
        "remark": "zeros are stored like other weights: no runtime skips them by itself",
    }
    assert convert(*arguments[:-1], "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "buffers left out" in printed
    assert "no runtime skips them" in printed


def test_dtype_and_shard_size(tmp_path):
    weights = write_tiny(tmp_path / "source")
    options = ["--dtype", "bfloat16", "--shard-size", "20KB", "--quiet"]
    assert convert(tmp_path / "source", tmp_path / "out", *options) == 0
    read = load_folder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert read.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(read[name], values.astype(read[name].dtype))
        assert read[name].dtype.name == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config


def no_flax_class(folder):
    write_folder(folder / "qwen", config := config_dict("qwen2"), random_weights(config))
    return [folder / "qwen", folder / "out", "--format", "flax"], "no Flax class"


def existing_destination(folder):
    (folder / "out").mkdir()
    return [folder / "source", folder / "out"], "--overwrite"


def not_cached(folder):
    return ["owner/name", folder / "out"], "owner/name is no folder or .gguf file"


def pickle_that_runs_code(folder):
    (folder / "source" / "model.safetensors").unlink()
    program = b"cos\nsystem\n(S'true'\ntR."
    (folder / "source" / "pytorch_model.bin").write_bytes(program)
    return [folder / "source", folder / "out"], "it names os.system"


@pytest.mark.parametrize(
    "make", [no_flax_class, existing_destination, not_cached, pickle_that_runs_code]
)
def test_an_error_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, monkeypatch, make):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_tiny(tmp_path / "source")
    arguments, named = make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert convert(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("prox24: error: ")
    assert named in printed.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_prune_writes_shards_and_says_how_in_the_model_card(tmp_path):
    write_tiny(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("# Tiny\n")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--calibration", str(tmp_path / "text.txt"), "--sequence-length", "32"]
    options += ["--samples", "8", "--shard-size", "20KB", "--method", "wanda", "--quiet"]
    assert main(["prune", str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 0
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# Tiny\n\n## Pruning\n")
    assert "were pruned by prox24 0." in card
    assert "Calibration: 8 windows of 32 tokens from text.txt.\n" in card
    assert '"name": "Wanda"' in card


@pytest.mark.parametrize(
    ("text", "size"),
    [("500 MB", 5 * 10**8), ("1.5MiB", 3 * 2**19)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "0GB", "-1GB", "5TB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)
