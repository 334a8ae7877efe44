"""Rotary frequencies from HF's config, for the variants that differ in their numbers only."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from prox24._models.spec import Rope
from prox24.errors import UnsupportedModelError

Parameters = Mapping[str, Any]
Frequencies = NDArray[Any]


def read_rope(
    hf: PreTrainedConfig,
    head_dim: int,
    layer_type: str | None = None,
    *,
    partly_rotated: bool = False,
) -> Rope:
    """The rotary positions of a config; its rope_parameters may have a set for each layer type.

    For a `partly_rotated` family, partial_rotary_factor applies to every rope type. For other
    families it applies to every type but "default".
    """
    hf.standardize_rope_params()  # A field of the config precedes the same field of its rope.
    given: Parameters = hf.rope_parameters
    given = given.get(layer_type) or given if layer_type else given
    kind = given.get("rope_type") or "default"
    if kind not in KINDS:
        supported = ", ".join(map(repr, KINDS))
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported; supported are {supported}"
        )
    is_read = partly_rotated or kind != "default"
    part = given.get("partial_rotary_factor") if is_read else None
    part = 1.0 if part is None else part
    if not 0 < part <= 1:
        raise UnsupportedModelError(f"partial_rotary_factor {part} is not supported")
    rotated = int(head_dim * part)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    with np.errstate(all="ignore"):
        frequencies = 1 / np.float32(given["rope_theta"]) ** exponents
        rope = KINDS[kind](frequencies, given, hf)
    if not np.isfinite([rope.scale, *rope.frequencies, *(rope.long or ())]).all():
        raise UnsupportedModelError(f"the rotary frequencies of rope type {kind!r} are not finite")
    return rope


def _rope(frequencies: Frequencies, scale: float = 1.0) -> Rope:
    return Rope(tuple(frequencies.tolist()), scale)


def _llama3(frequencies: Frequencies, given: Parameters, hf: PreTrainedConfig) -> Rope:
    """Keeps high frequencies, divides low ones by the factor, and blends between."""
    del hf
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return _rope(_blend(kept, frequencies, given["factor"]))


def _yarn(frequencies: Frequencies, given: Parameters, hf: PreTrainedConfig) -> Rope:
    """Blends kept and divided frequencies by their turns in the original context.

    The blend is linear in the index of the frequency.

    References:
      "YaRN: Efficient Context Window Extension of Large Language Models", arXiv 2309.00071.
    """
    original = given["original_max_position_embeddings"]
    factor = given.get("factor") or hf.max_position_embeddings / original
    rotated, theta = 2 * len(frequencies), given["rope_theta"]

    def index(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(given.get("beta_fast") or 32), index(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    last = last + 0.001 if first == last else last
    ramp = (np.arange(len(frequencies), dtype=np.float32) - first) / (last - first)
    kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    return _rope(_blend(kept, frequencies, factor), _yarn_scale(given, factor))


def _yarn_scale(given: Parameters, factor: float) -> float:
    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    both = given.get("mscale") and given.get("mscale_all_dim")
    default = scale(given["mscale"]) / scale(given["mscale_all_dim"]) if both else scale(1.0)
    return given.get("attention_factor") or default


def _longrope(frequencies: Frequencies, given: Parameters, hf: PreTrainedConfig) -> Rope:
    """Divides each frequency by a number, and by another number beyond the original context.

    References:
      "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", arXiv 2402.13753.
    """
    original = given["original_max_position_embeddings"]
    factor = given.get("factor") or hf.max_position_embeddings / original
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short = frequencies / np.asarray(given["short_factor"], np.float32)
    long = frequencies / np.asarray(given["long_factor"], np.float32)
    rope = _rope(short, given.get("attention_factor") or default)
    return rope._replace(long=tuple(long.tolist()), switch=original)


def _blend(kept: Frequencies, frequencies: Frequencies, factor: float) -> Frequencies:
    return kept * frequencies + (1 - kept) * frequencies / np.float32(factor)


KINDS: dict[str, Callable[[Frequencies, Parameters, PreTrainedConfig], Rope]] = {
    "default": lambda frequencies, given, hf: _rope(frequencies),
    "linear": lambda frequencies, given, hf: _rope(frequencies / np.float32(given["factor"])),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
