"""Reading GGUF files: HF's names, layout and config out of llama.cpp's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prox24.checkpoints.gguf_tokenizer import build_tokenizer
from prox24.checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError, UnsupportedModelError

TOP_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FREQUENCIES = "rope_freqs.weight"


class Architecture(NamedTuple):
    """How llama.cpp stores a family.

    Attributes:
      model_type: HF's.
      hf_class: HF's name of the model.
      settings: of HF's config that follow from the architecture.
      layer: HF's names of a layer's tensors.
      pairs: the rows of q and k are in the order in which neighbours rotate together.
      norm_offset: what was added to the weights of norms.
    """

    model_type: str
    hf_class: str
    settings: dict[str, Any]
    layer: dict[str, str] = LAYER_TENSORS
    pairs: bool = False
    norm_offset: float = 0.0


SILU = {"hidden_act": "silu"}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", SILU, pairs=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", SILU),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", SILU, LAYER_TENSORS | HEAD_NORMS),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
        LAYER_TENSORS | HEAD_NORMS | SANDWICH_NORMS,
        norm_offset=1.0,
    ),
}
"""By general.architecture."""


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
    """Opens a GGUF file.

    Raises:
      CheckpointError: the file is damaged or lacks metadata.
      UnsupportedModelError: an architecture that is not in `ARCHITECTURES`.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader has no exceptions of its own
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        supported = ", ".join(map(repr, ARCHITECTURES))
        raise UnsupportedModelError(
            f"GGUF architecture {kind!r} is not supported; supported: {supported}"
        )
    architecture = ARCHITECTURES[kind]
    try:
        config = _config(kind, metadata, {tensor.name for tensor in reader.tensors})
        tensors = {
            _hf_name(tensor.name, architecture, path): _source(tensor, architecture, config)
            for tensor in reader.tensors
            if tensor.name != ROPE_FREQUENCIES
        }
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the metadata field {error}") from error
    length = config["max_position_embeddings"]
    return GGUFContents(config, tensors, lambda: build_tokenizer(metadata, length, path))


def _config(kind: str, metadata: dict[str, Any], names: set[str]) -> dict[str, Any]:
    architecture = ARCHITECTURES[kind]
    own = {
        name.removeprefix(f"{kind}."): value
        for name, value in metadata.items()
        if name.startswith(f"{kind}.")
    }
    if ROPE_FREQUENCIES in names or own.get("rope.scaling.type", "none") != "none":
        raise UnsupportedModelError(
            "a GGUF with scaled rope frequencies does not say how they were scaled; "
            "prune the model's HF folder instead"
        )
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length") or own.get("rope.dimension_count") or hidden // heads
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": float(np.float32(own["attention.layer_norm_rms_epsilon"])),
        "rope_theta": own.get("rope.freq_base", 10000.0),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "float32",
        **architecture.settings,
    }
    if kind == "gemma3":
        config["sliding_window"] = own["attention.sliding_window"]
        # The model of 62 layers is the one that does not scale by the width of its heads.
        is_27b = own["block_count"] == 62
        config["query_pre_attn_scalar"] = hidden // heads if is_27b else head_dim
    for field in ("bos", "eos", "pad"):
        name = "padding" if field == "pad" else field
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{field}_token_id"] = token
    return config


def _hf_name(name: str, architecture: Architecture, path: Path) -> str:
    module, _, part = name.rpartition(".")
    parts = module.split(".")
    if module in TOP_TENSORS:
        return f"{TOP_TENSORS[module]}.{part}"
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in architecture.layer:
        raise CheckpointError(
            f"{path}: tensor {name} has no counterpart in {architecture.hf_class}"
        )
    return f"model.layers.{parts[1]}.{architecture.layer[parts[2]]}.{part}"


def _source(
    tensor: gguf.ReaderTensor, architecture: Architecture, config: dict[str, Any]
) -> TensorSource:
    shape = tuple(int(length) for length in reversed(tensor.shape))
    module = tensor.name.rpartition(".")[0].rpartition(".")[2]
    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    is_float16 = tensor.tensor_type == gguf.GGMLQuantizationType.F16

    def read() -> NDArray[Any]:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if architecture.pairs and module in rotated:
            values = _undo_rope_permutation(values, rotated[module])
        if module.endswith("norm"):
            values = values - np.float32(architecture.norm_offset)
        return values.astype(np.float16) if is_float16 else values

    return TensorSource(shape, np.dtype(np.float16 if is_float16 else np.float32), read)


def _undo_rope_permutation(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp rotates neighbouring pairs, HF halves of a head: each has its own order of rows."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
