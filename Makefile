# `make run` and `make test` set everything up by themselves; the rest is for people who work on the house.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.ready
export UV_LINK_MODE = copy

.PHONY: run test smoke check lab edit sync lock schema outputs bench setup clean help

help:            ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

run: $(SETUP)    ## the embedded example, from the problem file to the verdict
	@$(BIN)/pilothouse run params/flights.yml; code=$$?; \
	if [ $$code -eq 1 ] || [ $$code -eq 5 ]; then \
	  echo "The pipeline did its work; its verdict is not 'go' (exit code $$code). The report says why."; exit 0; fi; exit $$code

test: $(SETUP)   ## every lesson and every test
	@$(BIN)/python tools/setup.py browser
	$(BIN)/nbdev-test nbs --skip-folder-re '^([_.]|phases)' --n-workers 2
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

smoke: $(SETUP)  ## one table from CSV to verdict, served, verified and reproduced: minutes
	$(BIN)/python -m pytest tests/test_end_to_end.py -n 0 -k binary_table

check: $(SETUP)  ## notebooks and modules one thing, lint, types, layers, README
	$(BIN)/python tools/house.py check
	$(BIN)/ruff check -q pipeline tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

lab: $(SETUP)    ## JupyterLab on the phases
	$(BIN)/pilothouse lab

edit: $(SETUP)   ## NB=nbs/lib/core/00_errors.ipynb as text under .text/
	$(BIN)/python tools/house.py edit $(NB)

sync: $(SETUP)   ## changed texts under .text/ -> notebooks -> modules -> README
	$(BIN)/python tools/house.py sync

schema: $(SETUP) ## params/problem.schema.json from the typed problem file
	$(BIN)/python -c "from pipeline.core.problem import json_schema; print(json_schema(), end='')" > params/problem.schema.json

lock: $(SETUP)   ## new versions: requirements.lock and environment.yml
	$(BIN)/python tools/setup.py lock

bench: $(SETUP)  ## side-by-side measurements
	$(BIN)/python -m tests.bench

setup: $(SETUP)

$(SETUP): requirements.lock pyproject.toml tools/setup.py
	@$(PYTHON) tools/setup.py $(VENV)

clean:
	rm -rf $(VENV) outputs .text
