"""libtpu's compiler without a TPU, for the benchmarks that compile ahead of time."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

# Arrays of the host stay there.
jax.config.update("jax_platforms", "cpu")
# These keep libtpu from asking for the machine's TPU, and from the lock of one that is not there.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

CHIPS = ("v5e", "v6e")


def devices(chip: str) -> Sequence[Any]:
    """Eight chips of one of `CHIPS`, to compile for.

    Raises:
      SystemExit: libtpu is missing.
    """
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, which holds the TPU compiler, is missing: pip install 'jax[tpu]'")
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x4").devices
