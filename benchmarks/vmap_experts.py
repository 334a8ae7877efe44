"""Times `prox24.solve` on the experts of a layer: one `jax.vmap` over them, or a loop.

    python benchmarks/vmap_experts.py [--experts N] [--outputs N] [--inputs N] [--repetitions N]

Weights are standard normal, Grams of twice as many tokens as features, all float32; the methods are
the defaults. The first call compiles; the time of the later ones is their median.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np

import prox24


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--experts", type=common.positive, default=16)
    parser.add_argument("--outputs", type=common.positive, default=256)
    parser.add_argument("--inputs", type=common.positive, default=512)
    parser.add_argument("--repetitions", type=common.positive, default=5)
    arguments = parser.parse_args()
    outputs, inputs = arguments.outputs, arguments.inputs
    keys = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(keys[0], (arguments.experts, outputs, inputs))
    tokens = jax.random.normal(keys[1], (arguments.experts, 2 * inputs, inputs))
    grams = jnp.einsum("eti,etj->eij", tokens, tokens, precision="highest")
    mapped = jax.jit(jax.vmap(prox24.solve))

    def loop() -> list[prox24.Solution]:
        return [prox24.solve(*problem) for problem in zip(weights, grams, strict=True)]

    field = {"vmap": lambda: mapped(weights, grams), "loop": loop}
    first = {name: common.timed(run) for name, run in field.items()}
    seconds = common.medians(field, arguments.repetitions)
    losses = np.array([solution.statistics.relative_loss for solution in first["loop"][1]])
    difference = np.abs(first["vmap"][1].statistics.relative_loss - losses) / losses
    rows = [
        (name, f"{first[name][0] - seconds[name]:.2f}", f"{seconds[name]:.3f}") for name in field
    ]
    title = f"{arguments.experts} experts of {outputs} x {inputs}"
    common.show(("", "compiles,\ns", "median\ns"), rows, title=title)
    print(f"largest difference of a relative loss: {difference.max():.1e} of it")


if __name__ == "__main__":
    main()
