"""The decoder that every family is a setting of, as pure functions of its weights.

A layer's weights are a dict under the names of this module, whatever the checkpoint calls them
(`Names` translates): linears in (out, in) layout as "self_attn.q_proj.weight", norms as
"input_layernorm.weight". Everything is computed in float32, but for products with weights that are
`Packed24` or `InBfloat16`.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24.core.precision import PRECISION
from prox24.errors import UnsupportedModelError
from prox24.packed import Packed24, matmul

Weights = Mapping[str, Array]
Tap = Callable[[str, Array], None]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""By HF's names."""


class Norm(NamedTuple):
    """x / rms(x) times (offset + weight), or the standardised x times weight plus bias.

    Attributes:
      kind: "rms" or "layer".
      epsilon: added to the mean square or the variance.
      offset: 1 where the checkpoint holds weight - 1, as Gemma's do.
    """

    kind: str
    epsilon: float
    offset: float = 0.0


class Rope(NamedTuple):
    """Rotary positions of the first 2 len(frequencies) entries of a head, in HF's halves.

    Attributes:
      frequencies: radians per position.
      scale: of the cosines and sines.
      long: frequencies of sequences longer than `switch`, if they differ.
      switch: in tokens.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] | None = None
    switch: int = 0

    def at_length(self, length: int) -> "Rope":
        """What it is in a text of so many tokens, whatever the length of a pass."""
        if self.long is None or length <= self.switch:
            return Rope(self.frequencies, self.scale)
        return Rope(self.long, self.scale)


class Alibi(NamedTuple):
    """scale slope_h j is added to the score of a key at position j in head h.

    Attributes:
      slopes: one for each head.
      scale: applied after rounding.
      dtype: in which slopes times positions are rounded.
    """

    slopes: tuple[float, ...]
    scale: float = 1.0
    dtype: str = "float32"


class Attention(NamedTuple):
    """Causal attention with grouped heads.

    Attributes:
      heads: of the queries.
      key_value_heads: a divisor of `heads`.
      head_dim: entries of a head.
      scale: of the scores.
      fused: None for separate q, k and v; "rows" for one linear of all queries, then all keys,
        then all values; "groups" for one in which the queries of a key head are followed by its
        key and its value.
      bias: of q, k and v.
      output_bias: of the output projection.
      norm: "heads" to normalise each head of q and k, "rows" to normalise all heads together.
      clip: bound on the magnitude of q and k, after their norm, and v.
      rope: rotary positions.
      alibi: linear biases.
      window: keys that a query sees, itself included; all before it if None.
      softcap: c tanh(score / c) takes the place of a score.
    """

    heads: int
    key_value_heads: int
    head_dim: int
    scale: float
    fused: str | None = None
    bias: bool = False
    output_bias: bool = False
    norm: str | None = None
    clip: float | None = None
    rope: Rope | None = None
    alibi: Alibi | None = None
    window: int | None = None
    softcap: float | None = None


class Experts(NamedTuple):
    """A mixture: each token goes to the `per_token` experts of largest router probability.

    Attributes:
      number: of experts.
      per_token: experts that a token goes to.
      normalised: whether their probabilities are divided by their sum.
    """

    number: int
    per_token: int
    normalised: bool


class MLP(NamedTuple):
    """down(act(gate(x)) up(x)), or down(act(up(x))) without a gate.

    Attributes:
      width: between the linears.
      activation: a key of `ACTIVATIONS`.
      gated: whether there is a gate.
      fused: one linear whose rows are the gate's, then up's.
      bias: of every linear.
      experts: the mixture of which this is one expert.
    """

    width: int
    activation: str
    gated: bool = True
    fused: bool = False
    bias: bool = False
    experts: Experts | None = None


class Residual(NamedTuple):
    """Where the norms are, by name, and how the branches are added.

    Attributes:
      before_attention: norm of the attention's input.
      after_attention: norm of its output.
      before_mlp: norm of the MLP's input.
      after_mlp: norm of its output.
      parallel: both branches see the layer's input.
      scale: of each branch.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    scale: float = 1.0


