"""PyTorch models as functions of JAX, and what is said where torchax is not to be had."""

import dataclasses
import json
import os
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TEXT, calibrated, error_line, printed_json, run
from safetensors.numpy import load_file, save_file
from tiny import (
    VOCABULARY,
    assert_close,
    byte_tokenizer,
    config_dict,
    pruned_by,
    rounding,
    tokens,
    write_folder,
    write_tiny,
)

import prox24
from prox24 import DenseTargets, Recipe
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._jobs import torchax
from prox24._jobs.native import native_runner
from prox24._jobs.perplexity import native_perplexity
from prox24._jobs.torch_runner import TorchRunner
from prox24._pruning import loop
from prox24.errors import CalibrationError, CheckpointError, Prox24Error, UnsupportedModelError

WINDOWS = tokens(batch=8, length=32)
WANDA = Recipe.wanda()
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Families that have no forward pass here, with their own names of the sizes.
OPENAI = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FOREIGN = {
    "stablelm": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 4},
    "gptj": {**OPENAI, "rotary_dim": 4},
    "biogpt": {},
    "codegen": {**OPENAI, "n_ctx": 64, "rotary_dim": 4},
    "ernie4_5": {"num_key_value_heads": 2},
    "glm": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_bigcode": OPENAI,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "nemotron": {"num_key_value_heads": 2},
    "olmo": {"num_key_value_heads": 2},
    "persimmon": {},
    "starcoder2": {"num_key_value_heads": 2},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
}
WRITTEN = ["stablelm", "cohere", "gptj"]
# What torchax or prox24 cannot run.
IMPOSSIBLE = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "qwen2_moe": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.fixture
def works(standard_promotion):
    """Skips where torchax does not run and need not."""
    try:
        torchax.require()
    except Prox24Error as error:
        if "REQUIRE_TORCHAX" in os.environ:
            raise
        pytest.skip(str(error))


needs_torchax = pytest.mark.usefixtures("works")


