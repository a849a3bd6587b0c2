# make demo   set up and run the whole chain on the built-in pipeline
# make test   set up and pass the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types check clean

demo: .venv/installed
	$(BIN)/msfp demo

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks

types: .venv/installed
	$(BIN)/mypy

check: lint types test

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv msfp-run msfp-demo
