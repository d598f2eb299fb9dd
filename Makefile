# `make` alone lists what there is. Works with GNU make 3.81 (macOS) and later.
#
#   CUDA=1                 torch with CUDA from PyPI; the choice is remembered in .venv
#   PYTHON=/path/python    the Python that makes .venv
#   TORCH_INDEX=URL        where the CPU build of torch comes from
#   ARGS="..."             more arguments for `quickstart` or pytest: make test ARGS="-k losses -x"

VENV := .venv
BIN := $(VENV)/bin
FIND_PYTHON = for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done
PYTHON ?= $(shell $(FIND_PYTHON))
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

TORCH := $(if $(filter 1,$(CUDA)),cuda,$(if $(wildcard $(VENV)/.torch-cuda),cuda,cpu))
OTHER_TORCH := $(filter-out $(VENV)/.torch-$(TORCH),$(wildcard $(VENV)/.torch-*))
# The CPU index only adds `+cpu` wheels, which pip prefers to the plain (on Linux: CUDA) ones. It serves the one command
# that installs torch without its dependencies; one retry, so that a machine that cannot reach it loses a second.
TORCH_FLAGS_cpu = --extra-index-url $(TORCH_INDEX) --retries 1 --timeout 15
TORCH_FLAGS_cuda =

# Once as constraints of what is installed, once as those of the build backend: pip reads the latter from either name.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pyright's version is pinned in constraints.txt: do not look for another one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# On macOS and in small containers a test that starts a thread per core slows all others down.
BOUNDED := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format schema clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@sed -n 's/^#   \([A-Z]\)/  \1/p' Makefile

quickstart: $(VENV)/.installed ## install into .venv, distil a small student on this machine, show its scorecard
	$(BIN)/distill-llm quickstart $(ARGS)

test: check ## install, check, and run all tests, the slow ones too
	$(BOUNDED) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.installed-dev ## lint, formatting, types, import layers, size rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BOUNDED) $(BIN)/python -m pytest tests/contracts/test_conventions.py

format: $(VENV)/.installed-dev ## fix what lint can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed ## write docs/recipe.schema.json, by which editors check recipes
	$(BIN)/distill-llm recipe schema > docs/recipe.schema.json

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "distill-llm needs Python 3.11 or newer; found: '$(PYTHON)'." \
		"Install one (Debian: apt install python3.11-venv; macOS: brew install python@3.11)" \
		"or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed. On Debian the package python3.11-venv is missing." >&2; exit 1; }

# One stamp per build of torch: asking for the other one replaces it, asking again does nothing.
$(VENV)/.torch-$(TORCH): constraints.txt | $(BIN)/python
	@echo "Installing torch ($(TORCH)) into $(VENV)"
	@test -z "$(OTHER_TORCH)" || { $(BIN)/pip uninstall --quiet --yes torch && rm -f $(OTHER_TORCH); }
	@$(BIN)/pip install --quiet --no-deps $(TORCH_FLAGS_$(TORCH)) torch
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch-$(TORCH)
	@echo "Installing distill-llm into $(VENV)"
	@$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch-$(TORCH)
	@echo "Installing distill-llm with its development tools into $(VENV)"
	@$(BIN)/pip install --quiet --editable '.[dev,export,openai,plot,quantize,tensorboard]'
	@touch $@ $(VENV)/.installed
