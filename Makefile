# Everything happens in .venv: `make demo` and `make test` set it up and keep it up to date.
#
#   PYTHON  the Python to make .venv with (the first that works of the list below)
#   ARGS    further arguments: make test ARGS="tests/attacks -x", make demo ARGS="--seed 1"

PYTHON ?= python3.13 python3.12 python3.11 python3
ARGS   ?=

VENV := .venv
RUN  := $(VENV)/bin/python -P -m
PIP  := $(RUN) pip

# The installed copy is renewed when one of these changes; a folder changes when a file comes or goes.
FOLDERS := $(shell find attacks commands defenses distill eval -type d -not -name __pycache__)
SOURCES := pyproject.toml README.md LICENSE py.typed $(FOLDERS) \
	$(wildcard *.py $(FOLDERS:=/*.py) $(FOLDERS:=/*.yaml) $(FOLDERS:=/*.j2) $(FOLDERS:=/*.json))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all bench-quick lint format table clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.package ## set up .venv and install distillsec in it

demo: $(VENV)/.package ## a backdoor through a distillation, start to end, on 2 CPU cores
	$(VENV)/bin/distillsec attack --preset digits-naive $(ARGS)

test: $(VENV)/.tools $(VENV)/.package ## the fast tests, in as many processes as there are cores, 4 at most
	$(RUN) pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-all: $(VENV)/.tools $(VENV)/.package ## the slow tests as well, and those for a GPU where there is one
	$(RUN) pytest -m "" $(ARGS)

bench-quick: $(VENV)/.package ## the fast path against the plain one at small sizes, one or two minutes
	$(VENV)/bin/python benchmarks/speed.py $(VENV)/bench-quick.json --quick --rounds 5 $(ARGS)

lint: $(VENV)/.tools $(VENV)/.package ## ruff's rules and format, mypy strict
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy --strict -p distillsec
	$(RUN) mypy --strict --explicit-package-bases tests
	$(RUN) mypy --strict --explicit-package-bases examples

format: $(VENV)/.tools ## let ruff put the format right, and what it can of the rules
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

table: $(VENV)/.package ## write commands/table.json anew, after a change of a command or a catalogue
	$(VENV)/bin/python -P -c "from pathlib import Path; from distillsec.cli import loaded_commands; \
	from distillsec.commands.table_maker import write_table; \
	write_table(loaded_commands(), Path('commands/table.json'))"

clean: ## remove what builds and tools leave; .venv and runs stay
	rm -rf build dist distillsec.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# --- how .venv comes about -------------------------------------------------------------------

$(VENV)/.python:
	@bare=; for python in $(PYTHON); do \
	    "$$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    if "$$python" -I -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "== making $(VENV) with $$("$$python" -I -c 'import sys; print(sys.executable)')"; \
	        "$$python" -m venv $(VENV) && touch $@; exit; \
	    fi; \
	    bare="$$bare $$python"; \
	done; \
	if [ "$$bare" ]; then \
	    echo "make: Python is here ($${bare# }) without its venv module: install it (on Debian: apt install python3-venv)" >&2; \
	else \
	    echo "make: no Python 3.11 or newer found (tried: $(PYTHON)); name one: make PYTHON=/path/to/python" >&2; \
	fi; exit 1

# $(call requirements,EXPRESSION): the lists that EXPRESSION picks from pyproject.toml's [project], line by line.
requirements = $(VENV)/bin/python -I -c 'import tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = project["optional-dependencies"]; print(*$(1), sep="\n")'

$(VENV)/.dependencies: pyproject.toml $(VENV)/.python
	@echo "== installing what distillsec needs: torch with its GPU libraries is about 5 GB; a few minutes, once"
	@$(PIP) install --quiet --upgrade pip "setuptools>=77"
	@$(call requirements,project["dependencies"]) > $(VENV)/dependencies.txt
	@$(PIP) install -r $(VENV)/dependencies.txt
	@touch $@

$(VENV)/.tools: pyproject.toml $(VENV)/.dependencies
	@echo "== installing what the tests and checks need"
	@$(call requirements,extras["test"] + extras["dev"]) > $(VENV)/tools.txt
	@$(PIP) install --quiet -r $(VENV)/dependencies.txt -r $(VENV)/tools.txt
	@touch $@

# A regular install, not an editable one: the tests meet what a user gets, and mypy finds it.
# build/ goes first, or setuptools would pack what an earlier build left there.
$(VENV)/.package: $(SOURCES) $(VENV)/.dependencies
	@echo "== installing distillsec in $(VENV)"
	@rm -rf build distillsec.egg-info
	@$(PIP) install --quiet --no-deps --no-build-isolation --force-reinstall .; \
	    status=$$?; rm -rf build distillsec.egg-info; exit $$status
	@touch $@
