# make demo: the whole path on real digits, in minutes on a CPU.
# make test: the test suite, two tests at a time.
# make test-slow: what takes minutes each, such as killing a run 30 times.
# make test-gpu: the numbers of kernels that only a GPU runs, with the JAX that is installed there.
PYTHON ?= python3
DEMO_DIR ?= demo_output
BIN := .venv/bin

.PHONY: demo test test-slow test-gpu tpu-table lint clean

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	@touch $@

demo: .venv/.installed
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} PATH="$(CURDIR)/$(BIN):$$PATH" \
	  bash launch/demo.sh "$(DEMO_DIR)"

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow -s --durations=10

test-gpu:
	TEST_PLATFORM=cuda $(PYTHON) -m pytest tests/test_hopper_attention.py

# The rows of docs/tpu.md; about 25 minutes on 2 cores.
tpu-table: .venv/.installed
	@for config in configs/[a-z]*_*.py; do for slice in v5e-16 v5e-256 v5p-128 v6e-64; do \
	  $(BIN)/python launch/compile_check.py --config=$$config --topology=$$slice --row; \
	  test $$? -le 1 || exit; done; done

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch

clean:
	rm -rf .venv build *.egg-info "$(DEMO_DIR)"
