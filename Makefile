# `make test` and `make demo` set up all they need in $(VENV); a machine needs Python >= 3.10, a C++ compiler and make.
# To use an environment of yours, with the packages it has: make test VENV="$VIRTUAL_ENV" CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)
NATIVE = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-rare test-frameworks lint format bench evidence evidence-quick rank docs docs-version audit install-matrix wheels fuzz faults numerics parity tables gpu-check clean

demo: $(VENV)/.installed
	$(VENV)/bin/mla-ext demo

# From tests/ and by the script, neither of which puts the checkout's own mla_ext before the installed one.
test: lint
	cd tests && MLA_EXT_INSTALLED=1 $(abspath $(VENV))/bin/pytest -q -rs

# What takes long and guards what seldom changes. benchmarks/stress has longer ones: make faults, make fuzz.
test-rare: $(VENV)/.installed
	cd tests && MLA_EXT_INSTALLED=1 $(abspath $(VENV))/bin/pytest -q -rs -m rare

# The examples of docs/frameworks.md, the tests of what frameworks do, and those that need torchvision, transformers or
# PyAV, in a throw-away environment that has them all.
test-frameworks: $(VENV)/.installed
	$(RUN) benchmarks/stress/frameworks.py

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

# All tables and plots of speed; BENCH=--quick takes a few minutes. `python -m benchmarks.compare` says what changed.
BENCH ?=
bench: $(VENV)/.installed
	$(RUN) -m benchmarks.speed.step $(BENCH)
	$(RUN) -m benchmarks.speed.head_step $(BENCH)
	$(RUN) -m benchmarks.speed.fusion $(BENCH)
	$(RUN) -m benchmarks.speed.training $(BENCH)
	$(RUN) -m benchmarks.speed.host_time $(BENCH)

# All tables and figures of the method on DATA. An interrupted run continues where it was. The six datasets:
# make evidence DATA="digits avdigits.npz mfeat.npz wikipedia.npz mosi.npz leaves.npz".
DATA ?= digits
SEEDS ?= 5
evidence: $(VENV)/.installed
	$(RUN) -m benchmarks.evidence all --data $(DATA) --seeds $(SEEDS)

# The same with two seeds and few trials, in build/evidence-quick, and every page says so.
evidence-quick: $(VENV)/.installed
	$(RUN) -m benchmarks.evidence all --data $(DATA) --quick

# The rank form of P against the dense one on DATA, an hour on one core with six datasets; the picture is of the first.
rank: $(VENV)/.installed
	$(RUN) -m benchmarks.evidence.rank --data $(DATA) --seeds $(SEEDS)
	$(RUN) -m benchmarks.evidence.kept --data $(DATA) --seeds $(SEEDS)
	$(RUN) -m benchmarks.evidence.frontier --data $(firstword $(DATA))

# The pages of docs/ with the docstrings, as build/site/index.html.
docs: $(VENV)/.installed
	$(RUN) -m mkdocs build --strict --quiet

# The same as one version of several, with a menu to choose by, committed to the branch gh-pages. "latest" is the newest.
# `$(VENV)/bin/mike serve` shows it.
docs-version: docs
	$(PIP) mike
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/mike deploy --update-aliases \
	  "$$($(RUN) -c 'import mla_ext; print(mla_ext.__version__)')" latest
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/mike set-default latest

# Known vulnerabilities of what is installed. Fails where a package could not be looked up, as without a network. The tests
# before it need no network: they show that the same command finds what a list of advisories holds.
audit: $(VENV)/.installed
	$(PIP) pip-audit
	cd tests && $(abspath $(VENV))/bin/pytest -q test_audit.py
	mkdir -p build
	$(RUN) -m pip list --format=freeze --exclude mla_ext | sed 's/+.*//' >build/installed.txt
	$(RUN) -m pip_audit --strict --disable-pip --no-deps --requirement build/installed.txt

# Every way to install, each tried in an environment of its own: two hours and 20 GB of downloads, or ONLY="sdist editable".
install-matrix:
	$(PYTHON) -m benchmarks.stress.install_matrix $(ONLY)

# What a release uploads, built in dist/ and tested: an hour and 15 GB of downloads. benchmarks/stress/wheels.py says what
# it needs.
wheels:
	$(PYTHON) -m benchmarks.stress.wheels

# The kernels under sanitizers, the public functions and the optimizer on random inputs, for SECONDS in all. With clang and
# its libFuzzer installed the inputs are guided by coverage.
SECONDS ?= 600
fuzz: $(VENV)/.installed
	$(RUN) benchmarks/stress/fuzz --seconds $(SECONDS)

# Training killed 250 times at random moments, full disks, damaged files, ranks that die.
faults: $(VENV)/.installed
	$(RUN) -m benchmarks.stress.faults

# float32 against float64 over a million steps.
numerics: $(VENV)/.installed
	$(RUN) -m benchmarks.stress.numerics

# The error of every backend over that of plain PyTorch.
parity: $(VENV)/.installed
	TRITON_INTERPRET=1 PYTHONPATH=tests $(RUN) -m benchmarks.stress.parity_table

# The tables of speed and trust made again, in two hours, alone on the machine. The longer ones have targets of their own:
# evidence, rank, install-matrix, wheels.
tables: bench parity numerics faults fuzz

# On a machine with a GPU, in its own Python (PYTHON=...): build, tests, sanitizers and benchmarks, as files in $$OUT.
# DEVICE=emulated makes a dry run on any machine, in build/gpu_check.
DEVICE ?= cuda
gpu-check:
	PYTHON=$(PYTHON) DEVICE=$(DEVICE) bash benchmarks/gpu_check.sh

clean:
	rm -rf build dist *.egg-info mla_ext/_C*.so mla_ext/_build.json $(VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "mla_ext needs Python >= 3.10, but PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1); name another with make PYTHON=..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without isolation the library is built against the PyTorch that runs it, and nothing is fetched when $(VENV) has it all.
# The checkout's own mla_ext, which `python -m benchmarks...` finds before the installed one, gets the libraries as well.
$(VENV)/.installed: $(shell find csrc -type f) $(shell find mla_ext -name '*.py') CMakeLists.txt setup.py pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) setuptools cmake ninja pybind11 torch
	$(PIP) --no-build-isolation '.[test,lint,docs]'
	@from=$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/mla_ext; \
	  cp "$$from"/_C*.so "$$from"/_build.json mla_ext/
	@touch $@
