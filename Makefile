# One command each: `make demo` to see it work, `make check` before every commit.
# PYTHON=python3.12 make demo   takes another interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
# Two processes with one thread each: torch's threads of several processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
QUICK := not slow and not gpu and not campaign
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo check test rest campaign lint types imports light quick bench docs dist clean

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

check: $(STAMP) ## style, types, direction of imports and the quick tests, at the same time
	@$(MAKE) --no-print-directory -j --output-sync=target -o $(STAMP) lint types imports light quick

test: $(STAMP) ## every test but the campaigns
	$(PYTEST) -n 2 -m "not campaign"

rest: $(STAMP) ## what `make test` has besides `make check`
	$(PYTEST) -n 2 -m "(slow or gpu) and not campaign"

campaign: $(STAMP) ## random kills, damaged files, fuzzing at length, provoked monitors, variants of the loss beside TRL's
	$(PYTEST) -n 2 -m campaign

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy tartvg run.py

imports: $(STAMP)
	$(BIN)/lint-imports

light: $(STAMP) ## the quick tests that need no torch
	$(PYTEST) -n 2 -m "$(QUICK)" tests/light

quick: $(STAMP)
	$(PYTEST) -n 2 -m "$(QUICK)" --ignore=tests/light

bench: $(STAMP) ## decoding, speed and memory beside other engines (an hour on two quiet cores)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench,bench_video]'
	$(BIN)/python -m experiments.efficiency.bench.decoding
	$(BIN)/python -m experiments.efficiency.bench
	$(BIN)/python -m experiments.efficiency.bench update rollout memory --base tiny3 --out runs/bench_tiny3

docs: $(STAMP) ## the documents as a static site that opens from a disk: build/site/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/site

dist: $(STAMP) ## a wheel in dist/, tried in an empty environment
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTEST) -m slow tests/launch/test_wheel.py

clean: ## removes .venv and caches; runs/ and data/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
