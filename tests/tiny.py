"""Tiny checkpoints of every family with random weights that are the same on every machine."""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from prox24._models import decoder, spec
from prox24._models.families import config_from_hf
from prox24._models.generate import ModelWeights
from prox24._pruning import loop
from prox24._pruning.report import LinearReport

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
VOCABULARY = 260
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "partial_rotary_factor": 1.0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
VARIANTS: dict[str, dict] = {
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
    "yarn_rope": {"rope_parameters": YARN_ROPE},
    "large_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "loose_norm": {"rms_norm_eps": 1e-2},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2},
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "num_key_value_heads": 2},
    "granite": {
        "model_type": "granite",
        "num_key_value_heads": 4,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2, "sliding_window": 8},
    "phi3_short": {
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 64},
        "original_max_position_embeddings": 64,
    },
    "phi3_long": {
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 32},
        "original_max_position_embeddings": 32,
    },
    "gemma": {"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        },
    },
    "gpt2": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True, "n_inner": 48},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "gpt_neox_sequential": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "falcon": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
    },
    "falcon_one_key_head": {"model_type": "falcon", "ffn_hidden_size": 48},
    "falcon_alibi": {
        "model_type": "falcon",
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
        "ffn_hidden_size": 48,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 48, "num_attention_heads": 6},
    "phi": {"model_type": "phi", "num_key_value_heads": 2},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "head_dim": 8,
        **EXPERTS,
    },
    "olmoe": {"model_type": "olmoe", "clip_qkv": 0.5, "num_key_value_heads": 2, **EXPERTS},
}
FIRST_OF_FAMILY = {
    changes.get("model_type", "llama"): variant for variant, changes in reversed(VARIANTS.items())
}
SETTINGS = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_dict(variant: str = "llama1", **changes) -> dict:
    config = AutoConfig.for_model(**(SETTINGS | VARIANTS[variant] | changes))
    return json.loads(config.to_json_string(use_diff=False))


def random_weights(config: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    shapes = spec.tensor_shapes(config_from_hf(config))
    generator = np.random.default_rng(24)
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = generator.standard_normal(shape) / np.sqrt(shape[-1])
        if ("norm" in name or "ln_" in name) and not name.endswith("bias"):
            values = 0.1 * generator.standard_normal(shape)
            values += 0 if config["model_type"].startswith("gemma") else 1
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


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a start token, 256, an end token, 257, and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_tiny(
    folder: Path, variant: str = "llama1", dtype: str = "float32", shards: int = 1, **changes
):
    """Writes an HF folder of a config with changes; returns its weights by name."""
    config = config_dict(variant, **changes) | {"torch_dtype": dtype}
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


def write_edited(folder: Path, name: str, place, value, variant: str = "llama1"):
    """Writes a model with another value at a place of a weight; returns its weights."""
    weights = random_weights(config_dict(variant))
    weights[name][place] = value
    return write_folder(folder, config_dict(variant), weights)


def load_folder(folder: Path) -> dict[str, np.ndarray]:
    shards = map(load_file, sorted(folder.glob("*.safetensors")))
    return {name: values for shard in shards for name, values in shard.items()}


def assert_same(read: dict, weights: dict) -> None:
    assert read.keys() == weights.keys()
    for name, values in weights.items():
        assert read[name].dtype == values.dtype
        assert read[name].tobytes() == values.tobytes()


def tokens(batch: int = 2, length: int = 48) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


class Pruned(NamedTuple):
    """What the loop yields: values by tensor, and the reports."""

    tensors: dict[str, np.ndarray]
    reports: list[LinearReport]


def pruned_by(runner, recipe, **options) -> Pruned:
    found = list(loop.prune_stages(runner, recipe, **options))
    reports = [report for tensor in found for report in tensor.reports]
    return Pruned({tensor.name: tensor.values for tensor in found}, reports)


def rounding(values: np.ndarray, layers: int = 2, width: int = 64) -> float:
    """How far two results in float32 of a model's forward pass may lie apart.

    A sum of K products rounds by at most about sqrt(K) u of its size, u = 2^-24, however a
    processor orders it (Higham and Mary, 2019). A layer has four products in sequence, the head is
    one more, and the two results round independently: their squares add. Three standard deviations.
    """
    products = 2 * (4 * layers + 1)
    return 3 * np.sqrt(products * width) * 2.0**-24 * float(np.abs(values).max())


def assert_close(found, expected, **sizes) -> None:
    """Up to the rounding of a forward pass in float32."""
    atol = rounding(expected, **sizes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def jax_logits(
    config_json: dict, weights: dict, token_ids: np.ndarray, tap=decoder.no_tap
) -> np.ndarray:
    config, (outer, layers) = model_weights(config_json, weights)
    hidden = decoder.embed(config, outer, jnp.asarray(token_ids))
    for layer, own in zip(config.layers, layers, strict=True):
        hidden = decoder.layer(layer, own, hidden, tap)
    return np.asarray(decoder.logits(config, outer, hidden))


def model_weights(config_json: dict, weights: dict) -> tuple[spec.Config, ModelWeights]:
    """The decoder, and its weights as `prox24._models.generate` takes them."""
    config = config_from_hf(config_json, weights)

    def layer_tensor(index: int, name: str):
        values = jnp.asarray(weights[spec.layer_tensor(config.names, index, name)])
        return values.T if config.names.transposed else values

    outer = {
        name: jnp.asarray(weights[spec.outer_tensor(config.names, name)])
        for name in spec.embedding_shapes(config) | spec.head_shapes(config)
    }
    layers = [
        {name: layer_tensor(index, name) for name in spec.layer_shapes(layer)}
        for index, layer in enumerate(config.layers)
    ]
    return config, ModelWeights(outer, layers)


def seen_by_linears(config_json: dict, weights: dict, token_ids: np.ndarray, index: int) -> dict:
    """What the linears of a layer see, (tokens, in) in float64, by the checkpoint's names."""
    config, (outer, layers) = model_weights(config_json, weights)
    seen: dict[str, jnp.ndarray] = {}
    hidden = decoder.embed(config, outer, jnp.asarray(token_ids))
    for layer, own in list(zip(config.layers, layers, strict=True))[: index + 1]:
        hidden = decoder.layer(layer, own, hidden, seen.__setitem__)
    return {
        spec.layer_tensor(config.names, index, f"{linear}.weight"): np.asarray(
            seen[name], np.float64
        ).reshape(-1, seen[name].shape[-1])
        for linear, name in spec.linear_inputs(config.layers[index]).items()
    }
