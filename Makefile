# make serve    install into .venv, start a cluster on this machine, ask the model a question, keep serving
# make test     install into .venv, run the whole test suite
# make proofs   what takes minutes or root: clusters over ssh, in network namespaces, autoscaled, redeployed under load
# make check    formatting, lint and types
# make check-k8s  checkov over the Kubernetes manifests; keep what it found
# make kernels  compile every Triton kernel for Hopper; needs no GPU

MODEL ?=
PORT ?= 8000
ARGS ?=
VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do $$python -c \
	'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
CHECKOV_VERSION := 3.3.30
# The default build of PyTorch for Linux brings several GB of CUDA, which a machine without a GPU cannot use.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: serve test proofs check check-k8s format kernels clean
.DELETE_ON_ERROR:

serve: $(VENV)/.installed
	$(BIN)/lserve up --port $(PORT) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

proofs: $(VENV)/.installed-dev
	LSERVE_WRITE_PROOFS=1 $(BIN)/pytest -m proof $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check-k8s: $(VENV)/.installed-dev
	$(PYTHON) -m venv $(VENV)/checkov && $(VENV)/checkov/bin/pip install --quiet checkov==$(CHECKOV_VERSION)
	PYTHONPATH=tests/cluster $(BIN)/python tests/cluster/run_checkov.py $(VENV)/checkov/bin/checkov

kernels: $(VENV)/.installed-dev
	$(BIN)/python -m lserve.kernels.compile_check

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "LServe needs Python 3.11 or 3.12; name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without a GPU: the CPU build, from PyTorch's own index where it answers, else from pip's configured one.
$(VENV)/.torch: | $(BIN)/python
	@if command -v nvidia-smi >/dev/null; then \
		echo "GPU found: pip installs PyTorch with CUDA"; \
	elif $(BIN)/python -c "import urllib.request; urllib.request.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; then \
		$(BIN)/pip install torch==$(TORCH_VERSION) --extra-index-url $(TORCH_CPU_INDEX); \
	else \
		$(BIN)/pip install torch==$(TORCH_VERSION); \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --editable '.[nixl,demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --editable '.[dev]'
	@touch $@
