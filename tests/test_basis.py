"""A learnt basis between two linears, against float64 loops of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, damped, definite, eps_of

from prox24 import basis
from prox24.basis import Part, learn, objective, orthogonal, places_of, turned

HEADS, MEMBERS, WIDTH = 2, 3, 8
MADE, READ = places_of(HEADS, WIDTH, start=4), places_of(HEADS, WIDTH, MEMBERS)
INPUTS = HEADS * MEMBERS * WIDTH
IDENTITY = jnp.stack([jnp.eye(WIDTH, dtype=jnp.float32)] * HEADS)


def rotations(seed, away=None):
    """Orthogonal matrices: any, or some that turn by about an angle."""
    free = np.random.default_rng(seed).standard_normal((HEADS, WIDTH, WIDTH))
    return orthogonal(free if away is None else np.eye(WIDTH) + away * (free - free.mT) / 2)


def parts_of(seed, pattern=(2, 4), gram=True):
    """A fused linear of which some rows make the vectors, and the linear that reads them."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((24, 16)), rng.standard_normal((12, INPUTS))
    grams = [definite(width, 100, rng) if gram else np.eye(width) for width in (16, INPUTS)]
    single = [jnp.asarray(x, jnp.float32) for x in (*weights, *grams)]
    return [
        Part(single[axis], single[2 + axis], axis, places, pattern)
        for axis, places in enumerate((MADE, READ))
    ]


def expected_objective(turn, parts, damping, exponent):
    """The formula of the docstring, block by block."""
    total = 0.0
    for part in parts:
        given = np.asarray(part.weight, np.float64)
        weight = turned(given, turn, part.places, part.axis)
        width, (kept, group) = weight.shape[1], part.pattern
        gram = damped(np.asarray(part.gram, np.float64), damping)
        rows = part.places.ravel() if part.axis == 0 else np.arange(len(weight))
        whole = np.trace(given[rows] @ gram @ given[rows].T)
        if part.axis == 1:
            both = np.eye(width)
            for head, members in enumerate(part.places):
                for places in members:
                    both[np.ix_(places, places)] = turn[head]
            gram = both.T @ gram @ both
        cost = np.diag(gram) * (np.diag(gram) * np.diag(np.linalg.inv(gram))) ** -exponent
        squares = np.square(weight[rows]) * cost
        blocks = np.sort(squares.reshape(len(rows), -1, group), axis=-1)
        total += blocks[..., : group - kept].sum() / whole
    return total


@pytest.mark.parametrize(
    ("pattern", "gram", "exponent"), [((2, 4), True, 0.5), ((1, 8), True, 1.0), ((2, 4), False, 0)]
)
def test_the_objective_is_that_of_its_formula(pattern, gram, exponent):
    parts, turn = parts_of(0, pattern, gram), rotations(1)
    found = objective(jnp.asarray(turn, jnp.float32), parts, damping=0.01, exponent=exponent)
    # The inverse of a Gram of condition 100 loses that many roundings, its products the width.
    roundings = 100 * INPUTS
    assert_close(found, expected_objective(turn, parts, 0.01, exponent), roundings)


def test_what_is_learnt_is_orthogonal_and_better_than_the_identity_for_every_exponent():
    parts = parts_of(2)
    learn(parts, steps=1)
    compiled = basis._learn._cache_size()
    for exponent in (0.0, 0.5, 1.0):
        turn = learn(parts, exponent=exponent, steps=50)
        product = np.asarray(turn).mT @ np.asarray(turn)
        assert np.abs(product - np.asarray(IDENTITY)).max() <= 2 * WIDTH * eps_of("float32")
        before, after = (objective(r, parts, exponent=exponent) for r in (IDENTITY, turn))
        assert after < 0.9 * before
    assert basis._learn._cache_size() == compiled  # The numbers are traced.


def slope_by_differences(turn, parts, step=1e-7):
    """The antisymmetric gradient of the objective by S, where R moves to R (I + S).

    A larger step would cross points where two costs of a block are equal.
    """
    slope = np.zeros_like(turn)
    for head in range(HEADS):
        for i in range(WIDTH):
            for j in range(i):
                angle = np.zeros_like(turn)
                angle[head, i, j], angle[head, j, i] = step, -step
                after, before = (
                    expected_objective(turn @ (np.eye(WIDTH) + sign * angle), parts, 0.01, 0.5)
                    for sign in (1, -1)
                )
                slope[head, i, j] = (after - before) / (4 * step)
                slope[head, j, i] = -slope[head, i, j]
    return slope


def test_adam_moves_the_angles_by_their_slopes():
    steps = 2
    parts = [
        part._replace(weight=part.weight.astype(float), gram=part.gram.astype(float))
        for part in parts_of(2)
    ]
    turn = np.asarray(IDENTITY, np.float64)
    first = second = np.zeros_like(turn)
    for step in range(steps):
        slope = slope_by_differences(turn, parts)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        mean, square = (m / (1 - b ** (step + 1)) for m, b in ((first, 0.9), (second, 0.999)))
        rate = basis.RATE * (1 + np.cos(np.pi * step / steps)) / 2
        turn = turn @ orthogonal(np.eye(WIDTH) - rate * mean / (np.sqrt(square) + 1e-8))
    # Differences are off by 1e-10, and the least slope is 1e-5: a step of 0.08 is off by 8e-7.
    assert_close(learn(parts, steps=steps), turn, 1e-6 / eps_of("float64"))


