"""The implementations of the product by name, one of which is right everywhere."""

from prox24.packed.cpu import CPU
from prox24.packed.cuda import CUDA
from prox24.packed.cusparselt import CUSPARSELT
from prox24.packed.implementation import Implementation
from prox24.packed.tpu import TPU
from prox24.packed.unpacked import UNPACKED

FALLBACK = "unpack"
"""What runs unless another one was measured to be faster."""

IMPLEMENTATIONS: dict[str, Implementation] = {
    FALLBACK: UNPACKED,
    "cpu": CPU,
    "cuda": CUDA,
    "cusparselt": CUSPARSELT,
    "tpu": TPU,
}
