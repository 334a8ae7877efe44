"""Reading GGUF files: HF's names, layout and config out of llama.cpp's."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prox24._checkpoints.gguf_header import StoredTensor, read_header
from prox24._checkpoints.gguf_tokenizer import build_tokenizer
from prox24._checkpoints.tensors import TensorSource, read_entries
from prox24.errors import CheckpointError, UnsupportedModelError

TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
"""HF's names in a layer, of all families."""

# The setting of HF's config that a bias needs, None where there always is one.
QKV_BIASES: dict[str, str | None] = dict.fromkeys(("attn_q", "attn_k", "attn_v"))
ATTENTION_BIASES = dict.fromkeys((*QKV_BIASES, "attn_output"), "attention_bias")
MLP_BIASES = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "mlp_bias")


class Architecture(NamedTuple):
    """How llama.cpp stores a family."""

    model_type: str  # HF's
    hf_class: str
    settings: dict[str, Any]  # of HF's config that follow from the architecture
    biases: Mapping[str, str | None] = ATTENTION_BIASES  # that there may be, and their settings
    pairs: bool = False  # the rows of q and k are in the order in which neighbours rotate together
    norm_offset: float = 0.0  # what was added to the weights of norms


SILU = {"hidden_act": "silu"}
ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", SILU, ATTENTION_BIASES | MLP_BIASES, pairs=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", SILU, QKV_BIASES),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", SILU),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
        norm_offset=1.0,
    ),
}
"""By general.architecture."""


def open_gguf(
    path: Path,
) -> tuple[dict[str, Any], dict[str, TensorSource], Callable[[], PreTrainedTokenizerBase]]:
    """The config.json that HF would have, the tensors, and a function that builds the tokenizer.

    The tensors have HF's names and layout. They are dequantised to float32 when they are read, but
    for those in float16.
    """
    try:
        metadata, stored = read_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        supported = ", ".join(map(repr, ARCHITECTURES))
        raise UnsupportedModelError(
            f"GGUF architecture {kind!r} is not supported; supported: {supported}"
        )
    config, layer = _config(path, kind, metadata, stored), _layer_modules(kind)
    tensors = {
        _hf_name(path, name, kind, layer): _source(path, name, tensor, ARCHITECTURES[kind], config)
        for name, tensor in stored.items()
    }
    length = config["max_position_embeddings"]
    return config, tensors, lambda: build_tokenizer(metadata, length, path)


def _layer_modules(kind: str) -> dict[str, str]:
    """HF's names in a layer by llama.cpp's."""
    known = get_tensor_name_map(MODEL_ARCH[kind.upper()], 1)
    names = {module: known.get_name(f"model.layers.0.{module}") for module in LAYER_MODULES}
    return {name.removeprefix("blk.0."): module for module, name in names.items() if name}


def _config(
    path: Path, kind: str, metadata: dict[str, Any], names: Collection[str]
) -> dict[str, Any]:
    architecture = ARCHITECTURES[kind]

    def field(name: str, of_type: type, default: Any = None) -> Any:
        value = metadata.get(name, default)
        if value is None:
            raise CheckpointError(f"{path} lacks the metadata field {name!r}")
        if type(value) is not of_type:
            raise CheckpointError(f"{path}: the metadata field {name!r} is no {of_type.__name__}")
        return value

    def number(name: str, default: int | None = None) -> int:
        value: int = field(f"{kind}.{name}", int, default)
        if value < 1:
            raise CheckpointError(f"{path}: the metadata field {kind}.{name} is {value}")
        return value

    # Older files have the factor alone, and mean it to be linear; 0 is none.
    factors = (metadata.get(f"{kind}.rope.{n}", 1) for n in ("scaling.factor", "scale_linear"))
    unsaid = "none" if all(factor in (0, 1) for factor in factors) else "linear"
    scaling = metadata.get(f"{kind}.rope.scaling.type", unsaid)
    if "rope_freqs.weight" in names or scaling != "none":
        raise UnsupportedModelError(
            "a GGUF with scaled rope frequencies does not say how they were scaled; "
            "prune the model's HF folder instead"
        )
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", number("rope.dimension_count", hidden // heads))
    rotated = number("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(
            f"rope.dimension_count of the GGUF is {rotated}, a head has {head_dim} entries, of "
            f"which {architecture.hf_class} rotates all; prune the model's HF folder instead"
        )
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": field(f"{kind}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": field(f"{kind}.rope.freq_base", float, 10000.0),
        "vocab_size": len(field("tokenizer.ggml.tokens", list)),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "float32",
        **architecture.settings,
    }
    for name in names:
        module, _, part = name.rpartition(".")
        setting = architecture.biases.get(module.rpartition(".")[2])
        if part == "bias" and setting is not None:
            config[setting] = True
    if kind == "gemma3":
        config["sliding_window"] = number("attention.sliding_window")
        # The model of 62 layers is the one that does not scale by the width of its heads.
        is_27b = config["num_hidden_layers"] == 62
        config["query_pre_attn_scalar"] = hidden // heads if is_27b else head_dim
    for theirs, own in {"bos": "bos", "eos": "eos", "padding": "pad"}.items():
        token = f"tokenizer.ggml.{theirs}_token_id"
        if token in metadata:
            config[f"{own}_token_id"] = field(token, int)
    return config


def _hf_name(path: Path, name: str, kind: str, layer: Mapping[str, str]) -> str:
    module, _, part = name.rpartition(".")
    parts, architecture = module.split("."), ARCHITECTURES[kind]
    if module in TOP_TENSORS and part == "weight":
        return f"{TOP_TENSORS[module]}.weight"
    known = {"weight": layer, "bias": architecture.biases}.get(part, ())
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in known:
        raise CheckpointError(
            f"{path}: tensor {name} has no counterpart in {architecture.hf_class}"
        )
    return f"model.layers.{parts[1]}.{layer[parts[2]]}.{part}"


def _source(
    path: Path, name: str, tensor: StoredTensor, architecture: Architecture, config: dict[str, Any]
) -> TensorSource:
    module = name.rpartition(".")[0].rpartition(".")[2]
    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    heads = rotated.get(module) if architecture.pairs else None
    if heads is not None and tensor.shape[0] % (2 * heads):
        raise CheckpointError(f"{path}: the {tensor.shape[0]} rows of {name} are not {heads} heads")
    is_float16 = tensor.kind == GGMLQuantizationType.F16

    def read() -> NDArray[Any]:
        content = read_entries(path, tensor.start, tensor.size, np.dtype(np.uint8))
        rows = content.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        try:
            with np.errstate(all="ignore"):  # who reads it looks for NaN and Inf
                values = dequantize(rows, tensor.kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
        if heads is not None:
            # llama.cpp rotates neighbouring pairs, HF halves of a head: the rows have two orders.
            pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if module.endswith("norm"):
            with np.errstate(all="ignore"):
                values = values - np.float32(architecture.norm_offset)
        return values.astype(np.float16) if is_float16 else values

    return TensorSource(tensor.shape, np.dtype(np.float16 if is_float16 else np.float32), read)
