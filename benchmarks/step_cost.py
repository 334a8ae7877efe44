"""Seconds and operations of a training step of SmolLM2-135M-Instruct, by part.

    python benchmarks/step_cost.py

A step of `prox24 distill` has one window of 512 tokens, here of random ids. A step of `prox24 prune
--refine block` trains one layer on such a window, here with random hidden states. Operations are
the multiplications and additions of matrix products, as JAX traces them. Each part is timed as a
program of its own.
"""

import math
import statistics
import time

import common
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs import forward, training
from prox24.optax import keep_pattern
from prox24.refine import BlockRefinement, ModelRefinement, _blocks, _distillation, relative_error
from prox24.refine._training import step_program

LENGTH, REPEATS = 512, 5


def parts(model: forward.Model, length: int) -> dict[str, tuple]:
    """A program and its arguments for each part of a step of the model."""
    config = model.config
    features, logits = training._functions(config, None, "float32")
    outer = training._outer(model, None, "float32")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), training._params(model, None))
    optimizer = ModelRefinement().optimizer(100)
    state = keep_pattern(optimizer, jax.tree.map(lambda x: x != 0, params)).init(params)
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (1, length), np.int32)
    hidden = jax.jit(features)(params, outer, tokens)
    loss = _distillation._loss(features, logits, True, False)
    of_head = _distillation._loss(lambda h, *_: h, logits, True, False)
    constants, batch = (outer, outer, jnp.float32(0)), (tokens, hidden)
    moved = hidden * 1.01

    def pulled(params, outer, tokens):
        return jnp.vdot(features(params, outer, tokens), moved)

    return {
        "layers, forward": (jax.jit(features), params, outer, tokens),
        "layers, with gradient": (jax.jit(jax.grad(pulled)), params, outer, tokens),
        "head and loss, forward": (jax.jit(of_head), moved, constants, batch),
        "head and loss, with gradient": (jax.jit(jax.grad(of_head)), moved, constants, batch),
        "both, with gradient": (jax.jit(jax.grad(loss)), params, constants, batch),
        "step": (step_program(loss, optimizer, 1), params, state, None, constants, batch),
    }


def parts_of_block(model: forward.Model) -> dict[str, tuple]:
    """A program and its arguments for each part of a step of the layer in the middle."""
    index = len(model.config.layers) // 2
    layer = model.config.layers[index]
    apply = forward.layer_function(layer, None, "float32")
    weights = forward.layer_weights(model, index)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    optimizer = BlockRefinement().optimizer(8)
    state = keep_pattern(optimizer, jax.tree.map(lambda x: x != 0, params)).init(params)
    hidden = jax.random.normal(jax.random.key(0), (1, LENGTH, layer.hidden))
    loss = _blocks._block_loss(apply, relative_error)
    batch = hidden, hidden
    return {
        "one layer, forward": (jax.jit(apply), params, hidden),
        "one layer, with gradient": (jax.jit(jax.grad(loss)), params, None, batch),
        "step of one layer": (step_program(loss, optimizer, 1), params, state, None, None, batch),
    }


def operations(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiplications and additions of the matrix products of a program."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            (summed, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            count += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in summed)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        count += turns * sum(map(operations, jax.extend.core.jaxprs_in_params(equation.params)))
    return count


def main() -> None:
    common.parser_of(__doc__).parse_args()
    model, lines = forward.load_model(open_checkpoint(common.dense_model())), []
    programs = parts(model, LENGTH) | parts_of_block(model)
    for name, (program, *given) in programs.items():
        traced, seconds = program.trace(*given), []
        compiled, count = traced.lower().compile(), operations(traced.jaxpr.jaxpr)
        for _ in range(REPEATS + 1):
            own = jax.block_until_ready(jax.tree.map(jnp.copy, given))
            began = time.perf_counter()
            jax.block_until_ready(compiled(*own))
            seconds.append(time.perf_counter() - began)
        memory = compiled.memory_analysis().temp_size_in_bytes
        took = statistics.median(seconds[1:])
        lines.append((name, f"{count / 1e9:.2f}", f"{took:.3f}", f"{memory / 1e9:.2f}"))
    common.show(("part", "billion operations", "seconds", "scratch GB"), lines)


if __name__ == "__main__":
    main()
