# `make demo` and `make test` each make .venv if it is missing, install, and run.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
BRACT_DATA ?= $(wildcard $(abspath ../shared/data))
export BRACT_DATA
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: demo test audit bench lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo   a private federated run of five sites on this machine, then its audit'
	@echo 'make audit  the audit of a mechanism, ε by three accountants, the table of faults that are found'
	@echo 'make test   lint, types and tests'
	@echo 'make bench  what things cost, beside rivals in an environment of their own'

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first and by its pin: a later range would choose a build of several gigabytes
	$(BIN)/pip install --progress-bar on --no-input -c constraints.txt torch setuptools wheel
	$(BIN)/pip install --progress-bar on --no-input -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/bract simulate digits --out runs/demo
	$(BIN)/bract audit verify runs/demo/ledgers/*.sqlite
	$(BIN)/bract audit budget runs/demo/ledgers/*.sqlite

audit: .venv/installed
	$(BIN)/bract audit experiment digits
	$(BIN)/python -m bract.simulations.audits.agreement
	$(BIN)/python -m bract.simulations.benchmarks.planted_faults

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2

.venv-rivals/installed: simulations/benchmarks/rivals/requirements.txt
	test -x .venv-rivals/bin/python || $(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/pip install --progress-bar on --no-input "$$(grep ^torch== constraints.txt)"
	.venv-rivals/bin/pip install --progress-bar on --no-input "$$(grep ^torch== constraints.txt)" -r $<
	@touch $@

bench: .venv/installed .venv-rivals/installed
	$(BIN)/python -m bract.simulations.benchmarks.suite --rivals $(abspath .venv-rivals/bin/python) --out simulations/benchmarks

clean:
	rm -rf .venv .venv-rivals build dist *.egg-info
