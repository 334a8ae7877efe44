"""What may be turned in attention: every family's logits stay, and what is between decides."""

import numpy as np
import pytest
from tiers import rest
from tiny import VARIANTS, assert_close, config_dict, jax_logits, random_weights, tokens

from prox24._models import spec
from prox24._models.families import config_from_hf
from prox24._models.heads import attention_ties
from prox24.basis import orthogonal, turned

QUICK = ["grouped_heads", "gpt2", "gpt_neox", "qwen2", "falcon"]


def turned_at_random(config_json, weights):
    """Every tie of every layer turned by random matrices, merged in float64."""
    config, new, rng = config_from_hf(config_json), dict(weights), np.random.default_rng(0)
    for index, layer in enumerate(config.layers):
        for tie in attention_ties(layer.attention):
            heads, _, width = tie[0][2].shape
            turn = orthogonal(rng.standard_normal((heads, width, width)))
            for linear, axis, places in tie:
                for part in ("weight", "bias")[: 2 - axis]:
                    name = spec.layer_tensor(config.names, index, f"{linear}.{part}")
                    if name in new:
                        stored = config.names.transposed and part == "weight"
                        given = np.asarray(new[name].T if stored else new[name], np.float64)
                        values = turned(given, turn, places, axis).astype(np.float32)
                        new[name] = values.T if stored else values
    return new


@pytest.mark.parametrize("variant", [*QUICK, *rest(*sorted(VARIANTS.keys() - {*QUICK}))])
def test_the_logits_of_a_turned_model_are_those_of_the_dense_one(variant):
    config = config_dict(variant)
    weights = random_weights(config)
    new = turned_at_random(config, weights)
    changed = {name for name in weights if not np.array_equal(new[name], weights[name])}
    assert bool(changed) == (variant != "olmoe")
    assert_close(jax_logits(config, new, tokens()), jax_logits(config, weights, tokens()))


def ties_of(variant, **changes):
    layers = config_from_hf(config_dict(variant, **changes)).layers
    return [
        [(linear, axis, places.shape) for linear, axis, places in tie]
        for tie in attention_ties(layers[0].attention)
    ]


def test_queries_and_keys_are_turned_where_nothing_comes_between_them():
    values = [("self_attn.v_proj", 0, (2, 1, 8)), ("self_attn.o_proj", 1, (2, 2, 8))]
    assert ties_of("grouped_heads") == [values]
    assert ties_of("qwen3")[1:] == ties_of("olmo2")[1:] == []  # A norm, and positions.
    fused = "self_attn.qkv_proj"
    every = [(fused, 0, (4, 1, 8)), ("self_attn.o_proj", 1, (4, 1, 8))]
    assert ties_of("gpt2") == [every, [(fused, 0, (4, 1, 8))] * 2]
    # A quarter of a head of 8 rotates.
    assert ties_of("gpt_neox")[1] == [(fused, 0, (4, 1, 6))] * 2
    # All queries of a key head have its basis.
    assert ties_of("falcon", alibi=True)[1] == [(fused, 0, (2, 2, 8)), (fused, 0, (2, 1, 8))]
    assert ties_of("olmoe") == []  # Values are clipped.
