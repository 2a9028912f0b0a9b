# One virtual environment for everything; VENV=/some/where puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-slow oldest lint docs clean

# the whole job on embedded data: about three minutes on two CPU cores after the installation
demo: $(VENV)/.installed
	$(BIN)/mtl-nnunet demo -o mtl_demo --overwrite

# the default tests; MTL_TEST_DATA=FOLDER adds those on real datasets
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# the end-to-end runs: select, plan, train, kill, resume, predict
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# the default tests on the oldest releases that pyproject.toml allows; PYTHON=python3.10 for the oldest Python
oldest:
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct --group test '.[demo,dask,monai]'
	PATH="$(abspath $(VENV)-oldest/bin):$$PATH" pytest tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the documentation as a site; links that lead nowhere fail
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --site-dir site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest mtl_demo site build dist .pytest_cache .mypy_cache .ruff_cache
