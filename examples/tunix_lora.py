"""Trains adapters of a pruned Llama of Tunix, and merges them into its kept weights.

Tunix takes its adapters from Qwix. Their products fill the zeros: merged whole, as Tunix's own
saver does, the model is dense; cut at the merge, it is not the model that was trained. So the last
row's loss is that of the cut weights. Model, data and trainer are those of `tunix_sft.py`.
"""

import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from tunix_sft import PLACE, RATE, batches, loss, print_table, train, trained_and_pruned

from prox24 import lora

RANK, SCALE = 4, 2.0
LAYERS = ".*(q|k|v|gate|up|down)_proj"  # o_proj sums over two axes


def merged(graph, model, whole=False):
    """The pruned model with the adapters in its kept weights, or in all of them."""
    _, *states = nnx.split(model, nnx.LoRAParam, nnx.Param)
    factors, params = (dict(nnx.to_flat_state(state)) for state in states)
    for *path, name in [path for path in factors if path[-1].endswith("_lora_a")]:
        a, b = (factors[*path, name[:-1] + side][...] for side in "ab")
        place = (*path, name.removesuffix("_lora_a"))
        weight, adapter = params[place][...], lora.Adapter(a.T, b, axis=0)
        update = SCALE * jnp.tensordot(a, b, 1)
        new = weight + update if whole else lora.merge(weight, adapter, SCALE)
        params[place] = params[place].replace(new)
    return nnx.merge(graph, nnx.from_flat_state(params.items()))


def main():
    """Prunes, trains the adapters in two ways and prints the table."""
    _, graph, pruned = trained_and_pruned()
    sparse = nnx.merge(graph, pruned.params)
    provider = qwix.LoraProvider(module_path=LAYERS, rank=RANK, alpha=SCALE * RANK)
    start = qwix.apply_lora_to_model(
        sparse, provider, batches(1, 1)[0], cache=None, **PLACE, rngs=nnx.Rngs(2)
    )
    whole = train(start, optax.adam(RATE), seed=2)
    cut = train(
        start, optax.adam(RATE), 2, lambda model, tokens: loss(merged(graph, model), tokens)
    )
    models = {
        "pruned": sparse,
        "adapters merged whole": merged(graph, whole, whole=True),
        "adapters cut at the merge": merged(graph, whole),
        "adapters cut in training": merged(graph, cut),
    }
    print_table(pruned, models)


if __name__ == "__main__":
    main()
