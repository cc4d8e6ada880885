# Everything from a bare machine: Python 3.11 or later with pip and venv, make, and a package index.
PYTHON ?= python3
# Options of the command that installs torch, such as an --index-url of PyTorch's CPU builds: on Linux without a GPU
# that saves gigabytes of CUDA libraries.
TORCH_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet
SOURCES := assets composition kernels studio tests trainers ui
# What `make bench` runs: those that take a minute or two and write no results. Others by name, such as
# `make bench BENCHMARKS=bench_b_lora`.
BENCHMARKS ?= bench_compose bench_sparse_adamw

# Options of the builder of the embedded base models, such as "--device cuda --unet-minutes 15".
STARTER_OPTIONS ?=

.PHONY: help demo test lint fmt types bench bench-all starters setup clean
help:
	@echo "make demo    train an adapter on the embedded base model and draw with it"
	@echo "make test    run all tests"
	@echo "make lint    look for mistakes and unformatted files"
	@echo "make fmt     format the code"
	@echo "make types   check types"
	@echo "make bench   run the quick benchmarks: $(BENCHMARKS)"
	@echo "make bench-all   run all benchmarks, which takes hours, and write their results"
	@echo "make starters    build the embedded base models again, which takes a GPU or days"
	@echo "make setup   only prepare the environment in $(VENV)"
	@echo "make clean   remove the environment and everything built"

$(VENV)/.torch: constraints.txt
	@echo "Preparing the environment in $(VENV). The first time this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) $(TORCH_OPTIONS) $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(INSTALL) -c constraints.txt -e .
	@touch $@

# lycoris-lora is only read by tests; what it asks for beyond einops and toml serves its own trainer.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) -c constraints.txt --no-deps lycoris-lora einops toml
	@touch $@ $(VENV)/.run

setup: $(VENV)/.dev

demo: $(VENV)/.run
	$(BIN)/studio demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The folders are checked as they are installed, because trainers/ is the package studio.trainers.
types: $(VENV)/.dev
	rm -rf build/types build/lib build/bdist.*
	$(INSTALL) --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p studio

bench: $(VENV)/.dev
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python tests/benchmarks/$$name.py; done

bench-all:
	@$(MAKE) bench BENCHMARKS="$(basename $(notdir $(sort $(wildcard tests/benchmarks/bench_*.py))))"

# The evaluator and the autoencoder of the first serve the second too.
starters: $(VENV)/.dev
	$(BIN)/python -m studio.assets.builder.starters starter $(STARTER_OPTIONS)
	$(BIN)/python -m studio.assets.builder.starters starter-xl --vae assets/starter/vae $(STARTER_OPTIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