def foreign_model(family):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **(FOREIGN | IMPOSSIBLE)[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
            else:
                parameter *= 5
    return model


def write_foreign(folder, family):
    model = foreign_model(family)
    model.to(dtype=sys.modules["torch"].bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def torch_output(model):
    torch = sys.modules["torch"]
    with torch.no_grad():
        return model(torch.as_tensor(WINDOWS, dtype=torch.long))


def linears(model):
    torch = sys.modules["torch"]
    modules = model.named_modules()
    return {f"{name}.weight" for name, m in modules if isinstance(m, torch.nn.Linear)}


def opened(path):
    return open_checkpoint(path, any_family=True)


def pruned_folder(path, recipe=WANDA, windows=WINDOWS):
    return pruned_by(TorchRunner(opened(path), windows), recipe)


# A whole model


@needs_torchax
@pytest.mark.parametrize("family", FOREIGN)
def test_logits_are_those_of_pytorch_and_every_linear_is_found(family):
    model = foreign_model(family)
    apply, params = torchax.from_torch(model)
    assert params.keys() == dict(model.named_parameters()).keys()
    ids = jnp.asarray(WINDOWS)
    assert_close(jax.jit(apply)(params, ids), torch_output(model).logits.numpy())
    # A tied head is the embedding, which is no product.
    found = prox24.calibrate(apply, params, [ids]).grams
    assert found.keys() == linears(model) & params.keys()


@needs_torchax
def test_hidden_states_of_an_encoder_are_those_of_pytorch():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    apply, params = torchax.from_torch(model)
    ids = jnp.asarray(WINDOWS)
    assert_close(apply(params, ids), torch_output(model).last_hidden_state.numpy())
    assert prox24.calibrate(apply, params, [ids]).grams.keys() == linears(model)


@needs_torchax
def test_a_pruned_tree_goes_back_to_pytorch():
    model = foreign_model("stablelm")
    apply, params = torchax.from_torch(model)
    batches = [jnp.asarray(WINDOWS)]
    names = linears(model) - {"lm_head.weight"}
    for order in ("one-shot", "sequential"):
        pruned = prox24.prune_params(apply, params, batches, WANDA, order=order)
        assert {leaf.path for leaf in pruned.leaves if leaf.pruned} == names
    torch = sys.modules["torch"]
    values = {name: torch.as_tensor(np.array(leaf)) for name, leaf in pruned.params.items()}
    before = jax.tree.map(np.array, params)
    model.load_state_dict(values, strict=False)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert_close(apply(pruned.params, batches[0]), torch_output(model).logits.numpy())


@needs_torchax
def test_an_operation_that_torchax_lacks_is_named():
    apply, params = torchax.from_torch(foreign_model("qwen2_moe"))
    with pytest.raises(UnsupportedModelError, match=r"torchax cannot run Qwen2Moe.*grouped_mm"):
        jax.eval_shape(apply, params, jnp.asarray(WINDOWS))


@needs_torchax
def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    write_foreign(tmp_path, "stablelm")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/own-model.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(block, {"jax": jax, "prox24": prox24})
    weights = load_file(tmp_path / "pruned/model.safetensors")
    assert prox24.is_sparse(jnp.asarray(weights["model.layers.1.mlp.down_proj.weight"]))


# Layer by layer


@needs_torchax
@pytest.mark.parametrize(
    ("variant", "dtype", "targets"),
    [
        ("grouped_heads", "float32", None),
        ("gpt2", "bfloat16", DenseTargets()),
        ("gemma2", "float32", DenseTargets()),
    ],
)
def test_layers_are_pruned_as_by_the_native_forward_pass(
    tmp_path, monkeypatch, variant, dtype, targets
):
    monkeypatch.setattr("prox24._jobs.forward.BATCH_TOKENS", 64)  # four batches
    write_tiny(tmp_path / "model", variant, dtype)
    # In 16 bits a number between two others is rounded to either.
    recipe = Recipe(prox24.SparseGPT(), None, targets=targets, basis=None, dtype="float32")
    runner = native_runner(open_checkpoint(tmp_path / "model"), WINDOWS, recipe)
    native, pruned = pruned_by(runner, recipe), pruned_folder(tmp_path / "model", recipe)
    assert pruned.tensors.keys() == native.tensors.keys()
    # SparseGPT inverts a damped Gram of 64 columns at most, whose condition number is at most the
    # trace over what damping adds; a product with it rounds by the root of 64, relative to 2^-24.
    near = 64 / 0.01 * np.sqrt(64) * 2.0**-24
    for name, values in native.tensors.items():
        atol = near * np.abs(values).max()
        np.testing.assert_allclose(pruned.tensors[name], values, rtol=0, atol=atol)
    other = {report.name: report for report in native.reports}
    for report in pruned.reports:
        expected = other[report.name]
        assert report[1:5] == expected[1:5]
        assert report.statistics.relative_loss == pytest.approx(
            expected.statistics.relative_loss, rel=near
        )


@needs_torchax
def test_finished_tensors_and_those_of_the_recipe_are_left_out(tmp_path):
    write_tiny(tmp_path / "model", "gpt2", "bfloat16")
    recipe = Recipe(prox24.Wanda(), None, skip="c_fc", keep_dense=1)
    runner = TorchRunner(opened(tmp_path / "model"), WINDOWS)
    dense = loop.most_lossy(runner, recipe).losses
    whole = pruned_by(runner, recipe, dense=dense).tensors
    assert len(whole) == 8 - 2 - 1
    done = {name: types.SimpleNamespace(read=lambda v=v: v) for name, v in list(whole.items())[:3]}
    rest = pruned_by(runner, recipe, dense=dense, finished=done).tensors
    assert rest.keys() == whole.keys() - done.keys()
    assert all(values.tobytes() == whole[name].tobytes() for name, values in rest.items())


@needs_torchax
@pytest.mark.parametrize("family", WRITTEN)
def test_what_is_written_is_sparse_and_loads_in_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    path = write_foreign(tmp_path, family)
    pruned = pruned_folder(path).tensors
    write_checkpoint(opened(path), tmp_path / "out", pruned.items())
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, values in after.items():
        assert values.dtype == before[name].dtype
        if name in pruned:
            assert prox24.is_sparse(jnp.asarray(values))
            assert np.count_nonzero(values) <= values.size // 2
        else:
            assert values.tobytes() == before[name].tobytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.keys() == {name for name in linears(model) if "lm_head" not in name}


@needs_torchax
def test_the_mask_of_an_old_model_stays_as_it_is(tmp_path):
    path = write_foreign(tmp_path, "gptj") / "model.safetensors"
    weights, mask = load_file(path), "transformer.h.0.attn.masked_bias"
    save_file(weights | {mask: np.array(-np.inf, np.float16)}, path, metadata={"format": "pt"})
    prox24.prune(path.parent, tmp_path / "out", WANDA, calibration=WINDOWS)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (written[mask].dtype, float(written[mask])) == (np.float16, -np.inf)
    manifest = json.loads((tmp_path / "out" / "prox24.json").read_text())
    assert {"torch", "torchax"} <= manifest["versions"].keys()


@needs_torchax
def test_a_linear_that_is_not_a_plain_product_is_named(tmp_path):
    path = write_foreign(tmp_path, "mamba")
    with pytest.raises(CalibrationError, match=r"dt_proj\.weight has no products: used by"):
        pruned_folder(path)
    pruned = pruned_folder(path, dataclasses.replace(WANDA, skip="dt_proj"))
    assert {name.rpartition(".mixer.")[2] for name in pruned.tensors} >= {"in_proj.weight"}


@needs_torchax
def test_layers_that_depend_on_more_than_hidden_states_are_refused(tmp_path, monkeypatch):
    model = foreign_model("stablelm")

    def rotate_by_token(module, arguments, keywords):
        return arguments, keywords | {"position_ids": keywords["input_ids"]}

    model.model.register_forward_pre_hook(rotate_by_token, with_kwargs=True)
    monkeypatch.setattr(torchax, "_load", lambda path: model)
    monkeypatch.setattr("prox24._jobs.forward.BATCH_TOKENS", 64)
    path = write_foreign(tmp_path, "stablelm")
    with pytest.raises(UnsupportedModelError, match="depend on more than their hidden states"):
        pruned_folder(path)


@needs_torchax
def test_a_tensor_that_is_missing_is_named(tmp_path):
    folder = write_foreign(tmp_path, "stablelm")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        torchax.torch_perplexity(opened(folder), WINDOWS)


@needs_torchax
def test_long_windows_and_folders_that_transformers_does_not_know_are_refused(tmp_path):
    path = write_foreign(tmp_path, "gpt_neo")
    with pytest.raises(UnsupportedModelError, match="does not run"):
        pruned_folder(path, windows=tokens(1, 4096))
    write_folder(tmp_path / "other", {"model_type": "unheard_of"}, {"x": np.zeros(4, np.float32)})
    with pytest.raises(UnsupportedModelError, match="transformers cannot load it"):
        pruned_folder(tmp_path / "other")


# The command line


def pruning(folder):
    """A command."""
    (folder / "text.txt").write_text(TEXT)
    return ["prune", folder / "model", folder / "out", *calibrated(folder)]


@needs_torchax
def test_prune_verify_and_eval_take_families_that_are_not_native(tmp_path, capsys):
    model, out = write_foreign(tmp_path, "gptj"), tmp_path / "out"
    report = printed_json(capsys, *pruning(tmp_path))
    assert len(report["linears"]) == 12
    assert report["recipe"]["targets"] == {"name": "DenseTargets", "pull": 1.0}
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(prox24.is_sparse(jnp.asarray(written[it["name"]])) for it in report["linears"])

    counts = printed_json(capsys, "verify", out)
    assert (counts["linears"], counts["sparsity"], counts["violations"]) == (12, 0.5, {})
    assert run("verify", model, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["violations"]) == 12
    text = ["--text", tmp_path / "text.txt", "--sequence-length", "48"]
    assert 1 < printed_json(capsys, "eval", out, *text)["perplexity"] < 1e6

    assert run("verify", out, "--pattern", "2:5") == 2
    assert "not divisible by 5" in capsys.readouterr().err
    for option, value in (("memory", "1GB"), ("activations", "disk"), ("refine", "block")):
        said = error_line(capsys, *pruning(tmp_path), "--overwrite", f"--{option}", value)
        own = "is for models with a forward pass of prox24's own"
        assert said == f"prox24: error: {option} {own}\n"


@needs_torchax
@pytest.mark.parametrize("variant", ["grouped_heads", "gpt2"])
def test_perplexity_and_linears_are_those_of_the_native_forward_pass(tmp_path, variant):
    write_tiny(tmp_path / "model", variant)
    checkpoint, native = opened(tmp_path / "model"), open_checkpoint(tmp_path / "model")
    assert torchax.linear_axes(checkpoint) == torchax.linear_axes(native)
    seen = []
    result = torchax.torch_perplexity(checkpoint, WINDOWS, on_step=seen.append)
    expected = native_perplexity(native, WINDOWS)
    # A log-probability is off by at most twice what the logits, below 8, are.
    assert result == pytest.approx(expected, rel=2 * rounding(8.0))
    assert seen == list(range(len(WINDOWS)))


# Where torchax is not to be had


def test_packages_that_are_missing_or_do_not_go_together_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.13.0"))
    monkeypatch.setitem(sys.modules, "torchax", None)
    with pytest.raises(Prox24Error, match=r"torchax is not installed: .*'prox24\[torchax\]'"):
        torchax.require()
    (tmp_path / "torchax.py").write_text("raise AttributeError('no overload name')\n")
    monkeypatch.delitem(sys.modules, "torchax")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Prox24Error, match=r"does not work with torch 2\.13\.0 \(no overload name"):
        torchax.require()


def test_the_command_line_says_what_would_run_an_unknown_family(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torchax", None)
    config = config_dict() | {"model_type": "stablelm"}
    write_folder(tmp_path / "model", config, {"x": np.zeros(4, np.float32)})
    error = error_line(capsys, *pruning(tmp_path))
    assert "'stablelm' is not supported" in error
    assert "pip install 'prox24[torchax]'" in error
    assert not (tmp_path / "out").exists()
