"""Reading GGUF files: HF's names, layout, config and tokenizer out of llama.cpp's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prox24.checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError, UnsupportedModelError

TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQUENCIES = "rope_freqs.weight"

# How a byte-level vocabulary cuts text before merging, by tokenizer.ggml.pre.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}

CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4


class GGUFContents(NamedTuple):
    """A GGUF file in HF's terms.

    Attributes:
      config: what HF's config.json would say.
      tensors: by HF's names, in HF's layout, dequantised to float32 when read (float16 and
        bfloat16 tensors as they are).
      load_tokenizer: builds the tokenizer from the metadata.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorSource]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]


def open_gguf(path: Path) -> GGUFContents:
    """Opens a GGUF file of the Llama architecture.

    Raises:
      CheckpointError: the file is damaged or lacks metadata.
      UnsupportedModelError: another architecture.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader has no exceptions of its own
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    if metadata.get("general.architecture") != "llama":
        raise UnsupportedModelError(
            f"GGUF architecture {metadata.get('general.architecture')!r} is not supported; "
            "supported: 'llama'"
        )
    try:
        config = _config(metadata, {tensor.name for tensor in reader.tensors})
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        tensors = {
            _hf_name(tensor.name, path): _source(tensor, heads)
            for tensor in reader.tensors
            if tensor.name != ROPE_FREQUENCIES
        }
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the metadata field {error}") from error
    return GGUFContents(config, tensors, lambda: _tokenizer(metadata, path))


def _config(metadata: dict[str, Any], names: set[str]) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.rope.dimension_count")
        or metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "float32",
    }
    if ROPE_FREQUENCIES in names or metadata.get("llama.rope.scaling.type", "none") != "none":
        raise UnsupportedModelError(
            "a GGUF with scaled rope frequencies does not say how they were scaled; "
            "prune the model's HF folder instead"
        )
    for field in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{field}_token_id")
        if token is not None:
            config[f"{field}_token_id"] = token
    return config


def _hf_name(name: str, path: Path) -> str:
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER_TENSORS:
        raise CheckpointError(f"{path}: tensor {name} has no counterpart in the Llama family")
    return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"


def _source(tensor: gguf.ReaderTensor, heads: dict[str, int]) -> TensorSource:
    shape = tuple(int(length) for length in reversed(tensor.shape))
    part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
    is_float16 = tensor.tensor_type == gguf.GGMLQuantizationType.F16

    def read() -> NDArray[Any]:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if part in heads:
            values = _undo_rope_permutation(values, heads[part])
        return values.astype(np.float16) if is_float16 else values

    return TensorSource(shape, np.dtype(np.float16 if is_float16 else np.float32), read)


def _undo_rope_permutation(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp rotates neighbouring pairs, HF halves of a head: each has its own order of rows."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _tokenizer(metadata: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not supported; "
            f"supported are 'gpt2' with {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[split])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    whole = [
        AddedToken(token, normalized=False, special=kind == CONTROL_TOKEN)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
    ]
    tokenizer.add_special_tokens([token for token in whole if token.special])
    tokenizer.add_tokens([token for token in whole if not token.special])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[metadata[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in named.items()
        if f"tokenizer.ggml.{field}_token_id" in metadata
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
