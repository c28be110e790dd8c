# Every target sets up .venv: `make demo` on a fresh clone needs Python 3.11 or newer, git and make, nothing else.
# pip installs the versions that requirements.lock pins, and reads its usual configuration (indexes, wheel folders).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
CODE   := src tests examples benchmarks docs supply
DIST   := dist
# `make hashes TORCH=cpu` locks PyTorch's CPU build for an image without CUDA; the lock in this repository has PyPI's builds.
TORCH  :=
HASHES := requirements-hashes$(TORCH:%=-%).lock
# Tests have one thread each: threads of more processes than cores wait for each other, and small pieces gain nothing.
# Where a test takes more, an idle thread sleeps: threads that wait in a loop cost ten times the work on busy cores.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder
# Slow tests wait for processes, time-outs and sockets as much as they compute: a third process fills these waits.
TOGETHER ?= 3

# Without byte code on disk every process compiles PyTorch and transformers again: 7 of 12 seconds of its imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test check supply bench venv lock hashes release committed clean

help:
	@echo "make demo    tune SmolLM2-135M on real people's conversations; about seven minutes on two cores"
	@echo "make test    run every test: the slow ones (real weights, processes, a browser) beside the fast ones"
	@echo "make check   check format, lint, types and dependencies, and run the fast tests: required for every change"
	@echo "make bench   run the benchmarks: speed and memory, relative to a baseline in the same run"
	@echo "make venv    set up .venv for development only"
	@echo "make lock    rewrite requirements.lock from the versions in .venv, then requirements-hashes.lock and docs/licences.md"
	@echo "make release build the packages into dist/, with the lock with hashes, a bill of materials and SHA256SUMS"
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

test: $(VENV)/installed-dev
	@$(PYTEST) -n $(TOGETHER) --durations=10 --junitxml=build/tests.xml

check: $(VENV)/installed-dev supply
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/mypy
	@$(PYTEST) -n 2 -m "not slow"

# The audit runs when a lock or what is accepted has changed, and once a week: new vulnerabilities are found in old versions.
supply: $(VENV)/installed-dev
	@$(BIN)/python -m supply.licences
	@find $(VENV) -maxdepth 1 -name audited -mtime +6 -delete
	@$(MAKE) --no-print-directory $(VENV)/audited

# Without a network nothing is audited, so that the next call tries again.
$(VENV)/audited: requirements.lock requirements-hashes.lock supply/accepted.toml
	@$(BIN)/python -m supply.audit --stamp $@

bench: $(VENV)/installed-dev
	@$(BIN)/fedferret bench all

lock: $(VENV)/installed-dev
	@sed '/^#/!d' requirements.lock > .requirements.lock
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> .requirements.lock
	@mv .requirements.lock requirements.lock
	@$(MAKE) --no-print-directory hashes
	@$(BIN)/python -m supply.licences --write

# The packages of a server or site on Linux, each with the SHA-256 of its files: for the container image and the release.
hashes: $(VENV)/installed-dev
	@$(BIN)/uv pip compile pyproject.toml --extra flower --extra mixtures --constraint requirements.lock --generate-hashes --quiet \
		--python-version 3.11 --python-platform linux $(TORCH:%=--torch-backend %) \
		--custom-compile-command "make hashes$(TORCH:%= TORCH=%)" --output-file $(HASHES)

committed:
	@test -z "$$(git status --porcelain -- src pyproject.toml README.md LICENSE requirements-hashes.lock)" || { echo "A release has committed files only: commit or revert your changes" >&2; exit 1; }

release: $(VENV)/installed-dev committed supply
	@rm -rf $(DIST)
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation --outdir $(DIST) . >/dev/null
	@cp requirements-hashes.lock $(DIST)
	@$(BIN)/cyclonedx-py requirements requirements-hashes.lock --pyproject pyproject.toml --mc-type application \
		--output-reproducible --no-validate --of JSON -o $(DIST)/sbom.cdx.json 2>/dev/null
	@cd $(DIST) && sha256sum * > SHA256SUMS
	@ls -1 $(DIST)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
