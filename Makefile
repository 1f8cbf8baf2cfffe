# `make help` lists what there is. Every target does its own set-up, in .venv/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PYTHON

BIN := .venv/bin
# DeepSpeed compiles an extension for CPU processes on first use: into the venv, not into the home folder.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
# Processes of the test run; each test process computes with one thread.
JOBS ?= 2
PYTEST := env OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help setup demo test test-full lint types audit audit-online extensions unit bench bench-all clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## make .venv/ with everything a user needs
	@scripts/setup

demo: setup  ## train, evaluate and compare two LoRA runs on a CPU
	source $(BIN)/activate && python -m mgm_exp -m adapter=lora_r8,lora_r16

test: lint types audit extensions unit  ## lint, types, audit and all quick tests (what CI runs)

test-full: lint types audit extensions  ## all tests, the slow ones too -> the faults in docs/reliability.md
	@rm -rf .venv/fault_notes
	@FAULT_NOTES=$(CURDIR)/.venv/fault_notes scripts/timed "all tests" -- $(PYTEST)
	@$(BIN)/python -m tests.fault_table .venv/fault_notes docs/reliability.md

unit: setup-dev extensions
	@scripts/timed "tests" -- $(PYTEST) -m "not slow"

lint: setup-dev  ## ruff: rules and format
	@scripts/timed "ruff check" -- $(BIN)/ruff check .
	@scripts/timed "ruff format" -- $(BIN)/ruff format --check .

types: setup-dev  ## mypy
	@scripts/timed "mypy" -- $(BIN)/mypy

audit: setup-dev  ## versions with a known weakness, packages that do not fit together (no network)
	@scripts/timed "audit" -- $(BIN)/python scripts/audit.py
	@scripts/timed "pip check" -- $(BIN)/python -m pip check

audit-online: setup-dev  ## what is installed, looked up in a current database of weaknesses (needs the network)
	@$(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit
	@$(BIN)/python -m pip freeze --exclude-editable > .venv/audit/installed.txt
	@scripts/timed "pip-audit" -- .venv/audit/bin/pip-audit --no-deps --disable-pip -r .venv/audit/installed.txt

extensions: setup-dev
	@scripts/timed "DeepSpeed's CPU extension" -- $(BIN)/python scripts/build_extensions.py

bench: setup  ## benchmarks side by side with what others offer -> benchmarks/results.json
	@scripts/timed "benchmarks" -- $(BIN)/python -m benchmarks

bench-all: setup  ## all benchmarks, the long ones too
	@scripts/timed "all benchmarks" -- $(BIN)/python -m benchmarks --all

.PHONY: setup-dev
setup-dev:
	@scripts/timed "set-up" -- scripts/setup dev

clean:  ## remove .venv/ and caches (outputs/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +
