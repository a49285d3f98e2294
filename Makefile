# Every target makes what it needs: a virtual environment in .venv, pinned by constraints.txt, and the library in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc setup.py pyproject.toml -type f)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help demo test bench report lint format gpu clean

help:  ## say what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(VENV)/built  ## doctor, train on real images, compare MobileNet V1 with plain PyTorch
	$(BIN)/python -m fastconv doctor
	$(BIN)/python examples/digits.py
	$(BIN)/python -m fastconv compare mobilenet_v1 --train --plot out/mobilenet_v1.png --json out/mobilenet_v1.json

test: lint $(VENV)/built  ## lint and all tests
	$(BIN)/python -m pytest

bench: $(VENV)/built  ## measure every kernel against PyTorch's own
	$(BIN)/python -m fastconv bench --save

report: $(VENV)/built  ## write README's tables and the plots from benchmarks/results
	$(BIN)/python -m fastconv report

lint: $(VENV)/ready  ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/ready  ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

gpu:  ## on a machine with a GPU: build, test, sanitize, benchmark in under ten minutes
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) build out *.egg-info fastconv/*.so

$(VENV)/ready: constraints.txt pyproject.toml
	@echo "setting up $(VENV) (downloads PyTorch; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton numpy ninja pybind11 setuptools wheel
	$(PIP) pytest pytest-benchmark hypothesis scikit-learn transformers rich matplotlib ruff clang-format
	@touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	@echo "building the kernels (one to three minutes)"
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@
