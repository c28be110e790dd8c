# Every target sets up .venv: `make demo` on a fresh clone needs Python 3.11 or newer, git and make, nothing else.
# pip installs the versions that requirements.lock pins, and reads its usual configuration (indexes, wheel folders).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
CODE   := src tests examples benchmarks docs
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# Slow tests wait for processes, time-outs and sockets more than they compute, so several run at a time. Each has one
# thread, because threads of more processes than cores wait for each other.
TOGETHER ?= 3
# Fast tests compute small pieces, which a second thread hardly speeds up: two processes of one thread take half the time.
FAST   := OMP_NUM_THREADS=1 $(PYTEST) -q -m "not slow" -n 2 --junitxml=build/fast.xml

# Without byte code on disk every process compiles PyTorch and transformers again: 7 of 12 seconds of its imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-fast test-slow check bench venv lock clean

help:
	@echo "make demo    tune SmolLM2-135M on real people's conversations; about seven minutes on two cores"
	@echo "make test    run the fast tests, then the slow ones (real weights, processes, a browser)"
	@echo "make check   check format, lint and types, and run the fast tests: required for every change"
	@echo "make bench   run the benchmarks: speed and memory, relative to a baseline in the same run"
	@echo "make venv    set up .venv for development only"
	@echo "make lock    rewrite requirements.lock from the versions in .venv"
	@echo "make clean   remove .venv and caches, but not runs/"
	@echo ""
	@echo "PYTHON=python3.12 make ... selects the interpreter. On Linux without a GPU, set PIP_EXTRA_INDEX_URL to"
	@echo "PyTorch's index of CPU builds to install the small build of PyTorch."

# One stamp file per set of packages: pip runs again only when pyproject.toml or requirements.lock changes.
# --no-compile: compiling byte code of modules that are never imported is half of an installation's time.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "$(PYTHON) is missing or too old: fedferret needs Python 3.11 or newer; set it with PYTHON=python3.12 make ..." >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) cannot create $(VENV): on Debian, run apt-get install python3-venv" >&2; exit 1; }

$(VENV)/installed-%: pyproject.toml requirements.lock | $(BIN)/python
	@echo "Installing fedferret[$*] with the versions of requirements.lock (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check -c requirements.lock -e '.[$*]'
	@touch $@

.PRECIOUS: $(VENV)/installed-%

venv: $(VENV)/installed-dev

demo: $(VENV)/installed-demo
	@$(BIN)/fedferret run recipes/demo.toml --out $(DEMO)
	@test -d $(DEMO)/model || $(BIN)/fedferret export $(DEMO) --to $(DEMO)/model
	@test -f $(DEMO)/tuned.fedferret || $(BIN)/fedferret export $(DEMO) --delta $(DEMO)/tuned.fedferret
	@echo ""
	@echo "Report       $(DEMO)/report.html       open it in a browser"
	@echo "Tuned model  $(DEMO)/model/            $$(du -sh $(DEMO)/model | cut -f1), for plain transformers"
	@echo "Delta file   $(DEMO)/tuned.fedferret   $$(wc -c < $(DEMO)/tuned.fedferret | tr -d ' ') bytes; base + delta = the tuned model:"
	@echo "             $(BIN)/fedferret apply packaged:smollm2 $(DEMO)/tuned.fedferret --to FOLDER"

test: test-fast test-slow

test-fast: $(VENV)/installed-dev
	@$(FAST)

test-slow: $(VENV)/installed-dev
	@OMP_NUM_THREADS=1 $(PYTEST) -q -m slow -n $(TOGETHER) --dist loadgroup --durations=10 --junitxml=build/slow.xml

check: $(VENV)/installed-dev
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/mypy
	@$(FAST)

bench: $(VENV)/installed-dev
	@$(BIN)/fedferret bench all

lock: $(VENV)/installed-dev
	@sed '/^#/!d' requirements.lock > .requirements.lock
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> .requirements.lock
	@mv .requirements.lock requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
