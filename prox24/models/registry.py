"""From a config.json to the module that computes it."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from prox24.errors import UnsupportedModelError
from prox24.models import llama

FAMILIES: dict[str, ModuleType] = {"llama": llama}


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The module that computes a model: `config_from_hf`, `embed`, `layer`, `logits` and the rest.

    Raises:
      UnsupportedModelError: names the model_type and the supported ones.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type {kind!r} is not supported; supported: {supported}")
    return FAMILIES[kind]
