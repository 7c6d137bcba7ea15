# `make` lists the targets. Everything rests on `make install`, which a second call skips.
PYTHON ?= python3
KIND ?= auto
CONFIG ?= configs/metarl.yml
TESTS ?= tests
VENV := .venv
BIN := $(VENV)/bin
SOURCES := neox_rl megatron_patches tools tests setup.py deepy.py train.py

# One thread a process: the runs and the tests start several processes on few cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-neox check doctor clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

install:  ## make .venv and install into it (KIND=cpu or gpu overrides what the machine suggests)
	@$(PYTHON) tools/install.py --kind $(KIND)

demo: install  ## run configs/metarl.yml: a small model learns to search by asynchronous RL
	$(BIN)/python deepy.py train.py $(CONFIG)

test: install  ## the test suite (TESTS=tests/unit for a part)
	$(BIN)/python -m pytest --durations=15 $(TESTS)

test-neox: install  ## the tests that need a GPT-NeoX checkout (GPT_NEOX_PATH=~/gpt-neox make test-neox)
	@test -n "$(GPT_NEOX_PATH)" || { echo "set GPT_NEOX_PATH to a clone of github.com/EleutherAI/gpt-neox" >&2; exit 2; }
	$(BIN)/python -m pip install -q -e ".[neox]"
	GPT_NEOX_PATH=$(GPT_NEOX_PATH) $(BIN)/python -m pytest --durations=15 -m neox $(TESTS)

check: install  ## ruff, mypy strict, import floors, sizes; all of them, whichever fails
	@status=0; \
	for tool in "-m ruff check $(SOURCES)" "tools/check_floors.py" "tools/check_sizes.py" "-m mypy"; do \
		echo "check: $$tool"; $(BIN)/python $$tool || status=1; \
	done; exit $$status

doctor:  ## versions, cores, memory, ports, GPUs, and advice
	@if [ -x $(BIN)/python ]; then $(BIN)/python tools/doctor.py; else $(PYTHON) tools/doctor.py; fi

clean:  ## remove what install, test and check made; runs/ stays
	rm -rf $(VENV) build dist neox_rl.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find neox_rl megatron_patches tools tests -type d -name __pycache__ -prune -exec rm -rf {} +
