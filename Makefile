# Every target does its own set-up. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
# The versions that are tested, for what is installed and for what builds it (two names, by pip's version).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
SOURCES := $(shell find native -type f -name '*.cpp' -o -type f -name '*.h' -o -type f -name 'CMakeLists.txt' 2>/dev/null)

.PHONY: help demo serve test test-sim test-faults lint format check-clients bench bench-transfer bench-gateway soak clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(VENV)/.headrace: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Headrace into $(VENV); the first time takes a few minutes ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@ $(VENV)/.native

$(VENV)/.native: $(VENV)/.headrace $(SOURCES)
	@echo "Building the native kernels ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.native
	@echo "Installing what the checks need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.native ## install, fetch a small model, serve it, talk to it, stop
	@$(BIN)/headrace demo

serve: $(VENV)/.native ## serve MODEL (default smollm2-135m) on http://127.0.0.1:8000
	@$(BIN)/headrace serve $(MODEL)

# Two at a time (pytest-xdist): most tests use one core. A file's tests share servers, so they stay together.
test: $(VENV)/.dev ## the test suite
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-sim: $(VENV)/.dev ## the property and simulation tests with 20 times the examples
	@HEADRACE_EXAMPLES=20 $(BIN)/python -m pytest --timeout 3600 tests/engine tests/sim tests/world

test-faults: $(VENV)/.dev ## kill, stop and cut off real workers under load; cut links need the rights to make network namespaces
	@$(BIN)/python -m pytest tests/faults

lint: $(VENV)/.dev ## ruff, mypy, and who may import whom
	@$(BIN)/ruff check src tests benchmarks
	@$(BIN)/ruff format --check src tests benchmarks
	@$(BIN)/mypy
	@PYTHONPATH=src $(BIN)/lint-imports --no-cache

format: $(VENV)/.dev ## let ruff format the code
	@$(BIN)/ruff check --fix-only src tests benchmarks
	@$(BIN)/ruff format src tests benchmarks

build/clients/.installed: tests/clients/requirements.txt
	@$(PYTHON) -m venv build/clients
	@echo "Installing the clients of others into build/clients ..."
	@env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT build/clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

check-clients: $(VENV)/.dev build/clients/.installed ## the official openai client and guidellm, installed apart, against a server
	@$(BIN)/python tests/clients/check_clients.py build/clients

bench: $(VENV)/.dev ## tokens per second at batch sizes 1, 8 and 32, and the share of a step that is not a kernel
	@$(BIN)/python benchmarks/engine.py

bench-transfer: $(VENV)/.dev ## what a handoff costs: pulling KV blocks against a bare socket copy, and the pause after the first token (over a link of 10 Gbit/s: Linux, root)
	@$(BIN)/python benchmarks/kv_transfer.py && $(BIN)/python benchmarks/handoff_pause.py --link 10000

bench-gateway: $(VENV)/.dev ## what the gateway takes of a core for each request and token, with modelled workers
	@$(BIN)/python benchmarks/gateway_cost.py

soak: $(VENV)/.dev ## 10,000 requests at the highest rate the server holds, some cut off, some malformed
	@$(BIN)/python benchmarks/soak.py

clean: ## remove what the targets made here (models in the cache stay)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis
