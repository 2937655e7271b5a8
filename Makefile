# make train: set up and pretrain on the built-in data.   make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test lint check docs pictures bench audit clean

train: $(STAMP)
	$(BIN)/hjepa train configs/quickstart.yaml --resume

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What CI runs after make test.
check: lint
	$(BIN)/python -m pytest -m slow

# The site, into site/index.html; a link that leads nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The pictures of docs/method.md, drawn by the code that they show; the quickstart's encoder for one of them.
pictures: train
	$(BIN)/python scripts/draw.py docs/pictures runs/quickstart

# Everything that is measured, into docs/performance.md; the machine should have nothing else to do for an hour.
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py

# Known vulnerabilities in what is installed; where no advisory service can be reached, it says so and is content.
audit: $(STAMP)
	$(BIN)/python scripts/audit.py

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5,<1'
	UV_NATIVE_TLS=1 UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --compile-bytecode \
	  --python $(BIN)/python --editable '.[dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
