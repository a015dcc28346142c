# `make train` fine-tunes a small language model on this machine; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test lint bench clean

train: $(VENV)/installed
	$(BIN)/esfast train $(ARGS)

test: $(VENV)/installed
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/installed
	$(BIN)/esfast bench noise $(ARGS)

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info esfast/*.so
