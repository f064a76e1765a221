# Two commands matter: `make demo` runs the main job end to end, `make test` runs the quality gate.
# `make test-all` runs every test once, `make soak` the long campaigns.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3.11)
BIN := .venv/bin
# The stamp is newer than what it was made from, or the environment is built again.
STAMP := .venv/.installed

.PHONY: setup demo test types contracts test-rest test-all soak docs clean

setup: $(STAMP)

TORCH := $(shell grep '^torch==' constraints.txt)
# Where torch's own project keeps the CPU builds.
CPU_BUILDS := https://download.pytorch.org/whl/cpu
# NVIDIA's and AMD's.
GPU := $(firstword $(wildcard /dev/nvidiactl /dev/kfd))

# torch goes first and alone: what asks for it later is content with what is there. Elsewhere than on Linux the plain
# build is the one for the CPU; on Linux it is the one for GPUs, with gigabytes of libraries: pip then says each file
# and its size before it downloads it.
$(STAMP): pyproject.toml constraints.txt $(wildcard relex/_kernel.c)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if [ -n "$(GPU)" ] || [ "$$(uname)" != Linux ] || $(BIN)/pip freeze | grep -q '^$(TORCH)'; then \
	  $(BIN)/pip install --quiet $(TORCH); \
	elif $(BIN)/pip install --quiet $(TORCH)+cpu 2>/dev/null \
	  || $(BIN)/pip install --quiet --retries 1 --extra-index-url $(CPU_BUILDS) $(TORCH)+cpu 2>/dev/null; then :; \
	else \
	  echo "make setup: no GPU, and no CPU build of $(TORCH) for this Python at your package index or $(CPU_BUILDS):" \
	    "downloading the build for GPUs, gigabytes; interrupt to put a CPU build into .venv yourself."; \
	  $(BIN)/pip install $(TORCH); \
	fi
	# The name under which earlier versions were installed here.
	@$(BIN)/pip uninstall --quiet --quiet --yes relex
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

demo: setup
	$(BIN)/relex demo

# Three workers keep two cores busy, since tests also wait: what shares servers runs on one, a file at a time on each.
PYTEST = $(BIN)/pytest -n 3

test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --no-print-directory --jobs 2 types contracts
	$(PYTEST) -m "not slow"

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

# What make test leaves out. Only files that have any are collected: each worker would import all the others for nothing.
test-rest: setup
	$(PYTEST) -m slow $$(grep -rl mark.slow --include='test_*.py' tests)

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
