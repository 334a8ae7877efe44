"""Prunes a small Gemma of Google's gemma library, with random weights, by its forward pass."""

import jax
import numpy as np
from gemma import gm

import prox24
from prox24.optax import by_path

CONFIG = gm.nn.config.TransformerConfig(
    num_embed=256,
    embed_dim=64,
    hidden_dim=128,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=[gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL],
    sliding_window_size=8,
    transpose_gating_einsum=True,
    use_qk_norm=True,
)


def main():
    """Prunes by two recipes, and prints what the layers lose and where the zeros are."""
    model = gm.nn.Transformer(config=CONFIG)
    batches = list(np.random.default_rng(0).integers(1, 256, (4, 8, 32), dtype=np.int32))
    params = model.init(jax.random.key(0), batches[0])["params"]

    def forward(params, tokens):
        return model.apply({"params": params}, tokens).logits

    grams = prox24.calibrate(forward, params, batches)
    print("mean relative loss of the layers' outputs")
    for name, recipe in {"wanda": prox24.Recipe.wanda(), "default": prox24.Recipe()}.items():
        pruned = prox24.prune_params(forward, params, recipe=recipe, grams=grams)
        losses = [report.statistics.relative_loss for report in pruned.reports]
        print(f"{name:7}  {np.mean(losses):.3f}")
    axes = {leaf.path: leaf.axis for leaf in pruned.leaves if leaf.pruned}
    choice = {"axis": lambda path: axes.get(path, 0), "mask": by_path(axes.__contains__)}
    table = str(prox24.report(pruned.params, **choice)).splitlines()
    print("", *(line for line in table if "dense" not in line), sep="\n")


if __name__ == "__main__":
    main()
