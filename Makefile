# Works with GNU make 3.81 (macOS) and later, and any POSIX sh. 'make' lists what there is.

PYTHON ?=
VENV ?= .venv
REFERENCE_VENV ?= .venv-reference
DARWIN_VENV ?= .venv-darwin
# Linux machines with an NVIDIA GPU, once: make setup EXTRAS=cuda. The choice stays with the environment, and
# another choice makes a new one, because the CPU and the CUDA build of MLX overwrite each other's files.
EXTRAS ?= $(shell cat $(VENV)/.extras 2>/dev/null || echo cpu)
ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

RUN = $(VENV)/bin/python
PIP = -m pip install --quiet --disable-pip-version-check
STAMP = $(VENV)/.setup-$(EXTRAS)
DEV_STAMP = $(VENV)/.setup-dev-$(EXTRAS)
HARNESS_STAMP = $(VENV)/.setup-lm-eval
REFERENCE_STAMP = $(REFERENCE_VENV)/.setup-stamp
REFERENCE_PACKAGES = torch transformers gguf accelerate peft trl
# Workers run side by side: one BLAS thread each, unless the environment says otherwise.
ONE_THREAD = OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1}
PYTEST_WORDS = -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
PYTEST = $(ONE_THREAD) $(RUN) $(PYTEST_WORDS)

