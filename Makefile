# Two commands do all the set-up on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# the platform's own Python picks the torch build; constraints.txt pins what set-up installs, pyproject.toml the ranges
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LABORATORY := torch==2.11.0 'lightning>=2.5,!=2.6.2,!=2.6.3' numpy safetensors sentencepiece tokenizers jinja2 huggingface_hub bitsandbytes

.PHONY: demo test lint bench gpu-wheels gpu-dry clean help

help:
	@echo "make demo   install into .venv and run the whole road on a tiny model (about a minute of computing)"
	@echo "make test   install with the test tools, then lint, layering and tests"
	@echo "make lint   ruff only"
	@echo "make bench  lit_sft beside litgpt and TRL, which go into .venv-benchmark (long; see docs/performance.md)"
	@echo "make gpu-wheels  what benchmarks/gpu.py compares with, into .whl/ for a machine without a network"
	@echo "make gpu-dry  what the CUDA path compiles, without a GPU, in .venv-laboratory (5 GB; see docs/performance.md)"
	@echo "make clean  remove .venv, .venv-benchmark, .venv-laboratory, out/ and the demo's files"

# torch first and by itself: the other packages then find it there, whatever build it is
.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch"
	@$(PIP) --constraint constraints.txt torch
	@touch $@

.venv/installed: .venv/torch pyproject.toml
	@echo "installing lit_sft"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing the test tools"
	@$(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh demo/run.sh

lint: .venv/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

test: lint
	@$(BIN)/python -m pytest -q tests/test_architecture.py
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore tests/test_architecture.py

# BENCH="--data_file alpaca.json --tokenizer_dir FOLDER --shapes pythia-31m --repeats 3" and so on
bench: .venv/installed
	@$(BIN)/python benchmarks/train.py $(BENCH)

# for Python 3.12 on x86-64; what they need beyond torch, transformers, peft, lightning and pandas is among them
WHEELS := liger-kernel==0.8.5 trl==1.16.0 litgpt==0.5.13 jsonargparse==4.41.0 docstring-parser==0.18.0 \
	typeshed-client==2.15.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 torchao==0.18.0 bitsandbytes==0.50.2
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 \
	manylinux2014_x86_64 manylinux1_x86_64

gpu-wheels:
	@$(PYTHON) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp $(addprefix --platform ,$(PLATFORMS)) --dest .whl $(WHEELS)

# torch's CUDA build, which runs without a GPU as well; uv takes it from PyPI on any machine
.venv-laboratory/installed:
	@for python in python3.12 python3.11 $(PYTHON); do \
		test -x .venv-laboratory/bin/python || ! $$python -c '' 2>/dev/null || $$python -m venv .venv-laboratory; done
	@echo "installing torch's CUDA build into .venv-laboratory"
	@.venv-laboratory/bin/python -m pip --disable-pip-version-check install --quiet uv
	@.venv-laboratory/bin/uv pip install --quiet --python .venv-laboratory/bin/python $(LABORATORY)
	@touch $@

# GPU_DRY="--build", "--write", "--project CHECKOUT", "--cases bf16 fp8" and so on
gpu-dry: .venv-laboratory/installed
	@.venv-laboratory/bin/python benchmarks/laboratory/run.py $(GPU_DRY)

clean:
	rm -rf .venv .venv-benchmark .venv-laboratory out checkpoints/demo data/demo build *.egg-info
