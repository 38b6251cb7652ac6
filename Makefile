# `make demo` and `make test` do all the set-up; the others are for developers.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A second environment, with transformers 5 and without optimum.
VENV5 := .venv-transformers5
# A file of tests stays in one process. The files keep their order: xdist would begin with those of
# many tests, and a long file of few tests would run alone at the end.
PARALLEL := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-transformers5 check lint soak lock docs reference clean

demo: $(INSTALLED)  ## the main job on the embedded data: minutes, offline
	$(BIN)/ad2kit run demo
	$(BIN)/python bench/plain_sentences.py

test: lint  ## the whole suite
	$(BIN)/python -m pytest $(PARALLEL)

test-transformers5: $(VENV5)/.installed  ## the same with transformers 5; MARKED='-m transformers5' for a part
	$(VENV5)/bin/python -m pytest $(PARALLEL) $(MARKED)

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

lock: $(VENV)/.docs $(VENV5)/.installed  ## write the versions of both environments down as the tested ones
	for lock in '$(VENV) constraints.txt' '$(VENV5) constraints-transformers5.txt'; do \
	  set -- $$lock; \
	  ( head -n 2 $$2; $$1/bin/python -m pip freeze --exclude-editable | grep -v '^#' | \
	    sed 's/+[a-z0-9.]*$$//' ) > constraints.new && mv constraints.new $$2 || exit 1; \
	done

docs: $(VENV)/.docs reference  ## the site, into site/; a broken link is an error
	$(BIN)/python -m zensical build --strict --clean
	rm -f site/generate.py

reference: $(INSTALLED)  ## the pages of docs/reference, from the code
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(VENV5) dist site .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "ad2kit needs Python 3.11 or newer, found %d.%d; name one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[cpu,scale,ask,demo,dev]'
	touch $@

$(VENV5)/.installed: pyproject.toml constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints-transformers5.txt --editable '.[cpu-transformers5,scale,ask,demo,dev]'
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[docs]'
	touch $@
