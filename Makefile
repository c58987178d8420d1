# make run    the main job: the default suite on the embedded model, offline, a table at the end
# make test   everything CI checks: lint, types, tests, generated text
# make results   measure the committed leaderboard anew, and the tables made of it
# make evidence  measure what is missing of the reference family's tables of claims
# make machine   measure what this machine can do, and a model beside it
# make pruning   the same of pruning and low rank
# make quantization   the same of quantization, and how fast packed weights are multiplied on this machine

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: run test lint types unit docs bench results machine evidence pruning quantization clean

run: $(VENV)/.core
	$(BIN)/effbench run

test: lint types docs unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

docs: $(VENV)/.dev
	$(BIN)/python -m effbench.report.docs --check

bench: $(VENV)/.dev
	$(BIN)/python -m pytest tests/benchmarks --ignore=/dev/null

results: $(VENV)/.core
	rm -rf results/reference/records
	$(BIN)/effbench run --out results/reference
	$(BIN)/python -m effbench.report.docs

evidence: $(VENV)/.core
	$(BIN)/python -m effbench.evidence

pruning: $(VENV)/.core
	$(BIN)/python -m effbench.evidence results/pruning

machine: $(VENV)/.core
	$(BIN)/python -m effbench.report.machine

quantization: $(VENV)/.core
	$(BIN)/python -m effbench.evidence results/quantization

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("effbench needs Python 3.11 or newer; set PYTHON=... to one") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints/cpu.txt | $(VENV)/bin/python
	$(PIP) install -c constraints/cpu.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints/cpu.txt | $(VENV)/bin/python
	$(PIP) install -c constraints/cpu.txt -e '.[dev]'
	touch $@ $(VENV)/.core
