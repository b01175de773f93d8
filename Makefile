# `make train` and `make test` do all the set-up themselves; a second call installs nothing.
# Needed on the machine: Python >= 3.11 with venv, g++ with C++20, make. `make help` lists the targets.

VENV ?= .venv
ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Compiling every installed module takes a minute and more; Python compiles the tenth that is used when it is first used,
# and must be let to keep the result.
INSTALL := $(PIP) install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
CSRC := $(filter-out %.md,$(wildcard csrc/*))
PACKAGE := pyproject.toml setup.py constraints.txt $(CSRC)
export HF_HUB_DISABLE_TELEMETRY = 1

# The first Python that is new enough, unless the caller names one: make train PYTHON=python3.12
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13 python3.14 python,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

.DEFAULT_GOAL := help
.PHONY: help train test lint types format bench soak wheel env clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

train: $(VENV)/.demo  ## set up, then train: the embedded recipe, or ARGS="--config FILE --out DIR ..."
	$(BIN)/python -m jasper_fast.train $(ARGS)

test: $(VENV)/.dev  ## set up, then run the tests in JOBS processes (ARGS go to pytest)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -o faulthandler_exit_on_timeout=true $(ARGS)

soak: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## ruff: mend what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## mypy on the package
	$(BIN)/mypy

bench: $(VENV)/.dev  ## one benchmark: make bench ARGS="losses"; without ARGS, the list
	$(BIN)/python -m bench $(or $(ARGS),--help)

env: $(VENV)/.demo  ## what is in use on this machine, and why
	$(BIN)/python -m jasper_fast.env

# Without a fresh build folder, setuptools packs what an earlier build left there.
wheel: $(VENV)/.base  ## dist/*.whl, with the compiled extension or not at all
	rm -rf build dist
	JASPER_FAST_REQUIRE_EXTENSION=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove everything that was built, the virtual environment too; runs/ stays
	rm -rf $(VENV) build dist jasper_fast.egg-info jasper_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache

# The virtual environment, and what the extension is built against.
$(VENV)/.base: constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python >= 3.11; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (torch first, the largest download)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(INSTALL) torch setuptools wheel
	@touch $@

# What training needs, and no more: these minutes belong to the first run.
$(VENV)/.demo: $(VENV)/.base $(PACKAGE)
	@touch $(VENV)/.building
	$(INSTALL) --no-build-isolation -e ".[demo]"
	@$(extension_note)
	@touch $@

# What tests, lint and benchmarks need besides; everything of .demo is in it. Beside a CPU build of torch, the Triton
# that interprets and compiles the kernels; CUDA builds bring their own.
$(VENV)/.dev: $(VENV)/.base $(PACKAGE) requirements-ci.txt
	@touch $(VENV)/.building
	$(INSTALL) --no-build-isolation -e ".[dev]"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
		$(INSTALL) -r requirements-ci.txt; fi
	@$(extension_note)
	@touch $(VENV)/.demo $@

# pip hides what setup.py prints, so a build that went on without the extension, or left an older one, is told here.
extension_note = find jasper_fast -maxdepth 1 -name '_C*.so' -newer $(VENV)/.building | grep -q . || \
	echo "warning: the compiled extension was NOT built; jasper_fast works without it, slower." \
	"For the compiler's message: JASPER_FAST_REQUIRE_EXTENSION=1 $(INSTALL) --no-build-isolation --no-deps -e ." >&2
