# make demo    a tour: a real model answers, and nothing is computed twice
# make serve   the server, on port 8000
# make test    ruff, mypy and all tests
# `make help` lists the rest. All work in .venv, made on the first call; nothing is installed outside it.

PORT ?= 8000
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt scripts/install.sh

.PHONY: help demo serve test lint ember clean

help:
	@echo "make demo    a tour: a real model answers, and nothing is computed twice"
	@echo "make serve   the server, on port $(PORT); make serve PORT=9000 for another"
	@echo "make test    ruff, mypy and all tests (installs PyTorch too: the built-in model's formats are compared)"
	@echo "             in as many processes as there are cores, up to four; make test WORKERS=1 for one after the other"
	@echo "make lint    ruff and mypy alone"
	@echo "make ember   train the built-in model again"
	@echo "make clean   delete .venv and all caches"

demo: $(VENV)/.installed
	@$(BIN)/rekindle demo

serve: $(VENV)/.installed
	@exec $(BIN)/rekindle serve --port $(PORT)

# Files are given to workers in the order of their names: by their number of tests the long ones would come last.
test: lint
	@$(BIN)/python -m compileall -q src
	$(BIN)/python -m pytest $(if $(filter-out 0 1,$(WORKERS)),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder)

lint: $(VENV)/.installed-for-development
	$(BIN)/ruff check
	$(BIN)/mypy

ember: $(VENV)/.installed-for-development
	$(BIN)/python -m rekindle.model.ember train

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(INPUTS)
	@sh scripts/install.sh $(VENV) .
	@touch $@

$(VENV)/.installed-for-development: $(INPUTS)
	@sh scripts/install.sh $(VENV) '.[dev,torch]'
	@touch $@ $(VENV)/.installed
