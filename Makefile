# Everything sets itself up: `make demo` on a fresh clone needs Python 3.11 or newer, git and make, nothing else.
# Installed is what requirements.lock pins, into .venv; pip's own configuration (indexes, wheel folders) is respected.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
CODE   := src tests examples benchmarks docs
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# Slow tests wait for processes, time-outs and sockets more than they compute: several at a time share the cores, with a
# thread each, for threads of more processes than there are cores wait for each other.
TOGETHER ?= 3
# Fast tests compute, in small pieces that a second thread hardly helps: two processes of one thread take half the time.
FAST   := OMP_NUM_THREADS=1 $(PYTEST) -q -m "not slow" -n 2

.PHONY: help demo test test-fast test-slow check bench venv lock clean

help:
	@echo "make demo    tune a real model (SmolLM2-135M) on real people's conversations; about ten minutes on two cores"
	@echo "make test    the tests: the fast ones, then the slow ones (real weights, processes, a browser)"
	@echo "make check   format, lint, types and the fast tests: what a change must pass"
	@echo "make bench   the benchmarks: speed and memory, each against something measured in the same run"
	@echo "make venv    set up .venv for development and nothing else"
	@echo "make lock    write requirements.lock again, from what .venv holds"
	@echo "make clean   remove .venv and caches; runs/ stays"
	@echo ""
	@echo "PYTHON=python3.12 make ... chooses the interpreter. On Linux without a GPU, PIP_EXTRA_INDEX_URL set to"
	@echo "PyTorch's index of CPU builds takes the small build of PyTorch."

# A stamp per set of packages: a second call costs nothing until pyproject.toml or the lock changes.
# --no-compile: byte code of what is never imported is half of an installation's time.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "fedferret needs Python 3.11 or newer: say which, PYTHON=python3.12 make ..." >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) cannot make $(VENV): on Debian, apt-get install python3-venv" >&2; exit 1; }

$(VENV)/installed-%: pyproject.toml requirements.lock | $(BIN)/python
	@echo "Installing fedferret[$*], versions as in requirements.lock (some minutes the first time)"
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
	@OMP_NUM_THREADS=1 $(PYTEST) -q -m slow -n $(TOGETHER)

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
