# Environments, each made once and again only when pyproject.toml changes:
# .venv holds what prox24 needs, and for the tests PyTorch as the parity oracle.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.13

# Most of the time of the tests is XLA's. Programs are optimized, as users have them, where the
# subject is rounding or a real model, and compiled in half of the time elsewhere.
define run-tests
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(1)/bin/python -m pytest -m "optimized and $(2)"
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(1)/bin/python -m pytest -m "not optimized and $(2)"
endef

.PHONY: demo test test-slow lint test-newest test-torchax clean

demo: .venv/demo.stamp
	.venv/bin/prox24 demo --output pruned

test: lint
	$(call run-tests,.venv,not slow)

test-slow: .venv/test.stamp
	$(call run-tests,.venv,slow)

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The newest JAX, without PyTorch: parity is held against the golden files.
test-newest: .venv-newest/test.stamp
	$(call run-tests,.venv-newest,not slow)

# The models that torchax runs. Its releases that work are previews, which `make test` does without.
test-torchax: .venv-torchax/test.stamp
	REQUIRE_TORCHAX=1 .venv-torchax/bin/python -m pytest tests/jobs/test_torchax.py

.venv/demo.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/test.stamp: .venv/demo.stamp
	.venv/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv-newest/test.stamp: pyproject.toml
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[test-newest]'
	touch $@

.venv-torchax/test.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-torchax
	.venv-torchax/bin/python -m pip install --quiet --editable '.[test-newest,torchax]'
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-torchax
