# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv and outputs/.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One rank per GPU; two on a machine without any.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# Ranks on a CPU share its cores: one thread each, or they fight.
export OMP_NUM_THREADS ?= 1

# A folder that `make wheelhouse` made: `make install WHEELHOUSE=wheelhouse` asks no network.
WHEELHOUSE ?=
OFFLINE = $(if $(WHEELHOUSE),--no-index --find-links $(abspath $(WHEELHOUSE)))
# What a wheel fits: the interpreter and the platform, such as "cpython-311 linux-x86_64".
FITS = import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_platform())

# Tests in as many processes as there are cores, up to four: each takes about 1 GB.
WORKERS ?= --numprocesses auto --maxprocesses 4

# The constraints of `make test-versions`: tests/versions/lowest.txt (for Python 3.11) or newest.txt.
VERSIONS ?= newest

.PHONY: install wheelhouse demo test test-slow test-quant test-versions test-browser test-cluster test-endurance check \
	format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
ifneq ($(WHEELHOUSE),)
	@test -f $(WHEELHOUSE)/fits || { \
		echo "$(WHEELHOUSE) is no complete wheelhouse: run make wheelhouse where there is internet, copy it here"; \
		exit 1; }
	@test "$$(cat $(WHEELHOUSE)/fits)" = "$$($(PYTHON) -c '$(FITS)')" || { \
		echo "$(WHEELHOUSE) fits $$(cat $(WHEELHOUSE)/fits), here is $$($(PYTHON) -c '$(FITS)'): give PYTHON=..."; \
		exit 1; }
endif
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(OFFLINE) --constraint constraints.txt --editable ".[test,check]"
	touch $@

# All that `make install` needs, for machines without internet that have the same Python and platform.
wheelhouse: setup.py constraints.txt
	rm -rf wheelhouse .wheelhouse
	$(PYTHON) -m venv .wheelhouse
	.wheelhouse/bin/pip wheel --quiet --wheel-dir wheelhouse --constraint constraints.txt ".[test,check]" setuptools wheel
	rm -rf wheelhouse/cogds-*.whl .wheelhouse
	$(PYTHON) -c '$(FITS)' > wheelhouse/fits

# A port of its own, so that another run on this machine is in nobody's way.
DEMO_PORT = $(shell $(BIN)/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")

demo: install
	$(BIN)/deepspeed --num_gpus $(RANKS) --master_port $(DEMO_PORT) launch/train.py --deepspeed ds_configs/zero2.json

test: install
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not cluster and not endurance and not browser"

test-slow: install
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not cluster"

# The base in 8 or 4 bits. Its libraries stay out of the other tests' way, whose every process they would slow down.
test-quant: $(VENV)/quant/.installed
	PYTHONPATH=$(abspath $(VENV)/quant) $(BIN)/python -m pytest $(WORKERS) -rs -m "not slow" \
		tests/model/transformer/test_quantize.py tests/dist/test_quantize.py

$(VENV)/quant/.installed: $(VENV)/.installed
	rm -rf $(VENV)/quant
	$(BIN)/pip install --quiet $(OFFLINE) --constraint constraints.txt --no-deps --target $(VENV)/quant \
		torchao bitsandbytes
	PYTHONPATH=$(abspath $(VENV)/quant) $(BIN)/python -c "import torchao, bitsandbytes" # or the tests would skip
	touch $@

# Train, resume and sample with the lowest or the newest dependencies, in a virtual environment of their own.
test-versions: $(VENV)-$(VERSIONS)/.installed
	$(<D)/bin/python tests/versions/check.py

$(VENV)-%/.installed: setup.py tests/versions/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet $(OFFLINE) --constraint tests/versions/$*.txt --editable .
	touch $@

# Pages as a reader sees them, in a headless Chromium: as root, on Debian.
test-browser: install
	tests/browser/install.sh
	$(BIN)/python -m pytest -m browser

# Two nodes on this machine, with SLURM and pdsh: as root, on Debian.
test-cluster: install
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m cluster

# The kill matrix and the soak, on such a cluster too: a quarter of an hour.
test-endurance: install
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m endurance

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf outputs .testdata
