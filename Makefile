# `make quickstart` trains and evaluates a small BiFormer; `make test` runs the tests. Both make .venv if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_OUTPUT := outputs/quickstart

.PHONY: help quickstart test test-gpu lint benchmark clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 1; }
	@# Debian packs ensurepip apart. Where it is missing, a pip outside can put one into the environment; root can fetch it.
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing python3-venv, which $(VENV) needs" \
	     && apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv --clear $(VENV); } \
	|| { rm -rf $(VENV); echo "cannot make $(VENV): python -m venv needs pip; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.requirements: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: $(VENV)/.requirements  ## train biformer_nano on handwritten digits, on the CPU or a GPU, in minutes
	@rm -rf $(QUICKSTART_OUTPUT)
	$(BIN)/python main.py --config configs/train/quickstart.yaml --output_dir $(QUICKSTART_OUTPUT)
	$(BIN)/python main.py --config configs/train/quickstart.yaml --eval --resume $(QUICKSTART_OUTPUT)/last.pth
	@echo "log:        $(QUICKSTART_OUTPUT)/log.txt"
	@echo "checkpoint: $(QUICKSTART_OUTPUT)/last.pth"

test: $(VENV)/.requirements-dev  ## run the tests on the CPU
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/.requirements-dev  ## run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.requirements-dev  ## check the style
	$(BIN)/ruff check .

benchmark: $(VENV)/.requirements  ## measure the models side by side on this machine
	$(BIN)/python scripts/benchmark.py models --output benchmarks

clean:  ## remove the virtual environment and all outputs
	rm -rf $(VENV) outputs
