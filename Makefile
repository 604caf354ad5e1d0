# `make demo` sets up and runs the main job; `make test` sets up and runs the tests. Both need Python 3.11 or newer, and a
# package index, and put everything into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find operators cluster pipelines -name '*.py' -o -name '*.yaml') pyproject.toml
PACKAGES := -p penstock.operators -p penstock.cluster -p penstock.pipelines
DEMO_ROOT := demo

.PHONY: demo test test-slow lint clean

demo: $(VENV)/demo
	$(BIN)/penstock run pipelines/library/quickstart.yaml --set root=$(DEMO_ROOT)
	$(BIN)/penstock search live --root $(DEMO_ROOT) --k 3 \
		"read only some columns of a parquet file" \
		"how far apart are two vectors" \
		"keep a copy of a remote file on local disk"

test: $(VENV)/dev lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --durations 10

test-slow: $(VENV)/dev
	$(BIN)/pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd tests && ../$(BIN)/python -m mypy --config-file ../pyproject.toml $(PACKAGES)

# The wheel is what runs and what is tested, never the checkout.
$(VENV)/demo: $(VENV)/wheel
	$(PIP) install -c constraints.txt "$$(ls dist/penstock-*.whl)[demo,s3]"
	touch $@

$(VENV)/dev: $(VENV)/wheel
	$(PIP) install -c constraints.txt "$$(ls dist/penstock-*.whl)[demo,s3,dev]"
	touch $@

$(VENV)/wheel: $(SOURCES) constraints.txt $(VENV)/base
	rm -rf build dist *.egg-info
	$(PIP) wheel --no-deps --wheel-dir dist .
	rm -rf build *.egg-info
	$(PIP) uninstall --yes penstock
	touch $@

$(VENV)/base:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO_ROOT)
