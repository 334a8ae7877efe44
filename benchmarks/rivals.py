"""What prox24 is timed against: two iterative ways of the 2:4 proximal operator, and SparseGPT.

The iterative ways work on the magnitudes of blocks of four. They compare three candidates: the two
largest entries unchanged, a support of three, and a support of four. The candidate with the least
objective 1/2 |w - y|^2 + lam e3(w) wins.

All are written from descriptions; no code of any publication was used.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax

SWEEPS = 100
LEAST_CHANGE = 1e-8
MAX_STEPS = 1000
TOLERANCE = 1e-6
COLUMNS = 128

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Of PyTorch."""

Block4 = tuple[Array, Array, Array, Array]


def finished(result: Any) -> Any:
    """A result of PyTorch, when its device has computed it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


def alternating_minimisation(y: torch.Tensor, lam: float) -> torch.Tensor:
    """The proximal operator by cyclic coordinate minimisation, in ordinary PyTorch expressions.

    It works on the sorted magnitudes, and starts from w = 0. A sweep minimises each coordinate
    exactly, from the smallest to the largest: w_i <- max(y_i - lam e2(the others), 0). Sweeps run
    over the three largest entries with the fourth at zero, and over all four. They end when a sweep
    changes all blocks together by less than `LEAST_CHANGE`, or after `SWEEPS` sweeps. Signs and
    order are restored at the end.

    References:
      "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs",
      arXiv 2502.00258, which solves the same operator by alternating minimisation.
    """

    def minimise(y: torch.Tensor, support: int) -> torch.Tensor:
        w = torch.zeros_like(y)
        for _ in range(SWEEPS):
            previous = w.clone()
            for i in reversed(range(support)):
                a, b, *rest = (w[:, j] for j in range(support) if j != i)
                pairs = a * b
                for c in rest:
                    pairs = pairs + c * (a + b)
                w[:, i] = torch.clamp(y[:, i] - lam * pairs, min=0)
            if torch.sum(torch.abs(w - previous)) < LEAST_CHANGE:
                break
        return w

    magnitudes, order = torch.sort(torch.abs(y), dim=-1, descending=True)
    w = _best_support(magnitudes, lam, minimise)
    return torch.zeros_like(y).scatter(-1, order, w).copysign(y)


def tuned_alternating_minimisation(y: torch.Tensor, lam: float) -> torch.Tensor:
    """The same sweeps as `alternating_minimisation`, tuned: our own form, not a published one.

    Every update works in place on contiguous copies of the i-th entries of all blocks, and every
    tenth sweep is tested for convergence. It stays eager, without `torch.compile`.
    """

    def minimise(y: torch.Tensor, support: int) -> torch.Tensor:
        w = torch.zeros_like(y)
        pair_sum = torch.empty_like(y[:, 0])
        for sweep in range(1, SWEEPS + 1):
            tested = sweep % 10 == 0
            if tested:
                previous = w.clone()
            for i in reversed(range(support)):
                a, b, *rest = (w[:, j] for j in range(support) if j != i)
                torch.addcmul(y[:, i], a, b, value=-lam, out=w[:, i])
                for c in rest:
                    torch.add(a, b, out=pair_sum)
                    w[:, i].addcmul_(c, pair_sum, value=-lam)
                w[:, i].clamp_(min=0)
            if tested and torch.dist(w, previous, p=1) < LEAST_CHANGE:
                break
        return w

    magnitudes, order = y.abs().sort(dim=-1, descending=True)
    # A (blocks, 4) view with contiguous columns, as has every tensor that is made like it.
    w = _best_support(magnitudes.T.contiguous().T, lam, minimise)
    return torch.empty_like(y).scatter_(-1, order, w).copysign_(y)


def _best_support(
    y: torch.Tensor, lam: float, minimise: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """The best of the three candidates for sorted magnitudes of shape (blocks, 4)."""
    best = y.clone()
    best[:, 2:] = 0
    least = _objective(best.unbind(-1), y.unbind(-1), lam)
    for support in (3, 4):
        candidate = minimise(y, support)
        value = _objective(candidate.unbind(-1), y.unbind(-1), lam)
        best = torch.where((value < least)[:, None], candidate, best)
        least = torch.minimum(value, least)
    return best


@jax.jit
def gradient_descent(y: Array, lam: Array | float) -> Array:
    """The proximal operator by projected gradient descent, in JAX.

    It works on the sorted magnitudes, once for a support of three entries and once for all four.
    A step is

        w <- max(w - eta (w - y + lam grad e3(w)), 0).

    The first w is y. Steps end when no entry of any block moves by more than `TOLERANCE`, or after
    `MAX_STEPS` steps. The Hessian is I + lam A(w). In the box 0 <= w <= y, a row of A has a sum of
    at most r. Here r is y1 + y2 for three entries, and 2 (y1 + y2 + y3) for four. So each block has
    its own eta = 1 / (1 + lam r).

    The paper solves the operator by gradient descent. Its step, start, number of steps and stop
    test were not at hand. The ones above were chosen here, and so was the projection on w >= 0
    alone.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015.
    """
    order = jnp.argsort(-jnp.abs(y), axis=-1)
    magnitudes = jnp.take_along_axis(jnp.abs(y), order, axis=-1)
    y1, y2, y3, y4 = (magnitudes[:, i] for i in range(4))
    zero = jnp.zeros_like(y1)
    candidates = [
        (y1, y2, zero, zero),
        _descend((y1, y2, y3, zero), lam, y1 + y2),
        _descend((y1, y2, y3, y4), lam, 2 * (y1 + y2 + y3)),
    ]
    values = jnp.stack([_objective(w, (y1, y2, y3, y4), lam) for w in candidates])
    best = jnp.argmin(values, axis=0).astype(jnp.int32)
    entries = [lax.select_n(best, *each) for each in zip(*candidates, strict=True)]
    chosen = jnp.stack(entries, axis=-1)
    restored = jnp.take_along_axis(chosen, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.copysign(restored, y)


def _descend(y: Block4, lam: Array | float, row_sum: Array) -> Block4:
    """Gradient descent from y; entries that are zero in y stay zero."""
    step = 1 / (1 + lam * row_sum)

    def update(state: tuple[Array, Block4, Array]) -> tuple[Array, Block4, Array]:
        count, w, _ = state
        a, b, c, d = w
        slopes = (
            b * c + d * (b + c),
            a * c + d * (a + c),
            a * b + d * (a + b),
            a * b + c * (a + b),
        )
        new = tuple(
            jnp.maximum(w_i - step * (w_i - y_i + lam * slope), 0)
            for w_i, y_i, slope in zip(w, y, slopes, strict=True)
        )
        moves = [jnp.max(jnp.abs(p - q)) for p, q in zip(new, w, strict=True)]
        return count + 1, new, functools.reduce(jnp.maximum, moves)

    def unfinished(state: tuple[Array, Block4, Array]) -> Array:
        count, _, moved = state
        return (count < MAX_STEPS) & (moved > TOLERANCE)

    start = jnp.int32(0), y, jnp.full((), jnp.inf, y[0].dtype)
    return lax.while_loop(unfinished, update, start)[1]


def _objective(w: Any, y: Any, lam: Any) -> Any:
    a, b, c, d = w
    distance = sum((w_i - y_i) ** 2 for w_i, y_i in zip(w, y, strict=True))
    return distance / 2 + lam * (a * b * (c + d) + c * d * (a + b))


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT to 2:4, one column after the other, in PyTorch.

    U is upper triangular, and U^T U is the inverse of the damped Gram. At the first column of every
    block of four, the two entries with the least w^2 / U_jj^2 are pruned. A pruned entry has the
    error w / U_jj. This error times row j of U is subtracted from the columns that follow. Within
    `COLUMNS` columns this is done at once, and for all others by one matrix product. A feature
    whose diagonal in the Gram is zero gets 1 there, and weight 0. Products of float32 are true
    float32: TF32 is off unless PyTorch is told otherwise.

    Returns the pruned weight and the bool mask of the kept entries.

    References:
      "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
      algorithm 1.
    """
    weight, gram = weight.clone(), gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)

    pruned = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        w, u, pruned_here = weight[:, columns], factor[columns, columns], pruned[:, columns]
        errors = torch.zeros_like(w)
        for i in range(w.shape[1]):
            if i % 4 == 0:
                scores = w[:, i : i + 4] ** 2 / u.diagonal()[i : i + 4] ** 2
                least = torch.topk(scores, 2, largest=False).indices
                pruned_here[:, i : i + 4].scatter_(1, least, True)
            kept = torch.where(pruned_here[:, i], 0, w[:, i])
            errors[:, i] = (w[:, i] - kept) / u[i, i]
            w[:, i:] -= torch.outer(errors[:, i], u[i, i:])
            w[:, i] = kept
        weight[:, start + COLUMNS :] -= errors @ factor[columns, start + COLUMNS :]
    return weight, ~pruned