class Layer(NamedTuple):
    """All that a layer's computation depends on; hashable. Equal layers share one program."""

    hidden: int
    norm: Norm
    attention: Attention
    mlp: MLP
    residual: Residual = Residual()


class Embedding(NamedTuple):
    """Token embedding times scale, plus learned positions, then a norm.

    Attributes:
      scale: of the embedding.
      positions: rows of the table of positions, 0 if there is none.
      offset: its row for position 0.
      norm: whether a norm follows.
    """

    scale: float = 1.0
    positions: int = 0
    offset: int = 0
    norm: bool = False


class Head(NamedTuple):
    """Logits: a linear over scale, softly capped.

    Attributes:
      tied: the embedding serves as the linear.
      bias: of the linear.
      divisor: of the logits.
      softcap: c tanh(logit / c) takes the place of a logit.
    """

    tied: bool
    bias: bool = False
    divisor: float = 1.0
    softcap: float | None = None


class Names(NamedTuple):
    """What a checkpoint calls the weights; what is not listed has the name it has here.

    Attributes:
      base: prefix of all but the head; some checkpoints of a family lack it, or its first part.
      layers: what comes before the number of a layer.
      layer: pairs of a name here and the checkpoint's, within a layer. "{}" is an expert's number.
      outer: the same outside the layers.
      transposed: linears of layers are stored as (in, out).
    """

    base: str = "model."
    layers: str = "layers"
    layer: tuple[tuple[str, str], ...] = ()
    outer: tuple[tuple[str, str], ...] = ()
    transposed: bool = False


class Config(NamedTuple):
    """A decoder; hashable.

    Attributes:
      vocabulary: rows of the embedding.
      hidden: width of the hidden states.
      norm: every norm of the model.
      layers: in order.
      embedding: what comes before them.
      head: what comes after them.
      names: what a checkpoint calls the weights.
      positions: the most tokens of a text; None if the config does not say.
    """

    vocabulary: int
    hidden: int
    norm: Norm
    layers: tuple[Layer, ...]
    embedding: Embedding
    head: Head
    names: Names
    positions: int | None = None


class Past(NamedTuple):
    """What comes before the tokens of a pass.

    Attributes:
      length: tokens before them, the position of the first of them; an int32 scalar if traced.
      join: from their keys and values, each (batch, key heads, length, head_dim), to those of all
        positions from 0. What is behind theirs is not seen.
    """

    length: Array | int
    join: Callable[[Array, Array], tuple[Array, Array]]


NO_PAST = Past(0, lambda keys, values: (keys, values))
"""Of the tokens of whole texts."""


def linear_inputs(layer: Layer) -> dict[str, str]:
    """The linears of a layer in order of use, each with the name under which `tap` sees its input.

    The router of a mixture is not among them: it is not pruned.
    """
    parts = ["qkv_proj"] if layer.attention.fused else ["q_proj", "k_proj", "v_proj"]
    inputs = {f"self_attn.{part}": "attention_input" for part in parts}
    inputs["self_attn.o_proj"] = "attention_output"
    experts = layer.mlp.experts
    for prefix in ["mlp"] if experts is None else _expert_names(experts):
        source = "mlp_input" if experts is None else f"{prefix}.input"
        activation = "mlp_activation" if experts is None else f"{prefix}.activation"
        inputs |= {f"{prefix}.{part}": source for part in _entry_linears(layer.mlp)}
        inputs[f"{prefix}.down_proj"] = activation
    return inputs


def _expert_names(experts: Experts) -> list[str]:
    return [f"mlp.experts.{index}" for index in range(experts.number)]


def _entry_linears(mlp: MLP) -> list[str]:
    if mlp.fused:
        return ["gate_up_proj"]
    return ["gate_proj", "up_proj"] if mlp.gated else ["up_proj"]


