# make demo: the whole path on real digits, in minutes on a CPU. make test: the test suite.
PYTHON ?= python3
DEMO_DIR ?= demo_output
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	@touch $@

demo: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh "$(DEMO_DIR)"

test: .venv/.installed
	$(BIN)/python -m pytest --durations=10

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow --durations=10

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch

clean:
	rm -rf .venv build *.egg-info "$(DEMO_DIR)"
