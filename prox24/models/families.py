"""From HF's config.json to the setting of the decoder that computes it: a function for a family.

`docs/adding-a-model.md` adds one. A field that changes the computation and has no counterpart in
`prox24.models.decoder` raises; it is never ignored.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from prox24.errors import UnsupportedModelError
from prox24.models.decoder import (
    ACTIVATIONS,
    MLP,
    Alibi,
    Attention,
    Config,
    Embedding,
    Experts,
    Head,
    Layer,
    Names,
    Norm,
    Residual,
    Rope,
    alibi_slopes,
    outer_tensor,
)
from prox24.models.rope import read_rope

SANDWICH = Residual(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
AFTER = Residual(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
PARALLEL = Residual(parallel=True)
PARALLEL_ONE_NORM = Residual(before_mlp="input_layernorm", parallel=True)


LIMITS = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**16,
    "num_attention_heads": 2**12,
    "head_dim": 2**12,
}
MLPS = 2**14
"""Beyond any model, and its experts in all; a small config.json should not take more memory."""

WRONG_VALUE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers, and a family, run into if a field has a value of another kind."""

UNUSED = ("dtype", "torch_dtype", "id2label", "label2id", "num_labels")
"""What transformers reads torch for, or makes as many entries of as it is told."""


def config_from_hf(config: Mapping[str, Any], tensors: Collection[str] = ()) -> Config:
    """Reads HF's config.json.

    Args:
      config: the decoded JSON object. Fields that it lacks are as transformers has them.
      tensors: the checkpoint's names, since some lack the prefix that transformers expects.

    Raises:
      UnsupportedModelError: the model_type, or a setting of it, has no forward pass here.

    Example:
      >>> config_from_hf({"model_type": "llama", "num_hidden_layers": 2}).hidden
      4096
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type {kind!r} is not supported; supported: {supported}")
    _check_sizes(kind, config)
    given = {name: value for name, value in config.items() if name not in UNUSED}
    try:
        found = FAMILIES[kind](transformers.AutoConfig.for_model(**given))
    except WRONG_VALUE as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise UnsupportedModelError(f"the config of a {kind} model: {reason}") from error
    if sum(layer.mlp.experts.number if layer.mlp.experts else 1 for layer in found.layers) > MLPS:
        raise UnsupportedModelError(f"the config of a {kind} model: more than {MLPS} experts")
    # OPT's larger models have "decoder." alone for "model.decoder.".
    parts = found.names.base.split(".")
    names = [found.names._replace(base=".".join(parts[start:])) for start in range(len(parts))]
    present = (one for one in names if outer_tensor(one, "embed_tokens.weight") in tensors)
    return found._replace(names=next(present, found.names))


def _check_sizes(kind: str, config: Mapping[str, Any]) -> None:
    aliases = CONFIG_MAPPING[kind].attribute_map
    for name, limit in LIMITS.items():
        for key in sorted({name, aliases.get(name, name)}):
            value = config.get(key)
            if value is not None and not (type(value) is int and 0 < value <= limit):
                raise UnsupportedModelError(
                    f"the config of a {kind} model: {key} is {value!r}, "
                    f"not a number from 1 to {limit}"
                )


def _decoder(
    hf: PreTrainedConfig,
    attention: Callable[[int], Attention],
    mlp: Callable[[int], MLP],
    norm: Norm,
    *,
    residual: Residual = Residual(),
    embedding: Embedding = Embedding(),
    head: Head | None = None,
    names: Names = Names(),
) -> Config:
    layers = tuple(
        Layer(hf.hidden_size, norm, attention(index), mlp(index), residual)
        for index in range(hf.num_hidden_layers)
    )
    head = head or Head(hf.tie_word_embeddings)
    positions = getattr(hf, "max_position_embeddings", None)
    if positions is not None and (type(positions) is not int or positions < 1):
        raise UnsupportedModelError(f"max_position_embeddings {positions!r} is not a number")
    return Config(hf.vocab_size, hf.hidden_size, norm, layers, embedding, head, names, positions)


def _rms(hf: PreTrainedConfig, offset: float = 0.0) -> Norm:
    return Norm("rms", hf.rms_norm_eps, offset)


def _attention(
    hf: PreTrainedConfig, *, partly_rotated: bool = False, **changes: Any
) -> Callable[[int], Attention]:
    """Grouped heads, rotary positions, and the windows that the config gives to each layer."""
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads

    @functools.cache
    def rope(kind: str | None) -> Rope:
        return read_rope(hf, head_dim, kind, partly_rotated=partly_rotated)

    def of_layer(index: int) -> Attention:
        kind = _layer_type(hf, index)
        settings: dict[str, Any] = {
            "heads": heads,
            "key_value_heads": _declared(hf, "num_key_value_heads") or heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "window": _declared(hf, "sliding_window") if kind != "full_attention" else None,
        }
        if "rope" not in changes:
            settings["rope"] = rope(kind)
        found = Attention(**(settings | changes))
        keys, window = found.key_value_heads, found.window
        if type(keys) is not int or keys < 1 or heads % keys:
            raise UnsupportedModelError(f"{keys!r} heads of keys for {heads} heads of queries")
        if window is not None and (type(window) is not int or window < 1):
            raise UnsupportedModelError(f"a sliding window of {window!r} tokens")
        return found

    return of_layer


def _declared(hf: PreTrainedConfig, field: str) -> Any:
    """A field of the family's config class; others may stand in a config, and mean nothing."""
    return getattr(hf, field) if hasattr(type(hf), field) else None


