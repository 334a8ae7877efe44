"""The decoder of every family, as pure functions of its weights.

A layer's weights are a dict with the names of `prox24._models.spec`. All computation is in float32,
except products with `Packed24` or `InBfloat16` weights.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24._core.precision import einsum
from prox24._models.spec import (
    MLP,
    Alibi,
    Attention,
    Config,
    Layer,
    Norm,
    Rope,
    expert_names,
    head_weight,
)
from prox24.errors import UnsupportedModelError
from prox24.packed import Packed24, matmul

Weights = Mapping[str, Array]

Tap = Callable[[str, Array], None]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""The activations by their HF names."""


LONG = 512
"""Windows of fewer tokens have one block of queries, since four take longer to compile."""


class Past(NamedTuple):
    """The text before the tokens of a pass.

    `join` takes the keys and values of the tokens, each (batch, key heads, length, head_dim). It
    returns the keys and values of all positions from 0. Positions after the tokens are masked.
    """

    length: Array | int  # number of tokens before; an int32 scalar if traced
    join: Callable[[Array, Array], tuple[Array, Array]]


NO_PAST = Past(0, lambda keys, values: (keys, values))
"""The past of whole texts: none."""


def embed(config: Config, weights: Weights, tokens: Array, start: Array | int = 0) -> Array:
    """Token ids (batch, length), the first at `start`, to hidden states (batch, length, hidden).

    Raises:
      UnsupportedModelError: there are more tokens than rows in the table of positions.
    """
    length, embedding = tokens.shape[1], config.embedding
    hidden = weights["embed_tokens.weight"][tokens].astype(jnp.float32) * embedding.scale
    if embedding.positions:
        positions = embedding.positions - embedding.offset
        if length > positions:
            raise UnsupportedModelError(
                f"windows of {length} tokens are longer than the model's {positions} positions"
            )
        table = weights["embed_positions.weight"]
        rows = jax.lax.dynamic_slice_in_dim(table, embedding.offset + start, length)
        hidden = hidden + rows.astype(jnp.float32)[None]
    return _norm(config.norm, weights, "embed_norm" if embedding.norm else None, hidden)


embed_program = jax.jit(embed, static_argnums=0)
"""`embed`, compiled alone."""


def layer(spec: Layer, weights: Weights, hidden: Array, tap: Tap, past: Past = NO_PAST) -> Array:
    """One decoder layer: hidden states (batch, length, hidden), float32, to the same shape.

    `tap` is called for every input of a linear, with its name in `linear_inputs` and its value
    (batch, length, in). The inputs of an expert are zero for tokens routed to other experts.
    """
    residual = spec.residual

    def norm(name: str | None, x: Array) -> Array:
        return _norm(spec.norm, weights, name, x)

    x = norm(residual.before_attention, hidden)
    tap("attention_input", x)
    x = _attention(spec.attention, spec.norm, weights, x, past)
    tap("attention_output", x)
    x = _affine(weights, "self_attn.o_proj", x)
    attended = hidden + residual.scale * norm(residual.after_attention, x)

    x = norm(residual.before_mlp, hidden if residual.parallel else attended)
    x = _mixture(spec.mlp, weights, x, tap) if spec.mlp.experts else _mlp(spec.mlp, weights, x, tap)
    return attended + residual.scale * norm(residual.after_mlp, x)


def no_tap(name: str, x: Array) -> None:
    """Observes nothing."""
    del name, x


def logits(config: Config, weights: Weights, hidden: Array) -> Array:
    """Hidden states (batch, length, hidden) to float32 logits (batch, length, vocabulary)."""
    head = config.head
    x = _norm(config.norm, weights, "norm", hidden)
    y = linear(x, weights[head_weight(head)])
    if head.bias:
        y = y + weights["lm_head.bias"].astype(jnp.float32)[None, None, :]
    return _softcap(y / head.divisor, head.softcap)


class InFloat32(NamedTuple):
    """A weight of a linear with float32 products, and gradients that are fast on CPUs."""

    weight: Array  # shape (out, in)


class InBfloat16(NamedTuple):
    """A weight of a linear with bfloat16 products, forwards and backwards."""

    weight: Array  # shape (out, in), bfloat16


def computed_in(compute_dtype: str, weights: Weights, linears: Collection[str]) -> dict[str, Any]:
    """The weights for training: those named in `linears` become `InFloat32` or `InBfloat16`."""

    def computed(weight: Array) -> InFloat32 | InBfloat16:
        if compute_dtype == "float32":
            return InFloat32(weight)
        return InBfloat16(weight.astype(jnp.bfloat16))

    return {name: computed(w) if name in linears else w for name, w in weights.items()}


def linear(x: Array, weight: Array | Packed24 | InFloat32 | InBfloat16) -> Array:
    """x W^T of x (batch, length, in) and W (out, in), in float32.

    All products with the weight of a linear are computed here. A packed weight needs `x` in its own
    dtype: `x` and the product are rounded to it. With an `InBfloat16` weight, operands are rounded
    to bfloat16, also for the gradients, and sums are float32.
    """
    if isinstance(weight, Packed24):
        return matmul(x.astype(weight.dtype), weight).astype(jnp.float32)
    if isinstance(weight, InBfloat16):
        return jax.custom_gradient(_product)(x, weight.weight)
    if isinstance(weight, InFloat32):
        return jax.custom_gradient(_product)(x, weight.weight.astype(jnp.float32))
    return einsum("bti,oi->bto", x, weight.astype(jnp.float32))