# Sets $$python to the first interpreter that runs, fits and can make a virtual environment, or ends with a line
# that says what to install. A pyenv shim is found on PATH but may fail: hence the trial. A Python for Intel also runs
# on Apple Silicon, translated by Rosetta, but pip finds no MLX for it.
FIND_PYTHON = python=; bare=; intel=; \
	for name in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3); do \
	  "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || continue; \
	  if "$$name" -c 'import platform, sys; sys.exit((sys.platform, platform.machine()) != ("darwin", "x86_64"))'; then \
	    intel=$${intel:-$$name}; continue; \
	  fi; \
	  if "$$name" -c 'import ensurepip, venv' 2>/dev/null; then python=$$name; break; fi; \
	  bare=$${bare:-$$name}; \
	done; \
	if [ -z "$$python" ] && [ -n "$$bare" ]; then \
	  version=$$("$$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  hint=; if command -v apt-get >/dev/null; then hint=" (apt-get install python$$version-venv)"; fi; \
	  echo "setup: $$bare cannot make virtual environments; install its modules ensurepip and venv$$hint" >&2; \
	  exit 2; \
	fi; \
	hint=; if command -v brew >/dev/null; then hint=" (brew install python@3.12)"; fi; \
	if [ -z "$$python" ] && [ -n "$$intel" ]; then \
	  if [ "$$(sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ]; then \
	    echo "setup: $$intel is a Python for Intel, which Rosetta translates; MLX needs one for arm64: install it$$hint, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	  else \
	    echo "setup: MLX needs a Mac with Apple Silicon; this one has an Intel processor" >&2; \
	  fi; \
	  exit 2; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "setup: no Python 3.11, 3.12 or 3.13 $(if $(PYTHON),in PYTHON=$(PYTHON),that runs on PATH); install one$$hint, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi

.PHONY: help setup dev-setup models compiled train test test-all test-darwin faults bench bench-full check clean

help: ## list these targets
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '  make %-11s %s\n' "$$name" "$$text"; \
	done

setup: $(STAMP) ## make .venv and install everything into it (PYTHON=, EXTRAS=)

$(STAMP): pyproject.toml constraints.txt
	@if [ "$$(cat $(VENV)/.extras 2>/dev/null)" = "$(EXTRAS)" ] && "$(RUN)" -c 'import pip' 2>/dev/null; then :; else \
	  $(FIND_PYTHON); \
	  echo "setup: making $(VENV) with $$("$$python" -V) ($$python)"; \
	  "$$python" -m venv --clear "$(VENV)" || exit 2; \
	  echo "$(EXTRAS)" > "$(VENV)/.extras"; \
	fi
	@echo "setup: installing runner[$(EXTRAS)] and what it needs (some minutes the first time)"
	@"$(RUN)" $(PIP) --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch "$(STAMP)"
	@echo "setup: done"

# Apart from setup, because training needs none of it: the libraries of the loggers alone take 250 MB.
dev-setup: $(DEV_STAMP)

$(DEV_STAMP): $(STAMP)
	@echo "setup: installing what the tests and checks need"
	@"$(RUN)" $(PIP) --constraint constraints.txt --editable ".[dev]"
	@"$(RUN)" tests/headless_browser.py
	@touch "$(DEV_STAMP)"

models: setup ## fetch the small model that train and test use
	@"$(RUN)" -m runner.models.fetch smollm2_135m

train: models ## fine-tune the small model and show it before and after (ARGS="lora.rank=16 ...")
	@"$(RUN)" -m runner experiment=first_run $(ARGS)

# Tests start hundreds of processes: where PYTHONDONTWRITEBYTECODE is set, each would compile the package anew.
compiled: dev-setup
	@"$(RUN)" -m compileall -q runner hydra_plugins

test: models compiled ## run the tests, all but those against torch (WORKERS=, PYTEST_ARGS=)
	@$(PYTEST) -m "not reference and not long"

test-all: models compiled $(REFERENCE_STAMP) $(HARNESS_STAMP) ## run every test, those with torch, transformers and lm-eval too
	@RUNNER_REFERENCE_PYTHON="$(CURDIR)/$(REFERENCE_VENV)/bin/python" $(PYTEST)

test-darwin: models compiled ## run the tests of make test in a simulated macOS with a GPU, and list what it skips
	@"$(RUN)" tests/darwin/environment.py "$(DARWIN_VENV)"
	@RUNNER_CACHE="$(abspath $(DARWIN_VENV))/cache" $(ONE_THREAD) "$(DARWIN_VENV)/bin/python" $(PYTEST_WORDS) \
	  -m "not reference and not long"

$(HARNESS_STAMP): $(DEV_STAMP)
	@echo "setup: installing lm-eval"
	@"$(RUN)" $(PIP) --constraint constraints.txt --editable ".[lm-eval]"
	@touch "$(HARNESS_STAMP)"

$(REFERENCE_STAMP): constraints.txt
	@if "$(REFERENCE_VENV)/bin/python" -c 'import pip' 2>/dev/null; then :; else \
	  $(FIND_PYTHON); \
	  echo "setup: making $(REFERENCE_VENV) with $$("$$python" -V) ($$python)"; \
	  "$$python" -m venv --clear "$(REFERENCE_VENV)" || exit 2; \
	fi
	@echo "setup: installing $(REFERENCE_PACKAGES) for comparison (large)"
	@"$(REFERENCE_VENV)/bin/python" $(PIP) --constraint constraints.txt $(REFERENCE_PACKAGES)
	@touch "$(REFERENCE_STAMP)"

faults: models compiled ## every fault of tests/faults/rows.py with full counts, one line a row (an hour)
	@RUNNER_FAULTS=full $(PYTEST) tests/faults

bench: dev-setup ## against stock mlx_lm.lora, side by side (ten minutes; leave the machine alone)
	@"$(RUN)" -m benchmarks.against_mlx_lm --quick $(ARGS)

bench-full: dev-setup ## all rows and rounds of it (hours)
	@"$(RUN)" -m benchmarks.against_mlx_lm --full $(ARGS)

check: dev-setup ## formatting, lint, types, layers, and docs and conf/ in step with the code
	@"$(RUN)" -m ruff format --check .
	@"$(RUN)" -m ruff check .
	@"$(RUN)" -m mypy
	@"$(VENV)/bin/lint-imports" --no-logo
	@"$(RUN)" -m runner.config.reference --check

clean: ## remove virtual environments, caches and built files; outputs/ stays
	rm -rf "$(VENV)" "$(REFERENCE_VENV)" "$(DARWIN_VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
