"""Reads GGUF files: from llama.cpp's names, layout and metadata to HF's."""

import functools
import re
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
from prox24._models.families import config_from_hf
from prox24._models.spec import Config, tensor_shapes
from prox24.errors import CheckpointError, UnsupportedModelError

EXACT = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
"""The encodings without loss. Any other encoding has rounded the weights."""

ATTENTION_BIASES = {"attn": "attention_bias"}

HUB = "https://huggingface.co/"
# Metadata can be any text of any length. A model card gets short names only.
LICENSE, TAG = re.compile(r"\w[\w.-]{0,63}"), re.compile(r"\w[\w .:+/-]{0,63}")
BASE_MODEL = re.compile(rf"({re.escape(HUB)})?\w[\w.-]{{0,95}}/\w[\w.-]{{0,95}}")
MOST_TAGS = 64


class Architecture(NamedTuple):
    """How llama.cpp stores a family."""

    model_type: str  # HF's
    settings: dict[str, Any]  # HF's fields with one value for the architecture
    biases: Mapping[str, str] = ATTENTION_BIASES  # HF's field for a bias, by kind of linear
    pairs: bool = False  # rotary pairs of q and k are neighbouring rows
    norm_offset: float = 0.0  # added to the weights of norms in the file


SILU, GELU = {"hidden_act": "silu"}, {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": Architecture("llama", SILU, ATTENTION_BIASES | {"ffn": "mlp_bias"}, pairs=True),
    "qwen2": Architecture("qwen2", SILU, biases={}),
    "qwen3": Architecture("qwen3", SILU),
    "gemma3": Architecture("gemma3_text", GELU, norm_offset=1.0),
}
"""The supported architectures, by general.architecture."""


class Opened(NamedTuple):
    """A GGUF file in HF's terms."""

    config: dict[str, Any]  # as in config.json
    decoder: Config
    tensors: dict[str, TensorSource]  # in HF's layout, float16 if stored as float16, else float32
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    pruned_dtype: str | None  # bfloat16 if the encoding of a tensor is not in `EXACT`, else None
    card_metadata: dict[str, Any]


def open_gguf(path: Path) -> Opened:
    """Opens a file with one of the `ARCHITECTURES`; a tensor is dequantised when it is read."""
    try:
        metadata, stored = read_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    if (parts := metadata.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{path} is one of {parts} files of a model; join them with llama-gguf-split --merge"
        )
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        supported = ", ".join(map(repr, ARCHITECTURES))
        raise UnsupportedModelError(
            f"GGUF architecture {kind!r} is not supported; supported: {supported}"
        )
    architecture = ARCHITECTURES[kind]
    config = _config(path, kind, metadata, stored)
    sources = {name: _source(path, name, x, architecture, config) for name, x in stored.items()}
    decoder, hf_class = config_from_hf(config), config["architectures"][0]
    known = get_tensor_name_map(MODEL_ARCH[kind.upper()], len(decoder.layers))
    names = {known.get_name(name, (".weight", ".bias")): name for name in tensor_shapes(decoder)}
    for name in sources:
        if name not in names:
            raise CheckpointError(f"{path}: tensor {name} has no counterpart in {hf_class}")
    tensors = {names[name]: source for name, source in sources.items()}
    length = config["max_position_embeddings"]
    exact = all(tensor.kind in EXACT for tensor in stored.values())
    pruned_dtype = None if exact else "bfloat16"

    @functools.cache
    def load_tokenizer() -> PreTrainedTokenizerBase:
        return build_tokenizer(metadata, length, path)

    return Opened(config, decoder, tensors, load_tokenizer, pruned_dtype, _card_metadata(metadata))


def _card_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The licence, the base model and the tags, by their names in a model card."""

    def texts(name: str, form: re.Pattern[str]) -> list[str]:
        value = metadata.get(f"general.{name}")
        given = value if isinstance(value, list) else [value]
        return [each for each in given if isinstance(each, str) and form.fullmatch(each)]

    # The name is mostly a title, such as "Base 1B", and rarely an id of the hub.
    base = texts("base_model.0.repo_url", BASE_MODEL) or texts("base_model.0.name", BASE_MODEL)
    found = {
        "license": "".join(texts("license", LICENSE)[:1]).lower(),
        "base_model": "".join(base[:1]).removeprefix(HUB),
        "tags": texts("tags", TAG)[:MOST_TAGS],
    }
    return {name: value for name, value in found.items() if value}


def _config(
    path: Path, kind: str, metadata: dict[str, Any], names: Collection[str]
) -> dict[str, Any]:
    architecture, hf_class = ARCHITECTURES[kind], f"{kind.capitalize()}ForCausalLM"

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

    # Older files have only the factor of a linear scaling, where 0 means no scaling.
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
            f"which {hf_class} rotates all; prune the model's HF folder instead"
        )
    config = {
        "architectures": [hf_class],
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
        bias = re.fullmatch(r"blk\.\d+\.([a-z]+)_\w+\.bias", name)
        if bias is not None and bias[1] in architecture.biases:
            config[architecture.biases[bias[1]]] = True
    if kind == "gemma3":
        config["sliding_window"] = number("attention.sliding_window")
        # Only the model of 62 layers does not scale scores by the width of its heads.
        is_27b = config["num_hidden_layers"] == 62
        config["query_pre_attn_scalar"] = hidden // heads if is_27b else head_dim
        config["rope_local_base_freq"] = field(f"{kind}.rope.freq_base_swa", float, 10000.0)
        cap = field(f"{kind}.final_logit_softcapping", float, 0.0)
        config["final_logit_softcapping"] = cap or None
    if not field(f"{kind}.attention.causal", bool, True):
        config["is_causal"] = False
    for theirs, own in {"bos": "bos", "eos": "eos", "padding": "pad"}.items():
        token = f"tokenizer.ggml.{theirs}_token_id"
        if token in metadata:
            config[f"{own}_token_id"] = field(token, int)
    return config


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
            with np.errstate(all="ignore"):  # the caller checks for NaN and Inf
                values = dequantize(rows, tensor.kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
        if heads is not None:
            # llama.cpp pairs neighbouring rows, and HF pairs the two halves of a head.
            pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if module.endswith("norm"):
            with np.errstate(all="ignore"):
                values = values - np.float32(architecture.norm_offset)
        return values.astype(np.float16) if is_float16 else values

    return TensorSource(tensor.shape, np.dtype(np.float16 if is_float16 else np.float32), read)
