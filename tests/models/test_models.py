"""The forward pass of every family against PyTorch transformers, and what it refuses."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    VARIANTS,
    config_dict,
    jax_logits,
    pruned_by,
    random_weights,
    seen_by_linears,
    tokens,
    write_tiny,
)

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._core.masks import is_sparse
from prox24._jobs.forward import all_linears, load_model, oriented
from prox24._jobs.native import native_runner
from prox24._jobs.text import first_windows
from prox24._models import families, spec
from prox24._models.families import FAMILIES, config_from_hf
from prox24._pruning.recipe import Recipe
from prox24.errors import UnsupportedModelError

# Other positions or residuals do not matter to files.
SAME_TENSORS = {"phi3_short", "phi3_long", "falcon_one_key_head", "gpt_neox_sequential", "gemma"}
GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = ["grouped_heads", "tied_head", "biases"]
QUICK = {"grouped_heads", "gpt2", "qwen3_moe", "gemma3"}
OTHER_FAMILIES = [variant for variant, changes in VARIANTS.items() if "model_type" in changes]


def test_every_family_has_a_variant():
    assert {config_dict(variant)["model_type"] for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_pytorch(tmp_path, variant):
    make_golden = pytest.importorskip("make_golden", exc_type=ImportError)
    weights = write_tiny(tmp_path / "model", variant)
    expected = make_golden.torch_logits(make_golden.torch_model(tmp_path / "model"), tokens())
    logits = jax_logits(config_dict(variant), weights, tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def test_the_family_that_the_page_adds_agrees_with_pytorch(tmp_path, monkeypatch):
    make_golden = pytest.importorskip("make_golden", exc_type=ImportError)
    page = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    exec(code, {})
    monkeypatch.setitem(VARIANTS, "added", {"model_type": "starcoder2", "num_key_value_heads": 2})
    weights = write_tiny(tmp_path / "model", "added")
    expected = make_golden.torch_logits(make_golden.torch_model(tmp_path / "model"), tokens())
    logits = jax_logits(config_dict("added"), weights, tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_golden_files(variant):
    config = config_dict(variant)
    logits = jax_logits(config, random_weights(config), tokens())
    expected = np.load(GOLDEN / f"{variant}.npy")
    np.testing.assert_allclose(logits[:, -4:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "variant",
    [
        variant if variant in QUICK else pytest.param(variant, marks=pytest.mark.slow)
        for variant in [*LLAMA, *sorted(set(OTHER_FAMILIES) - SAME_TENSORS)]
    ],
)
def test_a_pruned_model_in_bfloat16_agrees_with_pytorch(tmp_path, variant):
    make_golden = pytest.importorskip("make_golden", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    write_tiny(tmp_path / "source", variant, dtype="bfloat16")
    source = open_checkpoint(tmp_path / "source")
    windows = first_windows(tokens().ravel(), 2, 48)
    recipe = Recipe.magnitude()
    pruned = pruned_by(native_runner(source, windows, recipe), recipe)
    write_checkpoint(source, tmp_path / "out", pruned.tensors.items())
    out = open_checkpoint(tmp_path / "out")
    config = load_model(out).config
    for linear in all_linears(config):
        assert is_sparse(oriented(config, jnp.asarray(out.read(linear.tensor))), (2, 4), -1)
    ours = jax_logits(out.config, {name: out.read(name) for name in out.tensors}, tokens())
    model = make_golden.torch_model(tmp_path / "out", torch.bfloat16)
    difference = np.linalg.norm(ours - make_golden.torch_logits(model, tokens()), axis=-1)
    # In a mixture, rounding sends single tokens to another expert, hence the median.
    assert np.median(difference / np.linalg.norm(ours, axis=-1)) <= 2e-2
    exact = make_golden.torch_logits(make_golden.torch_model(tmp_path / "out"), tokens())
    np.testing.assert_allclose(ours, exact, atol=1e-5, rtol=0)


def test_variants_differ_from_the_plain_model():
    plain = np.load(GOLDEN / "llama1.npy")
    for variant in set(VARIANTS) - {"llama1"}:
        assert np.abs(np.load(GOLDEN / f"{variant}.npy") - plain).max() > 1e-3, variant


def test_old_and_new_config_fields_mean_the_same():
    new = config_dict("llama3_rope")
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert config_from_hf(old) == config_from_hf(new)


@pytest.mark.parametrize(
    ("variant", "change", "named"),
    [
        ("llama1", {"hidden_act": "gelu_fast"}, "gelu_fast"),
        (
            "llama1",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_settings_without_implementation_raise(variant, change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf(config_dict(variant) | change)


def test_an_unknown_architecture_names_the_supported_ones():
    with pytest.raises(
        UnsupportedModelError, match=r"'mamba' is not supported; supported: bloom, "
    ):
        config_from_hf({"model_type": "mamba"})


def test_equal_layers_share_one_program():
    config = config_from_hf(config_dict("llama1", num_hidden_layers=5))
    assert len(set(config.layers)) == 1
    assert len(set(config_from_hf(config_dict("gemma3")).layers)) == 2


@pytest.mark.parametrize("variant", OTHER_FAMILIES)
def test_tap_sees_the_input_of_every_linear(variant):
    config_json = config_dict(variant)
    weights = random_weights(config_json)
    config = config_from_hf(config_json)
    for linear in all_linears(config)[: len(spec.linear_inputs(config.layers[0]))]:
        seen = seen_by_linears(config_json, weights, tokens(), 0)
        assert seen[linear.tensor].shape == (tokens().size, linear.shape[1])


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
    np.testing.assert_array_equal(
        jax_logits(config, bare, tokens()), jax_logits(config, weights, tokens())
    )


def test_windows_longer_than_the_table_of_positions_are_refused():
    config = config_dict("gpt2", max_position_embeddings=32)
    with pytest.raises(UnsupportedModelError, match="48 tokens are longer than the model's 32"):
        jax_logits(config, random_weights(config), tokens())
