PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes of the tests, each on one core.
WORKERS ?= 2

.PHONY: demo test lint docs bench soak clean

# The stamp makes the environment once, and again when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo_images.py runs/demo_images
	rm -rf runs/demo
	$(BIN)/pyro-vje inspect runs/demo_images/good runs/demo_images/new --out runs/demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs the tutorials, and fails on a warning. Open build/docs/index.html.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak

clean:
	rm -rf $(VENV) runs build *.egg-info
