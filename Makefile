# Everything from a bare machine: Python 3.11 or later, pip, g++ and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# GPUs to compile for in cuda-check; any list of compute capabilities from 80 on
CUDA_ARCHS ?= 80 90a

# Processes that share the tests; 0: this one alone
WORKERS ?= 2

# The oldest and the newest supported transformers. Another Python: make test PYTHON=python3.13 VENV=.venv313
VERSIONS ?= transformers==5.20.0 transformers==5.24.0

.PHONY: quickstart test test-devices faults versions lint docs example-report sanitize overrides cuda-check bench llama-cpp help clean
help:
	@echo "make quickstart   environment, then the main job on a small real model (about 3 minutes on 2 cores)"
	@echo "make test         environment, then all tests"
	@echo "make test-devices runs of two processes: equal to one, resumed, killed, refused (about 10 minutes); the suite has a sample"
	@echo "make faults       kills, signals, disks, damaged and hostile files, all of them; FAULTS='kills --every 10' for some"
	@echo "make versions     the tests that VERSIONS (of transformers, or torch) could break, each in an environment of its own"
	@echo "make lint         ruff, mypy, hadolint, and the docs' site built"
	@echo "make docs         the pages made from the code, and the site on localhost:8000"
	@echo "make example-report   the docs' example of a run's page and its picture, of the quickstart; needs chromium"
	@echo "make sanitize     the CPU op tests on kernels built with AddressSanitizer and UBSan"
	@echo "make overrides    wrong values for every key of the configuration (about 10 minutes); the suite has a sample"
	@echo "make cuda-check   the CUDA kernels compiled, linked and loaded by nvcc, for CUDA_ARCHS; needs no GPU"
	@echo "make bench        kernels beside torch's own layers, with this machine's limits"
	@echo "make llama-cpp    llama.cpp for Python, compiled once (6 minutes on 2 cores): GGUF exports are then run in it"

# torch first and by exact version. PyPI's torch for Linux brings CUDA, gigabytes of it; with pip's own PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS at torch's CPU wheels the same line takes 2.13.0+cpu.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, then the rest: minutes without a word"
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e .[dev]
	@touch $@

quickstart: $(READY)
	$(BIN)/python -m qat.train recipe=quickstart

test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Two processes that talk over the loopback; no GPU
test-devices: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -x -n $(WORKERS) --dist loadfile tests/devices

faults: $(READY)
	$(BIN)/python tests/faults $(FAULTS)

versions: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python tests/versions.py $(VERSIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

docs: $(READY)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

example-report: $(READY)
	$(BIN)/python docs/screenshot.py
	rm -rf build/example
	$(BIN)/python -m qat.train recipe=quickstart eval.damage=1024 run.dir=build/example
	$(BIN)/python docs/screenshot.py build/example

# A report ends the process: pytest may not keep what it writes to the terminal.
sanitize: $(READY)
	env $$($(BIN)/python -m qat.ops.build --sanitize) $(BIN)/python -m pytest tests/ops/test_kernels.py tests/ops/test_kernel_layers.py tests/ops/test_cpu_decode.py tests/ops/test_sums.py tests/ops/test_soft_kernels.py tests/ops/test_planes.py tests/ops/test_attention.py tests/ops/test_nearest_kernel.py -k "not fullgraph" --capture=sys

overrides: $(READY)
	QAT_ALL_OVERRIDES=1 $(BIN)/python -m pytest -q tests/config/test_overrides.py

cuda-check: $(READY)
	$(BIN)/python -m qat.ops.build --check --cuda-arch $(CUDA_ARCHS)

bench: $(READY)
	$(BIN)/python -m qat.bench

# With cmake and g++. pip keeps the wheel in its cache, so a second environment gets it in seconds.
llama-cpp: $(READY)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 -e .[llamacpp]

clean:
	rm -rf $(VENV) build *.egg-info
