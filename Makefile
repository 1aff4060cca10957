# `make` lists the targets. VENV= names another environment, PYTHON= another interpreter (3.11 or later).
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
READY = $(VENV)/.installed

# No word of newer versions, neither from pip nor from pyright: constraints.txt says which ones are used.
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: help env demo test check format clean

help:
	@echo 'make demo    train a small network on handwritten digits and watch its ranks fall'
	@echo 'make test    run the tests and the examples in the docstrings'
	@echo 'make check   check formatting, lint, types, tensor shapes and the layers of the package'
	@echo 'make format  format the source and mend what the linter can mend'
	@echo 'make env     install the package and all it needs into $(VENV) (the targets above do so)'
	@echo 'make clean   remove $(VENV), caches and build outputs (not runs/)'

env: $(READY)
	@:

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'rankfall needs Python 3.11 or later, and $(PYTHON) is not: try make PYTHON=python3.11' >&2; exit 1; }
	@echo 'Installing rankfall and all it needs into $(VENV) (a minute or more, once)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[train,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/rankfall train digits

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/test_laws.py -k 'not any_shape' --jaxtyping-packages=rankfall,beartype.beartype

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	@if test -f $(VENV)/pyvenv.cfg; then rm -rf $(VENV); fi
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
