# make train: set up and run the quickstart. make test: set up and check everything. Both need Python >= 3.11 and git.

VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
CONFIG ?= configs/quickstart.py

# Test files are dealt to three processes (each holds up to 2.5 GB): one often waits for the runs it started.
PYTEST := $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

# While pip installs what the tests need, Chromium's packages come and the quickstart data is built; linter and type
# checker run beside the first tests.
MAKEFLAGS += --jobs=2

.PHONY: train setup setup-tests chromium test pytest test-golden test-all lint clean

train: setup
	$(BIN)/python -m neo_jax.train --config=$(CONFIG) --workdir=$(WORKDIR)
	$(BIN)/python -m neo_jax.evaluate --workdir=$(WORKDIR)
	$(BIN)/python -m neo_jax.convert export --workdir=$(WORKDIR) --out=$(WORKDIR)/hf
	$(BIN)/python -m neo_jax.report --workdir=$(WORKDIR)

test: lint pytest

pytest: setup-tests
	$(PYTEST) -m "not slow"

test-golden: setup-tests
	$(PYTEST) -m golden

test-all: setup-tests lint
	$(PYTEST)

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# Stamp files make a second call instant: an environment is installed again only when its list of packages changed.
setup: $(VENV)/installed
setup-tests: $(VENV)/installed-tests chromium data/quickstart

# Any Python >= 3.11 that can make an environment; PYTHON=... names one.
FIND_PYTHON = for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; exit; fi; done

$(BIN)/python:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "error: found no Python >= 3.11 with venv: install it (Debian: apt-get install python3 python3-venv)" \
			"or name one with 'make PYTHON=/path/to/python'" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV) && $(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

# The two largest packages come beside the others; what they need themselves comes with the tests' packages.
$(VENV)/installed-large: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps torch==2.13.0 "libtpu>=0.0.52"
	@touch $@

$(VENV)/installed-tests: pyproject.toml $(VENV)/installed $(VENV)/installed-large
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps apache-beam==2.77.0  # why so: extra `beam` in pyproject.toml
	@touch $@

data/quickstart: | $(VENV)/installed
	$(BIN)/python -m data_pipelines.build --recipe=quickstart --output=$@

# The report is checked in a real browser.
chromium:
	@command -v chromium >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -qq --no-install-recommends chromium >/dev/null; \
		else \
			echo "error: the tests need Chromium: install the package 'chromium' (Debian: apt-get install chromium)" >&2; \
			exit 1; \
		fi; }
