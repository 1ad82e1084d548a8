# `make run` and `make test` work on a fresh machine that has Python (3.10 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_ARGS ?=

.PHONY: run test lint docs audit clean help

help:
	@echo "make run    set up .venv and run the whole journey on the embedded data (RUN_ARGS='--model convnet')"
	@echo "make test   set up .venv, check style and types, run the tests"
	@echo "make lint   style and types only"
	@echo "make docs   set up .venv and build the documentation site in build/site, its notebooks run"
	@echo "make audit  ask for advisories about the installed packages (needs the network, else it says so)"
	@echo "make clean  remove .venv and caches"

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("planish needs Python 3.10 or newer; try: make PYTHON=python3.11 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs,onnx,demo]'
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/planish run $(RUN_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one thread a worker: two torch threads on a busy core are slower than one
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# warnings are errors; nothing in the pages may come from another host
docs: $(STAMP)
	rm -rf build/site
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -c docs -d build/doctrees -j 2 -W --keep-going -q . build/site
	PYTHONPATH=docs/_ext $(BIN)/python -m planish_docs.check build/site

audit: $(STAMP)
	$(BIN)/python scripts/audit.py

clean:
	rm -rf build $(VENV) .mypy_cache .pytest_cache .ruff_cache
