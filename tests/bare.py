"""What works where nothing but jax, numpy and optax is installed: `make test-package` runs it."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import prox24
from prox24 import lora, refine
from prox24.errors import MissingPackageError
from prox24.optax import keep_pattern, proximal
from prox24.packed import pack

weight = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
inputs = jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32)
gram = jnp.matmul(inputs.T, inputs, precision="highest")


def apply(params, x):
    return x @ params["kernel"]


assert prox24.is_sparse(prox24.prox(weight, 1e9, axis=0), axis=0)
solution = prox24.solve(weight, gram, axis=0)
assert solution.status is prox24.Status.SPARSE
pruned = prox24.prune_params(apply, {"kernel": weight}, [inputs])
assert prox24.is_sparse(pruned.params["kernel"], axis=0)
for optimizer in (optax.chain(optax.sgd(0.1), proximal(0.1)), keep_pattern(optax.adam(1e-3))):
    optimizer.init(pruned.params)
lora.init(jax.random.key(0), pruned.params, 2)
assert refine.relative_error is not None
pack(pruned.params["kernel"].T)
assert prox24.Recipe.from_json(prox24.Recipe().to_json()) == prox24.Recipe()

said = None
with contextlib.suppress(MissingPackageError):
    said = prox24.prune
assert said is None, "the extra llm is installed"
ended = subprocess.run(
    [sys.executable, "-m", "prox24", "prune", "model", "out"], capture_output=True, text=True
)
assert ended.returncode == 2, ended
assert ended.stderr.count("\n") == 1, ended.stderr
assert "pip install 'prox24[llm]'" in ended.stderr, ended.stderr
print(f"prox24 {prox24.__version__} works without the extra llm")
