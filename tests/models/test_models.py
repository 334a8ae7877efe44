"""The forward pass of every family against PyTorch transformers, and what it refuses."""

import copy
import functools
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiers import rest
from tiny import (
    FIRST_OF_FAMILY,
    VARIANTS,
    assert_close,
    config_dict,
    jax_logits,
    model_weights,
    pruned_by,
    random_weights,
    seen_by_linears,
    tokens,
    write_tiny,
)

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._core.masks import is_sparse
from prox24._jobs.forward import all_linears, layer_linears, load_model, oriented
from prox24._jobs.native import native_runner
from prox24._jobs.tokens import available_windows
from prox24._models import decoder, families
from prox24._models.families import FAMILIES, config_from_hf
from prox24._pruning.recipe import Recipe
from prox24.errors import UnsupportedModelError

GOLDEN = Path(__file__).parents[1] / "golden"
HAS_TORCH = find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is the oracle")
QUICK = ["grouped_heads", "gpt2", "qwen3_moe", "gemma3"]
SLOW = sorted({*FIRST_OF_FAMILY.values()} - {*QUICK})


def test_every_family_has_a_variant():
    assert FIRST_OF_FAMILY.keys() == set(FAMILIES)


def torch_logits(folder, **options):
    import make_golden

    return make_golden.torch_logits(make_golden.torch_model(folder, **options), tokens())


@pytest.mark.parametrize("variant", [*QUICK, *rest(*sorted(VARIANTS.keys() - {*QUICK}))])
def test_logits_agree_with_pytorch_and_a_tap_sees_the_input_of_every_linear(tmp_path, variant):
    weights, seen = write_tiny(tmp_path / "model", variant), {}
    logits = jax_logits(config_dict(variant), weights, tokens(), seen.__setitem__)
    assert_close(logits[:, -4:], np.load(GOLDEN / f"{variant}.npy"))
    if HAS_TORCH:
        assert_close(logits, torch_logits(tmp_path / "model"))
    for linear in layer_linears(config_from_hf(config_dict(variant)), 1):
        assert seen[linear.input].shape[-1] == linear.shape[1]
        assert seen[linear.input].size == tokens().size * linear.shape[1]


@pytest.mark.parametrize("variant", ["grouped_heads", *rest("gemma3", "falcon_alibi")])
def test_blocks_of_queries_are_those_of_one_block(variant, monkeypatch):
    config_json = config_dict(variant, max_position_embeddings=600)
    weights, ids = random_weights(config_json), tokens(1, 513)
    config, (outer, layers) = model_weights(config_json, weights)
    hidden = decoder.embed(config, outer, jnp.asarray(ids))

    def output_and_gradients(hidden):
        def loss(own, x):
            out = decoder.layer(config.layers[0], own, x, decoder.no_tap)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(layers[0], hidden)

    gradients, out = output_and_gradients(hidden)
    _, of_fewer = output_and_gradients(hidden[:, :511])
    assert_close(out[:, :511], of_fewer, layers=1, width=513)
    monkeypatch.setattr(decoder, "LONG", 1000)
    expected, _ = output_and_gradients(hidden)
    jax.tree.map(functools.partial(assert_close, width=513), gradients, expected)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_gradients_of_a_weight_in_training_are_those_of_jax(shape):
    generator = np.random.default_rng(0)
    x, weight = (generator.normal(size=s).astype("float32") for s in ((2, 3, shape[1]), shape))

    def gradients(wrapped):
        def loss(x, weight):
            return jnp.sum(jnp.sin(decoder.linear(x, wrapped(weight))))

        return jax.jit(jax.grad(loss, (0, 1)))(x, weight)

    jax.tree.map(assert_close, gradients(decoder.InFloat32), gradients(lambda weight: weight))


def test_gradients_inside_of_shard_map_are_those_outside():
    config_json = config_dict()
    config, (outer, layers) = model_weights(config_json, random_weights(config_json))
    hidden = decoder.embed(config, outer, jnp.asarray(tokens()))

    def gradient(own, x):
        def loss(own):
            return jnp.sum(jnp.sin(decoder.layer(config.layers[0], own, x, decoder.no_tap)))

        return jax.grad(loss)(own)

    mesh = jax.make_mesh((1,), ("windows",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("windows")), out_specs=P())
    expected = jax.jit(gradient)(layers[0], hidden)
    jax.tree.map(assert_close, jax.jit(mapped)(layers[0], hidden), expected)


