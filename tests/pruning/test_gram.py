"""Sums of x x^T, and those of a decoder's layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_tiny

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.forward import layer_weights, load_model, run_layer
from prox24._jobs.observe import layer_inputs, observe_layer
from prox24._pruning.grams import GramSum, add_tokens, empty_gram

pytestmark = pytest.mark.optimized


def relative_error(gram: GramSum, exact: np.ndarray) -> float:
    return np.linalg.norm(np.asarray(gram.total, np.float64) - exact) / np.linalg.norm(exact)


def gathered(batches) -> tuple[GramSum, np.ndarray]:
    width = batches[0].shape[-1]
    gram, exact = empty_gram(width), np.zeros((width, width))
    for batch in batches:
        x = jnp.asarray(batch)
        gram = add_tokens(gram, x, x)
        tokens = batch.reshape(-1, width).astype(np.float64)
        exact += tokens.T @ tokens
    return gram, exact


def test_gram_is_within_1e_6_of_float64_over_many_batches():
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((64, 64)).astype(np.float32)
    scales = np.logspace(-3, 1, 64).astype(np.float32)
    batches = [
        (generator.standard_normal((4, 256, 64)).astype(np.float32) * scales) @ mixing + 1
        for _ in range(200)
    ]
    gram, exact = gathered(batches)
    assert relative_error(gram, exact) < 1e-6
    diagonal = np.asarray(gram.total, np.float64).diagonal()
    np.testing.assert_allclose(diagonal, exact.diagonal(), rtol=1e-6)


def test_gram_is_symmetric_and_counts_every_token():
    x = np.random.default_rng(3).integers(-8, 8, (3, 5, 4)).astype(np.float32)
    gram, _ = gathered([x])
    np.testing.assert_array_equal(gram.total, sum(np.outer(v, v) for v in x.reshape(-1, 4)))
    np.testing.assert_array_equal(gram.total, gram.total.T)


def test_a_cross_gram_pairs_the_tokens():
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((2, 6, 5, 4)).astype(np.float32)
    total = add_tokens(empty_gram(4), jnp.asarray(x), jnp.asarray(y)).total
    np.testing.assert_allclose(total, x.reshape(-1, 4).T @ y.reshape(-1, 4), rtol=1e-5)


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
    np.testing.assert_allclose(output, run_layer(layer, weights, dense), rtol=0, atol=1e-5)
    elsewhere = 0
    for name, cross in crosses.items():
        x = np.asarray(seen[name], np.float64).reshape(-1, seen[name].shape[-1])
        target = np.asarray(targets[name], np.float64).reshape(x.shape)
        for place, row in enumerate(target):
            if not row.any():
                elsewhere += bool(x[place].any())
                target[place] = x[place]
        np.testing.assert_allclose(cross.total, target.T @ x, rtol=0, atol=1e-5 * np.abs(x).max())
    assert elsewhere > 0
