import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import files
from safetensors.numpy import load_file, save_file
from tiny import (
    Q_PROJ,
    assert_same,
    config_dict,
    load_folder,
    random_weights,
    write_folder,
    write_tiny,
)

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.tensors import is_finite
from prox24._checkpoints.writer import write_checkpoint
from prox24.errors import CheckpointError, DiskError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    write_tiny(tmp_path / "source")
    return open_checkpoint(tmp_path / "source")


def write_changed(folder, changes):
    config = config_dict()
    weights = {n: x for n, x in (random_weights(config) | changes).items() if x is not None}
    return write_folder(folder, config, weights)


@pytest.mark.parametrize(("dtype", "shards"), [("bfloat16", 1), ("float16", 3)])
def test_a_copy_has_the_same_bytes_names_dtypes_and_files(tmp_path, dtype, shards):
    weights = write_tiny(tmp_path / "source", dtype=dtype, shards=shards)
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "source")
    for shard in (tmp_path / "copy").glob("*.safetensors"):
        assert load_file(shard).keys() == load_file(tmp_path / "source" / shard.name).keys()
    assert_same(load_folder(tmp_path / "copy"), weights)


def test_replaced_tensors_take_the_source_dtype_and_keep_exact_zeros(tmp_path):
    weights = write_tiny(tmp_path / "source", dtype="bfloat16")
    values = weights[Q_PROJ].astype(np.float32)
    values[:, ::2] = 0
    source = open_checkpoint(tmp_path / "source")
    write_checkpoint(source, tmp_path / "out", [(Q_PROJ, values)])
    read = load_file(tmp_path / "out" / "model.safetensors")[Q_PROJ]
    assert read.dtype == weights[Q_PROJ].dtype
    assert (read[:, ::2] == 0).all()
    assert (read[:, 1::2] == weights[Q_PROJ][:, 1::2]).all()


@pytest.mark.parametrize(
    ("name", "values", "options", "named"),
    [
        (Q_PROJ, np.full((32, 32), 1e6, np.float32), {"dtype": "float16"}, Q_PROJ),
        ("nope", np.zeros((32, 32)), {}, "no place for a tensor nope of shape"),
        (Q_PROJ, np.zeros((32, 64)), {}, f"no place for a tensor {Q_PROJ} of shape"),
    ],
    ids=["overflow", "name", "shape"],
)
def test_a_tensor_that_cannot_be_written_is_named(tmp_path, source, name, values, options, named):
    with pytest.raises(CheckpointError, match=named):
        write_checkpoint(source, tmp_path / "out", [(name, values)], **options)
    assert files(tmp_path) == ["source"]


def test_an_existing_destination_is_kept_unless_overwritten_without_failure(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match=r"out holds files, but no config.json of a model"):
        write_checkpoint(source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    bad = [(Q_PROJ, np.full((32, 32), np.nan, np.float32))]
    with pytest.raises(CheckpointError, match=Q_PROJ):
        write_checkpoint(source, tmp_path / "out", bad, overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    write_checkpoint(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert files(tmp_path) == ["out", "source"]


def test_more_shards_than_may_be_open_are_written(tmp_path, source):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = len(list(Path("/proc/self/fd").iterdir())) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        write_checkpoint(source, tmp_path / "out", max_shard_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 8
    read = open_checkpoint(tmp_path / "out").read(Q_PROJ)
    np.testing.assert_array_equal(read, source.read(Q_PROJ))


def test_a_tensor_of_a_dtype_that_is_not_read_is_named(tmp_path):
    write_changed(tmp_path / "source", {"model.scale": np.zeros(4, np.complex64)})
    source = open_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"model\.scale has a dtype that is not supported"):
        write_checkpoint(source, tmp_path / "out")


def test_a_file_that_goes_along_and_cannot_be_read_is_named(tmp_path, monkeypatch, source):
    (source.path / "notes.txt").write_text("x")
    source, opened = open_checkpoint(source.path), Path.open

    def forbidden(path, *arguments, **keywords):
        if path.name == "notes.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DiskError, match=r"cannot read .*/source/notes\.txt: Permission denied"):
        write_checkpoint(source, tmp_path / "out")
    assert files(tmp_path) == ["source"]


FIRST, SECOND = (f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2))


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def placed(shard):
    def damage(folder):
        shutil.copy(folder / FIRST, folder.parent / "elsewhere")
        changed = {"weight_map": index_of(folder)["weight_map"] | {Q_PROJ: shard}}
        (folder / INDEX).write_text(json.dumps(changed))

    return damage


def linked(name):
    def damage(folder):
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to("../elsewhere")

    return damage


def removed(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (removed(FIRST), f"{FIRST} is missing"),
        (shutil.rmtree, "source is neither a folder, nor a .gguf file, nor an id"),
        (removed(INDEX), r"no weights: none of model\.safetensors"),  # but files of such names
        (removed("config.json"), "config.json: there is no such file"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "no weight_map"),
        (placed(SECOND), f"{Q_PROJ} in model-00002"),
        (placed("config.json"), "config.json is incomplete or damaged"),
        (lambda at: os.truncate(at / FIRST, 2000), rf"{FIRST} is incomplete .*: download it again"),
        (placed("x" * 300), "shard .*xxx is missing"),
        *((placed(name), "outside the folder") for name in ("../elsewhere", "..", "", 7)),
        *((linked(n), f"{n} is a link to outside the") for n in ("config.json", "LICENSE", FIRST)),
    ],
)
def test_damage_is_named(tmp_path, damage, named):
    write_tiny(tmp_path / "source", shards=3)
    damage(tmp_path / "source")
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path / "source")


