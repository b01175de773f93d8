# `make train` and `make test` set up everything. A second call installs nothing.
# The machine needs Python >= 3.11 with venv, g++ with C++20, and make. `make help` lists the targets.

VENV ?= .venv
ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Compiling all installed modules takes over a minute. Python compiles the tenth that is used on first use, and must be
# allowed to write the result.
INSTALL := $(PIP) install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
CSRC := $(filter-out %.md,$(wildcard csrc/*))
PACKAGE := pyproject.toml setup.py constraints.txt $(CSRC)
export HF_HUB_DISABLE_TELEMETRY = 1
BEGAN := $(shell date +%s)

# The first Python that is new enough. Another one: make train PYTHON=python3.12
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13 python3.14 python,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

.DEFAULT_GOAL := help
.PHONY: help train test lint types format bench soak wheel env clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

train: $(VENV)/.demo  ## set up, then train the default recipe, or ARGS="--config FILE --out DIR ..."
	$(BIN)/python -m jasper_fast.train $(ARGS)

# Threads of the processes that wait actively would take cores from the other processes.
test: $(VENV)/.dev  ## set up, then run the tests in JOBS processes; ARGS go to pytest
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -o faulthandler_exit_on_timeout=true $(ARGS)

soak: $(VENV)/.dev  ## run the tests that take minutes
	$(BIN)/python -m pytest -m soak -o faulthandler_timeout=7200 $(ARGS)

lint: $(VENV)/.dev  ## check rules, format, imports between layers, prose and generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m bench prose
	$(BIN)/python -m bench config-page --check
	$(BIN)/python -m bench readme --check

format: $(VENV)/.dev  ## fix and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## check types with mypy
	$(BIN)/mypy

bench: $(VENV)/.dev  ## run a benchmark: make bench ARGS="losses"; without ARGS, list them
	$(BIN)/python -m bench $(or $(ARGS),--help)

env: $(VENV)/.demo  ## report the hardware and libraries in use
	$(BIN)/python -m jasper_fast.env

# setuptools would also pack the files of an earlier build.
wheel: $(VENV)/.base  ## build dist/*.whl with the compiled extension
	rm -rf build dist
	JASPER_FAST_REQUIRE_EXTENSION=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove all built files and the virtual environment; keep runs/
	rm -rf $(VENV) build dist jasper_fast.egg-info jasper_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache

# The virtual environment, and the dependencies of the build.
$(VENV)/.base: constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found. Fix: install one, or give its path: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python >= 3.11. Fix: give another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (torch first, the largest download)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot create a virtual environment. Fix: install venv (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(INSTALL) torch setuptools wheel
	@touch $@

# Only the dependencies of training, so that the first run starts soon.
$(VENV)/.demo: $(VENV)/.base $(PACKAGE)
	@touch $(VENV)/.building
	$(INSTALL) --no-build-isolation -e ".[demo]"
	@$(extension_note)
	@echo "set-up took $$(( $$(date +%s) - $(BEGAN) )) seconds"
	@touch $@

# Also the dependencies of tests, lint and benchmarks. With a CPU build of torch, this includes the Triton that interprets
# and compiles the kernels. CUDA builds include their own Triton.
$(VENV)/.dev: $(VENV)/.base $(PACKAGE) requirements-ci.txt
	@touch $(VENV)/.building
	$(INSTALL) --no-build-isolation -e ".[dev]"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
		$(INSTALL) -r requirements-ci.txt; fi
	@$(extension_note)
	@touch $(VENV)/.demo $@

# pip hides the output of setup.py, so this reports a build without the extension, or with an older one.
extension_note = find jasper_fast -maxdepth 1 -name '_C*.so' -newer $(VENV)/.building | grep -q . || \
	echo "warning: the compiled extension was NOT built. jasper_fast works without it, but slower." \
	"For the compiler's message: JASPER_FAST_REQUIRE_EXTENSION=1 $(INSTALL) --no-build-isolation --no-deps -e ." >&2
