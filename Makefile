# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv and outputs/.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One rank per GPU; two on a machine without any.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# Ranks on a CPU share its cores: one thread each, or they fight.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-slow test-browser test-cluster check format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,check]"
	touch $@

demo: install
	$(BIN)/deepspeed --num_gpus $(RANKS) launch/train.py --deepspeed ds_configs/zero2.json

test: install
	$(BIN)/python -m pytest -m "not slow and not cluster and not browser"

test-slow: install
	$(BIN)/python -m pytest -m slow

# Pages as a reader sees them, in a headless Chromium: as root, on Debian.
test-browser: install
	tests/browser/install.sh
	$(BIN)/python -m pytest -m browser

# Two nodes on this machine, with SLURM and pdsh: as root, on Debian.
test-cluster: install
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m cluster

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf outputs .testdata