def layer_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a layer; linears are (out, in)."""
    attention, mlp, hidden = layer.attention, layer.mlp, layer.hidden
    queries = attention.heads * attention.head_dim
    keys = attention.key_value_heads * attention.head_dim
    outputs = {
        "qkv_proj": (queries + 2 * keys, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_up_proj": (2 * mlp.width, hidden),
        "gate_proj": (mlp.width, hidden),
        "up_proj": (mlp.width, hidden),
        "down_proj": (hidden, mlp.width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in linear_inputs(layer):
        part = linear.rpartition(".")[2]
        shapes[f"{linear}.weight"] = outputs[part]
        output, within_attention = part == "o_proj", linear.startswith("self_attn")
        if attention.output_bias if output else (attention.bias if within_attention else mlp.bias):
            shapes[f"{linear}.bias"] = outputs[part][:1]
    if mlp.experts is not None:
        shapes["mlp.router.weight"] = (mlp.experts.number, hidden)
    for name in dict.fromkeys(layer.residual[:4]):
        if name is not None:
            shapes |= _norm_shapes(layer.norm, name, hidden)
    if attention.norm is not None:
        widths = (attention.head_dim,) * 2 if attention.norm == "heads" else (queries, keys)
        for name, width in zip(("self_attn.q_norm", "self_attn.k_norm"), widths, strict=True):
            shapes |= _norm_shapes(layer.norm, name, width)
    return shapes


def embedding_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `embed` reads."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocabulary, config.hidden)}
    if config.embedding.positions:
        shapes["embed_positions.weight"] = (config.embedding.positions, config.hidden)
    if config.embedding.norm:
        shapes |= _norm_shapes(config.norm, "embed_norm", config.hidden)
    return shapes


def head_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `logits` reads."""
    shapes = _norm_shapes(config.norm, "norm", config.hidden)
    table = head_weight(config.head)
    shapes[table] = (config.vocabulary, config.hidden)
    if config.head.bias:
        shapes["lm_head.bias"] = (config.vocabulary,)
    return shapes


