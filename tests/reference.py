"""Independent float64 NumPy references: slow, direct, and without any import of the library."""

import itertools

import numpy as np

PATTERNS = [(1, 4), (2, 4), (3, 4), (4, 8), (2, 8)]


def prox_objective(w, y, lam):
    """1/2 |w - y|^2 + lam e3(|w|) on the last axis, in float64; `lam` is a scalar or per block."""
    w, y = np.asarray(w, np.float64), np.asarray(y, np.float64)
    a, b, c, d = np.moveaxis(np.abs(w), -1, 0)
    return np.sum((w - y) ** 2, axis=-1) / 2 + lam * (a * b * (c + d) + c * d * (a + b))


def stationarity_residual(w, y, lam):
    """Largest |w_i - max(|y_i| - lam e2(others), 0)| of a block in units of its largest |y_i|."""
    w, y = np.abs(np.asarray(w, np.float64)), np.abs(np.asarray(y, np.float64))
    residuals = []
    for i in range(4):
        a, b, c = np.delete(w, i, axis=-1).T
        residuals.append(np.abs(w[:, i] - np.maximum(y[:, i] - lam * (a * b + a * c + b * c), 0)))
    top = y.max(axis=-1)
    return np.max(residuals, axis=0) / np.where(top > 0, top, 1)


def brute_force_prox(y, lam, sweeps=200, fractions=8, seed=0):
    """Least objective per block of y, shape (n, 4), by multi-start cyclic coordinate descent.

    Each coordinate minimises its one-dimensional quadratic exactly:
    w_i = max(|y_i| - lam e2(others), 0).
    """
    target = np.abs(np.asarray(y, np.float64))
    order = np.argsort(np.argsort(-target, axis=-1, kind="stable"), axis=-1)
    random = np.random.default_rng(seed).uniform(size=(fractions, *target.shape)) * target
    starts = [np.zeros_like(target), target * (order < 2), *random, *(random * (order < 3))]
    for shrunk in (0.45, 0.55, 0.65, 0.8, 1):
        starts += [shrunk * target, shrunk * target * (order < 3)]
    w = np.stack(starts)
    w1, w2, w3, w4 = np.moveaxis(w, -1, 0).copy()
    y1, y2, y3, y4 = np.moveaxis(target, -1, 0).copy()
    lam = np.asarray(lam, np.float64)
    for _ in range(sweeps):
        w1 = np.maximum(y1 - lam * (w2 * w3 + w2 * w4 + w3 * w4), 0)
        w2 = np.maximum(y2 - lam * (w1 * w3 + w1 * w4 + w3 * w4), 0)
        w3 = np.maximum(y3 - lam * (w1 * w2 + w1 * w4 + w2 * w4), 0)
        w4 = np.maximum(y4 - lam * (w1 * w2 + w1 * w3 + w2 * w3), 0)
    w = np.stack([w1, w2, w3, w4], axis=-1)
    return np.min(prox_objective(w, target, lam), axis=0)


def largest(scores, kept, group):
    """Bool mask of the `kept` largest of every `group` scores, earlier ties first."""
    blocks = scores.reshape(*scores.shape[:-1], -1, group)
    position = np.argsort(np.argsort(-blocks, axis=-1, kind="stable"), axis=-1)
    return (position < kept).reshape(scores.shape)


def damped(gram, damping):
    gram = np.asarray(gram, np.float64)
    return gram + damping * np.mean(np.diagonal(gram)) * np.eye(len(gram))


def quadratic_loss(weight, original, gram):
    """tr((W - W0) G (W - W0)^T) in float64."""
    difference = np.asarray(weight, np.float64) - np.asarray(original, np.float64)
    return float(np.sum((difference @ np.asarray(gram, np.float64)) * difference))


def sparsegpt(weight, gram, kept, group, damping):
    """arXiv 2301.00774, algorithm 1, one column at a time: (weight, mask)."""
    w = np.array(weight, np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    mask = np.zeros(w.shape, bool)
    for j in range(w.shape[1]):
        if j % group == 0:
            columns = slice(j, j + group)
            scores = w[:, columns] ** 2 / np.diagonal(upper)[columns] ** 2
            mask[:, columns] = largest(scores, kept, group)
        error = np.where(mask[:, j], 0, w[:, j] / upper[j, j])
        w[:, j:] -= np.outer(error, upper[j, j:])
    return np.where(mask, w, 0), mask


def masked_least_squares(weight, gram, mask):
    """Exact minimiser over the weights in the mask, row by row."""
    weight, gram = np.asarray(weight, np.float64), np.asarray(gram, np.float64)
    solution = np.zeros_like(weight)
    for row, (w, support) in enumerate(zip(weight, np.asarray(mask), strict=True)):
        target = (gram @ w)[support]
        solution[row, support] = np.linalg.solve(gram[np.ix_(support, support)], target)
    return solution


def best_mask_by_enumeration(weight_row, gram, kept=2, group=4):
    """The mask of one row with the least loss after an exact refit, among all: (mask, loss)."""
    w, gram = np.asarray(weight_row, np.float64), np.asarray(gram, np.float64)
    blocks = len(w) // group
    choices = list(itertools.combinations(range(group), kept))
    supports = np.array(
        [
            [group * block + i for block, choice in enumerate(choice_of) for i in choice]
            for choice_of in itertools.product(choices, repeat=blocks)
        ]
    )
    inner = gram[supports[:, :, None], supports[:, None, :]]
    solved = np.linalg.solve(inner, (gram @ w)[supports][..., None])[..., 0]
    candidates = np.zeros((len(supports), len(w)))
    np.put_along_axis(candidates, supports, solved, axis=1)
    difference = candidates - w
    losses = np.einsum("ki,ij,kj->k", difference, gram, difference)
    best = int(np.argmin(losses))
    mask = np.zeros(len(w), bool)
    mask[supports[best]] = True
    return mask, float(losses[best])
