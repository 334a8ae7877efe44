"""Prunes a small network of Flax by Qwix's calibration, and trains it under masks in Qwix.

Its calibration for GPTQ sums x x^T over the inputs of a kernel: the Gram that prox24 solves for.
Its own masks are by magnitude, by default in blocks along the output axis, which hardware cannot
use. In `eval_mode` its module keeps the mask that it is given.
"""

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from qwix.contrib import gptq
from qwix.contrib.sparsity.sparsity_module import SparsityModule, sparsity

import prox24

RULE = sparsity.SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4, eval_mode=True)
KERNELS = (0, 2)


class Masked(nnx.Linear):
    """A layer that sees its kernel through a mask of Qwix, which is a `BatchStat`."""

    def __init__(self, *sizes, rngs):
        super().__init__(*sizes, rngs=rngs)
        self.sparsity = SparsityModule(sizes, None, RULE)

    def __call__(self, x):
        """From inputs (batch, in) to outputs (batch, out)."""
        return jnp.matmul(*self.sparsity(x, self.kernel[...])) + self.bias


def network(layer):
    """Two layers, with the same random weights for each kind of layer."""
    rngs = nnx.Rngs(0)
    return nnx.Sequential(layer(32, 64, rngs=rngs), nnx.relu, layer(64, 16, rngs=rngs))


def pruned(model, prune):
    """A copy whose kernels are those of `prune`, a function of the layer's index and kernel."""
    model = nnx.clone(model)
    for i in KERNELS:
        model.layers[i].kernel[...] = prune(i, model.layers[i].kernel[...])
    return model


def main():
    """Prunes by both libraries, trains under Qwix's masks and reads them back."""
    dense, rngs = network(nnx.Linear), nnx.Rngs(1)
    x = jax.random.normal(rngs(), (1024, 32)) @ jax.random.normal(rngs(), (32, 32))

    def loss(model):
        return jnp.mean((model(x) - dense(x)) ** 2) / jnp.mean(dense(x) ** 2)

    watched = qwix.quantize_model(dense, gptq.GptqCalibrationProvider([gptq.GptqRule()]), x)
    watched(x)
    grams = {i: watched.layers[i].kernel_gptq["sum_of_hessian"] for i in KERNELS}
    default = pruned(dense, lambda _, kernel: sparsity.prune_inputs_n_m(kernel, n=2, m=4))
    ours = pruned(dense, lambda i, kernel: prox24.solve(kernel.T, grams[i]).weight.T)
    for name, model in {"Qwix by default": default, "prox24 by Qwix's Grams": ours}.items():
        print(f"{name}: loss {loss(model):.3f}\n{prox24.report(nnx.state(model))}\n")

    student, masks = network(Masked), prox24.mask_of(nnx.state(ours))
    for i in KERNELS:
        student.layers[i].sparsity.mask[...] = masks["layers"][i]["kernel"][...]
    nnx.update(student, nnx.state(ours))
    optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))
    for _ in range(100):
        step(student, optimizer)
    print(f"trained under Qwix's masks: loss {loss(student):.3f}")
    found = prox24.mask_of(nnx.state(student, nnx.Param))["layers"]
    kept = [found[i]["kernel"][...] == student.layers[i].sparsity.mask[...] for i in KERNELS]
    print(f"nonzeros are where its masks are: {'yes' if all(map(jnp.all, kept)) else 'no'}")


if __name__ == "__main__":
    main()
