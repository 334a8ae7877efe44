"""Proximal gradient descent for any smooth function and any proximal operator."""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree_utils as trees
from jax import Array, lax

from prox24._core.placement import placed_like, varying_like, whole
from prox24._core.precision import working_dtype
from prox24._core.tracing import is_traced
from prox24.errors import first_line

PyTree = Any
Prox = Callable[[PyTree, Any, Any], PyTree]
"""prox(x, hyperparams, scaling) = argmin_w  1/2 |w - x|^2 + scaling R(w; hyperparams)."""

SHRINK, GROW = 0.5, 1.25
"""Factors of the step size: after a failed trial, and from one step to the next."""

HALVINGS = 40
"""Maximal number of trials of a line search; 2^-40 of a step is below the digits of float32."""


class Descent(enum.IntEnum):
    """How a descent ended."""

    CONVERGED = 0
    """The error is at most the tolerance."""
    MAX_STEPS = 1
    """The error is above the tolerance after the last step."""
    NONFINITE = 2
    """The function or its gradient was not finite. The result is the last point where both were."""


class Descended(NamedTuple):
    """The result of `proximal_gradient`.

    Attributes:
      params: the minimiser found.
      outcome: a `Descent`; an int32 array if the call is traced.
      error: |x - prox(x - step grad f(x))| / step at the point x where the last step began; 0 at a
        minimum.
      value: the smooth function at this x.
      steps: number of steps.
      step: size of the last step.
    """

    params: PyTree
    outcome: Any
    error: Array
    value: Array
    steps: Array
    step: Array


class _State(NamedTuple):
    params: PyTree
    extrapolated: PyTree
    known: PyTree  # the last point with a finite value and gradient
    nesterov: Array
    step: Array
    error: Array
    value: Array
    steps: Array
    finite: Array
    bounded: Array  # 0 until a trial is too long, then 1


def following_nesterov(nesterov: Array) -> tuple[Array, Array]:
    """Nesterov's next number, and the share of a move that is extrapolated."""
    following = (1 + jnp.sqrt(1 + 4 * jnp.square(nesterov))) / 2
    return following, (nesterov - 1) / following


