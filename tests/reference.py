"""Independent float64 NumPy references: slow, direct, and without any import of the library."""

import itertools

import ml_dtypes
import numpy as np


def eps_of(dtype):
    return float(ml_dtypes.finfo(dtype).eps)


def assert_close(found, expected, roundings, dtype=None):
    """Errors are at most a count of roundings of the largest expected number.

    A rounding is relative and eps of the dtype of `found`, or of another that computed it.
    """
    found, expected = np.asarray(found), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    largest_of = np.max(np.abs(expected), initial=0)
    error = np.max(np.abs(found.astype(np.float64) - expected), initial=0)
    unit = eps_of(dtype or found.dtype) * largest_of
    assert error <= roundings * unit, f"{error / unit} roundings, not {roundings}"


def normalization(weight, gram, curvature):
    """The factors of the columns that give unit curvature and unit mean magnitude, and the Gram."""
    deviation = np.sqrt(curvature)
    magnitudes = np.abs(np.asarray(weight) * deviation)
    # The mean over the largest has 11 bits.
    fraction, exponent = np.frexp(magnitudes.mean() / magnitudes.max())
    ratio = np.ldexp(np.round(fraction * 2**11) / 2**11, exponent)
    return deviation / (magnitudes.max() * ratio), gram / np.outer(deviation, deviation)


def elementary(entries, degree):
    """The elementary symmetric polynomial of that degree, of arrays of one shape."""
    e = [1.0] + [0.0] * degree
    for count, entry in enumerate(entries, start=1):
        for d in range(min(count, degree), 0, -1):
            e[d] = e[d] + entry * e[d - 1]
    return e[degree]


def prox_objective(w, y, lam, kept=2):
    """1/2 |w - y|^2 + lam e_{kept + 1}(|w|) on the last axis; `lam` is a scalar or per block."""
    w, y = np.asarray(w, np.float64), np.asarray(y, np.float64)
    distance = np.sum((w - y) ** 2, axis=-1) / 2
    return distance + lam * elementary(np.moveaxis(np.abs(w), -1, 0), kept + 1)


def penalty_gradient(w, kept=2):
    """Gradient of e_{kept + 1}, (n, M): e_kept of the others."""
    entries = list(np.moveaxis(np.abs(np.asarray(w, np.float64)), -1, 0))
    return np.stack([_e_of_others(entries, i, kept) for i in range(len(entries))], axis=-1)


def stationarity_residual(w, y, lam, kept=2):
    """Largest |w_i - max(|y_i| - lam e_kept(others), 0)| of a block, in units of its max |y_i|."""
    w, y = np.abs(np.asarray(w, np.float64)), np.abs(np.asarray(y, np.float64))
    stationary = np.maximum(y - np.asarray(lam)[..., None] * penalty_gradient(w, kept), 0)
    top = y.max(axis=-1)
    return np.max(np.abs(w - stationary), axis=-1) / np.where(top > 0, top, 1)


def prox_hessian(w, lam, kept=2):
    """Hessian of the objective in |w|, (n, M, M): 1, and lam e_{kept - 1}(the others) off it."""
    group = w.shape[-1]
    hessian = np.tile(np.eye(group), (len(w), 1, 1))
    entries = list(np.moveaxis(np.abs(np.asarray(w, np.float64)), -1, 0))
    for i, j in itertools.permutations(range(group), 2):
        others = [entry for position, entry in enumerate(entries) if position not in (i, j)]
        hessian[:, i, j] = lam * elementary(others, kept - 1)
    return hessian


def prox_jacobian(w, lam, kept=2):
    """Derivatives of the minimiser w, (n, M): in y, (n, M, M), and in lam, (n, M)."""
    signs = np.sign(np.asarray(w, np.float64))
    identity = np.eye(w.shape[-1])
    both = signs[:, :, None] * signs[:, None, :]
    hessian = np.where(both != 0, prox_hessian(w, lam, kept), identity)
    in_y = both * np.linalg.inv(hessian)
    in_lam = -np.einsum("nij,nj->ni", in_y, signs * penalty_gradient(w, kept))
    return in_y, in_lam


def inverse_hessian(w, lam, kept=2):
    """Its largest row sum of magnitudes over all blocks: how much errors of the minimiser grow."""
    return np.abs(prox_jacobian(w, lam, kept)[0]).sum(axis=-1).max()


