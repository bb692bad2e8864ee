# make demo: from a fresh machine to a fine-tuned adapter. make test: the whole suite; make test-fast: two minutes of it.
# TORCH names another torch, TORCH_SOURCE options of pip that say where from:
#   make demo TORCH_SOURCE="--index-url URL"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_SOURCE ?=
QUICKSTART ?= quickstart
# Tests at a time, for two cores: one waits for SLURM most of the time, the others for processes now and then.
WORKERS ?= 4
RANKS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test test-fast check reference activations bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	@$(BIN)/python -m distft.cli.demo $(QUICKSTART) --gpus-per-node $(RANKS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/unit tests/integration/test_verify.py

check: $(VENV)/.dev
	@tools/check.sh $(BIN)

reference: $(VENV)/.dev
	$(BIN)/python tools/reference_files.py .
	$(BIN)/python tools/generated_docs.py docs

# The planner's table of activations, from the installed transformers, torch and peft: an hour on two cores.
activations: $(VENV)/.dev
	$(BIN)/python -m distft.simulation.activation_table

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cli_latency.py
	$(BIN)/python benchmarks/train_overhead.py
	$(BIN)/python benchmarks/scale.py

# torch first: without it, pip would take the newest build with gigabytes of CUDA packages, GPU or not.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@tools/install_torch.sh $(BIN)/python "$(TORCH)" $(TORCH_SOURCE)
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) $(QUICKSTART) runs
