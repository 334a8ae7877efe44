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
    rows = _rows(attention)
    linear = dict.fromkeys("qkv", "self_attn.qkv_proj") if attention.fused else _SEPARATE
    heads, group = attention.key_value_heads, attention.heads // attention.key_value_heads
    read = places_of(heads, attention.head_dim, group)
    ties: Ties = [[(linear["v"], 0, rows["v"]), ("self_attn.o_proj", 1, read)]]
    rotated = 0 if attention.rope is None else 2 * len(attention.rope.frequencies)
    if attention.norm is None and rotated < attention.head_dim:
        ties.append([(linear[part], 0, rows[part][..., rotated:]) for part in "qk"])
    return ties


_SEPARATE = {part: f"self_attn.{part}_proj" for part in "qkv"}


def _rows(attention: Attention) -> dict[str, Places]:
    """The rows of queries, keys and values, shape (key heads, members, head_dim)."""
    heads, width = attention.key_value_heads, attention.head_dim
    group = attention.heads // heads
    if attention.fused == "groups":
        rows = places_of(heads, width, group + 2)
        return dict(zip("qkv", np.split(rows, (group, group + 1), axis=1), strict=True))
    queries, keys = attention.heads * width, heads * width
    fused = attention.fused == "rows"
    return {
        "q": places_of(heads, width, group),
        "k": places_of(heads, width, start=queries if fused else 0),
        "v": places_of(heads, width, start=queries + keys if fused else 0),
    }