@needs_torch
def test_the_family_that_the_page_adds_agrees_with_pytorch(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    exec(code, {})
    monkeypatch.setitem(VARIANTS, "added", {"model_type": "starcoder2", "num_key_value_heads": 2})
    weights = write_tiny(tmp_path / "model", "added")
    logits = jax_logits(config_dict("added"), weights, tokens())
    assert_close(logits, torch_logits(tmp_path / "model"))


@needs_torch
@pytest.mark.parametrize("variant", rest(*QUICK, *SLOW))
def test_a_pruned_model_in_bfloat16_agrees_with_pytorch(tmp_path, variant):
    import torch

    write_tiny(tmp_path / "source", variant, dtype="bfloat16")
    source = open_checkpoint(tmp_path / "source")
    windows = available_windows(tokens().ravel(), 2, 48)[:2]
    recipe = Recipe.magnitude()
    pruned = pruned_by(native_runner(source, windows, recipe), recipe)
    write_checkpoint(source, tmp_path / "out", pruned.tensors.items())
    out = open_checkpoint(tmp_path / "out")
    config = load_model(out).config
    for linear in all_linears(config):
        assert is_sparse(oriented(config, jnp.asarray(out.read(linear.tensor))), (2, 4), -1)
    ours = jax_logits(out.config, {name: out.read(name) for name in out.tensors}, tokens())
    in_bfloat16 = torch_logits(tmp_path / "out", dtype=torch.bfloat16)
    difference = np.linalg.norm(ours - in_bfloat16, axis=-1)
    # PyTorch rounds by 2^-9 after each of five operations in each of two layers. In a mixture,
    # rounding sends single tokens to another expert, hence the median.
    assert np.median(difference / np.linalg.norm(ours, axis=-1)) <= 2 * 5 * 2.0**-9
    assert_close(ours, torch_logits(tmp_path / "out"))


def test_old_and_new_config_fields_mean_the_same():
    new = config_dict("llama3_rope")
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    given = copy.deepcopy(old)
    assert config_from_hf(old) == config_from_hf(new)
    assert old == given  # It is written beside the result.
    length = rope.pop("original_max_position_embeddings")
    assert config_from_hf(old | {"original_max_position_embeddings": length}) == config_from_hf(new)


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_new", "gelu_pytorch_tanh"])
def test_the_names_of_the_approximate_gelu(name):
    x = np.linspace(-6, 6, 101)
    exact = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    # About eight roundings of numbers of at most 6.
    atol = 8 * 6 * np.finfo(np.float32).eps
    np.testing.assert_allclose(decoder.ACTIVATIONS[name](jnp.float32(x)), exact, rtol=0, atol=atol)


def test_errors_of_transformers_about_a_config_are_one_sentence(monkeypatch):
    def fail(config):
        raise RuntimeError("ambiguous\nper layer")

    monkeypatch.setitem(FAMILIES, "llama", fail)
    with pytest.raises(UnsupportedModelError, match="the config of a llama model: ambiguous"):
        config_from_hf(config_dict("llama1"))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
NO_ROTATION = {"rope_theta": 1e4, "partial_rotary_factor": 0.0}
REFUSED = [
    # Without an implementation
    ("llama1", {"model_type": "mamba"}, "'mamba' is not supported; supported: bloom, "),
    ("llama1", {"hidden_act": "quick_gelu"}, "quick_gelu"),
    ("llama1", {"rope_parameters": DYNAMIC}, "dynamic"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("llama1", {"is_causal": False}, "is_causal False of llama models is not supported"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
    ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}, "slow_but_exact"),
    ("gemma3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    # Without a meaning
    ("llama1", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama1", {"hidden_act": ["silu"]}, "the config of a llama model"),
    ("llama1", {"head_dim": 9}, "the config of a llama model"),
    ("llama1", {"num_key_value_heads": 3}, "3 heads of keys for 4"),
    ("phi", {"rope_parameters": NO_ROTATION}, "partial_rotary_factor 0.0 is not supported"),
    ("llama1", {"attribute_map": {"hidden_size": "a", "a": "hidden_size"}}, "the config of a"),
    ("llama1", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000"),
    ("mistral", {"sliding_window": -1}, "a sliding window of -1"),
    ("mixtral", {"num_experts_per_tok": 9}, "9 of 4 experts"),
    ("olmoe", {"num_experts": 10**6}, "more than 16384 experts"),
]


@pytest.mark.parametrize(("variant", "change", "named"), REFUSED)
def test_other_configs_are_refused_by_name(variant, change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf(config_dict(variant) | change)


def test_an_expert_sees_the_tokens_that_are_routed_to_it():
    config = config_dict("mixtral")
    seen = seen_by_linears(config, random_weights(config), tokens(), 0)
    counts = [
        np.any(seen[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"] != 0, 1).sum()
        for expert in range(4)
    ]
    assert sum(counts) == 2 * tokens().size
    assert min(counts) < tokens().size


@pytest.mark.parametrize(
    ("variant", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama1", "model.")]
)
def test_names_without_the_prefix_of_the_base_model_are_found(variant, prefix):
    config = config_dict(variant)
    weights = random_weights(config)
    bare = {name.removeprefix(prefix): values for name, values in weights.items()}
    assert bare.keys() != weights.keys()
    found, expected = (model_weights(config, named)[1] for named in (bare, weights))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_windows_longer_than_the_table_of_positions_are_refused():
    config = config_dict("gpt2", max_position_embeddings=32)
    with pytest.raises(UnsupportedModelError, match="48 tokens are longer than the model's 32"):
        jax_logits(config, random_weights(config), tokens())
