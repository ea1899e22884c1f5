# The project's own environment and the two stages. `make` alone lists what there is.
#
#   make train                      both stages on the embedded default, no network needed once installed
#   make train CONFIG=run.yaml      both stages on your data and model
#   make test                       everything that CI runs but the linters
#   make test-nightly               longer runs of the randomized tests
#   make bench                      speed and memory beside TRL on this processor, an hour; docs/benchmarks.md, README
#   make bench ARGS='--only score-hh,train-hh --rounds 2'     some of it; the other results stay
#   make bench-gpu                  what must be known of a CUDA GPU, in six minutes (ARGS='--minutes 20')

PYTHON ?= python3
CONFIG ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEFAULT := stages/recipes/default.yaml
DEMO := runs/default

.DEFAULT_GOAL := help
.PHONY: help precompute train test test-nightly bench bench-gpu lint clean

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[report]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

ifeq ($(CONFIG),)
precompute: $(VENV)/.installed
	$(BIN)/refshard demo prepare $(DEMO)
	$(BIN)/refshard precompute --config $(DEFAULT) $(ARGS)

train: precompute
	$(BIN)/refshard train --config $(DEFAULT) $(ARGS)
	$(BIN)/refshard demo summary $(DEMO) --config $(DEFAULT) $(ARGS)
	$(BIN)/refshard report $(DEMO)/policy
else
precompute: $(VENV)/.installed
	$(BIN)/refshard precompute --config $(CONFIG) $(ARGS)

train: precompute
	$(BIN)/refshard train --config $(CONFIG) $(ARGS)
endif

# One thread a process: two workers fill two processors, and threads that wait for each other only cost.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

test-nightly: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m nightly

bench: $(VENV)/.installed-test
	$(BIN)/python tests/bench/run.py --json tests/bench/results/cpu.json $(ARGS)
	$(BIN)/python tests/bench/page.py

bench-gpu: $(VENV)/.installed-test
	$(BIN)/python tests/bench/gpu.py --json tests/bench/results/gpu.json $(ARGS)
	$(BIN)/python tests/bench/page.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
