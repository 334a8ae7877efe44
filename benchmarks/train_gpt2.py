"""Trains a small GPT-2, a family without rotary positions, and writes it as an HF folder.

    python benchmarks/train_gpt2.py gpt2

It has 6 layers of 256 features and a vocabulary of 4,096 pieces. The first tenth of each text is
left out of the training, and serves for evaluation.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import positive
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

from prox24._checkpoints.safetensors_file import create_file
from prox24._checkpoints.tensors import TensorSource
from prox24._jobs import load
from prox24._jobs.documents import plain_text
from prox24._models import spec
from prox24._models.families import config_from_hf

VOCABULARY, LENGTH, BATCH = 4096, 256, 8


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def first_weights(config: spec.Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """By the checkpoint's names, as GPT-2 begins."""
    weights = {}
    for name, shape in spec.tensor_shapes(config).items():
        norm = "ln_" in name and name.endswith("weight")
        weights[name] = np.full(shape, float(norm), np.float32)
        if name.endswith("weight") and not norm:
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    return weights


def loss_of(config: spec.Config, weights: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
    logits = load._logits(config, weights, tokens)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    every = [common.CALIBRATION, *common.TEXTS]
    parser.add_argument("--texts", type=Path, nargs="+", default=every, metavar="FILE")
    parser.add_argument("--steps", type=positive, default=1000)
    arguments = parser.parse_args()
    texts = list(map(plain_text, arguments.texts))
    texts = [text[len(text) // 10 :] for text in texts]
    tokenizer = tokenizer_of(texts)
    tokens = np.concatenate([np.array(tokenizer(text)["input_ids"], np.int32) for text in texts])
    hf = GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=256, n_layer=6, n_head=4, eos_token_id=0
    ).to_dict() | {"architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32"}
    config, rng = config_from_hf(hf), np.random.default_rng(0)
    weights = jax.tree.map(jnp.asarray, first_weights(config, rng))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, arguments.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, batch):
        loss, gradient = jax.value_and_grad(lambda w: loss_of(config, w, batch))(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    for index in range(arguments.steps):
        starts = rng.integers(0, len(tokens) - LENGTH, BATCH)
        batch = np.stack([tokens[start : start + LENGTH] for start in starts])
        weights, state, loss = step(weights, state, batch)
        if index % 50 == 0:
            print(f"step {index}: {loss:.3f}", flush=True)
    arguments.folder.mkdir()
    (arguments.folder / "config.json").write_text(json.dumps(hf))
    tokenizer.save_pretrained(arguments.folder)
    specs = {name: TensorSource(w.shape, np.dtype(np.float32)) for name, w in weights.items()}
    with create_file(arguments.folder / "model.safetensors", specs) as put:
        for name, values in weights.items():
            put(name, np.asarray(values))


if __name__ == "__main__":
    main()
