"""The examples in the docstrings."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import prox24
from prox24.errors import MissingPackageError

MODULES = [
    module.name
    for module in pkgutil.walk_packages(prox24.__path__, "prox24.")
    if not module.name.endswith("__main__")
]


def test_modules_with_examples_are_found():
    assert {"prox24._core.prox", "prox24._solvers.solve"} <= set(MODULES)


@pytest.mark.slow  # `make docs` has them too
@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    try:
        module = importlib.import_module(name)
    except MissingPackageError as error:
        pytest.skip(str(error))
    # The examples show what a user sees by default, which is float32.
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        failed, _ = doctest.testmod(module)
    assert failed == 0


def test_public_functions_of_the_mathematics_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("blocks", "masks", "pattern", "penalty", "planes", "prox"):
        found = finder.find(importlib.import_module(f"prox24._core.{name}"))
        assert any(test.examples for test in found), name
