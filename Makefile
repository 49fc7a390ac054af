# A machine needs Python >= 3.11, make and git: every target builds the environment it needs in .venv, once.
# constraints.txt pins every package, so that two machines run the same code.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt --no-build-isolation --progress-bar on
PINS := pyproject.toml constraints.txt
say = @printf '\n\033[1m%s\033[0m\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint types wheel clean

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.test  ## fit a model and look inside it; DATA=<file> takes your own data
	$(BIN)/python -m tutorials.demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.test  ## all tests, doctests included
	$(BIN)/python -m pytest

test-fast: $(VENV)/.test  ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.lint  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test $(VENV)/.lint  ## pyright on a copy installed as users get it
	rm -rf build/lib build/typecheck
	$(PIP) install --quiet --no-build-isolation --no-deps --target build/typecheck .
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(VENV)/.pip  ## build the wheel into dist/
	rm -rf build/lib dist
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist pyro_ext.egg-info .pytest_cache .ruff_cache

# Stamps: an environment is installed again only when pyproject.toml or constraints.txt changed since.
$(VENV)/.pip: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    found=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing); \
	    echo "Expected Python >= 3.11, but $(PYTHON) is $$found. Install one and name it: make PYTHON=python3.12" >&2; \
	    exit 1; }
	$(call say,Making the environment $(VENV))
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --upgrade --progress-bar on pip setuptools wheel
	@touch $@

$(VENV)/.test: $(VENV)/.pip $(PINS)
	$(call say,Installing pyro-ext and what its tests and demo need (torch is large: some minutes the first time))
	$(INSTALL) --editable '.[test,demo]'
	@touch $@

$(VENV)/.lint: $(VENV)/.pip $(PINS)
	$(call say,Installing ruff and pyright)
	$(INSTALL) --editable '.[lint]'
	@touch $@
