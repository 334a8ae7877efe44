"""The Llama family as pure functions: Llama 1 to 3.1, SmolLM2, TinyLlama.

Weights are dicts of arrays under HF's tensor names, linears in HF's (out, in) layout. A layer's
dict holds the names behind "model.layers.N.". Everything is computed in float32.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24.errors import UnsupportedModelError

Weights = Mapping[str, Array]
Tap = Callable[[str, Array], None]

PRECISION = "highest"

LINEAR_INPUTS: dict[str, str] = {
    "self_attn.q_proj": "attention_input",
    "self_attn.k_proj": "attention_input",
    "self_attn.v_proj": "attention_input",
    "self_attn.o_proj": "attention_output",
    "mlp.gate_proj": "mlp_input",
    "mlp.up_proj": "mlp_input",
    "mlp.down_proj": "mlp_activation",
}
"""The linears of a layer in order of use, each with the name under which `tap` sees its input."""


class Llama3Scaling(NamedTuple):
    """Llama 3.1's rope scaling: low frequencies divided by `factor`, high ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Config(NamedTuple):
    """What the computation depends on; hashable, so that it is a static argument under jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    norm_epsilon: float
    rope_theta: float
    rope_factor: float
    rope_scaling: Llama3Scaling | None
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool


def config_from_hf(config: Mapping[str, Any]) -> Config:
    """Reads HF's config.json, of transformers 4 (rope_scaling) or 5 (rope_parameters).

    Args:
      config: the decoded JSON object, with model_type "llama".

    Raises:
      UnsupportedModelError: a rope type or an activation that has no implementation here, or a
        field that is missing.

    Example:
      >>> from transformers import LlamaConfig
      >>> config_from_hf(LlamaConfig(num_hidden_layers=2).to_dict()).layers
      2
    """
    try:
        heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"hidden_act {activation!r} is not supported, only 'silu'")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_factor, rope_scaling = _rope_scaling(rope)
        return Config(
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden_size // heads,
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_factor=rope_factor,
            rope_scaling=rope_scaling,
            tied_head=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"config.json has no field {error}") from error


def _rope_scaling(rope: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return 1.0, None
    if kind == "linear":
        return float(rope["factor"]), None
    if kind == "llama3":
        return 1.0, Llama3Scaling(*(rope[field] for field in Llama3Scaling._fields))
    raise UnsupportedModelError(
        f"rope type {kind!r} is not supported; supported are 'default', 'linear', 'llama3'"
    )


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the computation reads."""
    queries = config.heads * config.head_dim
    keys = config.key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for part, has_bias in (("self_attn", config.attention_bias), ("mlp", config.mlp_bias)):
        for linear in LINEAR_INPUTS:
            if has_bias and linear.startswith(part):
                layer[f"{linear}.bias"] = layer[f"{linear}.weight"][:1]
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer_prefix(index)}{name}": shape
        for index in range(config.layers)
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def layer_prefix(index: int) -> str:
    """What HF puts before the names of a layer's tensors."""
    return f"model.layers.{index}."


def embed(weights: Weights, tokens: Array) -> Array:
    """Token ids (batch, length) to hidden states (batch, length, hidden), float32."""
    return weights["model.embed_tokens.weight"][tokens].astype(jnp.float32)


def layer(config: Config, weights: Weights, hidden: Array, tap: Tap) -> Array:
    """One decoder layer: causal grouped-query attention, then the gated MLP, each with a residual.

    Args:
      config: static.
      weights: the layer's tensors, named as behind `layer_prefix`.
      hidden: shape (batch, length, hidden), float32.
      tap: called with the name and the value (batch, length, in) of every input of a linear, as
        `LINEAR_INPUTS` names them. Pass `no_tap` to observe nothing.

    Returns:
      Hidden states of the same shape.
    """
    x = _rms_norm(hidden, weights["input_layernorm.weight"], config.norm_epsilon)
    tap("attention_input", x)
    x = _attention(
        config,
        _linear(weights, "self_attn.q_proj", x),
        _linear(weights, "self_attn.k_proj", x),
        _linear(weights, "self_attn.v_proj", x),
    )
    tap("attention_output", x)
    hidden = hidden + _linear(weights, "self_attn.o_proj", x)

    x = _rms_norm(hidden, weights["post_attention_layernorm.weight"], config.norm_epsilon)
    tap("mlp_input", x)
    gate = jax.nn.silu(_linear(weights, "mlp.gate_proj", x))
    x = gate * _linear(weights, "mlp.up_proj", x)
    tap("mlp_activation", x)
    return hidden + _linear(weights, "mlp.down_proj", x)


def no_tap(name: str, x: Array) -> None:
    """Observes nothing."""
    del name, x


def logits(config: Config, weights: Weights, hidden: Array) -> Array:
    """Hidden states (batch, length, hidden) to float32 logits (batch, length, vocabulary)."""
    x = _rms_norm(hidden, weights["model.norm.weight"], config.norm_epsilon)
    head = "model.embed_tokens" if config.tied_head else "lm_head"
    return _linear(weights, head, x)


def _linear(weights: Weights, name: str, x: Array) -> Array:
    weight = weights[f"{name}.weight"].astype(jnp.float32)
    y = jnp.einsum("bti,oi->bto", x, weight, precision=PRECISION)
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(jnp.float32)[None, None, :]


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + epsilon) * weight.astype(jnp.float32)[None, None, :]


def _attention(config: Config, queries: Array, keys: Array, values: Array) -> Array:
    batch, length, _ = queries.shape
    group = config.heads // config.key_value_heads
    angles = _rope_angles(config, length)[None, None, :, :]

    def heads_first(x: Array, heads: int) -> Array:
        return x.reshape(batch, length, heads, config.head_dim).transpose(0, 2, 1, 3)

    queries = _rotate(heads_first(queries, config.heads), angles)
    keys = _rotate(heads_first(keys, config.key_value_heads), angles)
    values = heads_first(values, config.key_value_heads)
    # The queries that share a key head are rows of one matrix product.
    shared = (batch, config.key_value_heads, group * length)
    queries = queries.reshape(*shared, config.head_dim) / math.sqrt(config.head_dim)
    scores = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, precision=PRECISION)
    scores = scores.reshape(batch, config.heads, length, length)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    probabilities = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    probabilities = probabilities.reshape(*shared, length)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", probabilities, values, precision=PRECISION)
    mixed = mixed.reshape(batch, config.heads, length, config.head_dim).transpose(0, 2, 1, 3)
    return mixed.reshape(batch, length, config.heads * config.head_dim)


def _rope_angles(config: Config, length: int) -> Array:
    """Rotation angles (length, head_dim / 2), positions in tokens from 0."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1 / (config.rope_theta**exponents) / config.rope_factor
    if config.rope_scaling is not None:
        frequencies = _llama3_frequencies(frequencies, config.rope_scaling)
    return jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None, :]


def _llama3_frequencies(frequencies: Array, scaling: Llama3Scaling) -> Array:
    """Keeps short wavelengths, divides long ones by the factor, blends between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0, 1)
    return blend * frequencies + (1 - blend) * frequencies / scaling.factor


def _rotate(x: Array, angles: Array) -> Array:
    """Rotates the pairs (x[i], x[i + head_dim / 2]), HF's convention."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