def _product(x: Array, weight: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x W^T, and the function for its gradients. Operands have the dtype of W in both.

    JAX's own gradients of a bfloat16 W would multiply float32 cotangents with bfloat16 operands,
    and XLA does this in float32. Those of a float32 W are slow on CPUs.
    """
    (out, width), x = weight.shape, x.astype(weight.dtype)

    def backwards(cotangent: Array) -> tuple[Array, Array]:
        # XLA's CPU backend computes the first operand again, column by column, which is slow. So
        # the operand with fewer columns comes first. CPUs have no such product in bfloat16.
        if width < out and weight.dtype == jnp.float32:
            of_weight = _sums("bti,bto->io", x, cotangent, weight.dtype).T
        else:
            of_weight = _sums("bto,bti->oi", cotangent, x, weight.dtype)
        of_x = _sums("bto,oi->bti", cotangent, weight, weight.dtype)
        return of_x, of_weight.astype(weight.dtype)

    return _sums("bti,oi->bto", x, weight, weight.dtype), backwards


def _sums(axes: str, a: Array, b: Array, dtype: Any) -> Array:
    """An einsum of operands in `dtype`, float32 or bfloat16, with float32 sums."""
    if dtype == jnp.float32:
        return einsum(axes, a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _affine(weights: Weights, name: str, x: Array) -> Array:
    y = linear(x, weights[f"{name}.weight"])
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(jnp.float32)[None, None, :]


def _norm(norm: Norm, weights: Weights, name: str | None, x: Array) -> Array:
    """Normalises the last axis; the identity without a name."""
    if name is None:
        return x
    if norm.kind == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    square = jnp.mean(jnp.square(x), axis=-1)
    weight = norm.offset + weights[f"{name}.weight"].astype(jnp.float32)
    # On CPUs, gradients of products sum faster than gradients of multiplications.
    x = einsum("...i,...->...i", x, jax.lax.rsqrt(square + norm.epsilon))
    x = einsum("...i,i->...i", x, weight)
    if norm.kind == "layer":
        shape = (1,) * (x.ndim - 1) + weight.shape
        x = x + weights[f"{name}.bias"].astype(jnp.float32).reshape(shape)
    return x


def _softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _mlp(mlp: MLP, weights: Weights, x: Array, tap: Tap, name: str = "mlp") -> Array:
    prefix = "mlp_" if name == "mlp" else f"{name}."
    tap(f"{prefix}input", x)
    activation = ACTIVATIONS[mlp.activation]
    if mlp.fused:
        gate, up = jnp.split(_affine(weights, f"{name}.gate_up_proj", x), 2, axis=-1)
    else:
        up = _affine(weights, f"{name}.up_proj", x)
        gate = _affine(weights, f"{name}.gate_proj", x) if mlp.gated else up
    x = activation(gate) * up if mlp.gated else activation(up)
    tap(f"{prefix}activation", x)
    return _affine(weights, f"{name}.down_proj", x)


def _mixture(mlp: MLP, weights: Weights, x: Array, tap: Tap) -> Array:
    """Every expert computes every token: simple, but experts / per_token times the needed work."""
    experts = mlp.experts
    assert experts is not None
    probabilities = jax.nn.softmax(_affine(weights, "mlp.router", x), axis=-1)
    chosen, indices = jax.lax.top_k(probabilities, experts.per_token)
    if experts.normalised:
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    total = jnp.zeros_like(x)
    for index, name in enumerate(expert_names(experts)):
        routed = indices == index
        share = jnp.sum(jnp.where(routed, chosen, 0), axis=-1, keepdims=True)
        seen = jnp.where(jnp.any(routed, axis=-1, keepdims=True), x, 0)
        total = total + share * _mlp(mlp, weights, seen, tap, name)
    return total


def _attention(attention: Attention, norm: Norm, weights: Weights, x: Array, past: Past) -> Array:
    """Mixed values (batch, length, heads head_dim), before the output projection."""
    batch, length, _ = x.shape
    queries, keys, values = _queries_keys_values(attention, weights, x)

    def normalised(x: Array, name: str) -> Array:
        rows = x.reshape(batch, length, -1) if attention.norm == "rows" else x
        return _norm(norm, weights, name if attention.norm else None, rows).reshape(x.shape)

    queries = normalised(queries, "self_attn.q_norm")
    keys = normalised(keys, "self_attn.k_norm")
    if attention.clip is not None:
        queries, keys, values = (
            jnp.clip(part, -attention.clip, attention.clip) for part in (queries, keys, values)
        )
    queries, keys, values = (part.transpose(0, 2, 1, 3) for part in (queries, keys, values))
    positions = past.length + jnp.arange(length, dtype=jnp.int32)
    if attention.rope is not None:
        cosines, sines = _angles(attention.rope.at_length(length), positions)
        queries, keys = _rotate(queries, cosines, sines), _rotate(keys, cosines, sines)
    queries = queries * attention.scale
    keys, values = past.join(keys, values)
    mixed = [
        _mixed(
            attention,
            queries[:, :, first:end],
            keys[:, :, :seen],
            values[:, :, :seen],
            positions[first:end],
        )
        for first, end, seen in _query_blocks(length, past.length, keys.shape[2])
    ]
    return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3).reshape(batch, length, -1)


def _query_blocks(length: int, past: Array | int, keys: int) -> list[tuple[int, int, int]]:
    """The first query of each block, its end, and the number of keys that it reads.

    Blocks read no keys after their last query: without a past, four compute 5 / 8 of the scores.
    The end of a traced past is not known, so its one block reads all keys.
    """
    if isinstance(past, Array) or length < LONG:
        return [(0, length, keys)]
    bounds = [length * index // 4 for index in range(5)]
    return [(first, end, past + end) for first, end in itertools.pairwise(bounds)]


def _mixed(
    attention: Attention, queries: Array, keys: Array, values: Array, positions: Array
) -> Array:
    """The mean of values for each query, weighted by the softmax of its scores.

    Queries at `positions` have shape (batch, heads, their number, head_dim). Keys and values have
    shape (batch, key heads, positions from 0, head_dim).
    """
    batch, heads, count, width = queries.shape
    key_heads, seen = keys.shape[1:3]
    # The queries that share a key head are rows of one matrix product.
    shared = (batch, key_heads, heads // key_heads * count)
    rows = queries.reshape(*shared, width)
    if count == 1:  # On CPUs two to four times faster; without the barrier XLA swaps the two.
        scores = jax.lax.optimization_barrier(einsum("bhkd,bhqd->bhkq", keys, rows)).mT
    else:
        scores = einsum("bhqd,bhkd->bhqk", rows, keys)
    scores = _softcap(scores.reshape(batch, heads, count, seen), attention.softcap)
    if attention.alibi is not None:
        scores = scores + _alibi(attention.alibi, seen)
    scores = jnp.where(_visible(positions, seen, attention.window), scores, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shares = jnp.exp(scores - largest).reshape(*shared, seen)
    # The sum divides the mixed values, which are usually fewer than the shares.
    mixed = einsum("bhqk,bhkd->bhqd", shares, values) / jnp.sum(shares, axis=-1, keepdims=True)
    return mixed.reshape(queries.shape)


def _queries_keys_values(
    attention: Attention, weights: Weights, x: Array
) -> tuple[Array, Array, Array]:
    """Each of shape (batch, length, its heads, head_dim)."""
    batch, length, _ = x.shape
    heads, key_heads, width = attention.heads, attention.key_value_heads, attention.head_dim

    def by_heads(x: Array) -> Array:
        return x.reshape(batch, length, -1, width)

    if attention.fused is None:
        queries, keys, values = (
            by_heads(_affine(weights, f"self_attn.{part}_proj", x)) for part in "qkv"
        )
        return queries, keys, values
    fused = by_heads(_affine(weights, "self_attn.qkv_proj", x))
    if attention.fused == "rows":
        queries, keys, values = jnp.split(fused, (heads, heads + key_heads), axis=2)
        return queries, keys, values
    group = heads // key_heads
    grouped = fused.reshape(batch, length, key_heads, group + 2, width)
    queries, keys, values = jnp.split(grouped, (group, group + 1), axis=3)
    return by_heads(queries), by_heads(keys), by_heads(values)


def _visible(positions: Array, keys: int, window: int | None) -> Array:
    """Whether a query (row) sees a key (column); bool, shape (1, 1, queries, keys)."""
    ahead = positions[:, None] - jnp.arange(keys, dtype=jnp.int32)[None, :]
    visible = ahead >= 0
    if window is not None:
        visible = visible & (ahead < window)
    return visible[None, None]


def _alibi(alibi: Alibi, keys: int) -> Array:
    """Shape (1, heads, 1, keys)."""
    slopes = jnp.asarray(alibi.slopes, jnp.float32).astype(alibi.dtype)
    bias = slopes[:, None] * jnp.arange(keys).astype(alibi.dtype)[None, :]
    return alibi.scale * bias.astype(jnp.float32)[None, :, None, :]


def _angles(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines, shape (1, 1, positions, rotated entries / 2)."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    angles = angles[None, None]
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def _rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotates the pairs (x[i], x[i + n / 2]) of the first n entries of a head."""
    half = cosines.shape[-1]
    pairs = x[..., : 2 * half].reshape(*x.shape[:-1], 2, half)
    cosines, sines = jnp.stack([cosines, cosines], -2), jnp.stack([-sines, sines], -2)
    # For a concatenation, XLA's CPU backend would choose a half at each entry, which is slow.
    rotated = pairs * cosines + jnp.flip(pairs, -2) * sines
    rotated = rotated.reshape(*x.shape[:-1], 2 * half)
    rest = x[..., 2 * half :]
    return jnp.concatenate([rotated, rest], axis=-1) if rest.size else rotated
