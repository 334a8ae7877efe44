"""The parts of HF's config that all families read: heads, positions, windows, MLPs."""

import functools
import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from prox24._models.decoder import ACTIVATIONS
from prox24._models.rope import read_rope
from prox24._models.spec import (
    MLP,
    Attention,
    Config,
    Embedding,
    Experts,
    Head,
    Layer,
    Names,
    Norm,
    Residual,
    Rope,
)
from prox24.errors import UnsupportedModelError


def decoder(
    hf: PreTrainedConfig,
    attentions: Callable[[int], Attention] | None = None,
    mlps: Callable[[int], MLP] | None = None,
    norm: Norm | None = None,
    *,
    residual: Residual = Residual(),
    embedding: Embedding = Embedding(),
    head: Head | None = None,
    names: Names = Names(),
) -> Config:
    """A decoder; `attentions` and `mlps` give each layer's parts by its number, default Llama's."""
    must_be(hf, is_causal=True, use_bidirectional_attention=False)
    attentions, mlps = attentions or attention(hf), mlps or gated(hf)
    norm, head = norm or Norm("rms", hf.rms_norm_eps), head or Head(hf.tie_word_embeddings)
    layers = tuple(
        Layer(hf.hidden_size, norm, attentions(index), mlps(index), residual)
        for index in range(hf.num_hidden_layers)
    )
    positions = getattr(hf, "max_position_embeddings", None)
    if positions is not None and (type(positions) is not int or positions < 1):
        raise UnsupportedModelError(f"max_position_embeddings {positions!r} is not a number")
    return Config(hf.vocab_size, hf.hidden_size, norm, layers, embedding, head, names, positions)


def attention(
    hf: PreTrainedConfig, *, partly_rotated: bool = False, **changes: Any
) -> Callable[[int], Attention]:
    """The attention of each layer, from the config's heads, biases, rotary positions and windows.

    `changes` replace fields of `Attention`. By default the output projection has a bias if q, k and
    v have one.
    """
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    bias = changes.get("bias", _declared(hf, "attention_bias") or False)

    @functools.cache
    def rope(kind: str | None) -> Rope:
        return read_rope(hf, head_dim, kind, partly_rotated=partly_rotated)

    def of_layer(index: int) -> Attention:
        kind = _layer_type(hf, index)
        settings: dict[str, Any] = {
            "heads": heads,
            "key_value_heads": _declared(hf, "num_key_value_heads") or heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "bias": bias,
            "output_bias": bias,
            "window": _declared(hf, "sliding_window") if kind != "full_attention" else None,
        }
        if "rope" not in changes:
            settings["rope"] = rope(kind)
        found = Attention(**(settings | changes))
        keys, window = found.key_value_heads, found.window
        if type(keys) is not int or keys < 1 or heads % keys:
            raise UnsupportedModelError(f"{keys!r} heads of keys for {heads} heads of queries")
        if window is not None and (type(window) is not int or window < 1):
            raise UnsupportedModelError(f"a sliding window of {window!r} tokens")
        return found

    return of_layer


def _declared(hf: PreTrainedConfig, field: str) -> Any:
    """A field that the family's config class declares; None for any other field of a config."""
    return getattr(hf, field) if hasattr(type(hf), field) else None


def _layer_type(hf: PreTrainedConfig, index: int) -> str | None:
    kinds = _declared(hf, "layer_types")
    if kinds is None:
        return None
    if kinds[index] not in ("full_attention", "sliding_attention"):
        raise UnsupportedModelError(f"layer type {kinds[index]!r} is not supported")
    return str(kinds[index])


def mlp(width: int, activation: str, **settings: Any) -> Callable[[int], MLP]:
    """An MLP for every layer; raises UnsupportedModelError for an unknown activation."""
    if activation not in ACTIVATIONS:
        supported = ", ".join(map(repr, ACTIVATIONS))
        raise UnsupportedModelError(
            f"activation {activation!r} is not supported; supported are {supported}"
        )
    return lambda index: MLP(width, activation, **settings)


def gated(hf: PreTrainedConfig, **settings: Any) -> Callable[[int], MLP]:
    """An MLP with a gate, with the width, activation and biases of the config."""
    bias = _declared(hf, "mlp_bias") or False
    return mlp(hf.intermediate_size, hf.hidden_act, bias=bias, **settings)


def experts(number: int, per_token: int, normalised: bool) -> Experts:
    """The experts of a mixture; `per_token` must be between 1 and `number`."""
    if not 1 <= per_token <= number:
        raise UnsupportedModelError(f"{per_token} of {number} experts for each token do not exist")
    return Experts(number, per_token, normalised)


def must_be(hf: PreTrainedConfig, **settings: Any) -> None:
    """Raises UnsupportedModelError if a field of the config differs from its given value."""
    for name, value in settings.items():
        given = getattr(hf, name, value)
        if (given or None) != (value or None):
            raise UnsupportedModelError(
                f"{name} {given!r} of {hf.model_type} models is not supported, only {value!r}"
            )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 i / n) for the first n heads, n the largest power of 2; then every second of 2 n.

    References:
      "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
      arXiv 2108.12409.

    Example:
      >>> alibi_slopes(6)
      (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rest = [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return tuple(first + rest)
