# `make test` or `make demo` in a fresh clone: sets up .venv first, once per change of pyproject.toml or constraints.txt.

PYTHON ?= python3
SEEDS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev

.PHONY: help setup test test-slow demo lint format clean

help:
	@echo "make test        tests that take less than 5 minutes together"
	@echo "make test-slow   the other tests"
	@echo "make lint        ruff, mypy, pydoclint"
	@echo "make format      rewrite the files as ruff wants them"
	@echo "make demo        pretrain a small model with and without selection (SEEDS=5 for five seeds)"
	@echo "make clean       remove caches, builds and .venv"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "PYTHON must be 3.10 or newer, got " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow"

# pytest exits with 5 where no test carries the marker.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow || [ $$? -eq 5 ]

demo: $(STAMP)
	$(BIN)/python examples/pretrain.py $(if $(SEEDS),--seeds $(SEEDS))

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/pydoclint --quiet mates_hf

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
