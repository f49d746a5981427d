# make demo: a GPT trained in minutes.  make test: the tests.  make test-all: the long ones too.  make lint.
# make wheel: the release with CUDA kernels for every GPU, in dist/; needs nvcc.
# TORCH chooses another build: make test TORCH='torch==2.12.*'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
MINUTES ?= 4
# Threads that wait spin by default, and starve the others where something else runs too.
export OMP_WAIT_POLICY ?= passive
# What these targets show needs no nvcc, and a build of the kernels takes minutes.
INSTALL := FUSED_LM_SKIP_CUDA=1 $(PIP)

.PHONY: demo test test-all lint golden wheel clean

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
	git ls-files '*.h' '*.c' '*.cpp' '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

golden: $(VENV)/.test
	$(BIN)/python -m tests.golden.write

wheel: $(VENV)/.torch
	FUSED_LM_FORCE_CUDA=1 FUSED_LM_CUDA_ARCHS="80;90;100;120" \
	  $(BIN)/python -m pip --disable-pip-version-check wheel -v --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist *.egg-info runs fused_lm/_C.* fused_lm/_build.json

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV) ..."
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[lm,triton]"
	@touch $@

# CuTe's headers, which the harness is held against; what its wheel asks for is not used.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[test]"
	$(PIP) --no-deps nvidia-cutlass==4.2.0.0
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[dev]"
	@touch $@
