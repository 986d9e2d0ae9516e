# One command sets everything up: each target first makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
APP ?= flask_blog
# Most tests wait for servers, so a few more than there are processors.
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help demo screenshots test test-all test-lowest contract lint types bench serve clean

# What a newer Python can change, and what of it does not take long: no matrix of web servers.
ELSEWHERE ?= tests/core tests/pool tests/aio tests/observe $(wildcard tests/adapters/test_*.py) \
	$(addprefix tests/gevent/test_,matrix.py kills.py storm.py)

# What meets a framework or a driver.
LOWEST ?= $(wildcard tests/adapters/test_*.py) tests/aio tests/metrics tests/gevent/test_matrix.py

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group servers
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[all]' --group dev
	@rm -rf $(VENV)/lib/python3.*/site-packages/tests  # of sanic-ext 24.12, and would hide ours
	@rm -rf $(VENV)/drivers
	$(BIN)/python -m pip install --quiet --target $(VENV)/drivers --group drivers
	@for driver in mysqlclient mariadb; do \
		$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/drivers $$driver >$(VENV)/$$driver.log 2>&1 \
		|| echo "$$driver cannot be built here (see $(VENV)/$$driver.log; it needs gcc, pkg-config and Debian's libmariadb-dev, \
then rm $@): its tests are skipped"; \
	done
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group bench
	@touch $@

demo: $(VENV)/.demo  ## Serve all four example apps, drive them hard, print the table; fails if a connection leaked
	$(BIN)/python -m example_apps.demo

test: $(VENV)/.dev  ## Run the tests (ARGS="-k name" to choose)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope -o cache_dir=$(VENV)/.pytest_cache $(ARGS)

test-all: test test-3.12 test-3.13  ## Run the tests, and on newer Pythons, where these are installed, what can differ there

contract: $(VENV)/.dev  ## Run every case of the adapters' contract with every server on every database
	PEEWEE_FRAMEWORKS_CONTRACT=full $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -o cache_dir=$(VENV)/.pytest_cache \
		tests/adapters/contract $(ARGS)

# python3.N on the PATH or of pyenv, if it works: its shims may not.
test-3.%:
	@found=; for python in "$$(command -v python3.$*)" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$*.*/bin/python; do \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null && found="$$python"; \
	done; \
	if [ -z "$$found" ]; then \
		echo 'Python 3.$* was not found (neither python3.$* nor with pyenv): nothing was tested on it.'; \
	else \
		$(MAKE) --no-print-directory test VENV=$(VENV)-3.$* PYTHON="$$found" ARGS='$(ELSEWHERE) $(ARGS)'; \
	fi

test-lowest:  ## Run the tests of adapters and drivers with the oldest versions that pyproject.toml allows
	$(MAKE) --no-print-directory test VENV=$(VENV)-lowest CONSTRAINTS=tests/lowest.txt \
		ARGS='-W ignore::DeprecationWarning $(LOWEST) $(ARGS)'

lint: $(VENV)/.dev  ## Ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## Strict mypy
	$(BIN)/mypy

bench: $(VENV)/.bench  ## Measure against the peers, side by side (ARGS="--only name")
	$(BIN)/python -m benchmarks $(ARGS)

screenshots: $(VENV)/.dev  ## Take the status page's pictures for the documentation (MariaDB and Chromium; two minutes)
	PEEWEE_FRAMEWORKS_SCREENSHOTS=docs/images $(BIN)/python -m pytest -q tests/health/test_page.py -k pictures

serve: $(VENV)/.demo  ## Serve one example app: make serve APP=flask_blog|sanic_feed|fastapi_shop|starlette_chat
	$(BIN)/python -m example_apps.serve $(APP)

clean:  ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-3.* .mypy_cache .pytest_cache .ruff_cache .hypothesis bench-results
