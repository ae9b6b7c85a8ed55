# `make` lists the targets. Everything runs in .venv, which `make setup` builds from exact pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup train sample evaluate prepare encode test test-slow lint format types notebooks docs wheel ci clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv with the pinned versions (the others do it when needed)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Ornstein needs Python 3.11 or newer; name one: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(READY) ## train; e.g. make train ARGS="model=dit scheduler=cosine"
	$(BIN)/python train.py $(ARGS)

sample: $(READY) ## sample a run; e.g. make sample ARGS="run=outputs/train/... num_samples=64"
	$(BIN)/python sample.py $(ARGS)

evaluate: $(READY) ## score a run; e.g. make evaluate ARGS="run=outputs/train/... num_samples=1000"
	$(BIN)/python evaluate.py $(ARGS)

prepare: $(READY) ## make a data set fast to read; e.g. make prepare ARGS="data=image_folder data.root=photos out=photos64"
	$(BIN)/python -m ornstein.cli.prepare $(ARGS)

encode: $(READY) ## encode a data set's latents; e.g. make encode ARGS="data=digits data.image_size=32"
	$(BIN)/python -m ornstein.cli.encode $(ARGS)

# Each worker on one thread: several small networks side by side, not one fighting itself over the cores.
test: $(READY) ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

test-slow: $(READY) ## the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --durations=10 $(ARGS)

lint: $(READY) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy over src
	$(BIN)/python -m mypy

notebooks: $(READY) ## run every notebook from top to bottom
	$(BIN)/jupyter-execute --timeout=600 --kernel_name=python3 notebooks/*.ipynb

docs: $(READY) ## write docs/design_space.md and docs/networks.md from docstrings and conf/
	OMP_NUM_THREADS=1 $(BIN)/python -m ornstein.cli.options docs

wheel: $(READY) ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

ci: ## what a submission must pass
	bash .ci/run

clean: ## remove caches and builds (keeps .venv and outputs)
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
