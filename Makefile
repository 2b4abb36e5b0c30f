# Start with `make demo` and `make test`. They write only to .venv/, outputs/ and .testdata/.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Ranks of the demo: one per GPU, or two on a machine without GPUs.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# Ranks on a CPU share its cores. With more than one thread each, they slow each other down.
export OMP_NUM_THREADS ?= 1

# Folder created by `make wheelhouse`. `make install WHEELHOUSE=wheelhouse` needs no network.
WHEELHOUSE ?=
OFFLINE = $(if $(WHEELHOUSE),--no-index --find-links $(abspath $(WHEELHOUSE)))
# Interpreter and platform of the wheels, such as "cpython-311 linux-x86_64".
FITS = import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_platform())

# Test processes: one per core, up to four. Each needs about 1 GB.
WORKERS ?= --numprocesses auto --maxprocesses 4

# The constraints of `make test-versions`: tests/versions/lowest.txt (for Python 3.11) or newest.txt.
VERSIONS ?= newest

.PHONY: install wheelhouse demo test test-slow test-quant test-versions test-browser test-cluster test-container \
	test-release test-planted test-all check format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
ifneq ($(WHEELHOUSE),)
	@test -f $(WHEELHOUSE)/fits || { \
		echo "error: WHEELHOUSE: $(WHEELHOUSE) is not a complete wheelhouse." \
			"Run make wheelhouse on a machine with internet and copy the folder here."; \
		exit 1; }
	@test "$$(cat $(WHEELHOUSE)/fits)" = "$$($(PYTHON) -c '$(FITS)')" || { \
		echo "error: WHEELHOUSE: $(WHEELHOUSE) is for $$(cat $(WHEELHOUSE)/fits), but this Python is" \
			"$$($(PYTHON) -c '$(FITS)'). Set PYTHON to a matching interpreter."; \
		exit 1; }
endif
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(OFFLINE) --constraint constraints.txt --editable ".[test,check]"
	touch $@

# Everything that `make install` needs, for machines without internet and with the same Python and platform.
wheelhouse: setup.py constraints.txt
	rm -rf wheelhouse .wheelhouse
	$(PYTHON) -m venv .wheelhouse
	.wheelhouse/bin/pip wheel --quiet --wheel-dir wheelhouse --constraint constraints.txt ".[test,check]" setuptools wheel
	rm -rf wheelhouse/cogds-*.whl .wheelhouse
	$(PYTHON) -c '$(FITS)' > wheelhouse/fits

# More arguments of `cogds demo`: `make demo DEMO_ARGS="train.num_steps=200"`.
DEMO_ARGS ?=

demo: install
	$(BIN)/cogds demo --num-gpus $(RANKS) $(DEMO_ARGS)

# What every commit runs: behavior of all packages, with a real run of two ranks, a resume and an export.
test: install
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not cluster and not release and not browser and not container"

test-slow: install
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not cluster"

# Quantization. Its libraries are installed separately, because they would slow down every process of the other tests.
test-quant: $(VENV)/quant/.installed
	PYTHONPATH=$(abspath $(VENV)/quant) $(BIN)/python -m pytest $(WORKERS) -rs -m "not slow" \
		tests/model/transformer/test_quantize.py tests/dist/test_quantize.py

$(VENV)/quant/.installed: $(VENV)/.installed
	rm -rf $(VENV)/quant
	$(BIN)/pip install --quiet $(OFFLINE) --constraint constraints.txt --no-deps --target $(VENV)/quant \
		torchao bitsandbytes
	PYTHONPATH=$(abspath $(VENV)/quant) $(BIN)/python -c "import torchao, bitsandbytes" # or the tests would be skipped
	touch $@

# Train, resume and sample with the lowest or the newest dependencies, in a virtual environment of their own.
test-versions: $(VENV)-$(VERSIONS)/.installed
	$(<D)/bin/python tests/versions/check.py

$(VENV)-%/.installed: setup.py tests/versions/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet $(OFFLINE) --constraint tests/versions/$*.txt --editable .
	touch $@

# TensorBoard and the report page in a headless Chromium. Needs root on Debian.
test-browser: install
	tests/browser/install.sh
	$(BIN)/python -m pytest -m browser

# Two nodes on this machine, with SLURM and pdsh. Needs root on Debian.
test-cluster: install
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m cluster

# The image of the Dockerfile, built and run. Needs root on Debian.
test-container: install
	tests/container/install.sh
	$(BIN)/python -m pytest -m container

# Before a release, and not in test-all: every benchmark at a tiny size, and long runs with many faults, one of them on
# the same two nodes.
test-release: install
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m release

# Plant each bug of tests/planted/bugs.json in a copy of the project. The quick tests must catch it.
test-planted: install
	$(BIN)/python tests/planted/check.py

test-all: test test-quant test-slow test-browser test-cluster

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf outputs .testdata
