# AnimeSketch. `make` lists the targets. Variables, given as `make demo PYTHON=python3.12`:
#   PYTHON   the interpreter that makes .venv, 3.11 or newer       (python3)
#   OUTPUT   where the demo puts its results                       (out/demo)
#   ARGS     more arguments for the command behind the target      (none)
# and pip's own, for the making of .venv: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (no CUDA packages)
PYTHON ?= python3
OUTPUT ?= out/demo
ARGS ?=

VENV := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test bench soak lint lock

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## make .venv from requirements.lock; instant when it is there
	@$(PYTHON) cluster/setup_env.py

demo: setup  ## footage -> dataset -> adapter -> server -> pictures and OUTPUT/report.html
	@$(VENV)/python -m cluster.demo --output "$(OUTPUT)" $(ARGS)

test: setup  ## all tests but the long ones
	@$(VENV)/python -m pytest $(ARGS)

bench: setup  ## the benchmark tables, each against its peer in the same run
	@$(VENV)/python -m tests.bench $(ARGS)

soak: setup  ## the long proofs: kill matrices, overload, full-size steps
	@$(VENV)/python -m pytest -m soak $(ARGS)

lint: setup  ## ruff and pyright
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/pyright

# Left out of the lock: this project itself, the build of torch that is for CPUs alone (`+cpu`), and the CUDA packages,
# which torch names exactly and brings itself where it needs them.
lock: setup  ## remake requirements.lock from pyproject.toml, keeping what still fits
	@$(VENV)/pip-compile --quiet --extra dev --strip-extras --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links --no-emit-options --output-file requirements.lock pyproject.toml $(ARGS)
	@sed -i.old -e 's/+cpu$$//' -e '/^animesketch/d' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton/d' -e '/^#/d' \
		requirements.lock && rm requirements.lock.old
	@{ echo '# Exact versions, made by `make lock` from pyproject.toml (extra dev).'; cat requirements.lock; } \
		> requirements.lock.new && mv requirements.lock.new requirements.lock
