# make demo   set up and run the whole chain on the built-in pipeline
# make test   set up and pass the tests that are quick
# make check  lint, check types, pass all tests, the slow ones too: what CI runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint types check clean
# After a crash of a process pytest-xdist may wait for it for ever, unless it starts no other one.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

demo: .venv/installed
	$(BIN)/msfp demo

test: .venv/installed
	$(PYTEST) -m "not slow"

test-all: .venv/installed
	$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks

types: .venv/installed
	$(BIN)/mypy

check: lint types test-all

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv msfp-run msfp-demo
