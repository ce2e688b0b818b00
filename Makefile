# make demo    trains, compares, generates and draws: the main job
# make test    lint, types and tests
# make help    everything else

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine with a GPU pip takes torch's CUDA build; without one the constraints file pins the CPU set.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

.PHONY: help demo test lint unit clean

help:
	@grep -E '^# make' Makefile | cut -c3-

$(VENV)/installed: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e '.[dev,triton]' $(CONSTRAINTS)
	touch $@

# make install   the virtual environment in .venv, with the package and what development needs
install: $(VENV)/installed

demo: install
	$(BIN)/python examples/demo.py

test: lint unit

# make lint    ruff and mypy
lint: install
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

# make unit    the tests that need no GPU, then those of Triton's interpreter, which takes a process of its own
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not interpreter"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m interpreter

# make clean   removes the virtual environment and caches
clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-output
