"""The linears of attention that can be turned, head by head, without a change of its function."""

import numpy as np

from prox24._models.spec import Attention
from prox24.basis import Places, places_of

Ties = list[list[tuple[str, int, Places]]]
"""Groups of linears that make or read the same vectors: name, turned axis, places on the axis."""


def attention_ties(attention: Attention) -> Ties:
    """The values with the output projection, and the queries with the keys if positions allow it.

    A head's values are only summed over tokens. Its queries and keys meet in a product. A norm
    before this product forbids a turn. A rope forbids it for the rotated entries. A bound on
    queries, keys and values forbids all turns.
    """
    if attention.clip is not None:
        return []
    heads, width = attention.key_value_heads, attention.head_dim
    group = attention.heads // heads
    # The rows of queries, keys and values, shape (key heads, members, head_dim).
    if attention.fused == "groups":
        rows = np.split(places_of(heads, width, group + 2), (group, group + 1), axis=1)
    else:
        rows = [places_of(heads, width, members) for members in (group, 1, 1)]
    if attention.fused == "rows":
        rows[1] += rows[0].size
        rows[2] += rows[0].size + rows[1].size
    made = [
        (f"self_attn.{'qkv' if attention.fused else part}_proj", 0, own)
        for part, own in zip("qkv", rows, strict=True)
    ]
    ties: Ties = [[made[2], ("self_attn.o_proj", 1, places_of(heads, width, group))]]
    rotated = 0 if attention.rope is None else 2 * len(attention.rope.frequencies)
    if attention.norm is None and rotated < width:
        ties.append([(name, axis, own[..., rotated:]) for name, axis, own in made[:2]])
    return ties
