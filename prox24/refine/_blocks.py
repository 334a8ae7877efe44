"""Training of a block's kept weights to reproduce the output of the dense block."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from prox24._core.placement import divisors
from prox24._core.precision import working_dtype
from prox24.errors import CalibrationError
from prox24.optax import keep_pattern
from prox24.refine._training import (
    Loss,
    OnStep,
    Passes,
    PyTree,
    Refined,
    at_least_float32,
    check_same_shape,
    check_settings,
    refine,
    step_program,
)

Apply = Callable[[PyTree, Array], Array]
OutputLoss = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class BlockRefinement(Passes):
    """How the pruning loop refines a layer after its linears are pruned.

    It uses Adam with a rate that falls to zero along a cosine. The steps of each tensor are
    multiplied by the root mean square of its entries, at least 0.001. So one rate serves weights of
    any size.

    Attributes:
      rate: first rate of Adam, relative to the size of each tensor's entries.
      passes: number of passes over the training windows.
      held_out: share of the calibration windows held out to choose the best pass. They are the last
        windows, at least as many as one step has. All others are training windows. If windows
        follow the order of a text, shuffle them.
      step_tokens: approximate number of tokens of a step. A window, or devices that share windows,
        may need more.
      linears_only: whether only linears are trained. Norms, biases and routers then do not change.
      compute_dtype: dtype of products with linears, "float32" or "bfloat16". The dtype bfloat16 is
        for accelerators, and for CPUs with instructions for it.

    Raises:
      ValueError: the rate, the passes or the tokens of a step are not positive, the share is not
        from 0 to 1, or the dtype is another one.

    References:
      "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235, section 8,
      for the relative steps.
    """

    rate: float = 1e-2
    passes: int = 5
    held_out: float = 0.125
    step_tokens: int = 512
    linears_only: bool = False
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_settings(self, ("rate", "passes", "step_tokens"), ("held_out",))

    def step_windows(self, windows: int, length: int, devices: int = 1) -> int:
        """Number of windows of a step, so that a pass has eight steps or more if possible.

        A step then has at most about `step_tokens` tokens.

        Args:
          windows: number of windows of all steps, a multiple of the devices.
          length: number of tokens of a window.
          devices: number of devices that share the windows of a step. It divides these windows.

        Raises:
          CalibrationError: the windows do not make two steps, one of them held out. Or the share
            that is held out leaves none.
        """
        most = max(1, min(self.step_tokens // length, windows // 8))
        shared = [n for n in range(devices, windows // 2 + 1, devices) if windows % n == 0]
        if not shared:
            raise CalibrationError(f"refining takes {2 * devices} calibration windows or more")
        enough = divisors(windows, most)[0]
        step = min((n for n in shared if n >= enough), default=shared[-1])
        if self.held_out_of(windows // step) == windows // step:
            raise CalibrationError(f"all {windows} windows are held out; use a smaller share")
        return step

    def optimizer(self, groups: int) -> optax.GradientTransformation:
        """The optimizer for a number of groups of windows; equal numbers get the same object.

        So a program with it is compiled once.
        """
        return _relative_adam(self.rate, self.steps(groups))


@functools.lru_cache
def _relative_adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(rate, max(1, steps))),
    )


def feature_weights(targets: Sequence[ArrayLike]) -> Array:
    """Weights of the features (features,) for `relative_error`, from batches of one shape.

    Batches are (..., features). The share of a feature is the mean over all tokens of target_f^2 /
    |target|^2. Its weight is min(1, 1 / (features * share_f)), so that no feature counts for more
    than the mean of all. In some language models one feature has most of the squared size of the
    hidden states. Without weights the others would hardly count. The work is done in float64 for
    targets in float64, else in float32.

    Raises:
      ValueError: there is no batch.

    Example:
      >>> feature_weights([jnp.array([[1.0, 1.0, 0.0, 0.0]])]).tolist()
      [0.5, 0.5, 1.0, 1.0]
    """
    if len(targets) == 0:
        raise ValueError("there is no batch of targets")
    dtype = working_dtype(jnp.result_type(targets[0]))
    shares = functools.reduce(_add_shares, targets, jnp.zeros(jnp.shape(targets[0])[-1:], dtype))
    return 1 / jnp.maximum(shares * (shares.size / len(targets)), 1)


@jax.jit
def _add_shares(total: Array, target: Array) -> Array:
    squares = jnp.square(at_least_float32(target))
    sizes = jnp.sum(squares, axis=-1, keepdims=True)
    shares = squares / jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny)
    return total + jnp.mean(shares, axis=tuple(range(shares.ndim - 1)))


@jax.jit
def relative_error(output: Array, target: Array, weights: Array | None = None) -> Array:
    """Mean over tokens of |output - target|^2 / |target|^2, for arrays (..., features).

    |x|^2 is the sum over the features of weights_f x_f^2. The weights are (features,), such as
    `feature_weights`; None weights all features equally.

    A few tokens with huge activations would dominate the plain squared error. The error of a target
    of zero is divided by the mean of |target|^2 instead, and by 1 if all targets are zero. The work
    is done in float64 if an array is float64, else in float32.

    Example:
      >>> output, target = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 1.0]])
      >>> float(relative_error(output, target, jnp.array([1.0, 3.0])))
      0.75
    """
    check_same_shape("output", output, target)
    output, target = at_least_float32(output), at_least_float32(target)
    if weights is None:
        weights = jnp.ones(target.shape[-1:], target.dtype)
    weights = jnp.expand_dims(weights, range(target.ndim - 1))
    error = jnp.sum(weights * jnp.square(output - target), axis=-1)
    size = jnp.sum(weights * jnp.square(target), axis=-1)
    size = jnp.where(size > 0, size, jnp.mean(size))
    size = jnp.where(size > 0, size, 1)
    return jnp.mean(error / jnp.maximum(size, jnp.finfo(size.dtype).tiny))


def train_block(
    apply: Apply,
    params: PyTree,
    inputs: Sequence[ArrayLike],
    targets: Sequence[ArrayLike],
    optimizer: optax.GradientTransformation,
    *,
    passes: int = 5,
    held_out: int = 1,
    micro_batches: int = 1,
    trainable: PyTree | Callable[[PyTree], PyTree] | None = None,
    loss: OutputLoss | None = None,
    on_step: OnStep | None = None,
) -> Refined:
    """Trains the kept parameters of a block to reproduce targets.

    It minimises the mean of loss(apply(params, x), t) over batches x and targets t, in the given
    order. The optimizer takes a step after every `micro_batches` batches.

    The last batches are held out, and the others are for training. After each pass the loss is
    measured on the held-out batches, with the parameters rounded to their own dtypes. The result
    has the best parameters: the given ones if no others are better.

    Args:
      apply: the block, a function of params and inputs. It is compiled once for each function
        object, so give equal blocks the same one.
      params: pytree of floating-point arrays; trained in float32, or float64 in float64.
      inputs: batches, all of one shape.
      targets: the outputs that `apply` should return, one for each batch.
      optimizer: one that needs no loss; compiled once for each object.
      passes: number of passes over the training batches.
      held_out: number of batches held out, from the end.
      micro_batches: number of batches of one step. They are in memory one after the other, and the
        step uses the mean of their gradients.
      trainable: the entries to train, see `prox24.optax.keep_pattern`. None trains the nonzeros of
        the leaves that `prox24.optax.proximal` prunes, and all other leaves.
      loss: function of an output and its target. It returns a scalar. None is `relative_error`
        with the `feature_weights` of all targets.
      on_step: function of the number of a step and its loss on training batches, before the step
        changes the parameters. Each call is one step late, or at a measurement.

    Returns:
      A `Refined`.

    Raises:
      ValueError: the numbers of targets and inputs differ, or no batch is left to train on or to
        hold out. Also if a leaf is traced or not floating-point, or a loss is no scalar.

    Example:
      >>> import jax
      >>> weight = jnp.array([[1.0, 0.0, 0.0, 2.0]])
      >>> inputs = list(jax.random.normal(jax.random.key(0), (8, 16, 4)))
      >>> targets = [x @ jnp.array([[3.0], [0.0], [0.0], [2.0]]) for x in inputs]
      >>> refined = train_block(lambda w, x: x @ w["kernel"], {"kernel": weight.T}, inputs, targets,
      ...                       optax.adam(0.3), passes=20)
      >>> refined.outcome, refined.params["kernel"].ravel().round().tolist()
      (<Outcome.IMPROVED: 'improved'>, [3.0, 0.0, 0.0, 2.0])
    """
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} batches of inputs, but {len(targets)} of targets")
    batches = list(zip(inputs, targets, strict=True))
    return refine(
        _block_loss(apply, loss),
        params,
        feature_weights(targets) if loss is None else None,
        batches,
        optimizer,
        passes=passes,
        held_out=held_out,
        micro_batches=micro_batches,
        trainable=trainable,
        on_step=on_step,
    )


def block_step(
    apply: Apply,
    params: PyTree,
    inputs: Any,
    targets: Any,
    refinement: BlockRefinement,
    micro_batches: int,
) -> jax.stages.Lowered:
    """The program of the last batch of a step of `train_block`; arrays may be only specs."""
    optimizer = refinement.optimizer(8)  # The program is the same for any number of steps.

    def begun(params: PyTree) -> tuple[PyTree, PyTree]:
        master = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        kept = jax.tree.map(lambda leaf: leaf != 0, master)
        return master, keep_pattern(optimizer, kept).init(master)

    master, state = jax.eval_shape(begun, params)
    total = None if micro_batches == 1 else master
    weights = jax.ShapeDtypeStruct(targets.shape[-1:], working_dtype(targets.dtype))
    step = step_program(_block_loss(apply, None), optimizer, micro_batches)
    return step.lower(master, state, total, weights, (inputs, targets))


@functools.lru_cache(maxsize=16)
def _block_loss(apply: Apply, loss: OutputLoss | None) -> Loss:
    def of_batch(params: PyTree, weights: Array | None, batch: tuple[Array, Array]) -> Array:
        x, target = batch
        output = apply(params, x)
        if loss is None:
            return relative_error(output, target, weights)
        value = loss(output, target)
        if jnp.shape(value):
            raise ValueError(f"loss has shape {jnp.shape(value)}: return a scalar, such as a mean")
        return value

    return of_batch