def proximal_gradient(
    fun: Callable[..., Array],
    params: PyTree,
    prox: Prox,
    hyperparams: Any = None,
    *args: Any,
    step: Array | float | None = None,
    momentum: bool = True,
    tolerance: Array | float = 1e-5,
    max_steps: Array | int = 1000,
) -> Descended:
    """Minimises f(x, *args) + R(x; hyperparams) for a smooth f and an R with a proximal operator.

    Each step is x <- prox(z - step grad f(z), hyperparams, step). Without momentum z is x. With
    momentum z extrapolates x by Nesterov's sequence, which restarts when it points uphill. If f and
    R are convex, the result is a minimum. Otherwise it is a fixed point.

    It works under `jax.jit` and `jax.vmap`. Outside of `jax.jit` each call compiles its functions
    anew. The numbers `step`, `tolerance` and `max_steps` may be traced.

    The result has derivatives by `args`, by `hyperparams`, and by arrays that `fun` and `prox`
    close over. They are the derivatives of the fixed point (implicit differentiation). They exist
    where it moves smoothly, and cost one linear system. If the params are on a mesh with explicit
    axes, take derivatives inside `jax.set_mesh`.

    Args:
      fun: f(params, *args), a float scalar.
      params: pytree of floating-point arrays, the start.
      prox: prox(x, hyperparams, scaling), as in jaxopt: the minimiser of 1/2 |w - x|^2 + scaling
        R(w; hyperparams). For the penalty of this package it is
        `lambda x, lam, scaling: prox24.prox(x, lam * scaling)`.
      hyperparams: the second argument of `prox`, such as the weight of a penalty.
      *args: further arguments of `fun`.
      step: the size of all steps, at most 1 / L for a gradient with Lipschitz constant L. None
        finds the sizes by a line search.
      momentum: whether steps are extrapolated.
      tolerance: largest error of a converged result, see `Descended`.
      max_steps: maximal number of steps.

    Returns:
      A `Descended`.

    Raises:
      ValueError: a number is out of range, `prox` has another convention, or `fun` is not a finite
        floating-point scalar at the start. In a traced call, only the outcome tells that `fun` was
        not finite.

    References:
      "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", 2009,
      equations 4.1 to 4.3. "Adaptive Restart for Accelerated Gradient Schemes", arXiv 1204.3982,
      section 3.2. "Efficient and Modular Implicit Differentiation", arXiv 2105.15183, section 2.

    Example:
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([3.0, 1.0])
      >>> def fun(w):
      ...     return jnp.sum((x @ w - y) ** 2) / 2
      >>> def soft(w, lam, scaling):
      ...     return jnp.sign(w) * jnp.maximum(jnp.abs(w) - lam * scaling, 0)
      >>> found = proximal_gradient(fun, jnp.zeros(2), soft, 1.0)
      >>> found.outcome, [round(w, 4) for w in found.params.tolist()]
      (<Descent.CONVERGED: 0>, [2.0, 0.25])
    """
    for name, number in {"step": step, "max_steps": max_steps}.items():
        if number is not None and not is_traced(number) and not number > 0:
            raise ValueError(f"{name} {number} is not positive")
    if not is_traced(tolerance) and not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} is negative")
    params = jax.tree.map(jnp.asarray, params)
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params has {leaf.dtype}, which is not floating-point")
    _check_prox(prox, params, hyperparams)
    value = fun(params, *args)
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(f"fun gives {jnp.shape(value)} of {jnp.result_type(value)}, not a number")
    if not is_traced(value) and not jnp.isfinite(value):
        raise ValueError(f"fun is {value} at the start: begin with other params")
    params = jax.tree.map(lambda leaf: varying_like(leaf, value), params)

    def landed(x: PyTree, size: Any) -> PyTree:
        # The scaling has the dtype of the value, which may be wider than that of x.
        found = prox(x, hyperparams, size)
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), found, x)

    def moved(x: PyTree, size: Any) -> PyTree:
        gradient = jax.grad(fun)(x, *args)
        return landed(_plus(x, -size, gradient), size)

    def residual(root: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        # If R is not convex, the fixed points depend on the size of the steps.
        x, size = root
        own = lax.stop_gradient(size)
        return trees.tree_sub(moved(x, own), x), size - own

    def solve(_: Any, root: tuple[PyTree, Array]) -> tuple[Any, list[Array]]:
        start, size = root
        advance = functools.partial(_advance, lambda x: fun(x, *args), landed, step, momentum)
        # Like the value, so that inside `jax.shard_map` they vary from device to device.
        number = functools.partial(jnp.full_like, value)
        first = _State(
            start,
            start,
            start,
            number(1),
            size * number(1),
            number(jnp.inf),
            jnp.asarray(value),
            jnp.int32(0),
            jnp.isfinite(value),
            number(0),
        )

        def unfinished(state: _State) -> Array:
            return state.finite & (state.error > tolerance) & (state.steps < max_steps)

        final = lax.while_loop(unfinished, advance, first)
        figures = final.error, final.value, final.steps, final.finite
        # The derivative of an integer has another dtype, for which `custom_root` has no rule.
        return (final.params, final.step), [figure.astype(real) for figure in figures]

    real = jnp.result_type(value)
    first_step = varying_like(jnp.asarray(1 if step is None else step, real), value)
    (found, last_step), figures = lax.custom_root(
        residual, (params, first_step), solve, _solve_linear, has_aux=True
    )
    error, last_value, steps, finite, last_step = map(lax.stop_gradient, (*figures, last_step))
    outcome: Any = jnp.where(
        error <= tolerance,
        jnp.int32(Descent.CONVERGED),
        jnp.where(finite > 0, jnp.int32(Descent.MAX_STEPS), jnp.int32(Descent.NONFINITE)),
    )
    if not is_traced(outcome):
        outcome = Descent(int(outcome))
    return Descended(found, outcome, error, last_value, steps.astype(jnp.int32), last_step)


def _advance(
    fun: Callable[[PyTree], Array],
    prox: Callable[[PyTree, Array], PyTree],
    fixed: Array | float | None,
    momentum: bool,
    state: _State,
) -> _State:
    point = state.extrapolated
    value, gradient = jax.value_and_grad(fun)(point)

    def trial(size: Array) -> PyTree:
        return prox(_plus(point, -size, gradient), size)

    step, bounded = state.step, state.bounded
    if fixed is None:
        # The rounding error of a difference of values.
        slack = 8 * jnp.finfo(value.dtype).eps * jnp.abs(value)

        def too_far(search: tuple[Array, PyTree, Array]) -> Array:
            size, landed, trials = search
            move = trees.tree_sub(landed, point)
            square = _norm(move, squared=True) / (2 * size)
            bound = value + _dot(gradient, move) + square + slack
            # A step to NaN or infinity is also too long.
            return ~(fun(landed) <= bound) & (trials < HALVINGS)

        def shorter(search: tuple[Array, PyTree, Array]) -> tuple[Array, PyTree, Array]:
            size = search[0] * SHRINK
            return size, trial(size), search[2] + 1

        # If a move changes the value by less than its rounding error, the test cannot reject a step
        # that is too long. Before the first rejection, steps may still be far too short.
        grows = (jnp.square(state.error) * step / 2 > slack) | (bounded == 0)
        begin = jnp.where(grows, step * GROW, step)
        first = begin, trial(begin), jnp.int32(0)
        step, landed, trials = lax.while_loop(too_far, shorter, first)
        bounded = jnp.where(trials > 0, jnp.ones_like(bounded), bounded)
    else:
        landed = trial(step)
    move = trees.tree_sub(landed, state.params)
    following, share = following_nesterov(state.nesterov)
    # Without momentum the sequence restarts in every step.
    restart = _dot(trees.tree_sub(point, landed), move) > 0 if momentum else True
    share, following = jnp.where(restart, 0, share), jnp.where(restart, 1, following)
    # The value may have fewer digits than the parameters.
    error = (_norm(trees.tree_sub(landed, point)) / step).astype(value.dtype)
    finite = jnp.isfinite(value) & jnp.isfinite(error)
    return _State(
        trees.tree_where(finite, landed, state.known),
        trees.tree_where(finite, _plus(landed, share, move), state.known),
        trees.tree_where(finite, point, state.known),
        following,
        step,
        jnp.where(finite, error, jnp.inf),
        value,
        state.steps + 1,
        finite,
        bounded,
    )


def _plus(tree: PyTree, factor: Any, other: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + jnp.asarray(factor, x.dtype) * y, tree, other)


def _dot(tree: PyTree, other: PyTree) -> Array:
    """The sum of products; unlike `jnp.vdot`, it does not join axes that devices share."""
    return trees.tree_sum(trees.tree_mul(_in_working_dtype(tree), _in_working_dtype(other)))


def _norm(tree: PyTree, squared: bool = False) -> Array:
    return trees.tree_norm(_in_working_dtype(tree), squared=squared)


def _in_working_dtype(tree: PyTree) -> PyTree:
    """Squares of 16-bit numbers soon leave their range."""
    return jax.tree.map(lambda x: x.astype(working_dtype(x.dtype)), tree)


def _solve_linear(matrix: Callable[[PyTree], PyTree], target: PyTree) -> Any:
    """Solves by conjugate gradients on the normal equations: the Jacobian is not symmetric."""

    def solve(matrix: Callable[[PyTree], PyTree], target: PyTree) -> PyTree:
        transpose = jax.linear_transpose(matrix, target)

        # `cg` flattens arrays. JAX forbids this for an axis that an explicit mesh cuts.
        # It also needs one dtype.
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*jax.tree.leaves(target))

        def like_target(x: PyTree) -> PyTree:
            return jax.tree.map(lambda y, t: placed_like(y.astype(t.dtype), t), x, target)

        def one_dtype(x: PyTree) -> PyTree:
            return jax.tree.map(lambda y: whole(y.astype(dtype)), x)

        def normal(x: PyTree) -> PyTree:
            return one_dtype(transpose(matrix(like_target(x)))[0])

        right = one_dtype(transpose(target)[0])
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(target))
        solution: PyTree = jax.scipy.sparse.linalg.cg(normal, right, tol=10 * eps, maxiter=1000)[0]
        return like_target(solution)

    # The size of the steps is constant: its row is the identity, and no other row depends on it.
    of_params, of_size = target

    def of_point(x: PyTree) -> PyTree:
        return matrix((x, jnp.zeros_like(of_size)))[0]

    found = lax.custom_linear_solve(of_point, of_params, solve, transpose_solve=solve)
    return found, of_size


def _check_prox(prox: Prox, params: PyTree, hyperparams: Any) -> None:
    said = (
        "prox is called as prox(x, hyperparams, scaling) and gives a tree like x: write "
        "lambda x, lam, scaling: prox24.prox(x, lam * scaling), or the like"
    )
    try:
        found = jax.eval_shape(lambda x, scaling: prox(x, hyperparams, scaling), params, 1.0)
    except Exception as error:  # of any type, if prox has another convention
        raise ValueError(f"{said}; it fails with: {first_line(error)}") from error
    kinds = [
        (jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)])
        for tree in (found, params)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{said}; it gives another tree, or other shapes or dtypes")
