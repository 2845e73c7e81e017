# Each target stands alone on a fresh machine with Python >= 3.10 and pip.
#   make demo                         in .venv, made and filled on the first call
#   make demo PYTHON=python3 VENV=    in the active Python; installs and downloads nothing
PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
READY := active-python
# Straight from the tree, whether or not layerprune is installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
RUN := $(abspath $(VENV))/bin/python
READY := $(VENV)/.installed
endif

# Quoted with ", run with sh: what to do stands last.
define check_python
@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
    echo "'$(PYTHON)' was not found. Install Python >= 3.10, or name one: make PYTHON=python3.12" >&2; \
    exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
    echo "layerprune needs Python >= 3.10, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1)." \
         "Name a newer one: make PYTHON=python3.12" >&2; \
    exit 1; }
endef

SANITIZED := build/sanitized
# Of symbols the lines alone, which reports name; all of them take longer than the rest.
SANITIZE := -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
WATCHED = ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$(CURDIR)/$(SANITIZED)" LD_PRELOAD="$$($(CXX) \
    -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
# torch.compile does not build its C++ under these settings.
NO_INDUCTOR := "not inductor"
OLDEST_TORCH := 2.10.0
# Tests in so many processes, of one thread each (needs pytest-xdist); none: in this one.
JOBS ?=
SHARED = $(if $(JOBS),-n $(JOBS) --dist loadscope)
SINGLE = $(if $(JOBS),OMP_NUM_THREADS=1)
OLDEST_VENV := .venv-oldest
# Of gpu-check: which of its parts are run, and the folder that the measurements go to.
PARTS ?= build tests sanitizer benchmark
RESULTS ?=

.PHONY: help demo test sanitize test-oldest gpu-check lint clean active-python

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "JOBS=2 runs tests in two processes at a time (pytest-xdist)."
	@echo "With 'PYTHON=python3 VENV=' they run in the active Python and install nothing, but for"
	@echo "gpu-check, which builds layerprune there; its parts are PARTS=\"$(PARTS)\"."

demo: $(READY)  ## train and prune on images of digits, a minute or two; writes runs/demo
	$(RUN) -m layerprune demo --output runs/demo

test: $(READY)  ## run the tests; those of the operations on each of their implementations
	$(SINGLE) $(RUN) -m pytest $(SHARED)
	ATEN_CPU_CAPABILITY=default $(SINGLE) $(RUN) -m pytest $(SHARED) tests/ops -k $(NO_INDUCTOR)
	TRITON_INTERPRET=1 LAYERPRUNE_BACKEND=eager $(SINGLE) $(RUN) -m pytest $(SHARED) \
	    tests/ops tests/gpu/operators

# From within tests/, the tree's own layerprune does not come before the one that is meant. Of the
# emulated CUDA kernels those for the widest and the narrowest elements, and not for 3,000 sections:
# the others are like them.
sanitize: $(READY)  ## run the operations' tests with AddressSanitizer and UBSan (gcc)
	rm -rf $(SANITIZED)
	CFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" LAYERPRUNE_BUILD=cpu $(RUN) -m pip \
	    install --quiet --no-build-isolation --no-deps --target $(SANITIZED) .
	cd tests && for capability in avx2 default; do \
	    ATEN_CPU_CAPABILITY=$$capability LAYERPRUNE_BACKEND=compiled $(SINGLE) $(WATCHED) \
	    $(RUN) -m pytest $(SHARED) ops -k $(NO_INDUCTOR) || exit 1; done
	cd tests && CFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" $(SINGLE) $(WATCHED) \
	    $(RUN) -m pytest $(SHARED) gpu/operators -k "not dtype1 and not dtype2 and not 3000"

test-oldest: $(READY)  ## build with this torch, run the core's tests under the oldest one
	rm -rf build/oldest
	LAYERPRUNE_BUILD=cpu $(RUN) -m pip wheel --quiet --no-build-isolation --no-deps -w build/oldest .
	test -e $(OLDEST_VENV)/bin/python || "$(PYTHON)" -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet torch==$(OLDEST_TORCH) torchvision \
	    numpy scikit-learn pytest hypothesis
	$(OLDEST_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall build/oldest/*.whl
	cd tests && PYTHONPATH= LAYERPRUNE_BACKEND=compiled $(abspath $(OLDEST_VENV))/bin/python -m pytest . \
	    --ignore=training --ignore-glob='*test_benchmark*' --ignore=test_cli.py --ignore=test_packaging.py

gpu-check: $(READY)  ## on a machine with a GPU: build for it, test, sanitize, measure
	PYTHON="$(RUN)" PARTS="$(PARTS)" RESULTS="$(RESULTS)" .ci/gpu-check

lint: $(READY)  ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror \
	    csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/gpu/operators/emulation/*.[ch]*

clean:  ## remove build folders and caches; runs stay, and .venv with what it runs from
	rm -rf build dist *.egg-info .benchmarks .hypothesis .pytest_cache .ruff_cache
	find layerprune kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes before layerprune, whose build uses the torch that is there and not one of its own.
# Some systems split ensurepip off from venv: there the system's own pip fills the environment.
$(VENV)/.installed: pyproject.toml setup.py layerprune/_version.py $(wildcard csrc/*.h csrc/*/*)
	$(check_python)
	@"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 \
	    || "$(PYTHON)" -m venv --clear "$(VENV)" >/dev/null 2>&1 \
	    || { "$(PYTHON)" -m venv --clear --without-pip "$(VENV)" && "$(VENV)/bin/python" \
	         "$$("$(PYTHON)" -c 'import pip; print(pip.__path__[0])')" install --ignore-installed pip; }
	"$(VENV)/bin/python" -m pip install --upgrade pip "setuptools>=77" wheel ninja pybind11
	"$(VENV)/bin/python" -m pip install torch torchvision
	"$(VENV)/bin/python" -m pip install --no-build-isolation -e ".[train,dev]"
	@touch $@

active-python:
	$(check_python)
	@"$(PYTHON)" -c 'import importlib.util as u, sys; \
	missing = [m for m in sys.argv[1:] if u.find_spec(m) is None]; \
	missing and sys.exit("The active Python lacks " + ", ".join(missing) + \
	". Install what pyproject.toml lists, or drop VENV= to have a .venv made.")' \
	torch torchvision numpy sklearn safetensors tqdm matplotlib tensorboard yaml typer
