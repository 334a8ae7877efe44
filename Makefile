# Environments, each made once and again only when pyproject.toml changes:
# .venv holds what prox24 needs, and for the tests PyTorch as the parity oracle.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.13

# An environment of one Python, or one line that says why there is none.
define make-venv
	@command -v $(1) > /dev/null || { echo "there is no $(1): name a Python by make PYTHON=..."; exit 1; }
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "prox24 needs Python 3.11 or newer: name one by make PYTHON=..."; exit 1; }
	@$(1) -c 'import ensurepip, venv' 2> /dev/null \
	  || { echo "$(1) has no pip or no venv: install them, or name a Python by make PYTHON=..."; exit 1; }
	$(1) -m venv $(2)
endef

# Some packages of `.venv`. pip would compile one file after the other, compileall keeps all cores
# busy. It fails for a few files that are no Python 3, as pip does without a word. It leaves out
# files that are hardly imported.
RARE = '/(tests|testing|_dynamo|_inductor|mypy|networkx|pip|sklearn|sympy)/|/transformers/models/'
define install
	.venv/bin/python -m pip install --quiet --no-compile --editable $(1)
	.venv/bin/python -m compileall -qq -j 0 -x $(RARE) .venv/lib || true
endef

# Most of the time of the tests is XLA's. Programs are optimized, as users have them, where the
# subject is rounding or a real model, and compiled in half of the time elsewhere.
define run-optimized
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(1)/bin/python -m pytest -m "optimized and $(2)"
endef
define run-quick
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(1)/bin/python -m pytest -m "not optimized and $(2)"
endef
define run-tests
	$(call run-optimized,$(1),$(2))
	$(call run-quick,$(1),$(2))
endef

# What depends on rounding, under an instruction set. The flag only caps: a processor uses what it has.
define run-isa
	XLA_FLAGS=--xla_cpu_max_isa=$(1) JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
	  .venv/bin/python -m pytest -m "optimized and not slow"

endef

.PHONY: demo demo-full test test-optimized test-all lint docs site gallery test-newest test-oldest test-torchax test-keras test-eval test-tunix test-gemma test-isas test-cuda test-package clean

demo: .venv/demo.stamp
	.venv/bin/prox24 demo --output pruned

# More windows, Wanda, and the default without turned heads.
demo-full: .venv/demo.stamp
	.venv/bin/prox24 demo --full --output pruned

# What a change must pass. It needs no network once the environment is made.
# mypy keeps one core busy, so the first tests run beside it.
test: .venv/test.stamp
	$(MAKE) --no-print-directory --jobs 2 lint test-optimized
	$(call run-quick,.venv,not slow)

test-optimized: .venv/test.stamp
	$(call run-optimized,.venv,not slow)

# The rest: a real model, parity with PyTorch for every family, processes, kills, examples.
test-all: .venv/test.stamp
	$(call run-tests,.venv,slow)

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The site; the examples of docstrings, and the Python of the pages. `make test-all` has the scripts.
docs: site
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv/bin/python -m pytest -m "not optimized" \
	  tests/test_doctests.py tests/test_examples.py -k "doctests or python_of"

# build/docs/index.html. Warnings are errors: broken links, and public names without a page.
site: .venv/docs.stamp
	.venv/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet \
	  --doctree-dir build/doctrees docs build/docs

# The pages of the gallery: runs its scripts, and keeps what they print and draw.
gallery: .venv/test.stamp
	.venv/bin/python docs/gallery.py

# The newest JAX, without PyTorch: parity is held against the golden files.
test-newest: .venv-newest/test.stamp
	$(call run-tests,.venv-newest,not slow)

# The lowest versions that pyproject.toml allows.
test-oldest: .venv-oldest/test.stamp
	$(call run-tests,.venv-oldest,not slow)

# The models that torchax runs. Its releases that work are previews, which `make test` does without.
test-torchax: .venv-torchax/test.stamp
	REQUIRE_TORCHAX=1 .venv-torchax/bin/python -m pytest tests/jobs/test_torchax.py

# Keras 3 on JAX.
test-keras: .venv-keras/test.stamp
	REQUIRE_KERAS=1 .venv-keras/bin/python -m pytest -m slow tests/integrations/test_keras.py

