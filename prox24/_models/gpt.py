"""The families after GPT: layer norms, MLPs without a gate."""

from typing import Any

from transformers import PreTrainedConfig

from prox24._models import settings
from prox24._models.settings import alibi_slopes
from prox24._models.spec import Alibi, Attention, Config, Embedding, Head, Names, Norm, Residual

PARALLEL_ONE_NORM = Residual(before_mlp="input_layernorm", parallel=True)

MEGATRON = (
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
)

BLOOM = Names(
    base="transformer.",
    layers="h",
    layer=(
        ("self_attn.qkv_proj", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        *MEGATRON,
    ),
    outer=(
        ("embed_tokens", "word_embeddings"),
        ("embed_norm", "word_embeddings_layernorm"),
        ("norm", "ln_f"),
    ),
)
"""The names of BLOOM and Falcon; Falcon has no norm after the embedding."""


def gpt2(hf: PreTrainedConfig) -> Config:
    """GPT-2: learned positions, and linears stored as (in, out)."""
    settings.must_be(hf, add_cross_attention=False)
    attention = settings.attention(hf, fused="rows", bias=True, rope=None)

    def scaled(index: int) -> Attention:
        found = attention(index)
        scale = found.scale if hf.scale_attn_weights else 1.0
        return found._replace(
            scale=scale / (index + 1 if hf.scale_attn_by_inverse_layer_idx else 1)
        )

    return settings.decoder(
        hf,
        scaled,
        settings.mlp(hf.n_inner or 4 * hf.n_embd, hf.activation_function, gated=False, bias=True),
        Norm("layer", hf.layer_norm_epsilon),
        embedding=Embedding(positions=hf.n_positions),
        names=Names(
            base="transformer.",
            layers="h",
            layer=(
                ("input_layernorm", "ln_1"),
                ("self_attn.qkv_proj", "attn.c_attn"),
                ("self_attn.o_proj", "attn.c_proj"),
                ("post_attention_layernorm", "ln_2"),
                ("mlp.up_proj", "mlp.c_fc"),
                ("mlp.down_proj", "mlp.c_proj"),
            ),
            outer=(("embed_tokens", "wte"), ("embed_positions", "wpe"), ("norm", "ln_f")),
            transposed=True,
        ),
    )


def opt(hf: PreTrainedConfig) -> Config:
    """OPT: learned positions from row 2."""
    settings.must_be(
        hf,
        do_layer_norm_before=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=hf.hidden_size,
        _remove_final_layer_norm=False,
    )
    bias = hf.enable_bias
    return settings.decoder(
        hf,
        settings.attention(hf, bias=bias, rope=None),
        settings.mlp(hf.ffn_dim, hf.activation_function, gated=False, bias=bias),
        Norm("layer", 1e-5),
        embedding=Embedding(positions=hf.max_position_embeddings + 2, offset=2),
        names=Names(
            base="model.decoder.",
            layer=(
                ("input_layernorm", "self_attn_layer_norm"),
                ("self_attn.o_proj", "self_attn.out_proj"),
                ("post_attention_layernorm", "final_layer_norm"),
                ("mlp.up_proj", "fc1"),
                ("mlp.down_proj", "fc2"),
            ),
            outer=(("norm", "final_layer_norm"),),
        ),
    )


def gpt_neox(hf: PreTrainedConfig) -> Config:
    """GPT-NeoX and Pythia: parallel branches, and a part of each head rotates."""
    return settings.decoder(
        hf,
        settings.attention(hf, partly_rotated=True, fused="groups"),
        settings.mlp(hf.intermediate_size, hf.hidden_act, gated=False, bias=True),
        Norm("layer", hf.layer_norm_eps),
        residual=Residual(parallel=hf.use_parallel_residual),
        names=Names(
            base="gpt_neox.",
            layer=(
                ("self_attn.qkv_proj", "attention.query_key_value"),
                ("self_attn.o_proj", "attention.dense"),
                *MEGATRON,
            ),
            outer=(
                ("embed_tokens", "embed_in"),
                ("norm", "final_layer_norm"),
                ("lm_head", "embed_out"),
            ),
        ),
    )


def falcon(hf: PreTrainedConfig) -> Config:
    """Falcon: one key head or groups of heads, rotary or linear biases, parallel or not."""
    if hf.new_decoder_architecture:
        key_heads = hf.num_kv_heads
    else:
        key_heads = 1 if hf.multi_query else hf.num_attention_heads
    width = hf.hidden_size // hf.num_attention_heads
    alibi = Alibi(alibi_slopes(hf.num_attention_heads), width**-0.5, "bfloat16")
    positions: dict[str, Any] = {"alibi": alibi, "rope": None} if hf.alibi else {}
    attention = settings.attention(
        hf, key_value_heads=key_heads, fused="groups", bias=hf.bias, **positions
    )
    two_norms = hf.num_ln_in_parallel_attn == 2 or (
        hf.num_ln_in_parallel_attn is None and hf.new_decoder_architecture
    )
    if not hf.parallel_attn:
        residual = Residual()
    elif two_norms:
        residual = Residual("ln_attn", None, "ln_mlp", parallel=True)
    else:
        residual = PARALLEL_ONE_NORM
    return settings.decoder(
        hf,
        attention,
        settings.mlp(hf.ffn_hidden_size, hf.activation, gated=False, bias=hf.bias),
        Norm("layer", hf.layer_norm_epsilon),
        residual=residual,
        names=BLOOM,
    )


def bloom(hf: PreTrainedConfig) -> Config:
    """BLOOM: linear biases, and a norm after the embedding."""
    settings.must_be(hf, apply_residual_connection_post_layernorm=False, slow_but_exact=False)
    alibi = Alibi(alibi_slopes(hf.n_head))
    return settings.decoder(
        hf,
        settings.attention(hf, fused="groups", bias=True, rope=None, alibi=alibi),
        settings.mlp(4 * hf.hidden_size, "gelu_pytorch_tanh", gated=False, bias=True),
        Norm("layer", hf.layer_norm_epsilon),
        embedding=Embedding(norm=True),
        names=BLOOM,
    )


def phi(hf: PreTrainedConfig) -> Config:
    """Phi-1, Phi-1.5 and Phi-2: parallel branches under one norm, a head with a bias."""
    settings.must_be(hf, qk_layernorm=False)
    return settings.decoder(
        hf,
        settings.attention(hf, partly_rotated=True, bias=True),
        settings.mlp(hf.intermediate_size, hf.hidden_act, gated=False, bias=True),
        Norm("layer", hf.layer_norm_eps),
        residual=PARALLEL_ONE_NORM,
        head=Head(hf.tie_word_embeddings, bias=True),
        names=Names(
            layer=(
                ("self_attn.o_proj", "self_attn.dense"),
                ("mlp.up_proj", "mlp.fc1"),
                ("mlp.down_proj", "mlp.fc2"),
            ),
            outer=(("norm", "final_layernorm"),),
        ),
    )
