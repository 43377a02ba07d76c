# `make test` or `make demo` in a fresh clone: sets up .venv first, once per change of pyproject.toml or constraints.txt.

PYTHON ?= python3
SEEDS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
# The demo needs less than the tests do: where neither is installed yet, it installs what it needs.
DEMO_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.installed-report)

# The lanes of other versions have environments of their own. Both take the torch of constraints.txt, whose comment says
# why; OLDEST_TORCH=2.4.0 tests the floor in pyproject.toml where a CPU build of it can be found.
OLDEST := .venv-oldest
NEWEST := .venv-newest
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

# One file of tests goes to one process; on a larger machine more than four are not worth their imports.
FAST := -q -m "not slow" -n auto --maxprocesses 4 --dist loadfile

.PHONY: help setup test test-slow test-oldest test-newest docs demo lint format clean

help:
	@echo "make test        tests that take less than 10 minutes together"
	@echo "make test-slow   the other tests"
	@echo "make test-oldest the tests of make test with the oldest supported versions (OLDEST_TORCH=2.4.0: torch too)"
	@echo "make test-newest the tests of make test with the newest versions"
	@echo "make docs        the site in docs/_build/html, its notebooks executed"
	@echo "make lint        ruff, mypy, pydoclint"
	@echo "make format      rewrite the files as ruff wants them"
	@echo "make demo        pretrain a small model with and without selection (SEEDS=5 for five seeds)"
	@echo "make clean       remove caches, builds and the environments"

setup: $(STAMP)

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "PYTHON must be 3.10 or newer, got " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

BROWSER := $(VENV)/.with-browser

# A real browser looks at the pages of reports. Only CI installs one; elsewhere it is the system's, if there is one.
$(BROWSER): $(STAMP)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ test -n "$(CI)" && timeout 120 apt-get update -qq && timeout 240 apt-get install -qq -y --no-install-recommends chromium >/dev/null; } && \
		touch $@ || echo "There is no Chromium: the tests of pages in a browser are skipped."

test: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest $(FAST)

# Built beside the torch that is installed, which its set-up imports. Where it cannot be, its tests are skipped.
DEEPSPEED := $(VENV)/.with-deepspeed

$(DEEPSPEED): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed && touch $@ || \
		echo "DeepSpeed could not be installed: its tests are skipped."

TRACKERS := $(VENV)/.with-trackers

$(TRACKERS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt tensorboard trackio wandb wandb-workspaces && touch $@ || \
		echo "Trackers could not be installed: their tests are skipped."

ENGINES := $(VENV)/.with-engines

$(ENGINES): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[datatrove,ray]" && touch $@ || \
		echo "datatrove and Ray could not be installed: their tests are skipped."

S3 := $(VENV)/.with-s3

$(S3): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt s3fs "moto[server]" && touch $@ || \
		echo "s3fs and moto could not be installed: the tests of files on S3 are skipped."

# Two at once at most: some start two processes of their own. pytest exits with 5 where no test carries the marker.
test-slow: $(STAMP) $(DEEPSPEED) $(TRACKERS) $(ENGINES) $(S3)
	$(BIN)/python -m pytest -q -m slow -n auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder || [ $$? -eq 5 ]

DOCS := $(VENV)/.with-docs

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]" && touch $@

# Notebooks are executed; nothing is read from the network. A warning is an error.
docs: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

test-oldest: pyproject.toml constraints-oldest.txt constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt "torch==$(OLDEST_TORCH)" -e ".[dev]"
	$(OLDEST)/bin/python -m pytest $(FAST)

test-newest: pyproject.toml constraints.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c constraints.txt -e ".[dev]"
	$(NEWEST)/bin/python -m pytest $(FAST)

demo: $(DEMO_STAMP)
	$(BIN)/python examples/compare.py $(if $(SEEDS),--seeds $(SEEDS))

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/pydoclint --quiet mates_hf

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
