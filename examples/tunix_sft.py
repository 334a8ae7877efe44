"""Prunes a small Llama of Tunix to 2:4 and fine-tunes it by Tunix's trainer, which keeps it 2:4.

The trainer takes any optimizer of optax: `keep_pattern` around AdamW is all that is needed. The
model has random weights and learns the bytes of the speeches packaged with prox24.
"""

from importlib import resources

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import prox24
from prox24.optax import by_path, keep_pattern

CONFIG = ModelConfig(2, 256, 64, 128, 4, 16, 2, rope_theta=10_000, norm_eps=1e-5)
STEPS, RATE, LENGTH = 100, 3e-3, 64
PLACE = {"positions": np.arange(LENGTH)[None], "attention_mask": np.tri(LENGTH, dtype=bool)[None]}
TEXT = np.frombuffer((resources.files("prox24") / "data/speeches.txt").read_bytes(), np.uint8)


def batches(seed, count):
    """Windows (8, LENGTH) of the text."""
    starts = np.random.default_rng(seed).integers(0, len(TEXT) - LENGTH, (count, 8, 1))
    return list(TEXT[starts + np.arange(LENGTH)].astype(np.int32))


def loss(model, tokens):
    """Mean cross-entropy of the bytes in nats."""
    logits, _ = model(tokens, cache=None, **PLACE)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train(model, optimizer, seed, loss=loss):
    """A copy of the model after some steps of Tunix's trainer."""
    trainer = PeftTrainer(nnx.clone(model), optimizer, TrainingConfig(eval_every_n_steps=STEPS))
    trainer.with_gen_model_input_fn(lambda tokens: {"tokens": tokens}).with_loss_fn(loss)
    trainer.train(batches(seed, STEPS))
    return trainer.model


def trained_and_pruned():
    """A model after some steps, its graph, and what `prune_params` makes of its parameters."""
    model, rngs = Llama3(CONFIG, rngs=nnx.Rngs(0)), nnx.Rngs(1)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        if not leaf[...].any():  # Tunix expects that these come from a checkpoint
            leaf[...] = 0.1 * jax.random.normal(rngs(), leaf.shape)
    model = train(model, optax.adam(RATE), seed=0)
    graph, params = nnx.split(model)
    forward = nnx.jit(lambda params, tokens: loss(nnx.merge(graph, params), tokens))
    return model, graph, prox24.prune_params(forward, params, batches(1, 4))


def print_table(pruned, models):
    """Prints the loss of each model on other windows, and whether it is 2:4."""
    axes = {leaf.path: leaf.axis for leaf in pruned.leaves if leaf.pruned}
    choice = {"axis": lambda path: axes.get(path, 0), "mask": by_path(axes.__contains__)}
    print(f"{'':25}   loss  2:4")
    for name, model in models.items():
        measured = np.mean([nnx.jit(loss)(model, tokens) for tokens in batches(3, 8)])
        sparse = prox24.report(nnx.state(model), **choice).sparse
        print(f"{name:25}  {measured:5.3f}  {'yes' if sparse else 'no'}")


def main():
    """Trains, prunes, fine-tunes with and without the pattern and prints the table."""
    dense, graph, pruned = trained_and_pruned()
    sparse = nnx.merge(graph, pruned.params)
    free = train(sparse, optax.adamw(RATE), seed=2)
    kept = train(sparse, keep_pattern(optax.adamw(RATE), pruned.trainable), seed=2)
    models = {"dense": dense, "pruned": sparse, "AdamW": free, "AdamW under keep_pattern": kept}
    print_table(pruned, models)


if __name__ == "__main__":
    main()
