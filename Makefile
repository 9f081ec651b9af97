# The commands of the project. Everything they need is installed into .venv by the first of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup quickstart test check lint format clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## .venv with pinned versions and the project installed editable

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(READY)  ## train, sample and score a diffusion model of handwritten digits (about 3 minutes on 2 cores)
	@$(BIN)/python data/digits.py --out shards/digits
	@$(BIN)/diffusion-trainer train experiment=digits

check: $(READY) lint  ## the fast tests (2.5 minutes on 2 cores)
	@$(BIN)/python -m pytest -q -n logical -m "not slow and not gpu"

test: $(READY) lint  ## all tests
	@$(BIN)/python -m pytest -q -n logical -m "not slow"
	@$(BIN)/python -m pytest -q -n logical -m slow tests/test_combinations.py
	@$(BIN)/python -m pytest -q -n logical --dist loadfile -m slow \
	  --ignore tests/test_combinations.py --ignore tests/slurm --ignore tests/benchmarks
	@$(BIN)/python -m pytest -q -m slow tests/slurm tests/benchmarks  # these measure, or have one cluster

lint: $(READY)  ## style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)  ## let ruff rewrite the files
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:  ## remove what the commands above made
	rm -rf $(VENV) runs shards build *.egg-info .pytest_cache .ruff_cache .hypothesis
