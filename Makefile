# Two commands matter: `make demo` runs the main job end to end, `make test` runs the quality gate.
PYTHON ?= python3.11
BIN := .venv/bin
# The stamp is newer than what it was made from, or the environment is built again.
STAMP := .venv/.installed

.PHONY: setup demo test clean

setup: $(STAMP)

# torch goes first and alone: asked for in any other way, pip may choose the multi-gigabyte CUDA build on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,s3,serve,dask,dev]'
	touch $@

demo: setup
	$(BIN)/relex demo

test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

clean:
	rm -rf .venv build *.egg-info
