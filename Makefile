# make demo: every stage on the bundled sample, in demo/.   make test: lint, format, tests.   Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test format clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.offline: $(VENV)/.installed requirements-offline.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-offline.txt \
		|| echo "note: the packages of requirements-offline.txt cannot be had here; the demo goes on without them"
	touch $@

demo: $(VENV)/.offline
	$(PY) reproduce.py --recipe sample --workdir demo

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m pytest -q

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf demo .pytest_cache .ruff_cache .hypothesis
