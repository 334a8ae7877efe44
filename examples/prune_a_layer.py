"""Prunes one linear layer to 2:4 by every solver and prints the losses."""

import jax
import jax.numpy as jnp

import prox24

OUT, IN, TOKENS = 256, 512, 4096

weight_key, token_key, mixing_key = jax.random.split(jax.random.key(0), 3)
weight = jax.random.normal(weight_key, (OUT, IN))
# Correlated inputs, as in a real network: the strength of the features falls like a power law.
strength = 1 / jnp.sqrt(1 + jnp.arange(IN, dtype=jnp.float32))
mixing = jnp.linalg.qr(jax.random.normal(mixing_key, (IN, IN)))[0]
tokens = (jax.random.normal(token_key, (TOKENS, IN)) * strength[None, :]) @ mixing
# Accelerators round more than float32 does, unless they are told not to.
gram = jnp.matmul(tokens.T, tokens, precision="highest")

for solver in (
    prox24.Magnitude(),
    prox24.Wanda(),
    prox24.SparseGPT(),
    prox24.ProximalGradient(),
    prox24.ADMM(),
):
    solution = prox24.solve(weight, gram, solver)
    figures = solution.statistics
    assert prox24.is_sparse(solution.weight)
    print(
        f"{type(solver).__name__:16} {solution.status.name.lower():8} "
        f"loss {figures.relative_loss_before_refit:.4f}, refitted {figures.relative_loss:.4f}"
    )