# The adapter for lm-evaluation-harness, beside what the harness computes by PyTorch.
test-eval: .venv-eval/test.stamp
	REQUIRE_LM_EVAL=1 HF_HUB_OFFLINE=1 .venv-eval/bin/python -m pytest tests/jobs/test_lm_eval.py

# The examples with Tunix and Qwix, which want an older safetensors than the commands do.
test-tunix: .venv-tunix/test.stamp
	REQUIRE_TUNIX=1 .venv-tunix/bin/python -m pytest -m "" tests/integrations/test_tunix.py \
	  tests/integrations/test_qwix.py

# The example with Google's gemma library, which wants Python 3.12 or newer.
test-gemma: .venv-gemma/test.stamp
	REQUIRE_GEMMA=1 .venv-gemma/bin/python -m pytest -m "" tests/integrations/test_gemma.py

# The programs that a GPU would run, compiled without one: none has grown or lost precision.
test-cuda: .venv-cuda/test.stamp
	.venv-cuda/bin/python benchmarks/compiled_cuda.py --check docs/figures/compiled-cuda.csv

test-isas: .venv/test.stamp
	$(foreach isa,SSE4_2 AVX2 AVX512,$(call run-isa,$(isa)))

# The wheel with its three packages, and the tests that the sdist carries.
test-package: .venv/test.stamp
	rm -rf build dist .venv-bare
	$(call make-venv,$(PYTHON),.venv-bare)
	.venv-bare/bin/python -m pip install --quiet build twine
	.venv-bare/bin/python -m build --outdir dist
	.venv-bare/bin/python -m twine check --strict dist/*
	rm -rf .venv-bare
	$(call make-venv,$(PYTHON),.venv-bare)
	.venv-bare/bin/python -m pip install --quiet dist/*.whl
	.venv-bare/bin/python -I tests/bare.py
	mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(CURDIR)/.venv/bin/python -m pytest \
	  -m "not slow and not optimized"

.venv/demo.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv)
	$(call install,'.[llm]')
	touch $@

.venv/test.stamp: .venv/demo.stamp
	$(call install,'.[test]')
	touch $@

.venv/docs.stamp: .venv/test.stamp
	$(call install,'.[docs]')
	touch $@

.venv-newest/test.stamp: pyproject.toml
	$(call make-venv,$(NEWEST_PYTHON),.venv-newest)
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[test-newest]'
	touch $@

.venv-torchax/test.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv-torchax)
	.venv-torchax/bin/python -m pip install --quiet --editable '.[test-newest,torchax]'
	touch $@

.venv-keras/test.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv-keras)
	.venv-keras/bin/python -m pip install --quiet --editable '.[test-newest]' keras
	touch $@

.venv-eval/test.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv-eval)
	.venv-eval/bin/python -m pip install --quiet --editable '.[test,eval]' 'lm_eval[hf]'
	touch $@

.venv-tunix/test.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv-tunix)
	.venv-tunix/bin/python -m pip install --quiet --editable . 'google-tunix>=0.1.7' \
	  'qwix>=0.1.8' 'pytest>=9' 'pytest-xdist>=3.8' 'hypothesis>=6.170'
	touch $@

# Newer sentencepiece wants a newer protobuf than gemma's other needs allow.
.venv-gemma/test.stamp: pyproject.toml
	$(call make-venv,$(NEWEST_PYTHON),.venv-gemma)
	.venv-gemma/bin/python -m pip install --quiet uv
	.venv-gemma/bin/uv pip install --quiet --python .venv-gemma/bin/python --editable . \
	  'gemma>=4' 'sentencepiece<0.2.2' 'pytest>=9' 'pytest-xdist>=3.8' 'hypothesis>=6.170'
	touch $@

# About 5 GB: XLA's compiler for GPUs, and NVIDIA's assembler.
.venv-cuda/test.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv-cuda)
	.venv-cuda/bin/python -m pip install --quiet --editable '.[examples]' 'jax[cuda13]==0.10.2' \
	  nvidia-cuda-nvdisasm
	touch $@

.venv-oldest/test.stamp: pyproject.toml
	$(call make-venv,$(PYTHON),.venv-oldest)
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python \
	  --resolution lowest-direct --editable '.[test-newest]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist
