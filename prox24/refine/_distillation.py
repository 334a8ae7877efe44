"""Training of a model's kept weights on the predictions of the dense model."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from prox24._core.placement import explicit_sharding
from prox24._core.precision import PRECISION
from prox24.refine._training import (
    Loss,
    OnStep,
    PyTree,
    Refined,
    Resume,
    Training,
    at_least_float32,
    check_same_shape,
    refine,
)

Features = Callable[[PyTree, PyTree, Array], Array]
Logits = Callable[[PyTree, Array], Array]


CHUNK = 128
"""Tokens of each window whose logits are in memory together."""


@jax.jit
def divergence(logits: Array, target: Array) -> Array:
    """KL(softmax(target) || softmax(logits)) in nats, over the last axis, in float32 or float64.

    Args:
      logits: floating-point, shape (..., vocabulary).
      target: floating-point, of that shape; -inf excludes an entry.

    Returns:
      Array of shape (...), float32; float64 for float64 arrays.

    Example:
      >>> uniform, certain = jnp.zeros(2), jnp.array([0.0, 100.0])
      >>> round(float(divergence(uniform, certain)), 6)  # log 2
      0.693147
    """
    check_same_shape("logits", logits, target)
    own, target = (_minus_largest(at_least_float32(x)) for x in (logits, target))
    # Each exponential is taken once: they take most of the time.
    weights = jnp.exp(target)
    total = jnp.sum(weights, axis=-1)
    # An entry with a target of -inf adds nothing, for any logits.
    gap = jnp.where(weights > 0, target - own, 0)
    # XLA's CPU backend takes several times as long for a sum of products.
    form, placed = "...v,...v->...", explicit_sharding(total, total)
    mean = jnp.einsum(form, weights, gap, precision=PRECISION, out_sharding=placed) / total
    return mean - jnp.log(total) + jnp.log(jnp.sum(jnp.exp(own), axis=-1))


def _minus_largest(x: Array) -> Array:
    largest = lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    # Without `where`, XLA's CPU backend makes one kernel of the product that computes x, the
    # maximum and the difference. It takes three times as long.
    return x - jnp.where(jnp.isfinite(largest), largest, 0)


def train_model(
    features: Features,
    logits: Logits,
    params: PyTree,
    outer: PyTree,
    tokens: Sequence[ArrayLike],
    targets: Sequence[ArrayLike],
    optimizer: optax.GradientTransformation,
    *,
    teacher: PyTree = None,
    cross_entropy: float = 0.0,
    passes: int = 1,
    held_out: int = 1,
    micro_batches: int = 1,
    trainable: PyTree | Callable[[PyTree], PyTree] | None = None,
    measured_every: int | None = None,
    resume: Resume = lambda state: state,
    on_measured: Callable[[Training], None] = lambda state: None,
    on_step: OnStep | None = None,
) -> Refined:
    """Trains the kept parameters of a model on the predictions of the dense one.

    It minimises the mean over tokens of

        (1 - c) KL(softmax(logits(teacher, t)) || softmax(logits(outer, h))) - c log p(next token),

    with h = features(params, outer, tokens), the target t, and the share c of cross-entropy.
    Targets are the teacher's last hidden states, which are far fewer numbers than its logits. The
    logits of 128 tokens of each window are in memory at a time, and their gradient is computed with
    them.

    The last batches are held out, and the others are for training. The loss is measured on the
    held-out batches, with the parameters rounded to their own dtypes. The result has the best
    parameters: the given ones if no others are better.

    Args:
      features: function of params, outer and tokens (windows, length). It returns hidden states
        (windows, length, hidden).
      logits: function of outer and hidden states. It returns logits.
      params: pytree of floating-point arrays; trained in float32, or float64 in float64.
      outer: pytree of untrained parameters, such as embeddings and the head.
      tokens: batches of windows, int32, all of one shape.
      targets: hidden states of the dense model for each batch. With a share of 1 they are not used.
      optimizer: compiled once for each object, and for each pair of functions.
      teacher: `outer` of the dense model; None if it is the same.
      cross_entropy: the share c, from 0 to 1. With 1 the teacher is not used, and with 0 the next
        tokens are not used.
      passes: number of passes over the training batches.
      held_out: number of batches held out, from the end.
      micro_batches: number of batches of one step. They are in memory one after the other, and the
        step uses the mean of their gradients.
      trainable: the entries to train, see `prox24.optax.keep_pattern`. None trains the nonzeros of
        the leaves that `prox24.optax.proximal` prunes, and all other leaves.
      measured_every: number of steps between measurements; None measures after every pass. The last
        step is always measured.
      resume: function of the state before the first step. It returns the state to begin with. To
        continue a training, return a state that `on_measured` got. The first step overwrites its
        arrays.
      on_measured: function of the state, called after each measurement. The next step overwrites
        the master parameters and the optimizer's state, so copy them to keep them.
      on_step: function of the number of a step and its loss on training batches, before the step
        changes the parameters. Each call is one step late, or at a measurement.

    Returns:
      A `Refined`.

    Raises:
      ValueError: the numbers of targets and batches differ, the share is not from 0 to 1, or
        another number is not positive. Also if no batch is left to train on or to hold out, or if
        the batches make no whole number of steps. Also if an entry of `trainable` has another shape
        than its parameter.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> outer = {"embedding": jax.random.normal(keys[0], (16, 8))}
      >>> def features(params, outer, tokens):
      ...     return outer["embedding"][tokens] @ params["kernel"]
      >>> def logits(outer, hidden):
      ...     return hidden @ outer["embedding"].T
      >>> dense = {"kernel": jax.random.normal(keys[1], (8, 8))}
      >>> pruned = {"kernel": dense["kernel"].at[1::2].set(0)}
      >>> tokens = list(jax.random.randint(keys[2], (9, 4, 8), 0, 16, "int32"))
      >>> targets = [features(dense, outer, batch) for batch in tokens]
      >>> refined = train_model(features, logits, pruned, outer, tokens, targets, optax.adam(0.03),
      ...                   passes=4)
      >>> refined.outcome, bool(jnp.any(refined.params["kernel"][1::2]))
      (<Outcome.IMPROVED: 'improved'>, False)
    """
    if len(tokens) != len(targets):
        raise ValueError(f"{len(tokens)} batches of tokens, but {len(targets)} of targets")
    if not 0 <= cross_entropy <= 1:
        raise ValueError(f"a share of cross-entropy of {cross_entropy} is not from 0 to 1")
    return refine(
        _loss(features, logits, cross_entropy < 1, cross_entropy > 0),
        params,
        (outer, outer if teacher is None else teacher, jnp.asarray(cross_entropy, jnp.float32)),
        list(zip(tokens, targets, strict=True)),
        optimizer,
        passes=passes,
        held_out=held_out,
        micro_batches=micro_batches,
        trainable=trainable,
        measured_every=measured_every,
        resume=resume,
        on_measured=on_measured,
        on_step=on_step,
    )


@functools.lru_cache(maxsize=16)
def _loss(features: Features, logits: Logits, taught: bool, reads_text: bool) -> Loss:
    """The loss of a batch, with or without the teacher and the next tokens of the text."""

    def of_batch(params: PyTree, constants: PyTree, batch: tuple[Array, Array]) -> Array:
        (outer, teacher, share), (tokens, targets) = constants, batch
        windows, length = tokens.shape

        @_with_gradient
        def of_chunk(hidden: Array, chunk: list[Array]) -> Array:
            following, seen, predicts, *target = chunk
            own = at_least_float32(logits(outer, hidden))
            loss = jnp.zeros((), own.dtype)
            if taught:
                gap = jnp.where(seen, divergence(own, logits(teacher, *target)), 0)
                loss += (1 - share) * jnp.sum(gap) / (windows * length)
            if reads_text:
                entropy = optax.softmax_cross_entropy_with_integer_labels(own, following)
                # A window of one token has no next token.
                of_text = jnp.sum(jnp.where(predicts, entropy, 0))
                loss += share * of_text / (windows * max(length - 1, 1))
            return loss

        place = jnp.broadcast_to(jnp.arange(length)[None, :], tokens.shape)
        following = jnp.roll(tokens, -1, axis=1)
        hidden = features(params, outer, tokens)
        for name, states in {"hidden states": hidden, "targets": targets}.items():
            if states is not None and states.shape[:2] != tokens.shape:
                raise ValueError(f"{name} of shape {states.shape} do not fit tokens {tokens.shape}")
        parts = [following, place < length, place < length - 1]
        parts += [targets] if taught else []
        # Chunks run along the windows, since devices may share the windows.
        losses = lax.map(lambda chunk: of_chunk(*chunk), jax.tree.map(_chunks, (hidden, parts)))
        return jnp.sum(losses)

    return of_batch


def _with_gradient(
    loss: Callable[[Array, PyTree], Array],
) -> Callable[[Array, PyTree], Array]:
    """The loss, whose gradient with respect to its first argument is computed with its value.

    The logits are then in memory once, and are not computed again for the gradient.
    """

    @jax.custom_vjp
    def value(x: Array, rest: PyTree) -> Array:
        return loss(x, rest)

    def forward(x: Array, rest: PyTree) -> tuple[Array, Array]:
        return jax.value_and_grad(loss)(x, rest)

    def backward(gradient: Array, cotangent: Array) -> tuple[Array, None]:
        scaled = cotangent * gradient.astype(cotangent.dtype)
        return scaled.astype(gradient.dtype), None

    value.defvjp(forward, backward)
    return value


def _chunks(x: Array) -> Array:
    """(windows, length, ...) to (chunks, windows, CHUNK, ...), padded with zeros."""
    windows, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % CHUNK), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(windows, -1, CHUNK, *rest), 1, 0)