def _layer_type(hf: PreTrainedConfig, index: int) -> str | None:
    kinds = _declared(hf, "layer_types")
    if kinds is None:
        return None
    if kinds[index] not in ("full_attention", "sliding_attention"):
        raise UnsupportedModelError(f"layer type {kinds[index]!r} is not supported")
    return str(kinds[index])


def _mlp(width: int, activation: str, **settings: Any) -> Callable[[int], MLP]:
    if activation not in ACTIVATIONS:
        supported = ", ".join(map(repr, ACTIVATIONS))
        raise UnsupportedModelError(
            f"activation {activation!r} is not supported; supported are {supported}"
        )
    return lambda index: MLP(width, activation, **settings)


def _gated(hf: PreTrainedConfig, **settings: Any) -> Callable[[int], MLP]:
    return _mlp(hf.intermediate_size, hf.hidden_act, **settings)


def _must_be(hf: PreTrainedConfig, **settings: Any) -> None:
    for name, value in settings.items():
        given = getattr(hf, name, value)
        if (given or None) != (value or None):
            raise UnsupportedModelError(
                f"{name} {given!r} of {hf.model_type} models is not supported, only {value!r}"
            )


def llama(hf: PreTrainedConfig) -> Config:
    """Llama 1 to 3.3, SmolLM and SmolLM2, TinyLlama, OpenLlama."""
    bias = hf.attention_bias
    attention = _attention(hf, bias=bias, output_bias=bias)
    return _decoder(hf, attention, _gated(hf, bias=hf.mlp_bias), _rms(hf))


def mistral(hf: PreTrainedConfig) -> Config:
    """Mistral, with its sliding window."""
    return _decoder(hf, _attention(hf), _gated(hf), _rms(hf))


def qwen2(hf: PreTrainedConfig) -> Config:
    """Qwen2 and Qwen2.5: a bias on q, k and v."""
    return _decoder(hf, _attention(hf, bias=True), _gated(hf), _rms(hf))


def qwen3(hf: PreTrainedConfig) -> Config:
    """Qwen3: each head of q and k is normalised."""
    bias = hf.attention_bias
    attention = _attention(hf, bias=bias, output_bias=bias, norm="heads")
    return _decoder(hf, attention, _gated(hf), _rms(hf))


def smollm3(hf: PreTrainedConfig) -> Config:
    """SmolLM3: some layers have no positions."""
    bias = hf.attention_bias
    rotary = _attention(hf, bias=bias, output_bias=bias)

    def attention(index: int) -> Attention:
        found = rotary(index)
        return found if hf.no_rope_layers[index] else found._replace(rope=None)

    return _decoder(hf, attention, _gated(hf, bias=hf.mlp_bias), _rms(hf))


def granite(hf: PreTrainedConfig) -> Config:
    """Granite: four multipliers."""
    bias = hf.attention_bias
    return _decoder(
        hf,
        _attention(hf, bias=bias, output_bias=bias, scale=hf.attention_multiplier),
        _gated(hf, bias=hf.mlp_bias),
        _rms(hf),
        residual=Residual(scale=hf.residual_multiplier),
        embedding=Embedding(scale=hf.embedding_multiplier),
        head=Head(hf.tie_word_embeddings, divisor=hf.logits_scaling),
    )


