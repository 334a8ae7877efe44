"""Text generation, token by token; a cache holds the keys and values of the tokens before.

A pass of `advance` runs a few compiled functions: the embedding, one for each kind of layer, the
head. They are compiled for the prompt and for single tokens, and serve any number of tokens and of
equal layers. One program with a loop over tokens or layers has two costs. Its compile time grows
with the number of layers, and XLA converts the weights of all layers to float32 at once.
"""

import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from prox24._models import decoder, spec
from prox24._models.decoder import Past
from prox24._models.spec import Config, Layer
from prox24.errors import PromptError, Prox24Error


class ModelWeights(NamedTuple):
    """All weights of a decoder, in any floating dtype; linears of layers may be packed."""

    outer: dict[str, Array]  # see `spec.embedding_shapes` and `spec.head_shapes`
    layers: list[dict[str, Any]]  # see `spec.layer_shapes`


class KeysValues(NamedTuple):
    """The cache of a layer: each float32, (batch, key heads, capacity, head_dim), by position."""

    keys: Array
    values: Array


Cache = list[KeysValues]
"""The cache of every layer."""


def empty_cache(config: Config, batch: int, capacity: int) -> Cache:
    """An empty cache for texts of at most `capacity` tokens."""
    heads = [layer.attention for layer in config.layers]
    shapes = [(batch, own.key_value_heads, capacity, own.head_dim) for own in heads]
    return [KeysValues(*(jnp.zeros(shape, jnp.float32) for _ in range(2))) for shape in shapes]


def advance(
    config: Config, weights: ModelWeights, cache: Cache, tokens: ArrayLike, start: ArrayLike
) -> tuple[Array, Cache]:
    """The logits (batch, vocabulary) after the next tokens (batch, length), and the longer cache.

    `start`, an int32 scalar, is the number of tokens in the cache. The cache is donated: do not use
    it again. `config` must be fixed to the capacity of the cache by `spec.at_length`. To compile
    everything as one program, use `jax.jit(advance, static_argnums=0, donate_argnums=2)`.
    """
    hidden = decoder.embed_program(config, weights.outer, tokens, start)
    extended: Cache = []
    for layer, own, cached in zip(config.layers, weights.layers, cache, strict=True):
        hidden, joined = _layer(layer, own, hidden, cached, start)
        extended.append(joined)
    return _logits(config, weights.outer, hidden[:, -1:])[:, 0], extended


_logits = jax.jit(decoder.logits, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _layer(
    layer: Layer, weights: dict[str, Array], hidden: Array, cached: KeysValues, start: Array
) -> tuple[Array, KeysValues]:
    """Compiled once for equal layers."""
    joined: list[KeysValues] = []

    def join(keys: Array, values: Array) -> KeysValues:
        parts = zip(cached, (keys, values), strict=True)
        joined.append(
            KeysValues(*(lax.dynamic_update_slice_in_dim(*pair, start, axis=2) for pair in parts))
        )
        return joined[0]

    hidden = decoder.layer(layer, weights, hidden, decoder.no_tap, Past(start, join))
    return hidden, joined[0]


@jax.jit
def choose(logits: Array, key: Array, temperature: Array | float, top_p: Array | float) -> Array:
    """The next token of each text, int32 of shape (batch,); -1 where logits are NaN.

    At temperature 0 it is the most probable token. Otherwise it is drawn from the nucleus with the
    probabilities softmax(logits / temperature). The nucleus is the smallest set of most probable
    tokens with a total probability of at least `top_p`. Ties with its last token belong to it.

    References:
      "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
    """

    def most_probable() -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        # The largest logit becomes 0, so that no temperature is too small.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        kept = lax.cond(top_p < 1, lambda: _nucleus(scaled, top_p), lambda: scaled)
        return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)

    chosen = lax.cond(temperature > 0, drawn, most_probable)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, chosen)


def _nucleus(logits: Array, top_p: Array | float) -> Array:
    """Logits with -inf for the tokens outside the nucleus."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Nothing is before the most probable token, and a number below float32's smallest is zero.
    within = before < jnp.maximum(top_p, jnp.finfo(before.dtype).tiny)
    least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def generate(
    config: Config,
    weights: ModelWeights,
    prompts: ArrayLike,
    tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[NDArray[np.int32]]:
    """Continues prompts (batch, length), and yields the next token of each, int32 (batch,).

    A `stop` token ends a text. The text repeats it until all texts have ended. Products are
    computed in float32 for every dtype of the weights. A packed linear rounds its inputs and
    results to the dtype of its weight.

    Raises:
      PromptError: the model cannot continue the prompts, see `check_prompts`.
      Prox24Error: logits are NaN.
      ValueError: a number is out of its range, or the prompts differ in length.
    """
    given = np.asarray(prompts)
    check_prompts(config, given, tokens)
    text = given.astype(np.int32)
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is negative")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not above 0 and at most 1")
    key = jax.random.key(seed)
    ended = np.zeros(len(text), bool)
    for capacity in _capacities(config, text.shape[1], text.shape[1] + tokens - 1):
        fixed = spec.at_length(config, capacity)
        cache = empty_cache(config, len(text), capacity)
        unseen = text
        while text.shape[1] <= capacity:
            length = text.shape[1]
            start = np.int32(length - unseen.shape[1])
            logits, cache = advance(fixed, weights, cache, unseen, start)
            drawn = choose(logits, jax.random.fold_in(key, length), temperature, top_p)
            last = np.where(ended, text[:, -1], drawn)
            if last.min() < 0:
                raise Prox24Error(
                    f"the model's logits after {length} tokens are NaN: a value overflows, as in "
                    "float16, or the weights are damaged"
                )
            yield last
            ended |= np.isin(last, list(stop))
            text = np.concatenate([text, last[:, None]], axis=1)
            if ended.all():
                return
            unseen = last[:, None]


def check_prompts(config: Config, prompts: NDArray[Any], tokens: int) -> None:
    """Raises PromptError unless a model can continue the prompts by `tokens` tokens."""
    if tokens < 1:
        raise ValueError(f"{tokens} tokens to generate are fewer than one")
    if prompts.ndim != 2:
        raise PromptError(f"prompts of shape {prompts.shape} are not (batch, length)")
    if not prompts.size:
        raise PromptError("the prompt is empty")
    if not np.issubdtype(prompts.dtype, np.integer):
        raise PromptError(f"the prompt's ids are {prompts.dtype}, not integers")
    if prompts.min() < 0 or prompts.max() >= config.vocabulary:
        raise PromptError(f"the prompt has ids that are not among the {config.vocabulary} tokens")
    length = prompts.shape[1]
    if config.positions is not None and length + tokens > config.positions:
        raise PromptError(
            f"a prompt of {length} tokens and {tokens} to generate are more than the model's "
            f"{config.positions} positions"
        )


def _capacities(config: Config, first: int, last: int) -> list[int]:
    """The lengths of the caches, one after the other: past a switch of `Rope` all keys change."""
    return [*(switch for switch in spec.switches(config) if first <= switch < last), last]
