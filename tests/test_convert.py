"""`prox24 convert`, and what the other commands share with it."""

import argparse
import json

import numpy as np
import pytest
from commands import calibrated, files, printed_json, run, write_workspace
from tiny import assert_same, config_dict, load_folder, random_weights, write_folder, write_tiny

from prox24._cli.options import size as parse_size


def test_to_flax_and_back_and_what_was_left_out(tmp_path, capsys):
    weights = random_weights(config_dict())
    write_folder(tmp_path / "source", config_dict(), weights | {"model.position_ids": np.arange(4)})
    convert = ["convert", tmp_path / "source", tmp_path / "flax", "--format", "flax"]
    assert printed_json(capsys, *convert) == {
        "source": str(tmp_path / "source"),
        "destination": str(tmp_path / "flax"),
        "format": "flax",
        "tensors": len(weights),
        "left_out": ["model.position_ids"],
        "remark": "zeros are stored like other weights: no runtime skips them by itself",
    }
    assert run(*convert, "--overwrite") == 0
    printed = capsys.readouterr().out
    for said in ("flax", "buffers left out", "no runtime skips them"):
        assert said in printed
    assert run("convert", tmp_path / "flax", tmp_path / "back", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert files(tmp_path / "back") == files(tmp_path / "source")
    assert_same(load_folder(tmp_path / "back"), weights)


def test_dtype_and_shard_size(tmp_path):
    weights = write_tiny(tmp_path / "source")
    options = ["--dtype", "bfloat16", "--shard-size", "20KB", "--quiet"]
    assert run("convert", tmp_path / "source", tmp_path / "out", *options) == 0
    read = load_folder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert read.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(read[name], values.astype(read[name].dtype))
        assert read[name].dtype.name == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config


def test_prune_writes_shards_and_says_how_in_the_model_card(tmp_path):
    write_workspace(tmp_path)
    (tmp_path / "model" / "README.md").write_text("# Tiny\n")
    options = ["--shard-size", "20KB", "--method", "wanda", "--quiet", *calibrated(tmp_path)]
    assert run("prune", tmp_path / "model", tmp_path / "out", *options) == 0
    assert run("verify", tmp_path / "out", "--quiet") == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# Tiny\n\n## Pruning\n")
    assert "were pruned by prox24 0." in card
    assert "Calibration: 8 windows of 32 tokens from text.txt.\n" in card
    assert '"name": "Wanda"' in card


@pytest.mark.parametrize(("text", "size"), [("500 MB", 5 * 10**8), ("1.5MiB", 3 * 2**19)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "0GB", "-1GB", "5TB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)
