# One command each: `make demo` to see it work, `make check` before every commit.
# PYTHON=python3.12 make demo   takes another interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
# Two processes with one thread each: torch's threads of several processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## the virtual environment .venv, with the tested versions (about two minutes, 2 GB)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## the whole method on the embedded model and data, on the CPU
	$(BIN)/python run.py

test: $(STAMP) ## every test
	$(PYTEST)

check: $(STAMP) ## style, types, direction of imports and the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tartvg run.py
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not gpu"

bench: $(STAMP) ## decoding, speed and memory beside other engines (an hour on two quiet cores)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench,bench_video]'
	$(BIN)/python -m experiments.efficiency.bench.decoding
	$(BIN)/python -m experiments.efficiency.bench

clean: ## removes .venv and caches; runs/ and data/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
