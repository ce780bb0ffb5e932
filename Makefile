# Everything from nothing but Python 3.10 or newer and make: `make demo`, `make test`.

VENV ?= $(or $(FLOWN_VENV),.venv)
BIN := $(VENV)/bin
DEVICE ?= cpu
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,\
  $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(p))))

.PHONY: help demo test lint slow ray installed site clean

help:
	@echo "make demo   generate classifiers from noise, measured and drawn, in a few minutes"
	@echo "make test   lint, types and tests; DEVICE=cuda runs the tests of devices there"
	@echo "make slow   the tests that take minutes"
	@echo "make installed  the wheel, in an environment of its own, offline"
	@echo "make site   the documentation, its notebooks run and its links checked, in site/"
	@echo "make ray    the tests on a local Ray cluster; installs Ray"
	@echo "make clean  remove the virtual environment and the demo's output"

$(VENV)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "flown needs Python 3.10 or newer; none was found" >&2; exit 2; }
	@echo "setting up $(VENV) (torch is large: a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[demo,diffusion,dev]'
	@$(BIN)/python -m pip install --quiet --no-deps torchcfm
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/flown demo --out demo-out --overwrite

lint: $(VENV)/.ready
	$(BIN)/ruff format --check flown tests docs/*.py
	$(BIN)/ruff check flown tests docs
	$(BIN)/mypy

# One thread in each of a few processes: tests are small, and twice as fast than with all threads in one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --device $(DEVICE) -n auto --maxprocesses 8 --dist worksteal

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow --timeout 3000

ray: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --editable '.[ray]'
	$(BIN)/python -m pytest -m ray

installed: $(VENV)/.ready
	tests/installed $(BIN)/python

# Pages lie as in the repository, so that a link is the same in both.
site: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@rm -rf build/site site && mkdir -p build/site
	@ln -s $(CURDIR)/docs $(CURDIR)/results $(CURDIR)/*.md build/site
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build

clean:
	rm -rf .venv .cache demo-out build site
