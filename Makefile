# One command sets everything up: each target first makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
APP ?= flask_blog
# Most tests wait for servers, so a few more than there are processors.
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench serve clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group servers
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/gevent-drivers --group gevent-drivers
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/gevent-drivers mysqlclient >/dev/null 2>&1 \
		|| echo 'mysqlclient cannot be built here (it needs libmariadb-dev and pkg-config); its tests are skipped'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group bench
	@touch $@

demo: $(VENV)/.demo  ## Serve all four example apps, drive them hard, print the table; fails if a connection leaked
	$(BIN)/python -m example_apps.demo

test: $(VENV)/.dev  ## Run the tests (ARGS="-k name" to choose)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(ARGS)

lint: $(VENV)/.dev  ## Ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## Strict mypy
	$(BIN)/mypy

bench: $(VENV)/.bench  ## Measure against the peers, side by side (ARGS="--only name")
	$(BIN)/python -m benchmarks $(ARGS)

serve: $(VENV)/.demo  ## Serve one example app: make serve APP=flask_blog|sanic_feed|fastapi_shop|starlette_chat
	$(BIN)/python -m example_apps.serve $(APP)

clean:  ## Remove what the other targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis bench-results
