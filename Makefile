# Every target that runs something makes .venv first. The second time, nothing is downloaded and no network is needed.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
MODALITY ?= image
BIN := .venv/bin
READY := .venv/.installed

# One thread a worker: the tests' models are tiny, and threads of two workers on two cores only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-matrix gpu lint venv clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## Watch a small model learn, about two minutes on a CPU; MODALITY=video or audio, options in ARGS="--seed 1"
	$(BIN)/python -m vlm_grpo demo --modality $(MODALITY) $(ARGS)

test: $(READY) ## Run the quick tests on a CPU
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not network" $(ARGS)

test-all: $(READY) ## Run the slow tests too, and those that need a GPU or a package index where there is one
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not gpu" $(ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(PYTEST) -m gpu $(ARGS) || test $$? -eq 5; \
	else echo "No GPU here: the tests marked gpu were left out."; fi

test-matrix: $(READY) ## Try the Unsloth patch on published releases of unsloth_zoo, which pip fetches the first time
	NETWORK=required $(PYTEST) -m network $(ARGS)

gpu: $(READY) ## Measure on a GPU what only a GPU can show, ten minutes at most; ARGS="--phases contest", see tests/gpu/README.md
	$(BIN)/python tests/gpu/suite.py $(ARGS)

lint: $(READY) ## Check style, import order between modules, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

venv: $(READY) ## Make .venv with everything for development

# The stamp is a copy of pyproject.toml: a checkout that only changes the file's time installs nothing.
$(READY): pyproject.toml
	@if cmp -s pyproject.toml $(READY); then touch $(READY); exit 0; fi; \
	test -x $(BIN)/pip || { \
		$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else \
			f"Python {v} ({sys.executable}) is too old: vlm-grpo needs 3.11 or newer. Try: make PYTHON=python3.11 ...")' && \
		$(PYTHON) -m venv .venv; } && \
	echo "Installing into .venv: about two minutes and 6.5 GB, only this once." && \
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[dev]" && \
	cp pyproject.toml $(READY)

clean: ## Remove what builds and tools leave behind; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
