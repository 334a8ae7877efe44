"""What the optax transforms cost on trees of many leaves: the first step, a step, memory.

    python benchmarks/trees.py --leaves 1 16 64 256

The leaves are kernels of about 256 x 256, of one shape or of eight. The first step compiles. Each
row is a process of its own, so that no program is there before. A line is appended to
FOLDER/trees.csv after each row, and a row that is there already is skipped.
"""

import json
import statistics
import subprocess
import sys
import time

import common
import jax
import jax.numpy as jnp
import optax
from common import positive

import prox24
from prox24.optax import check, keep_pattern, proximal

WIDTH, TURNS = 256, 9
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
        began = time.perf_counter()
        check(OPTIMIZERS["proximal"](), params)
        return {"first": time.perf_counter() - began}
    optimizer = OPTIMIZERS[name]()
    state, gradients = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    began = time.perf_counter()
    compiled = step.lower(params, state).compile()
    params, state = jax.block_until_ready(compiled(params, state))
    first = time.perf_counter() - began
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state))
        seconds.append(time.perf_counter() - began)
    scratch = compiled.memory_analysis().temp_size_in_bytes
    return {"first": first, "step": statistics.median(seconds), "scratch_bytes": scratch}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--leaves", type=positive, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--shapes", type=positive, nargs="+", default=[1, 8])
    common.add_output(parser)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "LEAVES", "SHAPES"))
    arguments = parser.parse_args()
    if arguments.one:
        name, *sizes = arguments.one
        print(json.dumps(measure(name, *map(int, sizes))))
        return
    path, rows = arguments.output / "trees.csv", []
    titles = ("optimizer", "leaves", "shapes")
    for leaves in arguments.leaves:
        for shapes in arguments.shapes:
            for name in (*OPTIMIZERS, "check"):
                key = dict(zip(titles, (name, leaves, shapes), strict=True))
                if shapes > leaves:
                    continue
                figures = (*titles, "first", "step", "scratch_bytes")
                rows = common.read_rows(path, figures)
                if not common.has_row(rows, key):
                    command = [sys.executable, __file__, "--one", name, str(leaves), str(shapes)]
                    found = json.loads(subprocess.check_output(command))
                    rows = common.add_row(path, dict.fromkeys(figures, "") | key | found)
    common.show(
        (*titles, "first, s", "step, ms", "scratch, MB"),
        [
            [
                *(row[title] for title in titles),
                f"{float(row['first']):.2f}",
                f"{1e3 * float(row['step']):.2f}" if row["step"] else "",
                f"{float(row['scratch_bytes']) / 1e6:.1f}" if row["step"] else "",
            ]
            for row in rows
        ],
    )
    print(common.environment())


if __name__ == "__main__":
    main()
