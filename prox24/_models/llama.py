"""The families after Llama: RMS norms, gated MLPs, rotary positions; some are mixtures."""

from typing import Any

from transformers import PreTrainedConfig

from prox24._models import settings
from prox24._models.spec import MLP, Attention, Config, Embedding, Head, Names, Norm, Residual

SANDWICH = Residual(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

AFTER = Residual(None, "post_attention_layernorm", None, "post_feedforward_layernorm")

EXPERTS = Names(layer=(("mlp.router", "mlp.gate"),))


def llama(hf: PreTrainedConfig) -> Config:
    """Llama 1 to 3.3, SmolLM and SmolLM2, TinyLlama, OpenLlama; Mistral, with its window."""
    return settings.decoder(hf)


def qwen2(hf: PreTrainedConfig) -> Config:
    """Qwen2 and Qwen2.5: a bias on q, k and v."""
    return settings.decoder(hf, settings.attention(hf, bias=True, output_bias=False))


def qwen3(hf: PreTrainedConfig) -> Config:
    """Qwen3: each head of q and k is normalised."""
    return settings.decoder(hf, settings.attention(hf, norm="heads"))


def smollm3(hf: PreTrainedConfig) -> Config:
    """SmolLM3: some layers have no positions."""
    rotary = settings.attention(hf)

    def attention(index: int) -> Attention:
        found = rotary(index)
        return found if hf.no_rope_layers[index] else found._replace(rope=None)

    return settings.decoder(hf, attention)


def granite(hf: PreTrainedConfig) -> Config:
    """Granite: four multipliers."""
    return settings.decoder(
        hf,
        settings.attention(hf, scale=hf.attention_multiplier),
        residual=Residual(scale=hf.residual_multiplier),
        embedding=Embedding(scale=hf.embedding_multiplier),
        head=Head(hf.tie_word_embeddings, divisor=hf.logits_scaling),
    )


def olmo2(hf: PreTrainedConfig) -> Config:
    """OLMo 2: norms after the branches, and over all heads of q and k."""
    return settings.decoder(hf, settings.attention(hf, norm="rows"), residual=AFTER)


def phi3(hf: PreTrainedConfig) -> Config:
    """Phi-3 and Phi-4: q, k and v are one linear, and so are gate and up."""
    attention = settings.attention(hf, partly_rotated=True, fused="rows")
    return settings.decoder(hf, attention, settings.gated(hf, fused=True))


def gemma(hf: PreTrainedConfig) -> Config:
    """Gemma: norms hold weight - 1, and the embedding is scaled."""
    return settings.decoder(
        hf,
        norm=Norm("rms", hf.rms_norm_eps, offset=1.0),
        embedding=Embedding(scale=hf.hidden_size**0.5),
    )


def gemma2(hf: PreTrainedConfig, **changes: Any) -> Config:
    """Gemma 2: Gemma with norms on both sides of a branch, soft caps and alternating windows."""
    scale, softcap = hf.query_pre_attn_scalar**-0.5, hf.attn_logit_softcapping
    return settings.decoder(
        hf,
        settings.attention(hf, scale=scale, softcap=softcap, **changes),
        settings.mlp(hf.intermediate_size, hf.hidden_activation),
        Norm("rms", hf.rms_norm_eps, offset=1.0),
        residual=SANDWICH,
        embedding=Embedding(scale=hf.hidden_size**0.5),
        head=Head(hf.tie_word_embeddings, softcap=hf.final_logit_softcapping),
    )


def gemma3(hf: PreTrainedConfig) -> Config:
    """Gemma 3's text model: Gemma 2 with normalised heads and a rope for each layer type."""
    settings.must_be(hf, attn_logit_softcapping=None)
    return gemma2(hf, norm="heads")


def mixtral(hf: PreTrainedConfig) -> Config:
    """Mixtral: eight experts, two for each token."""
    experts = settings.experts(hf.num_local_experts, hf.num_experts_per_tok, normalised=True)
    return settings.decoder(
        hf,
        mlps=settings.gated(hf, experts=experts),
        names=Names(
            layer=(
                ("mlp.router", "block_sparse_moe.gate"),
                ("mlp.experts.{}.gate_proj", "block_sparse_moe.experts.{}.w1"),
                ("mlp.experts.{}.up_proj", "block_sparse_moe.experts.{}.w3"),
                ("mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2"),
            )
        ),
    )


def qwen3_moe(hf: PreTrainedConfig) -> Config:
    """Qwen3's mixtures; some layers may be dense."""
    experts = settings.experts(hf.num_experts, hf.num_experts_per_tok, hf.norm_topk_prob)
    dense = settings.gated(hf)
    mixture = settings.mlp(hf.moe_intermediate_size, hf.hidden_act, experts=experts)

    def mlp(index: int) -> MLP:
        mixes = index not in hf.mlp_only_layers and (index + 1) % hf.decoder_sparse_step == 0
        return mixture(index) if mixes else dense(index)

    return settings.decoder(hf, settings.attention(hf, norm="heads"), mlp, names=EXPERTS)


def olmoe(hf: PreTrainedConfig) -> Config:
    """OLMoE: norms over all heads of q and k, which may be clipped."""
    experts = settings.experts(hf.num_experts, hf.num_experts_per_tok, hf.norm_topk_prob)
    attention = settings.attention(hf, norm="rows", clip=hf.clip_qkv)
    return settings.decoder(hf, attention, settings.gated(hf, experts=experts), names=EXPERTS)
