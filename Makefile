# Every target works on a fresh clone: it makes .venv, installs what it needs and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# as many processes as cores; the order of the tests is that of tests/conftest.py
PYTEST := $(BIN)/python -m pytest -q -n auto
SOURCES := $(shell find csrc kernels -type f) setup.py build_backend.py pyproject.toml

.NOTPARALLEL:  # one virtual environment, one pip at a time
.PHONY: help demo test test-kernels test-install test-full compile-kernels bench bench-full bench-report gpu gpu-check gpu-measure gpu-train gpu-sanitize lint format docs package clean
help:
	@echo "make demo       train ResNet-101 FCN on generated street scenes, 1 to 3 minutes"
	@echo "make test       the test suite, about 8 minutes on two cores with the set-up"
	@echo "make test-kernels  compiles the Triton kernels for sm_70 to sm_120, executes them in an emulator"
	@echo "make test-install  a plain pip install in new environments, with a compiler and without"
	@echo "make test-full  with the slow tests"
	@echo "make bench      12 benchmarks, under 10 minutes; bench-full: all of them"
	@echo "make bench-report   their tables and plots, into README.md and docs/"
	@echo "make gpu        gpu-check, then gpu-measure, with the python3 that sees the GPU; no network"
	@echo "make gpu-check     build, GPU tests in parallel, six smoke figures: at most 6 minutes"
	@echo "make gpu-measure   build, benchmarks in order of worth, profile, ncu: at most 6 minutes"
	@echo "make gpu-train     build, training steps and largest batches, loss curves: at most 9 minutes"
	@echo "make gpu-sanitize  compute-sanitizer over the kernels"
	@echo "make compile-kernels  the Triton kernels for sm_70 to sm_120, no GPU needed; ALL=1 every one"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make docs       the documentation, in build/site"
	@echo "make package    sdist and wheel, and a smoke test of the wheel outside the repository"

$(VENV)/build.stamp: requirements/build.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/build.txt
	@touch $@

$(VENV)/train.stamp: requirements/train.txt $(VENV)/build.stamp
	$(PIP) install -r requirements/train.txt
	@touch $@

$(VENV)/test.stamp: requirements/test.txt requirements/oracles.txt $(VENV)/train.stamp
	$(PIP) install -r requirements/test.txt
	$(PIP) install --no-deps -r requirements/oracles.txt
	@touch $@

$(VENV)/triton-3.6.stamp: requirements/triton-3.6.txt $(VENV)/build.stamp
	$(PIP) install --no-deps --upgrade --target $(VENV)/triton-3.6 -r requirements/triton-3.6.txt
	@touch $@

$(VENV)/install.stamp: $(SOURCES) $(VENV)/build.stamp
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# What pip fetches for a build in isolation, so that the tests of the install need no network.
$(VENV)/wheels.stamp: requirements/build.txt requirements/isolated.txt $(VENV)/build.stamp
	$(PIP) download --no-deps --dest $(VENV)/wheels -r requirements/isolated.txt
	@touch $@

$(VENV)/docs.stamp: requirements/docs.txt $(VENV)/build.stamp
	$(PIP) install -r requirements/docs.txt
	@touch $@

demo: $(VENV)/install.stamp $(VENV)/train.stamp
	$(BIN)/python examples/train_cityscapes.py

test: $(VENV)/install.stamp $(VENV)/test.stamp
	$(PYTEST) -m "not slow and not gpu and not install and not kernels"

test-kernels: $(VENV)/install.stamp $(VENV)/test.stamp
	$(PYTEST) -m "kernels and not slow"

test-install: $(VENV)/install.stamp $(VENV)/test.stamp $(VENV)/wheels.stamp
	$(BIN)/python -m pytest -q -m install

test-full: $(VENV)/install.stamp $(VENV)/test.stamp $(VENV)/wheels.stamp $(VENV)/triton-3.6.stamp
	$(PYTEST)

bench: $(VENV)/install.stamp $(VENV)/test.stamp
	$(BIN)/python benchmarks/suite.py summary

bench-full: $(VENV)/install.stamp $(VENV)/test.stamp
	$(BIN)/python benchmarks/suite.py matrix
	$(BIN)/python benchmarks/plot_scaling.py

bench-report: $(VENV)/install.stamp $(VENV)/test.stamp
	$(BIN)/python benchmarks/report.py

gpu:
	$(PYTHON) benchmarks/gpu.py check measure

gpu-check gpu-measure gpu-train gpu-sanitize: gpu-%:
	$(PYTHON) benchmarks/gpu.py $*

compile-kernels: $(VENV)/install.stamp $(VENV)/test.stamp
	$(BIN)/python -m tests.compile_kernels

lint: $(VENV)/install.stamp $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

docs: $(VENV)/install.stamp $(VENV)/train.stamp $(VENV)/docs.stamp
	$(BIN)/python docs/figures/cells.py
	$(BIN)/python -m mkdocs build -q
	@echo "docs: build/site/index.html"

package: $(VENV)/install.stamp
	$(PIP) install -r requirements/package.txt
	PYTHON=$(BIN)/python bash tests/package.sh

clean:
	rm -rf $(VENV) build dist *.egg-info fcnseg/*.so
