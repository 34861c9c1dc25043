# make demo: every stage on the bundled sample, in demo/.   make chat: a conversation.   make app: one in the browser.
# make test: lint, format, types, tests.   Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# where there is no NVIDIA driver, faiss-cpu does the same without 1.2 GB of CUDA; never both, they share a folder
NVIDIA := $(shell command -v nvidia-smi || ls -d /proc/driver/nvidia 2>/dev/null)
FAISS := $(if $(NVIDIA),faiss-gpu,faiss-cpu)

.PHONY: install demo chat app test format clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make demo PYTHON=python3.11, say"; exit 1; }
	@test ! -x $(PY) || $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(VENV) was made by an older Python than 3.11: delete it, then make again"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed 's/^faiss-gpu>=[0-9.]*/$(if $(NVIDIA),&,faiss-cpu>=1.9)/' requirements.txt > $(VENV)/requirements.txt
	$(PY) -m pip uninstall --quiet --yes $(filter-out $(FAISS),faiss-gpu faiss-cpu) 2>/dev/null
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.offline: $(VENV)/.installed requirements-offline.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-offline.txt \
		&& touch $@ \
		|| echo "note: the packages of requirements-offline.txt cannot be had here; it goes on without them"

demo: $(VENV)/.offline
	$(PY) reproduce.py --recipe sample --workdir demo
	@echo "before any other command: . $(VENV)/bin/activate"

chat: $(VENV)/.offline
	$(PY) respond.py

$(VENV)/.app: $(VENV)/.installed requirements-app.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	touch $@

app: $(VENV)/.offline $(VENV)/.app
	$(PY) app.py

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