def _norm_shapes(norm: Norm, name: str, width: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if norm.kind == "layer" else ("weight",)
    return {f"{name}.{part}": (width,) for part in parts}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape, in the checkpoint's terms, of every tensor that the computation reads."""
    shapes = {
        outer_tensor(config.names, name): shape
        for name, shape in (embedding_shapes(config) | head_shapes(config)).items()
    }
    for index, layer in enumerate(config.layers):
        for name, shape in layer_shapes(layer).items():
            stored = shape[::-1] if config.names.transposed else shape
            shapes[layer_tensor(config.names, index, name)] = stored
    return shapes


def layer_tensor(names: Names, index: int, name: str) -> str:
    """What the checkpoint calls a tensor of a layer.

    Example:
      >>> layer_tensor(Names(layer=(("self_attn.o_proj", "self_attn.dense"),)), 3,
      ...              "self_attn.o_proj.weight")
      'model.layers.3.self_attn.dense.weight'
    """
    module, _, part = name.rpartition(".")
    parts = module.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    pattern = ".".join("{}" if part == number else part for part in parts)
    module = dict(names.layer).get(pattern, pattern).replace("{}", number)
    return f"{names.base}{names.layers}.{index}.{module}.{part}"


def outer_tensor(names: Names, name: str) -> str:
    """What the checkpoint calls a tensor outside the layers."""
    module, _, part = name.rpartition(".")
    base = "" if module == "lm_head" else names.base
    return f"{base}{dict(names.outer).get(module, module)}.{part}"


def embed(config: Config, weights: Weights, tokens: Array, start: Array | int = 0) -> Array:
    """Token ids (batch, length) to hidden states (batch, length, hidden), float32.

    Args:
      config: static.
      weights: as `embedding_shapes` lists them.
      tokens: integers.
      start: the position of the first token.

    Raises:
      UnsupportedModelError: there are more tokens than rows in the table of positions.
    """
    length, embedding = tokens.shape[1], config.embedding
    hidden = weights["embed_tokens.weight"][tokens].astype(jnp.float32) * embedding.scale
    if embedding.positions:
        if length > embedding.positions - embedding.offset:
            raise UnsupportedModelError(
                f"windows of {length} tokens are longer than the model's "
                f"{embedding.positions - embedding.offset} positions"
            )
        table = weights["embed_positions.weight"]
        rows = jax.lax.dynamic_slice_in_dim(table, embedding.offset + start, length)
        hidden = hidden + rows.astype(jnp.float32)[None]
    return _norm(config.norm, weights, "embed_norm" if embedding.norm else None, hidden)


def layer(spec: Layer, weights: Weights, hidden: Array, tap: Tap, past: Past = NO_PAST) -> Array:
    """One decoder layer.

    Args:
      spec: static.
      weights: the layer's tensors.
      hidden: shape (batch, length, hidden), float32.
      tap: called with the name and the value (batch, length, in) of every input of a linear, as
        `linear_inputs` names them; tokens that an expert does not get are zero in its inputs. Pass
        `no_tap` to observe nothing.
      past: what comes before; nothing if `hidden` is of whole texts.

    Returns:
      Hidden states of the same shape.
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


def head_weight(head: Head) -> str:
    """The name of what the last hidden states are multiplied with."""
    return "embed_tokens.weight" if head.tied else "lm_head.weight"


class InBfloat16(NamedTuple):
    """A weight of a linear that is multiplied in bfloat16, forwards and backwards.

    Attributes:
      weight: shape (out, in), bfloat16.
    """

    weight: Array


def computed_in(compute_dtype: str, weights: Weights, linears: Collection[str]) -> dict[str, Any]:
    """Weights whose linears are multiplied in one of `prox24.core.precision.COMPUTE_DTYPES`.

    Args:
      compute_dtype: "float32" leaves the weights as they are, to be multiplied in float32.
      weights: of a layer, or around the layers, by name.
      linears: the names of those that are multiplied so.

    Returns:
      The weights, of which with "bfloat16" these are `InBfloat16`.

    Example:
      >>> weights = {"up.weight": jnp.ones((2, 4)), "norm.weight": jnp.ones(4)}
      >>> found = computed_in("bfloat16", weights, {"up.weight"})
      >>> found["up.weight"].weight.dtype.name, found["norm.weight"].dtype.name
      ('bfloat16', 'float32')
    """
    if compute_dtype == "float32":
        return dict(weights)
    return {
        name: InBfloat16(w.astype(jnp.bfloat16)) if name in linears else w
        for name, w in weights.items()
    }


def linear(x: Array, weight: Array | Packed24 | InBfloat16) -> Array:
    """x W^T of x (batch, length, in) and W (out, in), in float32.

    Nothing else multiplies with the weight of a linear. With a packed one `x` is rounded to its
    dtype, and so is the product: kernels read both in one dtype. With an `InBfloat16` operands are
    rounded to bfloat16, those of the gradients too, and sums are float32.

    Example:
      >>> linear(jnp.ones((1, 3, 4)), jnp.ones((2, 4), jnp.bfloat16)).shape
      (1, 3, 2)
    """
    if isinstance(weight, Packed24):
        return matmul(x.astype(weight.dtype), weight).astype(jnp.float32)
    if isinstance(weight, InBfloat16):
        return _in_bfloat16(x, weight.weight)
    return jnp.einsum("bti,oi->bto", x, weight.astype(jnp.float32), precision=PRECISION)


@jax.custom_vjp
def _in_bfloat16(x: Array, weight: Array) -> Array:
    """x W^T of a bfloat16 W.

    JAX's own gradients would multiply float32 cotangents with bfloat16 operands, which is done in
    float32.
    """
    return _sums("bti,oi->bto", x, weight)


def _in_bfloat16_forwards(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    x = x.astype(jnp.bfloat16)
    return _sums("bti,oi->bto", x, weight), (x, weight)


def _in_bfloat16_backwards(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight = operands
    of_weight = _sums("bto,bti->oi", cotangent, x)
    return _sums("bto,oi->bti", cotangent, weight), of_weight.astype(jnp.bfloat16)


def _sums(axes: str, a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


_in_bfloat16.defvjp(_in_bfloat16_forwards, _in_bfloat16_backwards)


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
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    weight = norm.offset + weights[f"{name}.weight"].astype(jnp.float32)
    shape = (1,) * (x.ndim - 1) + weight.shape
    x = x * jax.lax.rsqrt(square + norm.epsilon) * weight.reshape(shape)
    if norm.kind == "layer":
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
    """Every expert computes every token: simple, at experts / per_token times the least work."""
    experts = mlp.experts
    assert experts is not None
    probabilities = jax.nn.softmax(_affine(weights, "mlp.router", x), axis=-1)
    chosen, indices = jax.lax.top_k(probabilities, experts.per_token)
    if experts.normalised:
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    total = jnp.zeros_like(x)
    for index, name in enumerate(_expert_names(experts)):
        routed = indices == index
        share = jnp.sum(jnp.where(routed, chosen, 0), axis=-1, keepdims=True)
        seen = jnp.where(jnp.any(routed, axis=-1, keepdims=True), x, 0)
        total = total + share * _mlp(mlp, weights, seen, tap, name)
    return total


def _attention(attention: Attention, norm: Norm, weights: Weights, x: Array, past: Past) -> Array:
    """Mixed values (batch, length, heads head_dim), before the output projection."""
    batch, length, _ = x.shape
    heads, key_heads, width = attention.heads, attention.key_value_heads, attention.head_dim
    queries, keys, values = _queries_keys_values(attention, weights, x)

    def normalised(x: Array, name: str) -> Array:
        if attention.norm == "rows":
            rows = x.reshape(batch, length, -1)
            x = _norm(norm, weights, f"self_attn.{name}_norm", rows).reshape(x.shape)
        elif attention.norm == "heads":
            x = _norm(norm, weights, f"self_attn.{name}_norm", x)
        return x

    queries, keys = normalised(queries, "q"), normalised(keys, "k")
    if attention.clip is not None:
        queries, keys, values = (
            jnp.clip(part, -attention.clip, attention.clip) for part in (queries, keys, values)
        )
    queries, keys, values = (part.transpose(0, 2, 1, 3) for part in (queries, keys, values))
    positions = past.length + jnp.arange(length, dtype=jnp.int32)
    if attention.rope is not None:
        cosines, sines = _angles(attention.rope.at_length(length), positions)
        queries, keys = _rotate(queries, cosines, sines), _rotate(keys, cosines, sines)
    keys, values = past.join(keys, values)
    seen = keys.shape[2]
    # The queries that share a key head are rows of one matrix product.
    shared = (batch, key_heads, heads // key_heads * length)
    queries = queries.reshape(*shared, width) * attention.scale
    scores = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, precision=PRECISION)
    scores = _softcap(scores.reshape(batch, heads, length, seen), attention.softcap)
    if attention.alibi is not None:
        scores = scores + _alibi(attention.alibi, seen)
    scores = jnp.where(_visible(positions, seen, attention.window), scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).reshape(*shared, seen)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", probabilities, values, precision=PRECISION)
    mixed = mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
    return mixed.reshape(batch, length, heads * width)


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
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    rotated = [first * cosines - second * sines, second * cosines + first * sines, rest]
    return jnp.concatenate(rotated, axis=-1)


def at_length(config: Config, length: int) -> Config:
    """The decoder of texts of so many tokens, however many of them a pass has; see `Rope`."""

    def fixed(layer: Layer) -> Layer:
        rope = layer.attention.rope
        rope = None if rope is None else rope.at_length(length)
        return layer._replace(attention=layer.attention._replace(rope=rope))

    return config._replace(layers=tuple(map(fixed, config.layers)))


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
