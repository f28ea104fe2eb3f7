# On a machine with Python 3.11 and make: `make compare` and `make test` set up all that they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := .venv-torch

.PHONY: compare test test-slow test-install test-torch test-docs nightly mutation docs notebooks pictures lint format types check \
        bench hooks lock clean

compare: $(READY)
	$(BIN)/isoformer compare

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-install: $(READY)
	$(BIN)/python -m pytest -m install

test-torch: $(TORCH)/.ready
	$(TORCH)/bin/python -m pytest -m torch

test-docs: $(VENV)/.docs-ready
	$(BIN)/python -m pytest -m docs

docs: $(VENV)/.docs-ready
	$(BIN)/python -m sphinx -M html docs site --fail-on-warning --keep-going --fresh-env --write-all --quiet
	@echo open site/html/index.html

notebooks: $(VENV)/.docs-ready
	$(BIN)/jupyter execute --inplace docs/notebooks/nnx.ipynb docs/notebooks/equinox.ipynb

pictures: $(READY)
	$(BIN)/python docs/draw.py

nightly: $(READY)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

mutation: $(READY)
	$(BIN)/python -m tests.mutate $(FILES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/basedpyright

check: lint types test

bench: $(READY)
	$(BIN)/python -m bench report

hooks: $(READY)
	$(BIN)/pre-commit install

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[test,lint]'
	.venv-lock/bin/python -m pip freeze --exclude isoformer > requirements.lock
	rm -rf .venv-lock

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[docs]'
	touch $@

$(TORCH)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet torch==2.13.0 --requirement requirements.lock
	$(TORCH)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(TORCH) .cache build site *.egg-info
