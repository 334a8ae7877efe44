"""The examples that prune models of Flax, and the page that explains them."""

import functools
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from programs import ROOT
from reference import assert_close

PAGE = (ROOT / "docs/own-model.md").read_text()
GALLERY = (ROOT / "docs/gallery/nnx_characters.md").read_text()
# They train for longer than they compile.
run = functools.partial(programs.run, JAX_DISABLE_MOST_OPTIMIZATIONS="0")


def figures(output):
    """The leaves that are listed, and the numbers of each row of the table."""
    leaves, table = output.strip().split("\n\n")
    rows = [re.split(r" {2,}", line.strip()) for line in table.splitlines()[1:]]
    return leaves, {name: [float(cell.rstrip("%")) for cell in cells] for name, *cells in rows}


def without_losses(text):
    return re.sub(r"loss \d\.\d+", "loss", text)


@pytest.mark.slow
def test_a_linen_network_keeps_more_of_its_accuracy_by_the_default_than_by_wanda():
    leaves, table = figures(run("examples/linen_digits.py"))
    assert leaves in PAGE
    accuracy = {name: cells[0] for name, cells in table.items()}
    loss = {name: cells[2] for name, cells in table.items() if name != "dense"}
    default = "admm with the prox + refit"
    assert accuracy["dense"] > 95
    assert accuracy[default] > accuracy["wanda"] + 5
    assert loss[default] < 0.8 * loss["wanda"]
    assert loss[default] < loss["sparsegpt"]


@pytest.mark.slow
def test_an_nnx_transformer_loses_less_by_the_default_than_by_wanda(tmp_path):
    output = run("examples/nnx_characters.py", "--output", tmp_path / "losses.svg")
    leaves, table = figures(output)
    assert leaves in GALLERY
    assert (tmp_path / "losses.svg").read_text().startswith("<?xml")
    loss = {name: cells[0] for name, cells in table.items()}
    dense, default = loss["dense"], loss["admm with the prox + refit"]
    assert dense < 2.0
    assert dense < default
    assert default - dense < 0.8 * (loss["wanda"] - dense)
    assert max(loss["in order, own targets"], loss["in order, dense targets"]) < loss["wanda"]


@pytest.mark.slow
def test_a_sentence_encoder_keeps_more_of_its_similarities_by_the_default_than_by_wanda():
    leaves, table = figures(run("examples/minilm.py"))
    assert leaves in PAGE
    (wanda, wanda_same, _), (sparsegpt, _, _) = table["wanda"], table["sparsegpt"]
    correlation, same, _ = table["admm with the prox + refit"]
    assert correlation > max(sparsegpt, wanda + 0.05, 0.8)
    assert same > wanda_same + 5
    losses = [cells[2] for cells in table.values()]
    assert losses == sorted(losses, reverse=True)


def test_sentence_embeddings_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval()
    tokens = np.random.default_rng(0).integers(50, size=(5, 11))
    with torch.no_grad():
        # Biases and norms that are not those of initialisation.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
        mean = model(torch.asarray(tokens)).last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(mean).numpy()
    params = {name: jnp.asarray(tensor.numpy()) for name, tensor in model.state_dict().items()}
    embed = runpy.run_path(str(ROOT / "examples/minilm.py"))["embed_sentences"]
    with jax.numpy_rank_promotion("allow"):
        result = embed(config.to_dict(), params, jnp.asarray(tokens))
    # Three layers of sums of up to 64 terms.
    assert_close(result, expected, 3 * 64)


@pytest.mark.slow
def test_the_python_of_the_page_runs_and_prints_what_it_says():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    printed = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    output = programs.run("-c", "\n".join(blocks))
    assert printed
    for text in printed:
        assert without_losses(text) in without_losses(output)


def test_the_page_shows_the_examples():
    for name in ("linen_digits.py", "minilm.py"):
        assert f"python examples/{name}" in PAGE
    assert "python examples/nnx_characters.py" in GALLERY
    assert "](gallery/nnx_characters.md)" in PAGE
