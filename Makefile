# Python and environment can be chosen: make test PYTHON=python3.12 VENV=.venv-simd
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SIMD := build/simd
# One process, and the defaults said aloud: unasked, accelerate warns of each of them.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
CONSTRAINTS := $(if $(findstring simd,$(VENV)),$(SIMD)/constraints.txt,constraints.txt)

# Idle OpenMP threads that spin steal the core from whatever else runs: up to 25 times slower on a small machine.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help install quickstart test lint test-slow simd floors
.DELETE_ON_ERROR:

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(BIN)/.installed  ## the environment (.venv, about 6 GB) and nothing else; quick when it is up to date

quickstart: install  ## pretrain on the built-in images, then k-NN, linear probe and pictures: minutes on two cores
	@set -e; \
	last=$$(ls -d runs/quickstart-[0-9]* 2>/dev/null | sed 's/.*-0*//' | sort -n | tail -n 1); \
	run=$$(printf 'runs/quickstart-%03d' $$(($${last:-0} + 1))); \
	$(LAUNCH) pretrain/run.py run=$$run; \
	$(LAUNCH) evaluate/knn.py --ckpt $$run; \
	$(LAUNCH) evaluate/linear.py --ckpt $$run; \
	echo; \
	echo "run         $$run: backbone.safetensors, backbone.json, config.yaml, metrics.jsonl"; \
	echo "pictures    $$run/pictures: patches put where the model believes they belong"; \
	echo "tables      $$run/evaluate: knn.json, linear.json (printed above)"; \
	echo "curves      $(BIN)/tensorboard --logdir runs"; \
	echo "next        source $(BIN)/activate && accelerate launch pretrain/run.py data=PATH   # your own images"

test: lint  ## lint, types and the default tests, in under five minutes; what .ci/run calls
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist loadfile --durations=5

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: install  ## the tests that need many minutes or a network; stops at the first failure
	$(BIN)/pytest -q -m slow -x -n auto --maxprocesses 8 --dist loadfile --durations=5

# Every row of the matrix of backbones, and what else calls timm, torch, torchvision and the hub in their own ways.
FLOOR_TESTS = tests/test_floors.py tests/common/models/test_backbones.py tests/common/models/test_swin.py \
	tests/common/checkpoints/test_published.py tests/common/checkpoints/test_checkpoint.py \
	tests/evaluate/job/test_subjects.py tests/common/training/test_schedules.py

floors: .venv-floors/.installed  ## the tests of backbones and checkpoints, with the oldest dependencies: .venv-floors, 7 GB
	.venv-floors/bin/pytest -q -x -n auto --maxprocesses 8 $(FLOOR_TESTS)

.venv-floors/.installed: pyproject.toml tests/floors.py
	@rm -rf .venv-floors
	$(PYTHON) -m venv .venv-floors
	$(PYTHON) tests/floors.py >.venv-floors/constraints.txt
	.venv-floors/bin/pip install -c .venv-floors/constraints.txt -e . pytest pytest-timeout pytest-xdist scikit-learn
	@touch $@

simd:  ## a second environment, .venv-simd, with pillow-simd in place of pillow: faster resizing
	@$(MAKE) --no-print-directory install VENV=.venv-simd
	@.venv-simd/bin/pip check
	@.venv-simd/bin/python -c 'from PIL import features; from common.processes.launch import active_pil; \
		absent = [name for name in ("webp", "libtiff", "avif") if not features.check(name)]; \
		print("active:", active_pil()); \
		absent and print("built without", ", ".join(absent), "(no headers): for such images install libwebp-dev, libtiff-dev", \
			"or libavif-dev, then: rm -r .venv-simd $(SIMD) && make simd")'
	@echo 'use it: source .venv-simd/bin/activate, or make quickstart VENV=.venv-simd'

$(BIN)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'error: $(PYTHON) is not Python 3.10 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pillow-simd and pillow own the same PIL/ folder, so only one may be installed; others ask for the name `pillow`.
# An empty distribution of that name, which needs pillow-simd, satisfies them: nothing is ever overwritten.
$(SIMD)/constraints.txt: constraints.txt | $(BIN)/pip
	@mkdir -p $(SIMD)/pillow
	@printf '#include <stdio.h>\n#include <Python.h>\n#include <jpeglib.h>\n#include <zlib.h>\n' | cc -fsyntax-only -x c \
		-I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" - 2>$(SIMD)/missing.txt || \
		{ echo 'error: pillow-simd is compiled here: that needs a C compiler and the headers of Python, libjpeg and' \
		'zlib (Debian, Ubuntu: apt-get install gcc python3-dev libjpeg-dev zlib1g-dev); see $(SIMD)/missing.txt' >&2; exit 1; }
	@printf '%s\n' '[project]' 'name = "pillow"' 'version = "12.1.1+simd"' \
		'dependencies = ["pillow-simd==12.1.1.post0"]' '[tool.setuptools]' 'packages = []' >$(SIMD)/pillow/pyproject.toml
	@rm -f $(SIMD)/*.whl
	CC="cc$$(grep -qs avx2 /proc/cpuinfo && echo ' -mavx2')" \
		$(BIN)/pip wheel --no-deps --wheel-dir $(SIMD) pillow-simd==12.1.1.post0 ./$(SIMD)/pillow
	@sed '/^pillow==/d' constraints.txt >$@
	@for wheel in $(CURDIR)/$(SIMD)/*.whl; do \
		echo "$$(basename "$$wheel" | sed 's/-.*//; s/_/-/g') @ file://$$wheel"; done >>$@
