# Two commands for a newcomer: `make serve` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: serve test test-gpu lint format clean

serve: $(VENV)/.serve
	$(BIN)/headrace serve --port $(PORT)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 TIKTOKEN_ENCODINGS_BASE=$(VENV)/o200k $(BIN)/python -m pytest -n 2

# On a GPU machine, with the Python that is there (it has its own CUDA torch).
test-gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} python3 -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.serve: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once, about two minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@$(PIP) -e .
	@touch $@

# gpt-oss (OpenAI's reference, a test oracle) declares Python 3.12 and a GPU stack that its plain
# torch model does not need.
$(VENV)/.dev: $(VENV)/.serve
	@echo "Adding the development tools to $(VENV) (once, about two minutes) ..."
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps --ignore-requires-python gpt-oss==0.0.9
	@$(BIN)/python scripts/o200k_vocabulary.py $(VENV)/o200k
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
