PYTHON ?= python3
VENV := .venv
VISION := .venv-vision
TRACK := .venv-track
BIN := $(VENV)/bin
JOBS ?= 2
NAME ?= dfad
SEEDS ?= 3
PYTEST_ARGS ?=

# Every extra but vision, whose torchvision breaks other packages beside a CPU-only torch.
EXTRAS := augment,text,speech,diffusion,compress,federated,fair,tune,track,hub,export,arrow,docs

# Tested with these; users name the package alone.
TRACKERS := wandb==0.31.0 mlflow==3.17.2 trackio==0.43.0

# Byte code is compiled at first import: of torch alone only a fraction is ever imported. It must be
# kept then, or each of the hundreds of processes that the tests start would compile it anew.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := -m pip --disable-pip-version-check install -qq --no-compile -c constraints.txt

ifneq ($(wildcard .data),)
export VESTIGE_DATA ?= $(CURDIR)/.data
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-vision test-track lint docs bench clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.base ## environment with the library and its base dependencies

demo: $(VENV)/.base ## the main job on built-in real data; all a fresh machine needs
	$(BIN)/vestige demo

test: $(VENV)/.all ## every test that is not slow, gpu or optional
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.all ## the slow tests
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu and not optional" $(PYTEST_ARGS)

test-vision: ## the vision adapter, in an environment of its own
	@if ls tests/vision/test_*.py >/dev/null 2>&1; then \
		$(MAKE) --no-print-directory $(VISION)/.all && \
		$(VISION)/bin/python -m pytest -m optional tests/vision $(PYTEST_ARGS); \
	else \
		echo "The vision adapter has no tests yet: tests/vision holds no test file. Nothing was run."; \
	fi

test-track: $(TRACK)/.all ## every tracker with its real package, in an environment of its own
	$(TRACK)/bin/python -m pytest -m "" tests/training/tracking/test_backends.py $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff, mypy, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.all ## documentation site in docs/_build/html, links checked
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

bench: $(VENV)/.all ## claim benchmark of one method: NAME=dfad SEEDS=3
	$(BIN)/vestige bench claims $(NAME) --seeds $(SEEDS)

clean: ## caches and build products; runs and environments stay
	rm -rf dist build docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also the environments
	rm -rf $(VENV) $(VISION) $(TRACK)

$(VENV)/bin/pip $(VISION)/bin/pip $(TRACK)/bin/pip: %/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vestige needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $*

$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing vestige and its base dependencies into $(VENV), about a minute ..."
	@$(BIN)/python $(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing vestige and the development tools into $(VENV), about a minute ..."
	@$(BIN)/python $(INSTALL) -e '.[dev]'
	@touch $(VENV)/.base $@

$(VENV)/.all: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing vestige, its extras and the development tools into $(VENV), about two minutes ..."
	@$(BIN)/python $(INSTALL) -e '.[$(EXTRAS),dev]'
	@touch $(VENV)/.base $(VENV)/.dev $@

$(VISION)/.all: pyproject.toml constraints.txt | $(VISION)/bin/pip
	@echo "Installing vestige with the vision extra into $(VISION), about a minute ..."
	@$(VISION)/bin/python $(INSTALL) -e '.[vision,dev]'
	@touch $@

# Trackio and MLflow want older versions of three packages than the other extras take.
$(TRACK)/.all: pyproject.toml constraints.txt | $(TRACK)/bin/pip
	@echo "Installing vestige and the trackers into $(TRACK), about a minute ..."
	@grep -vE '^(pillow|importlib_metadata|python-dateutil)==' constraints.txt > $(TRACK)/constraints.txt
	@$(TRACK)/bin/python $(subst constraints.txt,$(TRACK)/constraints.txt,$(INSTALL)) -e '.[track]' \
		pytest hypothesis beartype $(TRACKERS)
	@touch $@
