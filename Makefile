# The commands of the project. Everything they need is installed into .venv by the first of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Of tests/: whole tables of ways to run and to die, some minutes each; and what measures time, or has the one cluster.
# Continuous integration runs a quarter of the tables, in turns, and the first, which has each pair of options, always.
PAIRS := tests/training/test_option_pairs.py
PART_0 := tests/apps/test_killed_runs.py tests/apps/test_ledger.py tests/training/test_precision_runs.py \
  tests/training/test_two_heads.py
PART_1 := tests/apps/test_cut_network.py tests/apps/test_interrupted_runs.py tests/apps/test_sweep_runs.py \
  tests/training/test_one_trajectory.py
PART_2 := tests/apps/test_damaged_checkpoint_runs.py tests/apps/test_wandb_sync.py tests/training/test_strategies.py
PART_3 := tests/apps/test_hangs.py tests/training/test_elastic_matrix.py tests/training/test_guarded_runs.py \
  tests/training/test_step_options.py
MATRICES := $(PAIRS) $(PART_0) $(PART_1) $(PART_2) $(PART_3)
SERIAL := tests/slurm tests/benchmarks
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup quickstart test matrices part slurm check lint format clean

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

check: $(READY) lint  ## the fast tests (some 2 minutes on 2 cores)
	@$(PYTEST) -n logical -m "not slow and not gpu"

test: $(READY) lint  ## what to run before pushing: the fast tests, and most that train (20 minutes on 2 cores)
	@$(PYTEST) -n logical -m "not slow"
	@$(PYTEST) -n logical -m slow tests/test_combinations.py
	@$(PYTEST) -n logical --dist loadfile -m slow \
	  $(addprefix --ignore=,tests/test_combinations.py $(MATRICES) $(SERIAL))

matrices: $(READY)  ## the tests of every way to run, to stop and to resume (over half an hour)
	@$(PYTEST) -n logical --dist loadfile -m slow $(MATRICES)

part: $(READY)  ## of matrices: PART=0 to 3
	@$(PYTEST) -n logical --dist loadfile -m slow $(PAIRS) $(PART_$(PART))

slurm: $(READY)  ## the tests that start a SLURM on this machine, and those that measure, one by one
	@$(PYTEST) -m slow $(SERIAL)

lint: $(READY)  ## style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)  ## let ruff rewrite the files
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:  ## remove what the commands above made
	rm -rf $(VENV) runs shards build *.egg-info .pytest_cache .ruff_cache .hypothesis
