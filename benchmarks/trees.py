"""Time and memory of the optax transforms, and of `prune_params` in both orders.

    python benchmarks/trees.py --leaves 1 16 64 256 --layers 2 24

The leaves are kernels of about 256 x 256, of one shape or of eight. The first step compiles. A
transformer has six matrices of width 64 in each layer, and is pruned on 4 x 4 windows of 64 tokens.
Its time is of the whole call. Each row is a process of its own, so that it compiles all of its
programs. Each row is appended to FOLDER/trees.csv. A row of the file is not measured again.
"""

import functools
import itertools
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
from common import positive

import prox24
from prox24.optax import check, keep_pattern, proximal

WIDTH, TURNS = 256, 9
OF_A_MODEL = ("check a model", "one-shot", "sequential")
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "keep_pattern": lambda: keep_pattern(optax.adam(1e-3)),
    "proximal": lambda: optax.chain(optax.adam(1e-3), proximal(prox24.Exponential(1e-3, 1.05))),
}


def tree_of(leaves: int, shapes: int) -> dict[str, dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), leaves)
    widths = [WIDTH + 4 * (i % shapes) for i in range(leaves)]
    return {
        f"layer{i}": {"kernel": jax.random.normal(key, (WIDTH, width)) / 16}
        for i, (key, width) in enumerate(zip(keys, widths, strict=True))
    }


def measure(name: str, leaves: int, shapes: int) -> dict[str, float]:
    """Seconds of the first step with its compilation, of a later one, and bytes of both."""
    params = tree_of(leaves, shapes)
    if name == "check":
        return {"first": common.timed(lambda: check(OPTIMIZERS["proximal"](), params))[0]}
    optimizer = OPTIMIZERS[name]()
    state = optimizer.init(params)

    @jax.jit
    def step(gradients, params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    gradients = jax.tree.map(jnp.sin, params)  # As constants XLA would fold them.
    compiling, compiled = common.timed(lambda: step.lower(gradients, params, state).compile())
    run = functools.partial(compiled, gradients, params, state)
    first = compiling + common.timed(run)[0]
    scratch = compiled.memory_analysis().temp_size_in_bytes
    seconds = common.medians({"step": run}, TURNS)
    return {"first": first, **seconds, "scratch_bytes": scratch}


def transformer(layers: int) -> tuple[Any, Any]:
    """A decoder as a function of its weights, which have three shapes."""
    keys = iter(jax.random.split(jax.random.key(0), 6 * layers + 1))

    def matrix(fan_in: int, fan_out: int) -> jax.Array:
        return jax.random.normal(next(keys), (fan_in, fan_out)) / fan_in**0.5

    sizes = dict.fromkeys("qkvo", (64, 64)) | {"up": (64, 256), "down": (256, 64)}
    own = [{name: matrix(*size) for name, size in sizes.items()} for _ in range(layers)]
    params = {"embed": matrix(64, 64), "layers": own}

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def apply(params, tokens):
        x = params["embed"][tokens]
        for p in params["layers"]:
            q, k, v = ((normed(x) @ p[name]).reshape(*x.shape[:2], 4, 16) for name in "qkv")
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.reshape(x.shape) @ p["o"]
            x = x + jax.nn.gelu(normed(x) @ p["up"]) @ p["down"]
        return x

    return apply, params


def measure_model(name: str, layers: int) -> dict[str, float]:
    """Seconds of pruning a transformer or of its check, and the number of compiled programs."""
    apply, params = transformer(layers)
    batches = [jax.random.randint(jax.random.key(i), (4, 64), 0, 64) for i in range(4)]
    compiled = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def run() -> Any:
        if name == "check a model":
            return check(OPTIMIZERS["proximal"](), params)
        return prox24.prune_params(apply, params, batches, order=name).params

    return {"first": common.timed(run)[0], "programs": len(compiled)}


def measure_one(name: str, size: int, shapes: int) -> dict[str, float]:
    """The columns of a row; `size` is the number of leaves or layers."""
    return measure_model(name, size) if name in OF_A_MODEL else measure(name, size, shapes)


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--leaves", type=positive, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--layers", type=positive, nargs="*", default=[])
    parser.add_argument("--shapes", type=positive, nargs="+", default=[1, 8])
    common.add_output(parser)
    arguments = parser.parse_args()
    titles = ("row", "leaves", "shapes")  # or layers
    figures = (*titles, "first", "step", "scratch_bytes", "programs")
    sizes = itertools.product(arguments.leaves, arguments.shapes, (*OPTIMIZERS, "check"))
    keys = [(name, leaves, shapes) for leaves, shapes, name in sizes if shapes <= leaves]
    keys += [(name, layers, 3) for layers in arguments.layers for name in OF_A_MODEL]
    runs = [(dict(zip(titles, own, strict=True)), own) for own in keys]
    measured = functools.partial(common.alone, measure_one)
    rows = common.completed(arguments.output / "trees.csv", figures, runs, measured)
    common.show(
        (*titles, "first, s", "step, ms", "scratch, MB", "programs"),
        [
            [
                *(row[title] for title in titles),
                f"{float(row['first']):.2f}",
                f"{1e3 * float(row['step']):.2f}" if row["step"] else "",
                f"{float(row['scratch_bytes']) / 1e6:.1f}" if row["step"] else "",
                row["programs"],
            ]
            for row in rows
        ],
    )
    print(common.environment())


if __name__ == "__main__":
    main()
