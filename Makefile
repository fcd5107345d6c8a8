# The verbs a person types. Needs make, Python 3.11+ with venv, and (for training and tests) nothing else.

PYTHON ?= python3
PORT ?=
HOST ?=
MODEL ?=
CUDA ?=
# Installed only where no torch is importable; a range would take the registry's newest build.
TORCH ?= torch==2.13.0
DATA ?= ../shared/data
PIECE_MINUTES ?= 9

SERVE_PYTHON := .venv-serve/bin/python
TEST_PYTHON := .venv/bin/python
SERVE_REQUIREMENTS := service/requirements$(if $(shell command -v nvidia-smi),-gpu).txt
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help serve test setup lint kernels gpu-check gpu-train train-camvid clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

serve: .venv-serve/ready ## set up and serve the embedded model on http://127.0.0.1:8000 (PORT=, HOST=, MODEL=file.onnx)
	@$(SERVE_PYTHON) model/kernels/build.py --quiet
	@exec $(SERVE_PYTHON) -m service serve $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL))

# One thread a process: two processes of two threads each would wait for each other's at every step of a network. Files in
# the order of tests/conftest.py: by number of tests, long ones of one test would come last.
test: setup lint ## set up and run lint, types and the whole test suite
	@$(TEST_PYTHON) model/kernels/build.py --quiet
	OMP_NUM_THREADS=1 $(TEST_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

kernels: ## compile the Encoding kernels into build/ with g++ or CXX=, and for a visible GPU with nvcc (CUDA=1: for all)
	@$(PYTHON) model/kernels/build.py $(if $(CUDA),--cuda)

gpu-check: ## on a machine with an NVIDIA GPU, torch and nvcc: build, check and measure the CUDA kernels (nine minutes)
	@$(PYTHON) -m benchmarks.gpu_check

gpu-train: ## on a machine with an NVIDIA GPU and torch: go on with all runs for one GPU (DATA=, PIECE_MINUTES=9)
	@$(PYTHON) -c 'import torch' 2>/dev/null || \
		{ echo "$(PYTHON) has no torch; name one that has, as in PYTHON=.venv/bin/python after make setup" >&2; exit 1; }
	@$(PYTHON) -m benchmarks.gpu_train --data $(DATA) --minutes $(PIECE_MINUTES)

setup: .venv/ready ## everything for training, export and tests, in .venv

lint: .venv/ready ## ruff and mypy
	$(TEST_PYTHON) -m ruff check .
	$(TEST_PYTHON) -m ruff format --check .
	$(TEST_PYTHON) -m mypy

train-camvid: .venv/ready ## train, evaluate and export the embedded model anew (DATA=, about six hours on two CPU cores)
	$(TEST_PYTHON) -m model.train --data $(DATA)/camvid --out runs/camvid --config model/recipes/camvid-resnet18c.toml \
		$(if $(wildcard runs/camvid/last.pt),--resume)
	$(TEST_PYTHON) -m model.train --data $(DATA)/camvid --out runs/camvid-second \
		--config model/recipes/camvid-resnet18c-second.toml \
		$(if $(wildcard runs/camvid-second/last.pt),--resume,--initial runs/camvid/final.pt)
	$(TEST_PYTHON) -m model.train --data $(DATA)/camvid --out runs/camvid-third \
		--config model/recipes/camvid-resnet18c-third.toml \
		$(if $(wildcard runs/camvid-third/last.pt),--resume,--initial runs/camvid-second/final.pt)
	$(TEST_PYTHON) -m model.train --data $(DATA)/camvid --out runs/camvid-fourth \
		--config model/recipes/camvid-resnet18c-fourth.toml \
		$(if $(wildcard runs/camvid-fourth/last.pt),--resume,--initial runs/camvid-third/final.pt)
	$(TEST_PYTHON) -m model.evaluate runs/camvid-fourth/final.pt --data $(DATA)/camvid --split test --base-size 512
	$(TEST_PYTHON) -m export runs/camvid-fourth/final.pt --output runs/camvid-fourth/camvid.onnx --compact --base-size 512

clean: ## remove the virtual environments, kernels and caches (runs/ stays)
	rm -rf build .venv .venv-serve .pytest_cache .ruff_cache .mypy_cache

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(1) || \
		{ rm -rf $(1); echo "Python has no venv module here; on Debian: apt-get install python3-venv" >&2; exit 1; }
endef

.venv-serve/ready: service/requirements.txt service/requirements-base.txt service/requirements-gpu.txt
	@echo "setting up .venv-serve (once, without torch) ..."
	$(call make_venv,.venv-serve)
	@$(SERVE_PYTHON) $(PIP_INSTALL) -r $(SERVE_REQUIREMENTS)
	@touch $@

.venv/ready: requirements.txt requirements-train.txt service/requirements.txt service/requirements-base.txt \
		service/requirements-client.txt service/requirements-cluster.txt service/requirements-tracing.txt
	@echo "setting up .venv (once, with torch) ..."
	$(call make_venv,.venv)
	@$(TEST_PYTHON) -c 'import torch' 2>/dev/null || $(TEST_PYTHON) $(PIP_INSTALL) '$(TORCH)'
	@$(TEST_PYTHON) $(PIP_INSTALL) -r requirements.txt
	@touch $@
