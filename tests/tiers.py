"""Which cases `make test` takes. `make test-all` takes the others."""

import pytest


def rest(*cases):
    """Cases beside those of `make test`, for `pytest.mark.parametrize`."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]
