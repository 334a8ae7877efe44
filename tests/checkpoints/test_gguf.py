"""GGUF files as llama.cpp's converter writes them, against the HF weights they were made of."""

import dataclasses
import itertools
import struct
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import Q_PROJ, config_dict, random_weights, write_tiny

import prox24
from prox24._checkpoints import gguf_file, gguf_header
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.gguf_tokenizer import build_tokenizer
from prox24._jobs.tokens import start_tokens
from prox24._models.families import config_from_hf
from prox24.errors import CheckpointError, UnsupportedModelError

# By llama.cpp's conventions; written here independently of what reads them.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PLAIN = LAYER | {"post_attention_layernorm": "ffn_norm"}
GEMMA = LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}
GEMMA3 = {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16}
GEMMA3 |= {"rope_parameters": GEMMA3_ROPE, "final_logit_softcapping": 30.0}
CASES = {
    "llama": ("grouped_heads", {}),
    "llama with biases": ("grouped_heads", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", GEMMA3),
}


def gguf_name(name: str, layer: dict[str, str]) -> str:
    module, _, part = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{part}"
    _, _, index, module = module.split(".", 3)
    return f"blk.{index}.{layer[module]}.{part}"


def write_gguf(path: Path, kind: str, config: dict, weights: dict, fields=None, kinds=None) -> None:
    writer = gguf.GGUFWriter(path, kind)
    adds = {tuple: writer.add_array, float: writer.add_float32, int: writer.add_uint32}
    adds[bool] = writer.add_bool
    for field, value in (fields or {}).items():
        adds[type(value)](f"{kind}.{field}", value)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if kind == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        writer.add_float32("gemma3.final_logit_softcapping", config["final_logit_softcapping"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    for name, values in weights.items():
        stored, kind_of = values, (kinds or {}).get(name)
        for linear, count in (("q_proj", heads), ("k_proj", key_heads)):
            if kind == "llama" and linear in name:
                halves = values.reshape(count, 2, -1, *values.shape[1:])
                stored = halves.swapaxes(1, 2).reshape(values.shape)
        if kind == "gemma3" and "norm" in name:
            stored = values + np.float32(1)
        layer = GEMMA if kind == "gemma3" else PLAIN
        stored = np.ascontiguousarray(stored)
        if kind_of is not None:
            stored = gguf.quantize(stored, kind_of)
        writer.add_tensor(gguf_name(name, layer), stored, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_small(path: Path) -> Path:
    config = config_dict("grouped_heads", vocab_size=8, num_hidden_layers=1)
    write_gguf(path, "llama", config, random_weights(config))
    return path


def test_a_bias_that_the_model_has_not_is_named(tmp_path):
    config = config_dict("qwen2", use_sliding_window=False)
    bias = {"model.layers.1.self_attn.o_proj.bias": np.ones(config["hidden_size"], np.float32)}
    write_gguf(tmp_path / "model.gguf", "qwen2", config, random_weights(config) | bias)
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_output\.bias has no counterpart"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", CASES)
def test_a_gguf_is_the_model_it_was_made_of(tmp_path, kind):
    variant, changes = CASES[kind]
    kind = kind.partition(" ")[0]
    config = config_dict(variant, rms_norm_eps=2.0**-20, **changes)  # which float32 has
    weights = random_weights(config)
    write_gguf(tmp_path / "model.gguf", kind, config, weights)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert config_from_hf(checkpoint.config, checkpoint.tensors) == config_from_hf(config, weights)
    assert checkpoint.tensors.keys() == weights.keys()
    for name, values in weights.items():
        # The norms of Gemma are stored plus one, which rounds by 2^-24 below 2.
        atol = 2.0**-24 if kind == "gemma3" and "norm" in name else 0
        np.testing.assert_allclose(checkpoint.read(name), values, rtol=0, atol=atol)


KINDS = gguf.GGMLQuantizationType
WIDTHS = {"hidden_size": 32, "intermediate_size": 64}  # of blocks of 32


@pytest.mark.parametrize(
    ("kind", "dtype", "norms", "linears"),
    [
        (KINDS.Q8_0, None, "bfloat16", "bfloat16"),
        (KINDS.Q8_0, "float32", "float32", "float32"),
        (KINDS.BF16, None, "bfloat16", "bfloat16"),
        # These have no fewer digits than the model.
        (KINDS.F16, None, "float32", "float16"),
        (KINDS.F32, None, "float32", "float32"),
    ],
)
def test_a_quantised_gguf_is_pruned_to_bfloat16(tmp_path, monkeypatch, kind, dtype, norms, linears):
    write_tiny(tmp_path / "tokenizer")
    tokenizer = open_checkpoint(tmp_path / "tokenizer").load_tokenizer()
    monkeypatch.setattr(gguf_file, "build_tokenizer", lambda *arguments: tokenizer)
    config = config_dict("grouped_heads", **WIDTHS)
    weights, path, out = random_weights(config), tmp_path / "model.gguf", tmp_path / "out"
    kinds = {name: kind for name, values in weights.items() if values.ndim == 2}
    write_gguf(path, "llama", config, weights, kinds=kinds)
    checkpoint = open_checkpoint(path)
    read = "float16" if kind == KINDS.F16 else "float32"
    assert checkpoint.read(Q_PROJ).dtype == read  # in full, for eval
    recipe = dataclasses.replace(prox24.Recipe.wanda(), dtype=dtype)
    report = prox24.prune(path, out, recipe, calibration=np.arange(128).reshape(4, 32))
    assert report.recipe.dtype == (norms if kind in (KINDS.Q8_0, KINDS.BF16) else None)
    assert ("written as" in str(report)) == (report.recipe.dtype is not None)
    written = open_checkpoint(out)
    assert written.config["torch_dtype"] == norms
    for name, source in checkpoint.tensors.items():
        values, dense = written.read(name), source.read()
        assert values.dtype == (norms if values.ndim == 1 else linears)
        kept = values != 0  # Wanda leaves weights as they are
        np.testing.assert_array_equal(values[kept], dense.astype(values.dtype)[kept])
    assert prox24.verify(out, path).ok


SCALED = "scaled rope frequencies"
ATTENTIONS = [
    ("rope.dimension_count", {8: None, 4: "is 4, a head has"}),
    ("rope.scale_linear", {0.0: None, 4.0: SCALED}),
    ("rope.scaling.factor", {1.0: None, (1.0, 4.0): SCALED}),
    ("attention.causal", {True: None, False: "is_causal False"}),
]


@pytest.mark.parametrize(("field", "values"), ATTENTIONS, ids=[field for field, _ in ATTENTIONS])
def test_another_attention_is_refused(tmp_path, field, values):
    config = config_dict("grouped_heads", head_dim=8)
    path, weights = tmp_path / "model.gguf", random_weights(config)
    for value, named in values.items():
        write_gguf(path, "llama", config, weights, {field: value})
        with pytest.raises(UnsupportedModelError, match=named) if named else nullcontext():
            open_checkpoint(path)


PIECES = {"\u2581": -9.0, "a": -8.0, "b": -7.0, "ab": -3.0, "ba": -2.5, "\u2581a": -4.0}
PIECES |= {"aba": -6.0, "\u2581ab": -1.0, "bab": -5.0, "\u2581ba": -2.0}


def pieces_by_greedy_merging(text: str) -> list[str]:
    """SentencePiece's BPE: the neighbours whose union has the highest score, until none is left."""
    parts = list(text.replace(" ", "\u2581"))
    while unions := [a + b for a, b in itertools.pairwise(parts) if a + b in PIECES]:
        best = max(unions, key=PIECES.get)
        place = [a + b for a, b in itertools.pairwise(parts)].index(best)
        parts[place : place + 2] = [best]
    return parts


SENTENCE_PIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", *PIECES, "<s>"],
    "tokenizer.ggml.scores": [0.0, *PIECES.values(), 0.0],
    "tokenizer.ggml.token_type": [2, *(1 for _ in PIECES), 3],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": len(PIECES) + 1,
}


@pytest.mark.parametrize("starts", [True, False])
def test_a_text_begins_with_the_start_token_unless_the_file_says_otherwise(starts):
    said = {} if starts else {"tokenizer.ggml.add_bos_token": False}
    start = [len(PIECES) + 1] if starts else []
    tokenizer = build_tokenizer(SENTENCE_PIECE | said, 64, Path("model.gguf"))
    plain = tokenizer("ab ab", add_special_tokens=False)["input_ids"]
    assert tokenizer("ab ab")["input_ids"] == start + plain
    assert start_tokens(tokenizer, len(PIECES) + 2) == start


@pytest.mark.parametrize(("split", "found"), [("llama-bpe", ["abc"]), ("qwen2", ["a", "bc"])])
def test_llama_3_takes_a_token_whole_that_merges_do_not_reach(split, found):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "bc", "abc", "<s>"],
        "tokenizer.ggml.token_type": [*[1] * 6, 3],
        "tokenizer.ggml.merges": ["b c", "a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 6,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = build_tokenizer(metadata, 64, Path("model.gguf"))
    assert tokenizer.tokenize("abc") == found


@pytest.mark.parametrize("add_space_prefix", [False, True])
def test_sentence_pieces_are_those_of_greedy_merging(add_space_prefix):
    metadata = SENTENCE_PIECE | {"tokenizer.ggml.add_space_prefix": add_space_prefix}
    tokenizer = build_tokenizer(metadata, 64, Path("model.gguf"))
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(rng.choice(list("ab "), 20)).strip() or "a"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = " " if add_space_prefix else ""
        assert tokenizer.convert_ids_to_tokens(ids) == pieces_by_greedy_merging(start + text)
        assert tokenizer.decode(ids) == text


# Files that are damaged or say too much


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_the_header_is_what_the_reader_of_the_gguf_package_finds(small_model):
    metadata, tensors = gguf_header.read_header(small_model)
    reader = gguf.GGUFReader(small_model)
    expected = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata == {name: x for name, x in expected.items() if not name.startswith("GGUF.")}
    assert tensors == {
        found.name: (found.tensor_type, tuple(found.shape[::-1]), found.data_offset, found.n_bytes)
        for found in reader.tensors
    }


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name="a", shape=(32,), kind=0, start=0):
    form = f"<I{len(shape)}QIQ"
    return text(name) + struct.pack(form, len(shape), *shape, kind, start)


def header(fields=b"", tensors=b"", *, field_count=None, count=0, magic=b"GGUF", version=3):
    field_count = bool(fields) if field_count is None else field_count
    return struct.pack("<4sIQQ", magic, version, count, field_count) + fields + tensors


ALIGNMENT = text("general.alignment")
HEADERS = [
    ("not begin with GGUF", header(magic=b"GGML")),
    ("version 1", header(version=1)),
    ("ends within", header(text("a") + struct.pack("<IIQ", 9, 7, 2**60))),
    ("ends within", header(text("a") + struct.pack("<IIQ", 9, 8, 2**60))),
    ("ends within", header(text("a") + struct.pack("<IQ", 8, 2**64 - 1))),
    ("ends within", header(tensors=tensor(), count=2**60)),
    ("a list of lists", header(text("a") + struct.pack("<IIQIQ", 9, 9, 1, 0, 0))),
    ("99 is not a valid GGUFValueType", header(text("a") + struct.pack("<I", 99))),
    ("can't decode", header(text("a") + struct.pack("<IQ", 8, 1) + b"\xff")),
    ("power of two", header(ALIGNMENT + struct.pack("<II", 4, 3))),
    ("power of two", header(ALIGNMENT + struct.pack("<IQ", 8, 0))),
    ("64 dimensions", header(tensors=tensor(shape=(1,) * 64), count=1)),
    (r"shape \(\)", header(tensors=tensor(shape=()), count=1)),
    ("in blocks of 32", header(tensors=tensor(shape=(16, 2), kind=8), count=1)),
    ("not a valid GGMLQ", header(tensors=tensor(kind=9999), count=1)),
    ("not within the file", header(tensors=tensor(shape=(2**32, 2**32)), count=1)),
    ("not within the file", header(tensors=tensor(shape=(0, 2**62)), count=1)),
    ("something twice", header(tensors=tensor() * 2, count=2)),
    ("something twice", header((text("a") + struct.pack("<IB", 0, 1)) * 2, field_count=2)),
    ("overlap", header(tensors=tensor("a") + tensor("b") + tensor("c") + bytes(160), count=3)),
]


@pytest.mark.parametrize(("named", "content"), HEADERS, ids=[named for named, _ in HEADERS])
def test_hostile_headers_are_refused(tmp_path, named, content, little_memory):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not a readable GGUF file: .*{named}"):
        open_checkpoint(tmp_path / "model.gguf")


WRONG_METADATA = [
    ("llama.attention.head_count", struct.pack("<II", 4, 0), "head_count is 0"),
    ("llama.attention.head_count", struct.pack("<IIQII", 9, 4, 2, 4, 4), "is no int"),
    ("llama.attention.head_count_kv", struct.pack("<II", 4, 3), "rows of blk.0.attn_k.weight"),
    ("llama.rope.freq_base", struct.pack("<II", 4, 100), "freq_base' is no float"),
    ("llama.embedding_length", None, "lacks the metadata field 'llama.embedding_length'"),
    ("split.count", struct.pack("<IH", 2, 3), "one of 3 files .* join them"),
    ("general.architecture", struct.pack("<IIQ", 9, 4, 0), r"architecture \[\]"),
    (
        "general.architecture",
        struct.pack("<I", 8) + text("mamba"),
        "'mamba' is not supported; .*'gemma3'",
    ),
]


@pytest.mark.parametrize(("name", "value", "named"), WRONG_METADATA)
def test_wrong_metadata_are_named(tmp_path, small_model, name, value, named):
    # The field in its place is renamed, and the wrong one is put first.
    content = small_model.read_bytes().replace(name.encode(), b"x" * len(name))
    tensors, fields = struct.unpack("<8x2Q", content[:24])
    wrong = b"" if value is None else text(name) + value
    wrong += text("fill") + struct.pack("<IQ", 8, padding := -(len(wrong) + 24) % 32)
    wrong += b"x" * padding
    head = header(wrong, content[24:], field_count=fields + 1 + (value is not None), count=tensors)
    (tmp_path / "model.gguf").write_bytes(head)
    kind = UnsupportedModelError if name == "general.architecture" else CheckpointError
    with pytest.raises(kind, match=named):
        open_checkpoint(tmp_path / "model.gguf")


NO_TOKENIZERS = [
    {"tokenizer.ggml.token_type": None},
    {"tokenizer.ggml.tokens": ["a" * 10**6]},
    {"tokenizer.ggml.bos_token_id": 10**6},
    {"tokenizer.ggml.model": ["llama"]},
    {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"},
]


@pytest.mark.parametrize("changes", NO_TOKENIZERS)
def test_a_tokenizer_that_the_metadata_do_not_describe_is_refused(changes):
    changed = SENTENCE_PIECE | changes
    metadata = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(CheckpointError, match=r"model\.gguf: (the )?tokenizer"):
        build_tokenizer(metadata, 64, Path("model.gguf"))
