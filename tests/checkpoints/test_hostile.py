"""Hostile and damaged files: each is read, or refused in one line, in little memory."""

import json
import random
from pathlib import Path

import flax.serialization
import numpy as np
import pytest
from safetensors.numpy import save
from test_formats import VALUES, entries, tensor, write_legacy, write_zip
from test_gguf import write_small
from tiny import config_dict, write_tiny

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.hf_folder import read_json
from prox24._models.families import config_from_hf
from prox24.errors import CheckpointError, UnsupportedModelError

# Random changes of files of every format


SMALL = entries({"a": tensor(), "b": tensor((3, 2), (1, 3))})
FILES = {
    "model.safetensors": lambda path: path.write_bytes(save({"a": VALUES, "b": np.arange(4)})),
    "pytorch_model.bin": lambda path: write_zip(path, SMALL),
    "legacy/pytorch_model.bin": lambda path: write_legacy(path, SMALL),
    "flax_model.msgpack": lambda path: path.write_bytes(
        flax.serialization.msgpack_serialize({"a": VALUES, "b": {"kernel": VALUES}})
    ),
    "model.gguf": write_small,
    "config.json": lambda path: write_tiny(path.parent),
}


@pytest.fixture(params=FILES)
def valid(request, tmp_path):
    path = tmp_path / "model" / Path(request.param).name
    if path.name != "config.json":
        # A model that is not computed, whose weights are read as they are.
        path.parent.mkdir()
        (path.parent / "config.json").write_text('{"model_type": "any"}')
    FILES[request.param](path)
    return path


def read_all(path):
    whole = path if path.suffix == ".gguf" else path.parent
    checkpoint = open_checkpoint(whole, any_family=path.name != "config.json")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def refusal(function, argument):
    """The one line in which it refuses, or nothing."""
    try:
        function(argument)
    except (CheckpointError, UnsupportedModelError) as error:
        return str(error)
    return ""


def test_a_changed_file_is_read_or_refused(valid):
    rng, content, refusals = random.Random(valid.name), valid.read_bytes(), []
    for _ in range(200):
        changed = content
        for _ in range(rng.randint(1, 3)):
            place, size = rng.randrange(len(changed) + 1), rng.randint(1, 8)
            part = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size])
            end = rng.choice([place + size, place + size, place, len(changed)])
            changed = changed[:place] + part + changed[end:]
        valid.write_bytes(changed)
        refusals.append(refusal(read_all, valid))
    assert "\n" not in "".join(refusals)
    assert any(refusals)
    assert not all(refusals)


def test_a_file_is_refused_wherever_it_is_cut(valid):
    content = valid.read_bytes()
    for length in range(0, len(content), 1 + len(content) // 300):
        valid.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=valid.name):
            read_all(valid)


def test_any_value_of_a_config_is_taken_or_refused():
    config = config_dict() | {"num_experts": 4, "sliding_window": 4}
    values = [None, True, -1, 0, 0.5, 2**62, "x", [], ["x"], {}, {"rope_type": "x"}]
    for changes in [{name: value} for name in config for value in values]:
        assert "\n" not in refusal(config_from_hf, config | changes)


# JSON


JSONS = [
    (b"[" * 100_000, "nested"),
    (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested in more than 100"),
    (rb'{"a": "\ud800"}', "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[]", "no JSON object"),
]


@pytest.mark.parametrize(("content", "named"), JSONS, ids=range(len(JSONS)))
def test_hostile_json_is_refused(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {named}"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("extra", [{"num_labels": 10**9}, {"dtype": "load"}, {"n_head": "x"}])
def test_what_is_not_used_of_a_config_is_not_read(little_memory, extra):
    assert config_from_hf(config_dict() | extra) == config_from_hf(config_dict())


def test_code_in_a_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    write_tiny(tmp_path / "source")
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("a question"))
    code = f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Own: pass\n"
    (tmp_path / "source" / "own.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "source" / name
        maps = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
        settings = json.loads(file.read_text()) | {"auto_map": maps, "tokenizer_class": "Own"}
        file.write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        checkpoint.load_tokenizer()
    assert not (tmp_path / "proof").exists()
