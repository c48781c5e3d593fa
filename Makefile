# Every target sets up .venv from nothing when it is missing or out of date.
# On Linux with an NVIDIA card absent, PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# avoids downloading CUDA libraries.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow check format bench clean

demo: $(READY)  ## search MiniLM under a memory and a latency budget
	$(BIN)/mpq run examples/minilm.toml

test: $(READY)  ## everything but the slow tests
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY)  ## the slow tests alone
	$(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "slow and alone"

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## every benchmark, one after the other
	set -e; for script in benchmarks/[a-z]*.py; do name=$$(basename $$script .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	# Apart, for its test alone: transformers would load it for seconds, every time.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt --target .venv/targets torchao
	touch $(READY)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
