# The commands of the project. Each sets up what it needs: a virtual environment in .venv with the exact versions of
# requirements.lock, made once and again when the lock changes.
#
#   make demo MODEL=facebook/bart-large DATASET=twitter_complaints     another model and data set, from the hub
#   make demo DATA_FILE=messages.csv NUM_PROCESSES=2                   your own messages, two processes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The site's generator and the packager have environments of their own: `make test` needs neither.
DOCS_VENV := .venv-docs
DIST_VENV := .venv-dist

MODEL ?=
DATASET ?=
DATA_FILE ?=
NUM_PROCESSES ?= 1
CONFIG ?= examples/zero3_offload_cpu.yaml
OUTPUT ?= runs/demo
ARGS ?=
BENCH_CASES ?= bart,lora8b,full1b
BENCH_ENGINE_CASES ?= bart lora8b
BENCH_PROCESSES ?= 2
BENCH_ROUNDS ?= $(if $(CPU_FLAG),1,3)
# Seconds after which no run is started and none goes on.
BENCH_BUDGET ?= 7200
BENCH_OUT ?= runs/bench
PYTEST_ARGS ?=
# Test files that run side by side, each with rank processes of its own.
WORKERS ?= 2

# Without a CUDA device the processes talk over gloo, on the CPU.
CPU_FLAG = $(shell $(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "--use_cpu")')
DATA_FLAGS = $(if $(MODEL),--model '$(MODEL)') $(if $(DATASET),--dataset '$(DATASET)') \
             $(if $(DATA_FILE),--data-file '$(DATA_FILE)')
# The embedded model and messages need no network; saying so keeps the hub's client from asking.
OFFLINE = $(if $(MODEL)$(DATASET),,HF_HUB_OFFLINE=1)

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shardwise needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

.PHONY: setup
setup: $(READY) ## make .venv with the pinned dependencies

.PHONY: demo
demo: $(READY) ## LoRA under ZeRO-3 with CPU offload, then check the saved adapter in stock peft
	$(OFFLINE) $(BIN)/shardwise launch --config_file $(CONFIG) --num_processes $(NUM_PROCESSES) $(CPU_FLAG) \
	    examples/conditional_generation.py $(DATA_FLAGS) --output-dir $(OUTPUT) \
	    --save-logits $(OUTPUT)/check/logits.safetensors $(ARGS)
	$(OFFLINE) $(BIN)/python examples/check_adapter.py $(OUTPUT) $(OUTPUT)/check/logits.safetensors

.PHONY: test
test: $(READY) ## the tests, without the long ones and those that need a GPU
	$(BIN)/python -m pytest -m 'not full and not gpu' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: test-full
test-full: $(READY) ## every test; those for GPUs skip themselves where there is none
	$(BIN)/python -m pytest -m 'full or not full' $(PYTEST_ARGS)

.PHONY: test-versions
test-versions: $(READY) ## the short parity set under older and the newest transformers and accelerate; needs a package index
	$(BIN)/python tests/compat/versions.py $(ARGS)

.PHONY: check
check: $(READY) ## lint, format, types, and the sizes of classes, functions and files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py --check

.PHONY: bench
bench: $(READY) ## one training script under DDP, FSDP2, DeepSpeed and shardwise; tiny shapes where there is no GPU
	@$(if $(CPU_FLAG),echo "# there is no GPU: tiny shapes on the CPU. Their times say nothing of the real ones.",:)
	rm -f $(BENCH_OUT)/runs.jsonl
	$(BIN)/python benchmarks/user.py --nproc $(BENCH_PROCESSES) --rounds $(BENCH_ROUNDS) --budget $(BENCH_BUDGET) \
	    --out $(BENCH_OUT) $(if $(CPU_FLAG),--tiny --use-cpu,--cases $(BENCH_CASES)) $(ARGS)
	@echo "# as the README's table: $(BIN)/python benchmarks/user.py --markdown $(BENCH_OUT)/runs.jsonl"

.PHONY: bench-engine
bench-engine: $(READY) ## the engine alone beside DDP and FSDP2, and the cost of its hooks; tiny shapes where there is no GPU
	for case in $(BENCH_ENGINE_CASES); do \
	    $(BIN)/torchrun --nproc_per_node $(BENCH_PROCESSES) benchmarks/compare.py --case $$case \
	        $(if $(CPU_FLAG),--tiny --use-cpu) $(ARGS); \
	done
	$(BIN)/torchrun --nproc_per_node $(BENCH_PROCESSES) benchmarks/hooks_overhead.py

.PHONY: suite
suite: $(READY) ## every engine on every case, eager and compiled, with a table and a plot; tiny shapes where there is no GPU
	$(BIN)/python benchmarks/suite.py --nproc $(BENCH_PROCESSES) $(if $(CPU_FLAG),--tiny --use-cpu) $(ARGS)

$(DOCS_VENV)/.ready: requirements-docs.lock
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	@touch $@

.PHONY: docs
docs: $(READY) $(DOCS_VENV)/.ready ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/python tools/site/reference.py
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --clean
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server -d build/site"

$(DIST_VENV)/.ready: requirements-dist.lock
	test -x $(DIST_VENV)/bin/python || $(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dist.lock
	@touch $@

.PHONY: dist
dist: $(READY) $(DIST_VENV)/.ready ## wheel and sdist in dist/, checked: metadata, contents, an import from an empty environment
	rm -rf dist
	$(DIST_VENV)/bin/python -m build --no-isolation --outdir dist .
	$(DIST_VENV)/bin/python -m twine check --strict dist/*
	$(BIN)/python tools/check_dist.py dist

.PHONY: clean
clean: ## remove the environments, caches, runs and what was built
	rm -rf $(VENV) $(DOCS_VENV) $(DIST_VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
