"""The optax transforms: exact N:M through every optimizer and wrapper, and where they land."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax import contrib
from reference import assert_close, eps_of, inverse_hessian, largest
from tiers import rest

from prox24 import Exponential, Pattern, prox, report, top_mask
from prox24.optax import by_path, check, keep_pattern, kept_entries, proximal

# The tests run few steps of what they compile.
FAST = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
fast_jit = functools.partial(jax.jit, compiler_options=FAST)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=4, weight_decay_rate=0.1),
    "muon": lambda: contrib.muon(0.05, weight_decay=0.1),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.05, weight_decay=0.1),
}


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def parameters(seed=0):
    return {"dense": {"kernel": normal((8, 8), seed), "bias": jnp.zeros(8, jnp.float32)}}


TARGET = {"dense": {"kernel": normal((8, 8), 9), "bias": normal(8, 9)}}


def gradients(params):
    """Those of half the squared distance to `TARGET`."""
    return jax.tree.map(jnp.subtract, params, TARGET)


def train(optimizer, params, steps, jit=False):
    update = fast_jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def updated(transform, params, steps, **more):
    """The updates of a first step."""
    return transform.update(steps, transform.init(params), params, **more)[0]


def nonzeros(w, axis=0, group=4):
    """The number of nonzeros of each block, by NumPy alone."""
    blocks = np.moveaxis(np.asarray(w, np.float64), axis, -1)
    return np.count_nonzero(blocks.reshape(*blocks.shape[:-1], -1, group), axis=-1)


LAM = optax.exponential_decay(0.05, 1, 4.0, end_value=1e30)
KERNELS = {"dense": {"kernel": True, "bias": False}}
LABELS = {"dense": {"kernel": "prune", "bias": "train"}}


def chained(optimizer):
    return optax.chain(optimizer, proximal(LAM))


def masked(optimizer):
    rest = jax.tree.map(lambda chosen: not chosen, KERNELS)
    prune = optax.masked(chained(optimizer), KERNELS)
    return optax.chain(prune, optax.masked(optax.sgd(0.1), rest))


def partitioned(optimizer):
    return optax.partition({"prune": chained(optimizer), "train": optax.sgd(0.1)}, LABELS)


def injected(optimizer):
    def make(lam, learning_rate):
        return optax.chain(optimizer, proximal(lam, learning_rate=learning_rate))

    return optax.inject_hyperparams(make)(lam=LAM, learning_rate=0.5)


WRAPPERS = {
    "chain": chained,
    "masked": masked,
    "partition": partitioned,
    "multi_steps": lambda optimizer: optax.MultiSteps(chained(optimizer), 2),
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(chained(optimizer), 3),
    "inject_hyperparams": injected,
    "ema": lambda optimizer: chained(optax.chain(optimizer, optax.ema(0.5))),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
# These hold conditions and loops, which are compiled anew at every call outside of jit.
COMPILED = {"multi_steps", "apply_if_finite", "muon"}
# Optimizers and wrappers do not know of one another: each is here once.
PAIRS = dict(zip(WRAPPERS, [*OPTIMIZERS, "sgd"], strict=True))


@pytest.mark.parametrize(("wrapper", "optimizer"), PAIRS.items())
def test_a_growing_penalty_ends_in_exact_sparsity(wrapper, optimizer, standard_promotion):
    start = parameters()
    transform = WRAPPERS[wrapper](OPTIMIZERS[optimizer]())
    jit = not COMPILED.isdisjoint({wrapper, optimizer})
    params, _ = train(transform, start, steps=20 if wrapper == "multi_steps" else 10, jit=jit)
    assert np.all(nonzeros(params["dense"]["kernel"]) == 2)
    assert np.all(np.asarray(params["dense"]["bias"]) != 0)


@pytest.mark.parametrize("pattern", [(1, 4), [2, 4]])
def test_the_pattern_and_the_axis_are_those_asked_for(pattern):
    w = normal((4, 8))
    stepped = w + updated(proximal(1e30, pattern, axis=-1), w, w)
    assert np.all(nonzeros(stepped, axis=1) == pattern[0])


def test_pairs_are_pruned_kept_checked_and_reported(standard_promotion):
    pairs = Pattern(2, 4, unit=2)
    step = proximal(Exponential(0.01, 2.0), pairs)
    params = {"kernel": normal((16, 8))}
    check(optax.chain(optax.sgd(0.1), step), params, pairs)
    with pytest.raises(ValueError, match="kernel is not 2:4x2 along axis 0 after a step"):
        check(optax.chain(step, optax.scale(0.5)), params, pairs)
    state = step.init(params)
    for _ in range(20):
        updates, state = step.update({"kernel": jnp.zeros((16, 8))}, state, params)
        params = optax.apply_updates(params, updates)
    assert set(nonzeros(params["kernel"], group=2).ravel().tolist()) == {0, 2}
    assert report(params, pairs).sparse
    assert not report(params).sparse
    kept = kept_entries(params, pairs)["kernel"]
    assert np.array_equal(kept, params["kernel"] != 0)


NUMBERS = {
    "numbers": lambda lam, rate: (lam, rate),
    "schedules": lambda lam, rate: (lambda count: lam, lambda count: rate),
    "traced": lambda lam, rate: (jnp.float32(lam), jnp.asarray(rate)),
}


@pytest.mark.parametrize(
    ("kind", "lam"), [("numbers", 0.0), ("numbers", 100.0), ("schedules", 0.5), ("traced", 0.5)]
)
def test_sgd_with_proximal_is_proximal_gradient_descent(kind, lam):
    params = parameters()

    def step(lam, rate):
        transform = optax.chain(optax.sgd(0.25), proximal(lam, learning_rate=rate))
        return train(transform, params, steps=1)[0]["dense"]

    step = fast_jit(step) if kind == "traced" else step
    stepped = step(*NUMBERS[kind](lam, 0.25))
    kernel, gradient = params["dense"]["kernel"], gradients(params)["dense"]
    expected = prox(kernel - 0.25 * gradient["kernel"], 0.25 * lam, axis=0)
    # Another program: M for an entry, grown by the inverse Hessian, and one for the landing.
    grown = inverse_hessian(np.asarray(expected).T.reshape(-1, 4), 0.25 * lam)
    assert_close(stepped["kernel"], expected, 4 * grown + 1)
    assert np.array_equal(stepped["bias"], -0.25 * gradient["bias"])


def test_schedules_see_the_number_of_earlier_updates():
    params = {"w": jnp.ones((1, 4), jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    transform = proximal(lambda count: jnp.where(count == 2, 100.0, 0.0))
    state = transform.init(params)
    remaining = []
    for _ in range(4):
        updates, state = transform.update(zeros, state, params)
        remaining.append(int(nonzeros(optax.apply_updates(params, updates)["w"], 1).max()))
    assert remaining == [4, 4, 2, 4]
    # An infinite lam times a rate of zero is no penalty.
    without = proximal(lambda count: jnp.inf, learning_rate=lambda count: 0.0)
    updates, _ = without.update(zeros, without.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert state.count.dtype == jnp.int32
    assert int(state.count) == 4


def test_penalty_replaces_lam_and_learning_rate_for_one_step():
    params = parameters()
    steps = gradients(params)
    transform = proximal(0.0, learning_rate=0.0)
    state = transform.init(params)
    hard, state = transform.update(steps, state, params, penalty=1e30, value=0.0)
    assert np.all(nonzeros(optax.apply_updates(params, hard)["dense"]["kernel"]) == 2)
    none, _ = transform.update(steps, state, params)
    assert np.all(nonzeros(optax.apply_updates(params, none)["dense"]["kernel"]) == 4)


def test_patterns_without_a_prox_missing_parameters_and_rows_of_penalties_are_refused():
    with pytest.raises(ValueError, match="supports 1:M and 2:M, not 3:4"):
        proximal(1.0, (3, 4))
    for wrong in (-1.0, np.nan, "0.1", Exponential(-1.0, 1.0)):
        with pytest.raises(ValueError, match="not a nonnegative number"):
            proximal(wrong)
    with pytest.raises(ValueError, match=r"inner is 0.001: give a whole optimizer"):
        keep_pattern(1e-3)
    transform = proximal(1.0)
    with pytest.raises(ValueError, match="proximal needs the parameters"):
        transform.update(parameters(), transform.init(parameters()))
    with pytest.raises(ValueError, match=r"the penalty has shape \(8,\): give proximal a scalar"):
        updated(transform, parameters(), parameters(), penalty=jnp.ones(8))


def test_none_masked_and_unselected_leaves_pass_through():
    params = {"a": normal((4, 8)), "b": None, "c": optax.MaskedNode(), "d": normal((4, 8), 1)}
    updates = {"a": normal((4, 8), 2), "b": None, "c": optax.MaskedNode(), "d": None}
    stepped = updated(proximal(1e30), params, updates)
    assert (stepped["b"], stepped["c"], stepped["d"]) == (None, optax.MaskedNode(), None)
    assert np.all(nonzeros(params["a"] + stepped["a"], axis=1) == 2)
    assert updated(proximal(1e30, mask=False), params, updates)["a"] is updates["a"]


# Alike, wider, narrower, and neither.
DTYPES = [
    ("float64", "float32"),
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    *rest(("float16", "float32"), ("float32", "float32"), ("bfloat16", "float16")),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_zeros_are_exact_in_every_mix_of_dtypes(dtypes, standard_promotion):
    param_dtype, update_dtype = dtypes
    for scale in (1e-3, 1.0, 1e3):
        params = normal((16, 8), 1, param_dtype)
        updates = (scale * normal((16, 8), 2, update_dtype)).astype(update_dtype)
        landing = updated(proximal(1e30), params, updates)
        assert landing.dtype == jnp.promote_types(param_dtype, update_dtype)
        stepped = optax.apply_updates(params, landing)
        assert stepped.dtype == param_dtype
        assert np.all(nonzeros(stepped, axis=1) == 2)
        kept, start, steps = (np.asarray(x, np.float64) for x in (stepped, params, updates))
        eps = max(map(eps_of, (param_dtype, update_dtype)))
        error = np.where(kept != 0, np.abs(kept - (start + steps)), 0)
        assert np.all(error <= eps * (np.abs(start) + np.abs(steps)))


def test_strict_promotion_suffices_where_the_dtypes_agree():
    w = normal((4, 8), dtype=jnp.bfloat16)
    transform = proximal(optax.exponential_decay(1.0, 1, 2.0), learning_rate=0.5)
    assert updated(transform, w, w).dtype == jnp.bfloat16


wild = st.one_of(
    st.builds(
        lambda mantissa, exponent: float(np.float32(mantissa * 10.0**exponent)),
        st.floats(-9.0, 9.0).filter(lambda mantissa: abs(mantissa) > 0.1),
        st.integers(-20, 20),
    ),
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0]),
)
wild_arrays = hnp.arrays(np.float32, (4, 8), elements=wild)
wild_penalties = st.builds(lambda exponent: 10.0**exponent, st.floats(-25, 25))


@pytest.mark.optimized
@given(wild_arrays, wild_arrays, wild_penalties)
def test_updates_land_on_the_proximal_operator_to_rounding(params, updates, penalty):
    start, steps, transform = jnp.asarray(params), jnp.asarray(updates), proximal(0.0)

    def landed(penalty):
        landing = updated(transform, start, steps, penalty=penalty)
        return np.asarray(optax.apply_updates(start, landing))

    w, result = np.asarray(prox(params + updates, penalty, axis=1)), landed(penalty)
    assert np.all(result[w == 0] == 0)
    error = np.abs(result.astype(np.float64) - w)
    size = np.abs(params.astype(np.float64)) + np.abs(w)
    assert np.all(error <= eps_of("float32") * size)
    # A large penalty leaves two of four at the step, and none leaves the updates bit for bit.
    target = params + updates
    top = largest(np.abs(target), 2, 4)
    assert np.array_equal(landed(1e30), np.where(top, target, 0))
    assert np.asarray(updated(transform, start, steps)).tobytes() == updates.tobytes()


def test_scan_over_steps_and_vmap_over_seeds_end_as_single_steps_do(standard_promotion):
    transform = optax.chain(optax.adam(0.05), proximal(LAM))
    starts = [parameters(seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(gradients(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        return jax.lax.scan(step, (params, transform.init(params)), length=10)[0][0]

    # The transform sees leaves of one seed, so that axes are counted without that of the seeds.
    together = fast_jit(jax.vmap(run))(stacked)["dense"]["kernel"]
    assert np.all(nonzeros(together, axis=1) == 2)
    for kernel, start in zip(together, starts, strict=True):
        alone, _ = train(transform, start, steps=10)
        # Ten steps add M for an entry; the inverse Hessian and Adam's division grow them 32 times.
        assert_close(kernel, alone["dense"]["kernel"], 10 * 4 * 32)


@pytest.mark.parametrize("wrap", [lambda adam: optax.chain(adam, proximal(1e30)), keep_pattern])
def test_parameters_and_state_may_be_donated(wrap, standard_promotion):
    transform = wrap(optax.adam(0.05))

    @functools.partial(fast_jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = transform.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    params = pruned_parameters()
    state = transform.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert np.all(nonzeros(params["dense"]["kernel"]) <= 2)


def test_donating_the_state_leaves_the_given_entries_alone():
    params = pruned_parameters()
    tree = jax.tree.map(lambda w: w != 0, params)
    transform = keep_pattern(optax.sgd(0.1), tree)
    donate = jax.jit(lambda state: jax.tree.map(jnp.logical_not, state.trainable), donate_argnums=0)
    donate(transform.init(params))
    assert np.array_equal(tree["dense"]["kernel"], params["dense"]["kernel"] != 0)


def pruned_parameters():
    """2:4 along axis 0, with a bias of zeros."""
    kernel = np.array(normal((8, 8), 3))
    kernel[[0, 3, 5, 6]] = 0
    return {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(8, jnp.float32)}}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_keep_pattern_keeps_zeros_and_trains_the_rest(optimizer, standard_promotion):
    start = pruned_parameters()
    transform = keep_pattern(OPTIMIZERS[optimizer]())
    params, state = train(transform, start, steps=10, jit=optimizer == "muon")
    kernel, before, target = (np.asarray(w["dense"]["kernel"]) for w in (params, start, TARGET))
    zero = before == 0
    assert np.array_equal(kernel == 0, zero)
    assert np.all(kernel[~zero] != before[~zero])
    assert np.sum(((kernel - target) ** 2)[~zero]) < np.sum(((before - target) ** 2)[~zero])
    assert np.all(np.asarray(params["dense"]["bias"]) != 0)
    # Accumulators of the kernel's shape are zero where it is.
    own = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.shape == kernel.shape]
    assert all(np.all(np.asarray(accumulator)[zero] == 0) for accumulator in own)


def test_keep_pattern_refuses_to_train_zeros_that_a_name_hides():
    weight = jnp.where(top_mask(jnp.abs(normal((64, 10))), axis=0), normal((64, 10)), 0)
    params = {"w2": weight, "adapter": jnp.zeros((8, 10), jnp.float32), "start": jnp.eye(4)}
    optimizer = keep_pattern(optax.sgd(0.1))
    said = r"w2 is 2:4 along axis 0, but its zeros would be trained: give trainable"
    with pytest.raises(ValueError, match=said):
        optimizer.init(params)
    optimizer.init({name: params[name] for name in ("adapter", "start")})
    keep_pattern(optax.sgd(0.1), kept_entries(params, axis=0)).init(params)
    jax.eval_shape(lambda: optimizer.init(params))  # where no number is known


def test_keep_pattern_refuses_the_mask_of_other_parameters():
    pruned, params = pruned_parameters(), parameters()
    optimizer = keep_pattern(optax.sgd(0.1), kept_entries(pruned))
    with pytest.raises(ValueError, match=r"dense/kernel are 2:4, but 32 others are nonzero"):
        optimizer.init(params)
    optimizer.init(pruned)
    jax.eval_shape(lambda: optimizer.init(params))  # where no number is known
    rows = jnp.arange(8)[:, None] % 4 == jnp.zeros((1, 8), int)  # new tokens of an embedding
    keep_pattern(optax.sgd(0.1), {"dense": {"kernel": rows, "bias": False}}).init(params)


def test_bools_in_other_nodes_are_refused_with_both_names():
    said = (
        r"bools in a list do not fit parameters in a dict; .* has no bool: give a tree of the same"
    )
    with pytest.raises(ValueError, match=said):
        keep_pattern(optax.sgd(0.1), [True]).init(parameters())
    with pytest.raises(ValueError, match=r"; dense/bias has no bool: "):
        keep_pattern(optax.sgd(0.1), {"dense": {"kernel": True}}).init(parameters())


def test_keep_pattern_masks_gradients_and_noise_and_passes_extra_arguments(standard_promotion):
    start = pruned_parameters()
    steps, seen = gradients(start), []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append((updates["dense"], value))
        return jax.tree.map(lambda u: jnp.full_like(u, jnp.nan), updates), state

    noisy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    updates = updated(keep_pattern(noisy), start, steps, value=2.0)["dense"]
    zero = np.asarray(start["dense"]["kernel"]) == 0
    ((given, value),) = seen
    assert value == 2.0
    assert np.array_equal(given["kernel"], np.where(zero, 0, steps["dense"]["kernel"]))
    assert np.array_equal(given["bias"], steps["dense"]["bias"])
    assert np.array_equal(updates["kernel"], np.where(zero, 0, np.nan), equal_nan=True)


def test_kept_may_be_a_tree_a_prefix_or_a_function():
    def still(kept, params):
        """Where a step of ones does not move the parameters."""
        ones = jax.tree.map(jnp.ones_like, params)
        updates = updated(keep_pattern(optax.sgd(0.1), kept), params, ones)
        return jax.tree.map(lambda u: np.asarray(u) == 0, updates)["dense"]

    params = parameters()
    kernel = params["dense"]["kernel"]
    found = still({"dense": {"kernel": kernel > 0, "bias": False}}, params)
    assert np.array_equal(found["kernel"], np.asarray(kernel) <= 0)
    assert np.all(found["bias"])
    assert np.all(still({"dense": False}, params)["kernel"])
    biases = functools.partial(kept_entries, mask=by_path(lambda path: "bias" in path), axis=-1)
    found = still(biases, pruned_parameters())
    assert not np.any(found["kernel"])
    assert np.all(found["bias"])
    with pytest.raises(ValueError, match=r"dense/kernel .*\(4, 8\).*\(8, 8\)"):
        still({"dense": {"kernel": np.ones((4, 8), bool), "bias": True}}, params)


@pytest.mark.parametrize("kept", ["none", "tree", "function"])
def test_states_can_be_mapped_like_parameters(kept):
    params = pruned_parameters()

    def only_dense(params):
        return {"dense": kept_entries(params)["dense"]}

    given = {"none": None, "tree": kept_entries(params), "function": only_dense}[kept]
    transform = keep_pattern(optax.chain(optax.adam(0.1), proximal(1.0)), given)
    state = transform.init(params)
    mapped = optax.tree_utils.tree_map_params(transform, lambda leaf: "param", state)
    assert mapped.trainable == jax.tree.map(lambda _: "param", params)
    assert jax.tree.leaves(mapped.inner).count("param") == 4


SHAPES = jax.eval_shape(parameters)


@every_wrapper
def test_check_passes_a_chain_that_ends_in_proximal(wrapper, standard_promotion):
    transform = WRAPPERS[wrapper](optax.adam(0.1))
    assert check(transform, SHAPES) is None


def behind(*transforms):
    return optax.chain(optax.sgd(0.1), proximal(Exponential(1e-4, 1.1)), *transforms)


BREAKING = {
    "scale": lambda: behind(optax.scale(0.5)),
    "weight_decay": lambda: behind(optax.add_decayed_weights(0.01)),
    "noise": lambda: behind(optax.add_noise(0.01, 0.55, 0)),
    "schedule_free": lambda: contrib.schedule_free(behind(), 0.1),
    "inside_masked": lambda: optax.masked(behind(optax.scale(0.5)), KERNELS),
    "another_axis": lambda: optax.chain(optax.sgd(0.1), proximal(1.0, axis=1)),
}


@pytest.mark.parametrize("make", BREAKING.values(), ids=BREAKING)
def test_check_names_the_leaf_that_something_behind_proximal_breaks(make, standard_promotion):
    with pytest.raises(ValueError, match=r"^dense/kernel is not 2:4 along axis 0 .* last"):
        check(make(), SHAPES)


def test_an_optimizer_that_is_kept_to_a_pattern_gets_extra_arguments(standard_promotion):
    # Which optax's own wrapper drops, since MultiSteps is of another class.
    optimizer = optax.MultiSteps(behind(), 2)
    check(keep_pattern(optimizer, trainable=True), SHAPES)
    wrapped = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    check(optax.chain(optax.clip(1.0), wrapped), SHAPES)


def small(lam):
    return optax.chain(optax.sgd(0.1), proximal(lam))


@pytest.mark.parametrize("lam", [1e-4, *rest(0.0), optax.linear_schedule(0.0, 1e-3, 100)])
@pytest.mark.parametrize("wrap", [lambda own: own, *rest(lambda own: optax.MultiSteps(own, 2))])
def test_check_finds_a_penalty_that_stays_small(lam, wrap, standard_promotion):
    said = r"the penalty, at most .* in 1,000,000 updates, is too small for dense/kernel"
    for params in (SHAPES, parameters()):
        with pytest.raises(ValueError, match=said):
            check(wrap(small(lam)), params)
    check(wrap(small(lam)), SHAPES, penalty=10.0)  # as updates are given
    with pytest.raises(ValueError, match=r"the penalty, at most 1e-06, is too small for"):
        check(wrap(small(lam)), SHAPES, penalty=1e-6)
    check(wrap(small(1.0)), parameters())  # a constant that is large enough


def test_check_looks_at_the_penalties_of_the_run_alone():
    optimizer = small(Exponential(1e-6, 1.02))
    check(optimizer, SHAPES)
    with pytest.raises(ValueError, match=r"at most 0.00037\d* in 300 updates, is too small"):
        check(optimizer, SHAPES, steps=300)
    check(optimizer, SHAPES, steps=1000)
    with pytest.raises(ValueError, match="steps 0 is not a positive number"):
        check(optimizer, SHAPES, steps=0)


def test_check_counts_the_updates_that_reach_proximal(standard_promotion):
    run = optax.MultiSteps(small(Exponential(1e-6, 1.02)), 4)
    check(run, SHAPES, steps=4 * 2000)
    with pytest.raises(ValueError, match=r"at most 0.00037\d* in 1,200 updates, is too small"):
        check(run, SHAPES, steps=4 * 300)


def test_check_finds_a_penalty_that_was_large_between(standard_promotion):
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, 5000)
    growing = Exponential(1e-3, 1.05)
    check(optax.chain(optax.adamw(rate), proximal(growing, learning_rate=rate)), SHAPES)
    injected = optax.inject_hyperparams(proximal, static_args=("pattern", "axis", "mask"))
    check(optax.chain(optax.sgd(0.1), injected(lam=growing)), SHAPES)


MISSING = r"^dense/kernel is not 2:4 .* no proximal"


@pytest.mark.parametrize(
    ("optimizer", "params", "more", "said"),
    [
        (optax.adam(0.1), SHAPES, {}, MISSING),
        (optax.chain(optax.sgd(0.1), proximal(1.0, mask=False)), SHAPES, {}, MISSING),
        # The wrapper drops the extra arguments.
        (optax.chain(optax.MultiSteps(behind(), 1).gradient_transformation()), SHAPES, {}, MISSING),
        # Parameters that are sparse already do not mislead it.
        (keep_pattern(optax.sgd(0.1)), pruned_parameters(), {}, MISSING),
        (optax.scale(0.1), SHAPES, {}, "the optimizer takes no extra arguments"),
        (optax.chain(proximal(1.0), optax.set_to_zero()), SHAPES, {}, "did not move"),
        (behind(), SHAPES, {"mask": False}, "no leaf is pruned"),
        (
            behind(optax.masked(optax.scale(0.5), {"a": False, "b": True})),
            {"a": SHAPES, "b": SHAPES},
            {},
            r"^b/dense/kernel",
        ),
    ],
)
def test_check_says_what_else_is_wrong(optimizer, params, more, said, standard_promotion):
    with pytest.raises(ValueError, match=said):
        check(optimizer, params, **more)


def test_check_takes_a_pattern_as_a_list():
    check(behind(), SHAPES, [2, 4])


def test_check_passes_on_what_else_the_optimizer_takes(standard_promotion):
    plateau = contrib.reduce_on_plateau()
    check(optax.chain(optax.sgd(0.1), plateau, proximal(1.0)), SHAPES, value=1.0)


def test_leaves_of_all_shapes_go_through_one_operator_and_land_as_alone():
    shapes = {"kernel": (8, 12), "conv/kernel": (3, 2, 8, 5), "query/kernel": (4, 2, 3)}
    shapes |= {"weight": (6, 16), "again/kernel": (8, 12), "empty/kernel": (8, 0)}
    params = {name: normal(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    steps = jax.tree.map(lambda p: 0.1 * jnp.cos(p), params)
    axes = {"conv/kernel": 2, "weight": 1}
    transform = proximal(0.7)
    landed = optax.apply_updates(params, updated(transform, params, steps))
    for name, param in params.items():
        expected = prox(param + steps[name], 0.7, axis=axes.get(name, 0))
        assert_close(landed[name], expected, 8)
        assert np.array_equal(landed[name] == 0, expected == 0)
    assert operators(transform, params) == 1
    # Pairs of entries, and leaves of two dtypes.
    params = {name: params[name] for name in ("kernel", "weight")}
    params |= {f"half/{name}": p.astype(jnp.bfloat16) for name, p in params.items()}
    pairs = proximal(1e30, Pattern(2, 4, 2))
    landed = optax.apply_updates(
        params, updated(pairs, params, jax.tree.map(jnp.zeros_like, params))
    )
    for name, axis in (("kernel", 0), ("weight", 1), ("half/kernel", 0), ("half/weight", 1)):
        assert np.all(nonzeros(landed[name], axis, 8) == 4)
    assert operators(pairs, params) == 2


def test_leaves_with_axes_of_a_mesh_keep_them():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {f"layer{i}/kernel": normal((8, 16), i) for i in range(2)}
    steps = jax.tree.map(jnp.cos, params)
    expected = updated(proximal(0.7), params, steps)
    placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params, steps = jax.device_put((params, steps), placement)
    for name, update in updated(proximal(0.7), params, steps).items():
        assert update.sharding == placement
        assert_close(update, expected[name], 8)


def test_large_leaves_go_through_the_operator_alone():
    rows = {"a": 4096, "b": 64, "c": 4096, "d": 32}
    tree = {name: jax.ShapeDtypeStruct((n, 4096), jnp.float32) for name, n in rows.items()}
    assert operators(proximal(1.0, axis=0), tree) == 3


def operators(transform, params):
    """The number of calls of the operator in the program of a step."""
    state = jax.eval_shape(transform.init, params)
    program = jax.make_jaxpr(transform.update)(params, state, params)
    return str(program).count("name=_landing_updates")