def brute_force_prox(y, lam, kept=2, rounds=60, random=1):
    """Least objective per block of y, shape (n, M), by descent from many starts.

    A round takes one Newton step on the nonzeros, where that lowers the objective, and one sweep of
    exact coordinate descent, w_i = max(|y_i| - lam e_kept(others), 0). While the penalty grows to
    lam, starts stay in their own support; then each goes on until a round changes nothing. Every
    point is feasible, so the result is never below the minimum.
    """
    y = np.abs(np.asarray(y, np.float64))
    lam = np.broadcast_to(np.asarray(lam, np.float64), len(y))
    group = y.shape[1]
    growth = 1 - np.concatenate([np.arange(group - 1, 0, -1), 0.5 ** np.arange(1, 9)]) / group
    starts = _starts(y, kept, random)
    least = np.full(len(y), np.inf)
    size = max(1, 2**13 // len(starts))  # Arrays that fit in a core's cache.
    for piece in np.split(np.arange(len(y)), range(size, len(y), size)):
        block = np.tile(piece, len(starts))
        w = list(starts[:, piece].reshape(-1, group).T.copy())
        target = [np.where(entry > 0, goal, 0) for entry, goal in zip(w, y[block].T, strict=True)]
        for part in growth:
            w = _descended(w, target, part * lam[block], kept)
        value = np.full(len(block), np.inf)
        for _ in range(rounds):
            target = list(y[block].T.copy())
            w = _descended(w, target, lam[block], kept)
            previous, value = value, _objective(w, target, lam[block], kept)
            np.minimum.at(least, block, value)
            moving = value < (1 - 1e-15) * previous
            w, block, value = [entry[moving] for entry in w], block[moving], value[moving]
    return least


def _starts(y, kept, random):
    """Shape (starts, n, M): prefixes of the largest entries, and random points below y."""
    order = np.argsort(np.argsort(-y, axis=-1, kind="stable"), axis=-1)
    prefixes = [y * (order < k) for k in range(kept, y.shape[1] + 1)]
    return np.stack([*prefixes, *np.random.default_rng(0).uniform(size=(random, *y.shape)) * y])


def _descended(w, y, lam, kept):
    with np.errstate(all="ignore"):  # A singular Newton step is not finite, and is not taken.
        w = _newton_step(w, y, lam, kept)
    for i in range(len(w)):
        w[i] = np.maximum(y[i] - lam * _e_of_others(w, i, kept), 0)
    return w


def _objective(w, y, lam, kept):
    return sum((a - b) ** 2 for a, b in zip(w, y, strict=True)) / 2 + lam * elementary(w, kept + 1)


def _e_of_others(w, i, degree):
    return elementary(w[:i] + w[i + 1 :], degree)


def _newton_step(w, y, lam, kept):
    """Gaussian elimination on the Hessian of the nonzeros, of all blocks at once."""
    group, support, total = len(w), [entry > 0 for entry in w], sum(w)
    rhs = [y[i] - w[i] - lam * _e_of_others(w, i, kept) for i in range(group)]
    rhs = [np.where(on, r, 0) for on, r in zip(support, rhs, strict=True)]
    h = [[np.ones_like(total)] * group for _ in w]
    for i, j in itertools.permutations(range(group), 2):
        slope = lam * (total - w[i] - w[j] if kept == 2 else 1)
        h[i][j] = np.where(support[i] & support[j], slope, 0)
    for i, j in itertools.combinations(range(group), 2):
        factor = h[j][i] / h[i][i]
        for k in range(i + 1, group):
            h[j][k] = h[j][k] - factor * h[i][k]
        rhs[j] = rhs[j] - factor * rhs[i]
    for i in reversed(range(group)):
        rhs[i] = (rhs[i] - sum(h[i][k] * rhs[k] for k in range(i + 1, group))) / h[i][i]
    moved = [np.maximum(entry + step, 0) for entry, step in zip(w, rhs, strict=True)]
    better = _objective(moved, y, lam, kept) < _objective(w, y, lam, kept)
    return [np.where(better, new, old) for new, old in zip(moved, w, strict=True)]


def largest(scores, kept, group):
    """Bool mask of the `kept` largest of every `group` scores, earlier ties first."""
    blocks = scores.reshape(*scores.shape[:-1], -1, group)
    position = np.argsort(np.argsort(-blocks, axis=-1, kind="stable"), axis=-1)
    return (position < kept).reshape(scores.shape)


def definite(width, condition, rng):
    """A positive definite matrix of a condition number, with random eigenvectors."""
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    matrix = (basis * np.geomspace(1, 1 / condition, width)) @ basis.T
    return (matrix + matrix.T) / 2


def damped(gram, damping):
    gram = np.asarray(gram, np.float64)
    return gram + damping * np.mean(np.diagonal(gram)) * np.eye(len(gram))


def solve_roundings(gram):
    """Of the solution of a linear system: as many as a row has terms, times the condition."""
    return len(gram) * np.linalg.cond(np.asarray(gram, np.float64))


def quadratic_loss(weight, original, gram):
    """tr((W - W0) G (W - W0)^T) in float64."""
    difference = np.asarray(weight, np.float64) - np.asarray(original, np.float64)
    return float(np.sum((difference @ np.asarray(gram, np.float64)) * difference))


def sparsegpt(weight, gram, choose, block, damping):
    """arXiv 2301.00774, algorithm 1, one column at a time: (weight, mask).

    `choose` makes the mask of a block of columns from its scores.
    """
    w = np.array(weight, np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    mask = np.zeros(w.shape, bool)
    for j in range(w.shape[1]):
        if j % block == 0:
            columns = slice(j, j + block)
            mask[:, columns] = choose(w[:, columns] ** 2 / np.diagonal(upper)[columns] ** 2)
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


def least_loss_by_enumeration(row, gram):
    """The least loss of one row after an exact refit, among all 2:4 masks."""
    choices = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
    masks = list(map(np.concatenate, itertools.product(choices, repeat=len(row) // 4)))
    refitted = masked_least_squares(np.tile(row, (len(masks), 1)), gram, masks)
    return min(quadratic_loss(weight, row, gram) for weight in refitted)
