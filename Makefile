# make help lists what there is. Everything runs in .venv, which `make setup` makes without root.

PYTHON ?= python3
VENV := .venv/bin
KERNELS := mpi_ops/kernels
LIBRARY := $(KERNELS)/libgq_kernels.so
CXX_FILES = $(wildcard $(shell git ls-files '*.cpp' '*.cc' '*.h' '*.hpp' '*.cu' '*.cuh'))
# By their first line, since scripts on PATH have no suffix.
SHELL_FILES = $(shell git ls-files | while read -r f; do head -n 1 "$$f" 2>/dev/null | \
	grep -qaE '^.!.*[/ ](ba|da)?sh( |$$)' && echo "$$f"; done)

# Their schemas come with the tool, which needs no network for them.
SCHEMA = $(VENV)/check-jsonschema --quiet --builtin-schema vendor.github

# The tools find each other: mpirun, cmake and the linters are in .venv/bin. Set-up itself runs in
# the caller's Python, since it may have to make .venv anew.
CALLERS_PATH := $(PATH)
export PATH := $(CURDIR)/$(VENV):$(PATH)
ifeq ($(shell id -u),0)
# Open MPI refuses to start as root, the usual user in a container, unless both are set.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
ifneq ($(origin CXX),default)
export CXX
endif

# Every rank, worker and script of the tests would compile all that it imports of this checkout.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup build lint format check test docs wheel demo bench gpu-check clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with everything in it (first time 6 to 12 minutes)
	@PATH="$(CALLERS_PATH)" $(PYTHON) tools/setup_env.py
	@$(MAKE) --silent --no-print-directory $(LIBRARY)

build: setup ## rebuild the native kernels if their sources changed

$(LIBRARY): $(wildcard $(KERNELS)/*.cpp $(KERNELS)/*.h $(KERNELS)/*.cu) setup.py
	@echo "compiling the native kernels"
	@$(VENV)/python setup.py --quiet build_ext --inplace

lint: setup ## ruff, mypy, clang-format, shellcheck, schemas of the files that services read
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(if $(CXX_FILES),$(VENV)/clang-format --dry-run -Werror $(CXX_FILES))
	$(if $(SHELL_FILES),$(VENV)/shellcheck $(SHELL_FILES))
	$(SCHEMA)-workflows .github/workflows/*.yml
	$(SCHEMA)-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA)-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

format: setup ## let ruff and clang-format rewrite the sources
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	$(if $(CXX_FILES),$(VENV)/clang-format -i $(CXX_FILES))

check: setup lint ## lint, and the tests of a gradient's path, in some four minutes
	$(VENV)/python -m pytest tests -m check -n 2 --maxschedchunk 1 $(PYTEST_ARGS)

# Tests of one process go several at a time. So do jobs, two at a time, whose ranks sleep while they
# wait for each other. The longest come first (tests/conftest.py), and are handed out one by one.
# What waits for links, time limits and the ends of jobs goes two files at a time, since the tests
# of a file share hosts. The others measure, and want the cores for themselves.
ALONE := tests/single tests/deploy
JOBS := $(patsubst %,tests/launch/test_%.py,parallel by_nodes tensorflow tensorflow_saved \
	tensorflow_join unnamed log_on_ranks mpi_libraries quickstart elastic gpu_check workloads \
	doctor_on_ranks timeline mistakes ends benchmarks_run)
WAITING := $(patsubst %,tests/cluster/test_%.py,hosts link_faults testbed) \
	$(patsubst %,tests/launch/test_%.py,faults tensorflow_guards)
test: setup lint ## lint, then all tests; PYTEST_ARGS="-k name" selects
	$(call tests,$(ALONE) -n logical --maxprocesses 8)
	$(call tests,$(JOBS) -n 2 --maxschedchunk 1)
	$(call tests,$(WAITING) -n 2 --dist loadfile)
	$(call tests,tests $(addprefix --ignore=,$(ALONE) $(JOBS) $(WAITING)))

# Where PYTEST_ARGS selects none of them (exit status 5), the others may still have some.
tests = $(VENV)/python -m pytest $(1) $(PYTEST_ARGS) || { status=$$?; \
	[ $$status = 5 ] && [ -n "$(PYTEST_ARGS)" ] || exit $$status; }

docs: setup ## the documentation as a site, in build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/python -m mkdocs build --quiet --strict

wheel: setup ## a wheel for this processor that other Linux machines take, and the sdist, in dist/
	rm -rf build/wheel
	$(VENV)/python -m build --no-isolation --outdir build/wheel
	mkdir -p dist && mv build/wheel/*.tar.gz dist/
	$(VENV)/auditwheel repair --plat auto --wheel-dir dist build/wheel/*.whl
	$(VENV)/auditwheel show dist/gq_horovod-*-manylinux*.whl

demo: setup ## train the example with and without compression
	$(VENV)/python examples/deeplight/demo.py

bench: setup ## kernel throughput on this machine
	$(VENV)/python benchmarks/kernels.py

gpu-check: ## what only a GPU can show, in ten minutes; GPU_CHECK_ARGS=--rehearse without one
	@tools/gpu_check.sh $(GPU_CHECK_ARGS)

clean: ## remove what building and testing left
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(LIBRARY)
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## also remove .venv (the cached Horovod wheel stays)
	rm -rf .venv .setup.lock
