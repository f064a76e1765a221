# Two commands matter: `make demo` runs the main job end to end, `make test` runs the quality gate.
# `make test-all` runs every test once, `make soak` the long campaigns.
PYTHON ?= python3.11
BIN := .venv/bin
# The stamp is newer than what it was made from, or the environment is built again.
STAMP := .venv/.installed

.PHONY: setup demo test types contracts test-rest test-all soak docs clean

setup: $(STAMP)

# torch goes first and alone: asked for in any other way, pip may choose the multi-gigabyte CUDA build on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,s3,serve,dask,dev]'
	touch $@

demo: setup
	$(BIN)/relex demo

# Both cores: what shares servers runs on one of two workers, a file at a time on either.
PYTEST = $(BIN)/pytest -n 2

test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --no-print-directory --jobs 2 types contracts
	$(PYTEST) -m "not slow"

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

# What make test leaves out.
test-rest: setup
	$(PYTEST) -m slow

test-all: test test-rest

# The campaigns, for a night: kills, faults in stored checkpoints, races for the alias, and examples of each run's own.
soak: export RELEX_KILL_ROUNDS ?= 20
soak: export RELEX_FAULTS ?= 2000
soak: export RELEX_RACES ?= 100
soak: export HYPOTHESIS_PROFILE ?= soak
soak: setup
	$(PYTEST) -m "slow or hypothesis" --timeout 7200

# The pages of docs/ as a site in build/docs; a warning is an error.
docs: .venv/.installed-docs
	$(BIN)/python docs/reference.py
	$(BIN)/sphinx-build -W --keep-going --quiet --builder html docs build/docs

.venv/.installed-docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
