# make demo: a GPT trained in minutes.  make test: the tests.  make test-all: the long ones too.  make lint.
# TORCH chooses another build: make test TORCH='torch==2.12.*'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
MINUTES ?= 4
# Threads that wait spin by default, and starve the others where something else runs too.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-all lint golden clean

demo: $(VENV)/.demo
	$(BIN)/fused-lm doctor
	$(BIN)/fused-lm parity --quick
	$(BIN)/fused-lm train --minutes $(MINUTES) --out runs/demo --overwrite
	$(BIN)/fused-lm generate --checkpoint runs/demo --bytes 1500 --check-python
	@echo "The loss curve: runs/demo/curve.png"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m "not slow" --durations=12

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --durations=12

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

golden: $(VENV)/.test
	$(BIN)/python -m tests.golden.write

clean:
	rm -rf $(VENV) build dist *.egg-info runs

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV) ..."
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[lm,triton]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@
