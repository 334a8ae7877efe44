"""Tiny Llama checkpoints with random weights that are the same on every machine."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prox24.models import llama

VOCABULARY = 260
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "llama1": {},
    "grouped_heads": {"num_key_value_heads": 2},
    "one_key_head": {"num_key_value_heads": 1},
    "tied_head": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 16, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    },
    "large_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "loose_norm": {"rms_norm_eps": 1e-2},
}


def hf_config(variant: str = "llama1", **changes) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(settings | VARIANTS[variant] | changes))


def config_dict(variant: str = "llama1", **changes) -> dict:
    return json.loads(hf_config(variant, **changes).to_json_string(use_diff=False))


def random_weights(config: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    shapes = llama.tensor_shapes(llama.config_from_hf(config))
    generator = np.random.default_rng(24)
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = generator.standard_normal(shape) / np.sqrt(shape[-1])
        if "norm" in name:
            values = 1 + 0.1 * generator.standard_normal(shape)
        if name == "model.embed_tokens.weight":
            values = 0.25 * generator.standard_normal(shape)
        weights[name] = values.astype(dtype)
    return weights


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_tiny(folder: Path, variant: str = "llama1", dtype: str = "float32", shards: int = 1):
    """Writes an HF folder; returns its weights by name."""
    config = config_dict(variant) | {"torch_dtype": dtype}
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    weights = random_weights(config, numpy_dtype)
    return write_folder(folder, config, weights, shards)


def write_folder(folder: Path, config: dict, weights: dict, shards: int = 1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "LICENSE").write_text("a licence\n")
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return weights
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def tokens(batch: int = 2, length: int = 48) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def jax_logits(config_json: dict, weights: dict, token_ids: np.ndarray) -> np.ndarray:
    import jax.numpy as jnp

    config = llama.config_from_hf(config_json)
    arrays = {name: jnp.asarray(values) for name, values in weights.items()}
    hidden = llama.embed(arrays, jnp.asarray(token_ids))
    for index in range(config.layers):
        prefix = llama.layer_prefix(index)
        layer = {n.removeprefix(prefix): w for n, w in arrays.items() if n.startswith(prefix)}
        hidden = llama.layer(config, layer, hidden, llama.no_tap)
    return np.asarray(llama.logits(config, arrays, hidden))
