# `make quickstart` trains and evaluates a small BiFormer; `make test` runs the tests. Both make .venv if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_OUTPUT := outputs/quickstart
BENCHMARKS ?= benchmarks
GPU_TESTS = $(shell grep -rl 'mark\.gpu' tests --include='test_*.py')

.PHONY: help quickstart test test-all test-fast test-gpu test-faults lint benchmark benchmark-gpu benchmark-cpu clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 1; }
	@# Debian packs ensurepip apart. Where it is missing, a pip outside can put one into the environment.
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } \
	|| { rm -rf $(VENV); echo "cannot create $(VENV): $(PYTHON) -m venv found no pip. On Debian and Ubuntu, run as root:"; \
	     $(PYTHON) -c 'import sys; print("  apt-get install python%d.%d-venv" % sys.version_info[:2])'; exit 1; }

# With progress bars on a terminal; a log gets warnings and errors alone.
PIP_INSTALL = quiet=; test -t 1 || quiet=--quiet; $(BIN)/pip install --disable-pip-version-check $$quiet

$(VENV)/.requirements: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt into $(VENV): minutes, and 6 GB with PyTorch's CUDA build"
	@echo "INSTALL.md says how to take another build of PyTorch"
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	@echo "installing requirements-dev.txt into $(VENV), for the tests"
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

quickstart: $(VENV)/.requirements  ## train biformer_nano on handwritten digits, in minutes; name a photograph by its own weights
	@rm -rf $(QUICKSTART_OUTPUT)
	$(BIN)/python main.py --config configs/train/quickstart.yaml --output_dir $(QUICKSTART_OUTPUT)
	$(BIN)/python main.py --config configs/train/quickstart.yaml --eval --resume $(QUICKSTART_OUTPUT)/last.pth
	$(BIN)/python scripts/predict.py docs/church.jpg
	@echo "log:        $(QUICKSTART_OUTPUT)/log.txt"
	@echo "checkpoint: $(QUICKSTART_OUTPUT)/last.pth"
	@echo "next:       . $(BIN)/activate && python main.py --help"

# One thread for each process: more threads than cores wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.requirements-dev  ## run the tests that need no GPU, but for the longest
	$(PYTEST) -m "not (long or gpu)"

test-all: $(VENV)/.requirements-dev  ## run all tests that need no GPU
	$(PYTEST) -m "not gpu"

test-fast: $(VENV)/.requirements-dev  ## run the tests that take no more than a minute on two cores
	$(PYTEST) -m "not (slow or long or compile or distributed or gpu or slurm)"

# Most of the time goes into compiling kernels, on the CPU: several processes share the GPU. A kernel that hangs cannot be
# interrupted, so its process ends when the time is up, and another takes its place.
GPU_WORKERS ?= 6
GPU_TIMEOUT ?= 120
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
GPU_LIMIT = $(shell $(GPU_PYTHON) -c 'import pytest_timeout' 2>/dev/null && echo --timeout $(GPU_TIMEOUT) --timeout-method thread)
GPU_PYTEST = $(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) $(GPU_LIMIT)

test-gpu:  ## run the tests that need a CUDA GPU, with the Python that is there
	@# Files without such tests are not read: they may import what is not there.
	status=0; \
	$(GPU_PYTEST) tests/ops/test_triton.py || status=1; \
	$(GPU_PYTEST) -m gpu $(filter-out tests/ops/test_triton.py,$(GPU_TESTS)) || status=1; \
	exit $$status

test-faults: $(VENV)/.requirements-dev  ## kill, starve and damage training runs, resume them, and compare them with undisturbed ones
	PYTHONPATH=.:tests $(BIN)/python -m helpers.faults --output benchmarks/faults.md

lint: $(VENV)/.requirements-dev  ## check the style
	$(BIN)/ruff check .

# These two never install anything: they also run where there is no network, with the Python that is there.
MEASURE = $(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/benchmark.py all --output $(BENCHMARKS)

benchmark-gpu:  ## measure the op, the models and their growth on this GPU: a record, tables and a plot, within 9 minutes
	$(MEASURE) --device cuda

benchmark-cpu:  ## the same at smaller sizes on the CPU
	$(MEASURE) --device cpu --budget 900

benchmark: $(VENV)/.requirements  ## measure the models side by side on this machine
	$(BIN)/python scripts/benchmark.py models --output $(BENCHMARKS)

clean:  ## remove the virtual environment and all outputs
	rm -rf $(VENV) outputs