def olmo2(hf: PreTrainedConfig) -> Config:
    """OLMo 2: norms after the branches, and over all heads of q and k."""
    bias = hf.attention_bias
    attention = _attention(hf, bias=bias, output_bias=bias, norm="rows")
    return _decoder(hf, attention, _gated(hf), _rms(hf), residual=AFTER)


def phi3(hf: PreTrainedConfig) -> Config:
    """Phi-3 and Phi-4: q, k and v are one linear, and so are gate and up."""
    attention = _attention(hf, partly_rotated=True, fused="rows")
    return _decoder(hf, attention, _gated(hf, fused=True), _rms(hf))


def gemma(hf: PreTrainedConfig) -> Config:
    """Gemma: norms hold weight - 1, and the embedding is scaled."""
    bias = hf.attention_bias
    _must_be(hf, use_bidirectional_attention=False)
    return _decoder(
        hf,
        _attention(hf, bias=bias, output_bias=bias),
        _gated(hf),
        _rms(hf, offset=1.0),
        embedding=Embedding(scale=hf.hidden_size**0.5),
    )


def gemma2(hf: PreTrainedConfig) -> Config:
    """Gemma 2: Gemma with norms on both sides of a branch, soft caps and alternating windows."""
    bias = hf.attention_bias
    _must_be(hf, use_bidirectional_attention=False)
    return _decoder(
        hf,
        _attention(
            hf,
            bias=bias,
            output_bias=bias,
            scale=hf.query_pre_attn_scalar**-0.5,
            softcap=hf.attn_logit_softcapping,
        ),
        _mlp(hf.intermediate_size, hf.hidden_activation),
        _rms(hf, offset=1.0),
        residual=SANDWICH,
        embedding=Embedding(scale=hf.hidden_size**0.5),
        head=Head(hf.tie_word_embeddings, softcap=hf.final_logit_softcapping),
    )


def gemma3(hf: PreTrainedConfig) -> Config:
    """Gemma 3's text model: Gemma 2 with normalised heads and a rope for each layer type."""
    _must_be(hf, use_bidirectional_attention=False)
    bias = hf.attention_bias
    return _decoder(
        hf,
        _attention(
            hf,
            bias=bias,
            output_bias=bias,
            norm="heads",
            scale=hf.query_pre_attn_scalar**-0.5,
            softcap=hf.attn_logit_softcapping,
        ),
        _mlp(hf.intermediate_size, hf.hidden_activation),
        _rms(hf, offset=1.0),
        residual=SANDWICH,
        embedding=Embedding(scale=hf.hidden_size**0.5),
        head=Head(hf.tie_word_embeddings, softcap=hf.final_logit_softcapping),
    )


