# Each target works from a clean clone on its own. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# The fallback is for a machine with two cores; xdist's `auto` counts the cores.
WORKERS ?= auto

.PHONY: demo test parity lint bench clean

demo: $(VENV)/.base
	$(BIN)/python -m jaxalope.train --config=demo --workdir=runs/demo
	$(BIN)/python -m jaxalope.infer --model=runs/demo --prompt="def " --max_new_tokens=200 --temperature=0.8

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(WORKERS) -m "not parity"

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -n $(WORKERS) -m parity

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv* .cache runs *.egg-info build

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Jaxalope needs Python 3.11 or newer; this is %d.%d. Set PYTHON=/path/to/python3.11." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp a set of extras; a changed pyproject.toml installs again.
$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
$(VENV)/.parity: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[parity]'
	touch $@
