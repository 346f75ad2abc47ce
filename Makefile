# Two commands: `make test` and `make reproduce`. Every target sets up .venv by itself, once.
#
#   make reproduce PROFILE=smoke FROM=oracle     the newcomer's first run, a few minutes
#   make reproduce                               play the main rows again with the released students
#   make reproduce FROM=tables                   tables and figures from the released rows
#   make reproduce FROM=oracle ROWS=all          everything from nothing
PROFILE ?= cpu
FROM ?= rollout
ROWS ?= main
REPLAY ?= 0
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.sgd-installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help test reproduce status lab release verify readme clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "expected Python 3.11 or later, got %d.%d. Try: make PYTHON=python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@

test: $(READY) ## notebooks, modules, style and crash tests, with the time of each group
	@.ci/test

reproduce: $(READY) ## [PROFILE=cpu] [FROM=rollout] [ROWS=main]: make what is missing, compare with the release
	@sgd reproduce --profile $(PROFILE) --from $(FROM) --rows $(ROWS)

status: $(READY) ## [PROFILE=cpu] [FROM=rollout] [ROWS=main]: what is done, missing or stale
	@sgd status --profile $(PROFILE) --from $(FROM) --rows $(ROWS)

lab: $(READY) ## read and run the notebooks in JupyterLab
	@jupyter lab --notebook-dir=. nbs/index.ipynb

release: $(READY) ## [PROFILE=cpu]: copy build/PROFILE to data/, paper_results/ and figures/
	@sgd release --profile $(PROFILE)

verify: $(READY) ## [REPLAY=0]: check every released file against its hash; play REPLAY oracle paths again
	@sgd verify --replay $(REPLAY)

readme: $(READY) ## README.md from nbs/index.ipynb
	@python .ci/readme.py

clean: ## remove what the profile PROFILE made; nothing in git is touched
	rm -rf build/$(PROFILE)
