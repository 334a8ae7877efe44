from pathlib import Path

import numpy as np
import pytest
from tiny import VARIANTS, config_dict, jax_logits, random_weights, tokens

from prox24.errors import UnsupportedModelError
from prox24.models import llama
from prox24.models.registry import family_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_pytorch(variant):
    make_golden = pytest.importorskip("make_golden", exc_type=ImportError)
    config = config_dict(variant)
    weights = random_weights(config)
    expected = make_golden.torch_logits(make_golden.tiny_model(variant, weights), tokens())
    np.testing.assert_allclose(jax_logits(config, weights, tokens()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_golden_files(variant):
    config = config_dict(variant)
    logits = jax_logits(config, random_weights(config), tokens())
    expected = np.load(GOLDEN / f"{variant}.npy")
    np.testing.assert_allclose(logits[:, -4:], expected, atol=1e-5, rtol=0)


def test_variants_differ_from_the_plain_model():
    plain = np.load(GOLDEN / "llama1.npy")
    for variant in set(VARIANTS) - {"llama1"}:
        assert np.abs(np.load(GOLDEN / f"{variant}.npy") - plain).max() > 1e-3, variant


def test_old_and_new_config_fields_mean_the_same():
    new = config_dict("llama3_rope")
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert llama.config_from_hf(old) == llama.config_from_hf(new)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ],
)
def test_settings_without_implementation_raise(change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        llama.config_from_hf(config_dict() | change)


def test_a_missing_field_is_named():
    config = config_dict()
    del config["hidden_size"]
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        llama.config_from_hf(config)


def test_an_unknown_architecture_names_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported: llama"):
        family_of({"model_type": "gpt2"})


def test_tap_sees_the_input_of_every_linear():
    import jax.numpy as jnp

    config = llama.config_from_hf(config_dict("wide_heads"))
    arrays = {n: jnp.asarray(w) for n, w in random_weights(config_dict("wide_heads")).items()}
    layer = {n.removeprefix("model.layers.0."): w for n, w in arrays.items()}
    seen = {}
    llama.layer(config, layer, llama.embed(arrays, jnp.asarray(tokens())), seen.__setitem__)
    assert set(seen) == set(llama.LINEAR_INPUTS.values())
    for linear, name in llama.LINEAR_INPUTS.items():
        assert seen[name].shape == (*tokens().shape, layer[f"{linear}.weight"].shape[1])
