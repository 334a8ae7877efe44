"""Sums of x x^T, and those of a decoder's layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, eps_of
from tiny import write_tiny

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.forward import layer_weights, load_model, run_layer
from prox24._jobs.observe import layer_inputs, observe_layer
from prox24._pruning.grams import GramSum, add_tokens, empty_gram


def gathered(batches) -> tuple[GramSum, np.ndarray]:
    width = batches[0].shape[-1]
    gram, exact = empty_gram(width), np.zeros((width, width))
    for batch in batches:
        x = jnp.asarray(batch)
        gram = add_tokens(gram, x)
        tokens = batch.reshape(-1, width).astype(np.float64)
        exact += tokens.T @ tokens
    return gram, exact


@pytest.mark.optimized
def test_gram_is_that_of_float64_to_eight_roundings_over_many_batches():
    """Sums over batches are exact. In one of 1024 tokens 32 add, like a root; batches average."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((64, 64)).astype(np.float32)
    scales = np.logspace(-3, 1, 64).astype(np.float32)
    batches = [
        (generator.standard_normal((4, 256, 64)).astype(np.float32) * scales) @ mixing + 1
        for _ in range(200)
    ]
    gram, exact = gathered(batches)
    total, eight = np.asarray(gram.total, np.float64), 8 * eps_of("float32")
    assert np.linalg.norm(total - exact) < eight * np.linalg.norm(exact)
    np.testing.assert_allclose(total.diagonal(), exact.diagonal(), rtol=eight)


@pytest.mark.optimized
@pytest.mark.parametrize("width", [256, 258])
def test_blocks_below_the_diagonal_are_those_above(width):
    x = np.random.default_rng(4).normal(size=(2, 40, width)).astype(np.float32)
    gram, exact = gathered([x])
    assert_close(gram.total, exact, 80)  # tokens
    np.testing.assert_array_equal(gram.total, gram.total.T)


@pytest.mark.optimized
def test_a_cross_gram_pairs_the_tokens():
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((2, 6, 5, 4)).astype(np.float32)
    total = add_tokens(empty_gram(4), jnp.asarray(x), jnp.asarray(y)).total
    assert_close(total, x.reshape(-1, 4).T @ y.reshape(-1, 4), 30)  # tokens


def test_a_token_that_the_dense_model_sends_elsewhere_is_paired_with_itself(tmp_path):
    write_tiny(tmp_path / "model", "mixtral")
    model = load_model(open_checkpoint(tmp_path / "model"))
    layer, weights = model.config.layers[0], layer_weights(model, 0)
    rng = np.random.default_rng(0)
    pruned, dense = (
        jnp.asarray(rng.normal(size=(2, 24, layer.hidden)), jnp.float32) for _ in range(2)
    )
    seen, targets = (layer_inputs(layer, weights, hidden) for hidden in (pruned, dense))
    sums = [{name: empty_gram(x.shape[-1]) for name, x in seen.items()} for _ in range(2)]
    _, crosses, output = observe_layer(layer, weights, pruned, dense, *sums)
    # The products of a layer one after another: v, o, up and down.
    assert_close(output, run_layer(layer, weights, dense), 4 * layer.hidden)
    elsewhere = 0
    for name, cross in crosses.items():
        x = np.asarray(seen[name], np.float64).reshape(-1, seen[name].shape[-1])
        target = np.asarray(targets[name], np.float64).reshape(x.shape)
        for place, row in enumerate(target):
            if not row.any():
                elsewhere += bool(x[place].any())
                target[place] = x[place]
        # Those of a sum over 48 tokens add like a root; what is summed has as many.
        assert_close(cross.total, target.T @ x, 2 * 48**0.5)
    assert elsewhere > 0