def gpt2(hf: PreTrainedConfig) -> Config:
    """GPT-2: learned positions, and linears stored as (in, out)."""
    _must_be(hf, add_cross_attention=False)
    attention = _attention(hf, fused="rows", bias=True, output_bias=True, rope=None)

    def scaled(index: int) -> Attention:
        found = attention(index)
        scale = found.scale if hf.scale_attn_weights else 1.0
        return found._replace(
            scale=scale / (index + 1 if hf.scale_attn_by_inverse_layer_idx else 1)
        )

    return _decoder(
        hf,
        scaled,
        _mlp(hf.n_inner or 4 * hf.n_embd, hf.activation_function, gated=False, bias=True),
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
    _must_be(
        hf,
        do_layer_norm_before=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=hf.hidden_size,
        _remove_final_layer_norm=False,
    )
    bias = hf.enable_bias
    return _decoder(
        hf,
        _attention(hf, bias=bias, output_bias=bias, rope=None),
        _mlp(hf.ffn_dim, hf.activation_function, gated=False, bias=bias),
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


MEGATRON = (
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
)


def gpt_neox(hf: PreTrainedConfig) -> Config:
    """GPT-NeoX and Pythia: parallel branches, and a part of each head rotates."""
    bias = hf.attention_bias
    return _decoder(
        hf,
        _attention(hf, partly_rotated=True, fused="groups", bias=bias, output_bias=bias),
        _mlp(hf.intermediate_size, hf.hidden_act, gated=False, bias=True),
        Norm("layer", hf.layer_norm_eps),
        residual=PARALLEL if hf.use_parallel_residual else Residual(),
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
    width = hf.hidden_size // hf.num_attention_heads
    if hf.new_decoder_architecture:
        key_heads = hf.num_kv_heads
    else:
        key_heads = 1 if hf.multi_query else hf.num_attention_heads
    alibi = Alibi(alibi_slopes(hf.num_attention_heads), width**-0.5, "bfloat16")
    positions: dict[str, Any] = {"alibi": alibi, "rope": None} if hf.alibi else {}
    two_norms = hf.num_ln_in_parallel_attn == 2 or (
        hf.num_ln_in_parallel_attn is None and hf.new_decoder_architecture
    )
    if not hf.parallel_attn:
        residual = Residual()
    elif two_norms:
        residual = Residual("ln_attn", None, "ln_mlp", parallel=True)
    else:
        residual = PARALLEL_ONE_NORM
    return _decoder(
        hf,
        _attention(
            hf,
            key_value_heads=key_heads,
            fused="groups",
            bias=hf.bias,
            output_bias=hf.bias,
            **positions,
        ),
        _mlp(hf.ffn_hidden_size, hf.activation, gated=False, bias=hf.bias),
        Norm("layer", hf.layer_norm_epsilon),
        residual=residual,
        names=Names(
            base="transformer.",
            layers="h",
            layer=(
                ("self_attn.qkv_proj", "self_attention.query_key_value"),
                ("self_attn.o_proj", "self_attention.dense"),
                *MEGATRON,
            ),
            outer=(("embed_tokens", "word_embeddings"), ("norm", "ln_f")),
        ),
    )


def bloom(hf: PreTrainedConfig) -> Config:
    """BLOOM: linear biases, and a norm after the embedding."""
    _must_be(hf, apply_residual_connection_post_layernorm=False)
    return _decoder(
        hf,
        _attention(
            hf,
            fused="groups",
            bias=True,
            output_bias=True,
            rope=None,
            alibi=Alibi(alibi_slopes(hf.n_head)),
        ),
        _mlp(4 * hf.hidden_size, "gelu_pytorch_tanh", gated=False, bias=True),
        Norm("layer", hf.layer_norm_epsilon),
        embedding=Embedding(norm=True),
        names=Names(
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
        ),
    )


def phi(hf: PreTrainedConfig) -> Config:
    """Phi-1, Phi-1.5 and Phi-2: parallel branches under one norm, a head with a bias."""
    _must_be(hf, qk_layernorm=False)
    return _decoder(
        hf,
        _attention(hf, partly_rotated=True, bias=True, output_bias=True),
        _mlp(hf.intermediate_size, hf.hidden_act, gated=False, bias=True),
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


def _experts(number: int, per_token: int, normalised: bool) -> Experts:
    if not 1 <= per_token <= number:
        raise UnsupportedModelError(f"{per_token} of {number} experts for each token do not exist")
    return Experts(number, per_token, normalised)


EXPERTS = (("mlp.router", "mlp.gate"),)


def mixtral(hf: PreTrainedConfig) -> Config:
    """Mixtral: eight experts, two for each token."""
    experts = _experts(hf.num_local_experts, hf.num_experts_per_tok, normalised=True)
    return _decoder(
        hf,
        _attention(hf),
        _gated(hf, experts=experts),
        _rms(hf),
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
    bias = hf.attention_bias
    experts = _experts(hf.num_experts, hf.num_experts_per_tok, hf.norm_topk_prob)
    dense = _gated(hf)
    mixture = _mlp(hf.moe_intermediate_size, hf.hidden_act, experts=experts)

    def mlp(index: int) -> MLP:
        mixes = index not in hf.mlp_only_layers and (index + 1) % hf.decoder_sparse_step == 0
        return mixture(index) if mixes else dense(index)

    attention = _attention(hf, bias=bias, output_bias=bias, norm="heads")
    return _decoder(hf, attention, mlp, _rms(hf), names=Names(layer=EXPERTS))


def olmoe(hf: PreTrainedConfig) -> Config:
    """OLMoE: norms over all heads of q and k, which may be clipped."""
    bias = hf.attention_bias
    experts = _experts(hf.num_experts, hf.num_experts_per_tok, hf.norm_topk_prob)
    return _decoder(
        hf,
        _attention(hf, bias=bias, output_bias=bias, norm="rows", clip=hf.clip_qkv),
        _gated(hf, experts=experts),
        _rms(hf),
        names=Names(layer=EXPERTS),
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig], Config]] = {
    "bloom": bloom,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmoe": olmoe,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}
"""By HF's model_type."""
