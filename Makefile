# make demo: the whole path on real digits, in minutes on a CPU.
# make test: the test suite, two tests at a time; EXTRAS=peer adds the tests that need PyTorch or W&B.
# make test-kernels: the Hopper kernels in JAX's interpreter; KERNEL_PYTHON is Python 3.12 or newer.
# make test-notebooks: both notebooks from top to bottom on the CPU, a few steps each.
# make test-slow: the tests that take minutes each, such as killing a run 30 times.
# make test-oldest: the test suite with the oldest versions that setup.py allows.
# make test-gpu: the numbers of kernels that only a GPU runs, with the JAX installed there.
PYTHON ?= python3
KERNEL_PYTHON ?= python3.12
DEMO_DIR ?= demo_output
BIN := .venv/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check -c constraints.txt
# More extras of setup.py, separated by commas. The stamp has their names: a change reinstalls.
EXTRAS ?=
INSTALLED := .venv/.installed-$(EXTRAS)

.PHONY: demo test test-notebooks test-kernels test-slow test-oldest test-gpu tpu-table lint clean

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) -e '.[demo,test$(EXTRAS:%=,%)]'
	@touch $@

.venv-kernels/.installed: setup.py constraints.txt
	$(KERNEL_PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/$(PIP_INSTALL) -e . pytest pytest-xdist scikit-learn
	@touch $@

# "name>=1.2" of install_requires as name==1.2.
OLDEST := $(shell sed -n '/install_requires/,/]/s/^ *"\([a-zA-Z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.py)

.venv-oldest/.installed: setup.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -e '.[test]' $(OLDEST)
	@touch $@

demo: $(INSTALLED)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} PATH="$(CURDIR)/$(BIN):$$PATH" \
	  bash launch/demo.sh "$(DEMO_DIR)"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-notebooks:
	@$(MAKE) --no-print-directory EXTRAS=notebook .venv/.installed-notebook
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python notebooks/run.py --small

test-kernels: .venv-kernels/.installed
	.venv-kernels/bin/python -m pytest -n 2 --dist worksteal tests/test_hopper_attention.py

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -s --durations=10

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal

test-gpu:
	TEST_PLATFORM=cuda $(PYTHON) -m pytest tests/test_hopper_attention.py

# The rows of docs/tpu.md: FOUR_SLICES on each of SLICES, ONE_SLICE on the first.
SLICES := v5e-16 v5e-256 v5p-128 v6e-64
FOUR_SLICES := finetune_celeba64:paper finetune_celebahq:paper finetune_digits \
  pretrain_celeba64:paper pretrain_celebahq:paper pretrain_digits \
  scratch_celeba64:paper scratch_celebahq:paper scratch_digits
ONE_SLICE := ablation_celeba64:block4,0.9 cifar10:finetune cifar10:pretrain edm_digits:edm \
  finetune_dwt:256 finetune_dwt:512 finetune_swiss_roll imagenet64:finetune lsun_church:finetune \
  phases_digits pretrain_celeba64:ours pretrain_celebahq:ours finetune_celeba64:ours \
  finetune_celebahq:ours pretrain_dwt:256 pretrain_dwt:512 pretrain_swiss_roll pretrain_vggface2 \
  scratch_swiss_roll transfer_celebahq:0.1 imagenet64:pretrain lsun_church:pretrain \
  pretrain_celebahq:paper_50 scratch_celeba64:ours scratch_celebahq:ours

tpu-table: $(INSTALLED)
	@for row in $(foreach slice,$(SLICES),$(addsuffix @$(slice),$(FOUR_SLICES))) \
	    $(addsuffix @$(firstword $(SLICES)),$(ONE_SLICE)); do \
	  $(BIN)/python launch/compile_check.py --config=$${row%@*} --topology=$${row#*@} --row; \
	  test $$? -le 1 || exit; done

lint: $(INSTALLED)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch .ci/run

clean:
	rm -rf .venv .venv-kernels .venv-oldest build *.egg-info "$(DEMO_DIR)"
