"""From HF's config.json to the settings of the decoder: a function for each family.

`docs/adding-a-model.md` shows how to add a family. A field may change the computation and have no
counterpart in `prox24._models.spec`. Such a field raises an error and is never ignored.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from prox24._models import gpt, llama
from prox24._models.spec import Config, outer_tensor
from prox24.errors import UnsupportedModelError

LIMITS = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**16,
    "num_attention_heads": 2**12,
    "head_dim": 2**12,
}

MLPS = 2**14
"""The most MLPs of a model, experts included: above any known model. It bounds the memory."""

WRONG_VALUE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""The errors of transformers and of families for a field with a value of the wrong kind."""

UNUSED = ("dtype", "torch_dtype", "id2label", "label2id", "num_labels")
"""Unused fields that make transformers import torch, or create as many entries as they say."""

FAMILIES: dict[str, Callable[[PreTrainedConfig], Config]] = {
    "bloom": gpt.bloom,
    "falcon": gpt.falcon,
    "gemma": llama.gemma,
    "gemma2": llama.gemma2,
    "gemma3_text": llama.gemma3,
    "gpt2": gpt.gpt2,
    "gpt_neox": gpt.gpt_neox,
    "granite": llama.granite,
    "llama": llama.llama,
    "mistral": llama.llama,
    "mixtral": llama.mixtral,
    "olmo2": llama.olmo2,
    "olmoe": llama.olmoe,
    "opt": gpt.opt,
    "phi": gpt.phi,
    "phi3": llama.phi3,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "qwen3_moe": llama.qwen3_moe,
    "smollm3": llama.smollm3,
}
"""The families by HF's model_type."""


def config_from_hf(config: Mapping[str, Any], tensors: Collection[str] = ()) -> Config:
    """The decoder of HF's config.json; a missing field has the default of transformers.

    The names of the checkpoint's tensors may lack the prefix that transformers expects.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type {kind!r} is not supported; supported: {supported}")
    _check_sizes(kind, config)
    # transformers changes the lists and dicts that it is given.
    given = copy.deepcopy({name: value for name, value in config.items() if name not in UNUSED})
    try:
        found = FAMILIES[kind](transformers.AutoConfig.for_model(**given))
    except WRONG_VALUE as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise UnsupportedModelError(f"the config of a {kind} model: {reason}") from error
    if sum(layer.mlp.experts.number if layer.mlp.experts else 1 for layer in found.layers) > MLPS:
        raise UnsupportedModelError(f"the config of a {kind} model: more than {MLPS} experts")
    return with_names_of(found, tensors)


def with_names_of(config: Config, tensors: Collection[str]) -> Config:
    """The decoder with the prefix of a checkpoint's names.

    OPT's larger models have the prefix "decoder." instead of "model.decoder.".
    """
    parts = config.names.base.split(".")
    names = [config.names._replace(base=".".join(parts[start:])) for start in range(len(parts))]
    present = (one for one in names if outer_tensor(one, "embed_tokens.weight") in tensors)
    return config._replace(names=next(present, config.names))


def _check_sizes(kind: str, config: Mapping[str, Any]) -> None:
    aliases = CONFIG_MAPPING[kind].attribute_map
    for name, limit in LIMITS.items():
        for key in sorted({name, aliases.get(name, name)}):
            value = config.get(key)
            if value is not None and not (type(value) is int and 0 < value <= limit):
                raise UnsupportedModelError(
                    f"the config of a {kind} model: {key} is {value!r}, "
                    f"not a number from 1 to {limit}"
                )
