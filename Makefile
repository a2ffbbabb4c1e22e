PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow soak lint types docs bench bench-gpu reproduce clean

install: $(STAMP)

# A stamp, so that it runs once and again only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "rewurst needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not types' --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

soak: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/test_kill.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/python -m pytest -m types tests/test_packaging.py

# The site, into build/site; a link that leads nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/stream.py --out benchmarks/results/stream.json
	$(BIN)/python benchmarks/decoding.py --out benchmarks/results/images.json
	$(BIN)/python benchmarks/wuerstchen.py --out benchmarks/results/wuerstchen.json
	$(BIN)/python benchmarks/lm.py --parts train overhead --rounds 3 --out benchmarks/results/lm.json

# One GPU, bfloat16: 405M parameters at 2,048 tokens, then Stage C and B as released.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/lm.py --suite gpu --out benchmarks/results/lm-gpu.json
	$(BIN)/python benchmarks/wuerstchen.py --suite released --device cuda --dtype bfloat16 --out benchmarks/results/wuerstchen-gpu.json

# The papers' experiments at the smallest scale, three seeds and one; stopped or killed, the same command goes on.
reproduce: $(STAMP)
	$(BIN)/rewurst reproduce continual --out runs/reproduce --scale tiny --seeds 3
	$(BIN)/rewurst reproduce wuerstchen --out runs/reproduce_wuerstchen

clean:
	rm -rf $(VENV) data build dist src/*.egg-info runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
