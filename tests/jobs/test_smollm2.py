"""The real model: from the GGUF in a package to a pruned folder that transformers loads."""

import jax.numpy as jnp
import numpy as np
import pytest
from smollm2 import fetched
from tiny import assert_close, rounding

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._core.masks import top_mask
from prox24._jobs.forward import (
    all_linears,
    all_weights,
    embed_windows,
    head_weights,
    layer_weights,
    load_model,
    run_layer,
)
from prox24._jobs.perplexity import native_perplexity
from prox24._jobs.text import packaged_text
from prox24._jobs.tokens import available_windows, tokenize
from prox24._models import decoder
from prox24._models.generate import generate

pytestmark = [pytest.mark.optimized, pytest.mark.slow]

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good"
SIZES = {"layers": 30, "width": 1536}


@pytest.fixture(scope="module")
def gguf_path():
    return fetched()


@pytest.fixture(scope="module")
def checkpoint(gguf_path):
    return open_checkpoint(gguf_path)


@pytest.fixture(scope="module")
def pruned_folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "pruned"
    pruned = {}
    for name in (linear.tensor for linear in all_linears(load_model(checkpoint).config)):
        weight = jnp.asarray(checkpoint.read(name))
        pruned[name] = np.asarray(jnp.where(top_mask(jnp.abs(weight)), weight, 0))
    write_checkpoint(checkpoint, folder, pruned.items())
    return folder


@pytest.fixture(scope="module")
def torch_model(pruned_folder):
    """In float64, so that its tokens and logits are exact."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pruned_folder, dtype=torch.float64).eval()


def forward(checkpoint, ids):
    model = load_model(checkpoint)
    (hidden,) = embed_windows(model, ids)
    for index, layer in enumerate(model.config.layers):
        hidden = run_layer(layer, layer_weights(model, index), hidden)
    return np.asarray(decoder.logits(model.config, head_weights(model), hidden))


def test_the_dense_model_predicts_english(checkpoint):
    # A wrong order of rows would agree with PyTorch on its own export, but would not do this.
    ids = tokenize(checkpoint.load_tokenizer(), packaged_text("austen.txt")[:20000], 49152)
    assert native_perplexity(checkpoint, available_windows(ids, 2, 256)[:2]) < 60


def test_logits_of_the_exported_model_agree_with_pytorch(pruned_folder, torch_model):
    import torch

    checkpoint = open_checkpoint(pruned_folder)
    ids = np.asarray([checkpoint.load_tokenizer()(TEXT)["input_ids"]], np.int32)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(ids).long()).logits.numpy()
    assert_close(forward(checkpoint, ids), expected, **SIZES)


def test_greedy_tokens_are_those_of_transformers(pruned_folder, torch_model):
    import torch

    checkpoint = open_checkpoint(pruned_folder)
    prompt = checkpoint.load_tokenizer()([TEXT], return_tensors="np")["input_ids"]
    model = load_model(checkpoint)
    found = np.stack(list(generate(model.config, all_weights(model), prompt, 12)), axis=1)
    expected = torch_model.generate(
        torch.from_numpy(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    np.testing.assert_array_equal(found, expected[:, prompt.shape[1] :].numpy())


def test_perplexity_agrees_with_pytorch(pruned_folder, torch_model):
    import torch

    checkpoint = open_checkpoint(pruned_folder)
    ids = tokenize(checkpoint.load_tokenizer(), packaged_text("austen.txt")[:20000], 49152)
    windows = available_windows(ids, 2, 128)[:2]
    with torch.no_grad():
        batch = torch.from_numpy(windows).long()
        logits = torch_model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    # A log-probability is off by at most twice what the logits are.
    rel = 2 * rounding(logits.numpy(), **SIZES)
    assert native_perplexity(checkpoint, windows) == pytest.approx(float(loss.exp()), rel=rel)


def test_tokenizer_gives_the_ids_of_transformers_own(gguf_path, checkpoint):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    ours = checkpoint.load_tokenizer()
    texts = [
        packaged_text("austen.txt")[:20000],
        packaged_text("speeches.txt")[:20000],
        "  Tabs\tand\n\nlines; 12,345.67 in 1945—naïve café, 漢字 и кириллица 🙂🏽!",
        "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_start|>",
        "it's they'll I'D\r\n   x  ",
        "",
    ]
    for text in texts:
        ids = ours(text, verbose=False)["input_ids"]
        assert ids == expected(text, verbose=False)["input_ids"]
        assert ours.decode(ids) == text
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(expected, name)


def test_the_exported_tokenizer_loads(pruned_folder, checkpoint):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(pruned_folder)
    assert loaded(TEXT)["input_ids"] == checkpoint.load_tokenizer()(TEXT)["input_ids"]
    assert loaded.eos_token == "<|im_end|>"
