# `make demo` and `make test` do all the set-up; the others are for developers.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check lint soak lock docs reference clean

demo: $(INSTALLED)  ## the main job on the embedded data: minutes, offline
	$(BIN)/ad2kit run demo
	$(BIN)/python bench/plain_sentences.py

test: lint  ## the whole suite
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

check: lint  ## the fast part, for the loop of edit and try
	$(BIN)/python -m pytest tests/unit -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(INSTALLED)  ## kill the whole chain at random moments, and send the service anything at all
	$(BIN)/python bench/soak.py
	$(BIN)/python -m pytest tests/integration/test_fuzz.py --hypothesis-profile=soak --timeout=3600

lock: $(VENV)/.docs  ## write the versions of this environment down as the tested ones
	( head -n 2 constraints.txt; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -v '^#' | sed 's/+[a-z0-9.]*$$//' ) > constraints.new
	mv constraints.new constraints.txt

docs: $(VENV)/.docs reference  ## the site, into site/; a broken link is an error
	$(BIN)/python -m zensical build --strict --clean
	rm -f site/generate.py

reference: $(INSTALLED)  ## the pages of docs/reference, from the code
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) dist site .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "ad2kit needs Python 3.11 or newer, found %d.%d; name one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[cpu,scale,ask,demo,dev]'
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[docs]'
	touch $@
