# `make train`: set-up in .venv and the demonstration. `make test`: set-up and all tests.
PYTHON ?= python3
BIN := .venv/bin

# with it, every process that a test starts would recompile all of torch's modules
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train seeds test test-full test-cpus interpret gpu lint types docs bench clean

train: .venv/runtime
	$(BIN)/python -m fsr_fast.train

test: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist worksteal -m "not slow"

# with the checks that are slow in full: 50 kills, a run of 2,000 iterations
test-full: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist worksteal

# the demonstration from five seeds, a few minutes each; repeat it to resume
seeds: .venv/runtime
	$(BIN)/python -m bench.seeds

# the numerical tests, with other processors' rounding
test-cpus: .venv/development
	$(BIN)/python -m tests.cpus

# whole steps and whole runs with Triton's kernels, interpreted: about half an hour
interpret: .venv/development
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 FSR_KERNELS=triton $(BIN)/python -m pytest -n auto \
		tests/parity tests/method/test_step.py tests/test_end_to_end.py

bench: .venv/development
	$(BIN)/python -m pytest bench

lint: .venv/development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/development
	$(BIN)/mypy

docs: .venv/development
	$(BIN)/mkdocs build --strict

# on a CUDA GPU: all checks and benches, part by part; repeat it to continue
gpu: .venv/development
	$(BIN)/python -m bench.gpu

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv

# uv installs in parallel what pip installs one by one; the versions are those of constraints.txt for both.
.venv/runtime: .venv/bin/uv constraints.txt inference.txt setup.py
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e .
	touch $@

.venv/development: .venv/bin/uv constraints.txt inference.txt setup.py
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev]"
	touch $@
