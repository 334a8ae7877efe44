"""Which cases `make test` takes. `make test-all` takes the others."""

import pytest


def rest(*cases):
    """Cases beside those of `make test`, for `pytest.mark.parametrize`."""
    return list(map(slow, cases))


def slow(*case):
    """One of these cases, with several arguments."""
    return pytest.param(*case, marks=pytest.mark.slow)