def test_a_link_within_the_folder_is_followed(tmp_path):
    weights = write_tiny(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    file.rename(tmp_path / "source" / "stored")
    file.symlink_to("stored")
    assert open_checkpoint(tmp_path / "source").tensors.keys() == weights.keys()


def test_a_blob_of_the_hub_that_is_a_link_itself_is_refused(tmp_path):
    folder = tmp_path / "model" / "snapshots" / "1"
    folder.parent.mkdir(parents=True)
    write_tiny(folder)
    (tmp_path / "model" / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "blobs" / "hash").symlink_to("../../elsewhere")
    (folder / "model.safetensors").symlink_to("../../blobs/hash")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to outside"):
        open_checkpoint(folder)


def test_a_blob_that_the_models_of_the_hub_share_is_read(tmp_path):
    folder, name = tmp_path / "models--a--b" / "snapshots" / "1", "ab" + "0" * 62
    folder.parent.mkdir(parents=True)
    write_tiny(folder)
    shared = tmp_path / "blobs" / "ab" / name
    for blob in (shared, tmp_path / "models--a--b" / "blobs" / "etag"):
        blob.parent.mkdir(parents=True)
    (folder / "model.safetensors").rename(shared)
    blob.symlink_to(f"../../blobs/ab/{name}")
    (folder / "model.safetensors").symlink_to("../../blobs/etag")
    assert open_checkpoint(folder).tensors


def test_a_large_float64_is_finite():
    assert is_finite(np.array([1e300]))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.zeros((32, 16), np.float32), r"has shape \(32, 16\).*\(32, 32\)"),
        (None, "is missing"),
        (np.zeros((32, 32), np.int8), "has dtype"),
    ],
)
def test_a_tensor_that_the_model_cannot_take_is_named(tmp_path, values, named):
    write_changed(tmp_path / "source", {Q_PROJ: values})
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} {named}"):
        open_checkpoint(tmp_path / "source")


def test_extra_tensors_are_carried_over(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4, dtype=np.float32),
        "model.position_ids": np.arange(4, dtype=np.int64),
        "model.scale": np.array(2, np.int32),
    }
    write_changed(tmp_path / "source", extra)
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "out", dtype="bfloat16")
    written = load_folder(tmp_path / "out")
    assert_same({name: written[name] for name in extra}, extra)
    assert written["model.scale"].shape == ()


def test_shards_are_no_larger_than_asked(tmp_path):
    weights = write_tiny(tmp_path / "source", shards=3)
    source = open_checkpoint(tmp_path / "source")
    limit = 20_000  # the embedding and the head are larger
    written = write_checkpoint(source, tmp_path / "out", max_shard_bytes=limit)
    assert written == [name for shard in source.shards for name in shard]
    index = index_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    shards = sorted({*index["weight_map"].values()})
    assert (count := len(shards)) > 3
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert_same(load_folder(tmp_path / "out"), weights)
    held = [[name for name in written if index["weight_map"][name] == shard] for shard in shards]
    assert [load_file(tmp_path / "out" / shard).keys() for shard in shards] == list(map(set, held))
    sizes = [sum(weights[name].nbytes for name in names) for names in held]
    assert all(size <= limit or len(names) == 1 for size, names in zip(sizes, held, strict=True))
    # Nothing of a shard would have fitted into the one before.
    firsts = [weights[names[0]].nbytes for names in held[1:]]
    assert all(size + first > limit for size, first in zip(sizes[:-1], firsts, strict=True))


def test_shards_are_measured_in_the_dtype_of_the_output(tmp_path, source):
    half = sum(2 * int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    for limit, count in ((half, 1), (half - 1, 2)):
        out = tmp_path / str(count)
        write_checkpoint(source, out, max_shard_bytes=limit, dtype="bfloat16")
        assert len(list(out.glob("*.safetensors"))) == count
        assert (out / INDEX).exists() == (count > 1)


def test_transformers_reads_shards_as_one_model(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    weights = write_tiny(tmp_path / "source", "tied_head")
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "out", max_shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    read = model.state_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, values in weights.items():
        np.testing.assert_array_equal(read[name].numpy(), values)


def test_a_model_card_is_copied_as_it_is(tmp_path, source):
    card = b"---\nlanguage: no\n---\n# A model\n\nof \xff somebody\n"
    (source.path / "README.md").write_bytes(card)
    write_checkpoint(open_checkpoint(source.path), tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == card


def test_a_folder_without_a_tokenizer_is_copied_and_no_other_weights(tmp_path, source):
    for name in {*files(source.path)} - {"config.json", "model.safetensors"}:
        (source.path / name).unlink()
    (source.path / "pytorch_model.bin").write_bytes(b"old")
    save_file({"x": np.zeros(1)}, source.path / "adapter.safetensors")
    write_checkpoint(open_checkpoint(source.path), tmp_path / "out")
    assert files(tmp_path / "out") == ["config.json", "model.safetensors"]
