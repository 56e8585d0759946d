# Two commands for a newcomer: `make run` (the main job) and `make test`. Both install what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# One thread a process: two torch processes with two threads each on two cores are many times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: help run test acceptance test-faults benchmarks results tree check format lint types doctest imports packages constraints clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 14

$(READY): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

run: $(READY)  ## Run the default experiment (pipeline.yaml): trains, prunes, compares
	@$(BIN)/fls run pipeline.yaml

test: $(READY)  ## Run the tests
	@$(BIN)/python -m pytest -n 3 --dist loadfile

acceptance: $(READY)  ## Do everything that the README has a newcomer do, in a fresh clone (ten minutes)
	@$(BIN)/python -m tests.acceptance

test-faults: $(READY)  ## Inject faults on a cluster of three nodes (half an hour; resumable)
	@$(BIN)/python -m tests.faults --out build/faults.jsonl

benchmarks: $(READY)  ## Run the unfinished benchmarks (hours)
	@$(BIN)/python -m benchmarks run

results: $(READY)  ## Write docs/results.md from the benchmarks' results
	@$(BIN)/python -m benchmarks report

tree: $(READY)  ## Write the tree of files into docs/architecture.md
	@$(BIN)/python -m tests.module_tree

check: format lint types imports packages doctest test  ## Everything that CI checks

format: $(READY)  ## Check the formatting
	@$(BIN)/ruff format --check .

lint: $(READY)  ## Lint
	@$(BIN)/ruff check .

types: $(READY)  ## Check the types
	@$(BIN)/mypy

imports: $(READY)  ## Check who may import whom
	@$(BIN)/lint-imports --no-cache

packages: $(READY)  ## Check that the installed packages fit together
	@$(BIN)/python -m pip check

doctest: $(READY)  ## Run the examples in docstrings
	@$(BIN)/python -m pytest --doctest-modules fishleg stages pipeline

constraints: $(READY)  ## Pin the versions that are installed now
	@{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove the environment and caches; results (.fls, mlflow.db) stay
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
