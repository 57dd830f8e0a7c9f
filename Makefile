# A machine with Python 3.11, make and PyPI needs nothing else. GPU=1 takes the CUDA build of torch instead of the CPU one.
PYTHON ?= $(or $(shell command -v python3.11),python3)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
CODE := core pipelines serve imprint.py benchmarks
ifdef GPU
INSTALLED := $(VENV)/.installed-gpu
INSTALL := $(BIN)/pip install -c constraints.txt -c constraints-gpu.txt -e '.[dev,gpu]'
else
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/pip install -c constraints.txt -e '.[dev]'
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format clean

help:  ## List what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv with the exact versions of constraints.txt (GPU=1: with CUDA)

# On the CPU torch comes first and alone: its CPU index has a build of 0.2 GB where PyPI has 2 GB of CUDA. Where that index is
# out of reach, pip takes PyPI's, which works too.
$(INSTALLED): pyproject.toml constraints.txt constraints-gpu.txt
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed*
ifndef GPU
	$(BIN)/pip install --no-deps --retries 2 --timeout 15 --extra-index-url $(CPU_INDEX) -c constraints.txt torch
endif
	$(INSTALL)
	touch $@

demo: setup  ## Train, convert, serve, ask and compare, in ten minutes
	$(BIN)/imprint demo

test: setup  ## Run the tests (without slow and gpu), in random order: the seed is printed
	$(BIN)/python -m pytest

test-slow: setup  ## Run the slow tests: kills, soaks, ablations
	$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 7200 -p no:randomly

lint: setup  ## Check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports

format: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv, caches and build output; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find core pipelines serve tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
