# make demo        the main job on sample data
# make test        checks and all tests
# make test-fast   tests that take a moment each
# make docs        the documentation, in docs/_build
# make check       lint, types, layers
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast check docs clean

demo: .venv/installed
	$(BIN)/vissl-lite demo --out runs/demo --overwrite

test: check docs
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed-dev
	$(BIN)/python -m sphinx -q -W -n --keep-going docs docs/_build

# The stamps hold what was installed: they are made again when pyproject.toml changes.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch .venv/installed $@

clean:
	rm -rf .venv runs build dist
