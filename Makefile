# Everything runs in a virtual environment that is made when it is needed.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test lint docs bench evidence fuzz lock audit clean

# The main job on the embedded model: checkpoint in, a measured rung beside its plain preset and the card out, in demo/.
demo: $(VENV)/.installed
	$(BIN)/bitladder run examples/tiny-olmo2 --out demo --ladder Q4_K_M --chunks 20 --imatrix-chunks 40 \
		--moments-chunks 8 --tune-chunks 16 --tasks continuation:pydoc:test --task-count 50 --no-bench

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check src tests benchmarks examples scripts
	$(BIN)/ruff format --check src tests benchmarks examples scripts
	$(BIN)/mypy
	$(BIN)/python scripts/docs.py --check

# docs/commands.md from the command line, then the documentation site in site/.
docs: $(VENV)/.docs
	$(BIN)/python scripts/docs.py
	$(BIN)/zensical build --clean --strict

# Ratios against llama.cpp's own tools, with targets: needs LLAMA_CPP_TOOLS=DIR and MODEL=F16.gguf TEXT=wiki.test.raw.
# TASKS is a folder with the questions in hellaswag/ and mmlu/.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/ratios.py $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT)) \
		$(if $(CALIBRATION),--calibration $(CALIBRATION)) \
		$(if $(TASKS),--hellaswag $(TASKS)/hellaswag --mmlu $(TASKS)/mmlu) $(OPTIONS)

# KLD beside rivals at the same bytes, resumable: MODELS="F16.gguf …", TEXTS="prose=FILE code=pydoc:test …" that no
# CALIBRATION="A B" saw, OPTIONS for more. Without MODELS, docs/evidence.md is written from benchmarks/results.
evidence: $(VENV)/.installed
	$(BIN)/python benchmarks/evidence.py $(MODELS) $(foreach text,$(TEXTS),--text $(text)) \
		$(foreach text,$(CALIBRATION),--calibration $(text)) $(OPTIONS)

# Every parser under atheris, MINUTES of the CPU each; corpus and finds are in .fuzz/.
fuzz: $(VENV)/.test
	$(BIN)/python -m pip install -q -e '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(or $(MINUTES),1) $(PARSERS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e .
	touch $@

# The tests compare with PyTorch and transformers; PyTorch's build for CPUs is enough where the index has it. Builds of
# PyTorch differ from index to index: it is not in the lock, and neither is what only it needs.
$(VENV)/.test: pyproject.toml requirements-dev.lock
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $(VENV)/.installed $@

# The newest versions that fit pyproject.toml, with their hashes.
lock: $(VENV)/.test
	$(BIN)/python -m pip install -q uv
	echo "torch ; python_version < '3'" > $(VENV)/without-torch.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--upgrade --no-header --no-annotate --override $(VENV)/without-torch.txt -o requirements-dev.lock

# Known faults of the locked versions; needs the network.
audit: $(VENV)/.test
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit --no-deps --disable-pip -r requirements-dev.lock

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) demo site .pytest_cache .mypy_cache .ruff_cache
