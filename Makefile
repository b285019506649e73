# `make demo` and `make test` do all the set-up they need. PYTHON is any Python of 3.11 or newer.
PYTHON ?= python3
PROCESSES ?= 2
RECIPE ?= fisher
BIN := .venv/bin
.DEFAULT_GOAL := help

.PHONY: help site demo study study-smoke test unit slow check soak bench gpu clean

help: ## these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo ## the main job on a real model: prune, extract, continue, export, open in transformers
	$(BIN)/python examples/smollm2/demo.py --processes $(PROCESSES) --recipe $(RECIPE) \
		$(if $(STEPS),--steps $(STEPS)) $(if $(RESUME),--resume) $(OVERRIDES)

study: .venv/ready ## which way of choosing units is best (examples/study): hours; goes on where it stopped
	$(BIN)/python examples/study/study.py runs/study
	$(BIN)/python examples/study/analyse.py runs/study

study-smoke: .venv/ready ## every part of the study once, in minutes
	$(BIN)/python examples/study/study.py runs/study-smoke --smoke
	$(BIN)/python examples/study/analyse.py runs/study-smoke

# Whole files are dealt to processes, in order: fixtures of a file are made once. One thread each: two would only wait.
test: .venv/ready check ## style, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

unit: .venv/ready ## the fast laws, in seconds
	$(BIN)/python -m pytest -x -m 'not slow and not rehearsal' tests/unit

slow: .venv/ready ## the rehearsals: tests that take minutes, beside `make test`
	$(BIN)/python -m pytest -m rehearsal

check: .venv/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: .venv/ready ## these pages as a site, in site/; fails on a link that leads nowhere
	$(BIN)/python -m mkdocs build --strict

soak: .venv/ready ## 100 kills, full disks, attacks and 100,000 damaged inputs; hours; goes on where it stopped
	$(BIN)/python tests/soak/soak.py --kills 100 --report docs/soak.md
	$(BIN)/python tests/soak/attacks.py > docs/attacks.md
	SHEAR_TRON_FUZZ=100000 $(BIN)/python -m pytest tests/unit/test_fuzz.py

bench: .venv/ready ## the kernel benchmark; without a GPU its roofline and the ahead-of-time table
	$(BIN)/python kernels/bench/run.py

gpu: ## on a machine with a GPU, and torch and triton in PYTHON: all it should answer, in under 25 minutes
	$(PYTHON) examples/gpu/session.py

# The demo needs half of the packages that tests do.
.venv/demo: EXTRAS := examples
.venv/ready: EXTRAS := dev,examples
.venv/demo .venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv (once; a few minutes at most)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[$(EXTRAS)]' torch triton
	@touch $@

clean: ## remove .venv, runs and build products
	rm -rf .venv runs build *.egg-info
