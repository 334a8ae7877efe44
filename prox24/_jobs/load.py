"""A checkpoint as a function of its parameters and tokens."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from prox24._jobs import torchax
from prox24._jobs.forward import layer_names, oriented, outer_names
from prox24._models import decoder, spec
from prox24._models.spec import Config
from prox24._trees.products import Apply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model.

    Attributes:
      apply: maps parameters and tokens, int32 of shape (batch, length), to logits, float32 of shape
        (batch, length, vocabulary). Products are float32 at the highest precision.
      params: arrays by HF's names, in the dtypes and layouts of the checkpoint.
      tokenizer: of transformers.
    """

    apply: Apply
    params: dict[str, Array]
    tokenizer: "PreTrainedTokenizerBase"


def load(model: str | Path) -> Loaded:
    """Reads a model as a function of JAX, for `prox24.calibrate`, `prune_params` and training.

    Args:
      model: an HF folder, a GGUF file, or the hub's OWNER/NAME[@REVISION].

    Returns:
      A `Loaded`, which unpacks to `apply, params, tokenizer`.

    Raises:
      CheckpointError: the model cannot be read.
      UnsupportedModelError: the model has no forward pass here, and torchax cannot run it.
    """
    checkpoint = torchax.open_any(model)
    config = checkpoint.decoder
    if config is None:
        return Loaded(*torchax.loaded(checkpoint), checkpoint.load_tokenizer())
    params = {name: jnp.asarray(checkpoint.read(name)) for name in spec.tensor_shapes(config)}
    return Loaded(functools.partial(_logits, config), params, checkpoint.load_tokenizer())


def _logits(config: Config, params: dict[str, Array], tokens: Array) -> Array:
    outer = {name: params[tensor] for name, tensor in outer_names(config).items()}
    hidden = decoder.embed(config, outer, tokens)
    for index, layer in enumerate(config.layers):
        names = layer_names(config, index).items()
        own = {name: oriented(config, params[tensor]) for name, tensor in names}
        hidden = decoder.layer(layer, own, hidden, decoder.no_tap)
    return decoder.logits(config, outer, hidden)