def test_a_sparse_basis_that_was_turned_away_is_found_again():
    rng = np.random.default_rng(3)
    parts, away = parts_of(3, gram=False), jnp.asarray(rotations(4, away=0.2), jnp.float32)
    sparse = []
    for part in parts:
        blocks = rng.permuted(
            np.tile([True, True, False, False], (len(part.weight), part.weight.shape[1] // 4, 1)),
            axis=-1,
        )
        weight = jnp.where(blocks.reshape(part.weight.shape), part.weight, 0)
        sparse.append(part._replace(weight=turned(weight, away, part.places, part.axis)))
    turn = learn(sparse, steps=300)
    assert objective(turn, sparse) < 0.1 * objective(IDENTITY, sparse)


def test_what_was_made_and_read_in_another_basis_is_the_same():
    rng, (maker, reader), turn = np.random.default_rng(5), parts_of(5), rotations(6)
    v, o = (np.asarray(part.weight, np.float64) for part in (maker, reader))
    bias, x = rng.standard_normal(24), rng.standard_normal((7, 16))

    def function(v, bias, o):
        hidden = (x @ v.T + bias)[:, MADE]
        read = np.zeros((7, INPUTS))
        read[:, READ] = np.broadcast_to(hidden, (7, *READ.shape))
        return read @ o.T

    new = function(turned(v, turn, MADE, 0), turned(bias, turn, MADE, 0), turned(o, turn, READ, 1))
    assert_close(new, function(v, bias, o), INPUTS, "float64")
    rest = np.setdiff1d(np.arange(24), MADE)
    assert np.array_equal(turned(v, turn, MADE, 0)[rest], v[rest])
    single = turned(jnp.asarray(v, jnp.float32), jnp.asarray(turn, jnp.float32), MADE, 0)
    assert_close(single, turned(v, turn, MADE, 0), WIDTH)


def test_a_gram_of_zeros_and_a_maker_of_zeros_give_finite_turns():
    maker, reader = parts_of(7)
    for parts in (
        [maker._replace(weight=jnp.zeros_like(maker.weight)), reader],
        [maker, reader._replace(gram=jnp.zeros_like(reader.gram))],
    ):
        assert jnp.isfinite(learn(parts, steps=3)).all()


def test_nan_in_one_head_makes_every_turn_nan():
    made, read = parts_of(4)
    broken = made._replace(weight=made.weight.at[MADE.ravel()[0], 0].set(jnp.nan))
    assert np.isnan(learn([broken, read], steps=2)).all()


def test_learning_is_traceable():
    parts = parts_of(8)
    compiled = jax.jit(lambda w: learn([parts[0]._replace(weight=w), parts[1]], steps=5))
    turns = compiled(parts[0].weight), learn(parts, steps=5)
    found, expected = (objective(turn, parts) for turn in turns)
    assert_close(found, expected, 100 * INPUTS)


def test_low_precision_is_computed_in_float32():
    parts = parts_of(9)
    low = [part._replace(weight=part.weight.astype(jnp.bfloat16)) for part in parts]
    turn = learn(low, steps=3)
    assert turn.dtype == jnp.float32
    assert turned(low[0].weight, turn, MADE, 0).dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"places": places_of(1, WIDTH)}, r"differ in \(heads, width\): \[\(1, 8\), \(2, 8\)\]"),
        ({"places": MADE + 20}, "part 0: places are not 16 different ones of 24"),
        ({"places": MADE.ravel()}, r"part 0: places \(16,\) int64 are not \(heads, members"),
        ({"pattern": (2, 5)}, "part 0: blocks of 5 do not divide the input width 16"),
        ({"axis": -1}, "part 0: axis -1 is neither 0"),
        ({"axis": 1, "places": places_of(2, 8)[::-1]}, "part 0: with axis=1, places are all of"),
        (
            {"axis": 1, "places": np.arange(16).reshape(2, 1, 8), "pattern": (2, 16)},
            "part 0: blocks of 16 do not divide a head of width 8",
        ),
        ({"gram": jnp.eye(24)}, r"\(24, 24\) do not fit: .*; the Gram .*: transpose the weight to"),
        ({"gram": jnp.eye(16, dtype=jnp.float64)}, "in different dtypes: .'float32', 'float64'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, said):
    maker, reader = parts_of(9)
    with pytest.raises(ValueError, match=said):
        learn([maker._replace(**change), reader])


def test_a_turn_of_fewer_heads_is_refused():
    with pytest.raises(ValueError, match=r"turn \(1, 8, 8\) is not \(heads, d, d\): \(2, 8, 8\)"):
        objective(jnp.eye(8)[None], parts_of(9))


@pytest.mark.parametrize("places", [MADE + 20, np.zeros_like(MADE), MADE - 5])
def test_places_that_an_axis_does_not_have_are_not_turned(places):
    with pytest.raises(ValueError, match="places are not 16 different ones of 24"):
        turned(parts_of(9)[0].weight, IDENTITY, places, axis=0)
