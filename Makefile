# moelab: `make help` lists what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STUDY ?= sweeps/studies/quickstart.yaml
export MOELAB_HOME ?= $(CURDIR)/.moelab
# One thread per process: a study packs one trial on each core.
export OMP_NUM_THREADS ?= 1

.PHONY: help install ablation report ui check test bench clean
.DEFAULT_GOAL := help

help: ## what each command does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "moelab needs Python 3.11 or newer: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: .venv/installed ## make .venv with the pinned dependencies

ablation: .venv/installed ## the quickstart study on real text, to a finished report (STUDY=... for another)
	$(BIN)/python -m sweeps run $(STUDY)
	$(BIN)/python -m reports build $(STUDY)
	@echo "Next:  make ui   compares the runs in MLflow;  README.md goes on from here."

report: .venv/installed ## build the report of the study again
	$(BIN)/python -m reports build $(STUDY)

ui: .venv/installed ## MLflow's pages on the store of the studies
	$(BIN)/python -m sweeps ui

check: .venv/installed ## ruff, format, types, imports between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

test: .venv/installed ## all tests, in three processes, fast ones first
	$(BIN)/python -m tests

bench: .venv/installed ## speed on one core beside transformers' and SimPy's (minutes; on a quiet machine), to a page in reports/benchmarks
	$(BIN)/python -m tests.bench

clean: ## remove .venv and caches (studies in .moelab stay)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
