# Everything runs from .venv, which `make` fills from constraints.txt on first use and leaves alone afterwards.

PYTHON ?= python3
UV ?= uv
EXTRAS ?= test,segmentation,mini
DEEPSPEED_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt
WITH_ENV := PATH="$(CURDIR)/$(BIN):$$PATH"

# Ranks: one a GPU, two on a machine without. Threads: the cores shared out among them.
COUNT_RANKS := import torch; print(torch.cuda.device_count() or 2)
COUNT_THREADS := import os, sys; print(max(1, len(os.sched_getaffinity(0)) // int(sys.argv[1])))

QUICKSTART := digits_linear digits_lora digits_full digits_spt_lora
SEGMENTATION := scenes_linear scenes_lora scenes_spt_lora
MINI := all_linear all_lora all

.DEFAULT_GOAL := help
# How many processes, and the threads of each, for the recipes below.
define SET_RANKS
set -e; export $(WITH_ENV); \
ranks=$${SPT_RANKS:-$$(python -c "$(COUNT_RANKS)")}; \
export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(python -c "$(COUNT_THREADS)" "$$ranks")}
endef

.PHONY: help quickstart segmentation mini test lint typecheck format lock clean bench

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12 (which Python makes .venv), SPT_RANKS=4 (processes of quickstart, segmentation and mini),"
	@echo "           DEEPSPEED_FLAGS='--master_port 29501'"

quickstart: .venv/.installed ## install, train four small models, merge one and print the comparison
	@$(SET_RANKS); \
	for name in $(QUICKSTART); do \
	    echo "== $$name on $$ranks ranks"; \
	    deepspeed --quiet --num_accelerators "$$ranks" $(DEEPSPEED_FLAGS) launch/train.py "configs/quickstart/$$name.py"; \
	done; \
	python launch/merge.py work_dirs/digits_spt_lora/task.safetensors \
	    --config configs/quickstart/digits_spt_lora.py --out work_dirs/digits_spt_lora/merged.safetensors; \
	python launch/report.py work_dirs/digits_linear work_dirs/digits_lora work_dirs/digits_spt_lora \
	    work_dirs/digits_full --out work_dirs/quickstart

segmentation: .venv/.installed ## draw scenes in ADE20K's layout, train a small SETR on them in three ways, evaluate and draw
	@$(SET_RANKS); \
	test -d data/scenes || python launch/prepare_data.py ade20k --make-scenes data/scenes; \
	for name in $(SEGMENTATION); do \
	    echo "== $$name on $$ranks ranks"; \
	    deepspeed --quiet --num_accelerators "$$ranks" $(DEEPSPEED_FLAGS) launch/train.py "configs/ade20k/$$name.py"; \
	done; \
	deepspeed --quiet --num_accelerators "$$ranks" $(DEEPSPEED_FLAGS) launch/evaluate.py \
	    configs/ade20k/scenes_spt_lora.py --task work_dirs/scenes_spt_lora/task.safetensors --multi-scale --visualize 8; \
	python launch/report.py $(addprefix work_dirs/,$(SEGMENTATION)) --out work_dirs/segmentation

mini: .venv/.installed ## draw the mini-benchmark, train its eight tasks in three ways and print one table
	@$(SET_RANKS); \
	test -d data/mini || python launch/prepare_data.py mini --make data/mini; \
	for name in $(MINI); do \
	    echo "== $$name on $$ranks ranks"; \
	    deepspeed --quiet --num_accelerators "$$ranks" $(DEEPSPEED_FLAGS) launch/train.py "configs/mini/$$name.py" --resume; \
	done; \
	python launch/report.py $(addprefix work_dirs/mini_,$(MINI)) --out work_dirs/mini

test: lint typecheck ## lint, type check and every test
	$(WITH_ENV) $(BIN)/python -m pytest

lint: .venv/.installed ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: .venv/.installed ## mypy
	$(BIN)/mypy

format: .venv/.installed ## let ruff mend and format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-benchmarks ## run every benchmark beside its peers
	@set -e; export $(WITH_ENV); \
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; python "$$script"; done

lock: ## resolve constraints.txt again (needs uv; UPGRADE=--upgrade moves every pin)
	@command -v "$(UV)" >/dev/null || { echo "make lock: '$(UV)' not found: install uv or pass UV=/path/to/uv" >&2; exit 1; }
	$(UV) pip compile pyproject.toml -c constraints.in --all-extras --group build --universal --python-version 3.10 \
	    --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	    $(UPGRADE) --quiet --output-file constraints.txt

clean: ## remove .venv, caches and build output (work_dirs stays)
	rm -rf .venv build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: deepspeed is built in this environment and looks at the torch it finds there. In an isolated build
# it could pull a second torch of several GB. DS_BUILD_OPS=0: its kernels are compiled when first used, if ever.
.venv/.installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: '$(PYTHON)' not found: pass PYTHON=/path/to/python (3.10 to 3.13)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "make: spt_dist needs Python 3.10 to 3.13, '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1): pass PYTHON=/path/to/python" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv .venv
	$(PIP) setuptools wheel ninja packaging numpy torch torchvision
	DS_BUILD_OPS=0 $(PIP) -e '.[$(EXTRAS)]'
	@touch $@

.venv/.installed-benchmarks: .venv/.installed
	DS_BUILD_OPS=0 $(PIP) -e '.[$(EXTRAS),benchmarks]'
	@touch $@
