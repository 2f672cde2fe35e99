# make demo    set up, then the main job: train, measure, forecast, price, report. Five to eight minutes on 2 cores.
# make test    set up, then the tests.
# make layouts every family under 40 layouts against one device. About an hour on 2 cores.
# PYTHON=...   the interpreter (3.11 to 3.13); by default the newest of them that runs.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; assert (3, 11) <= sys.version_info < (3, 14)' >/dev/null 2>&1 && echo $$p && break; done)
BIN = .venv/bin
OUT ?= runs/demo
TESTS ?=

# Sizes of the demo. `make demo SMOKE=1` walks the same street in a fraction of the time.
ifdef SMOKE
TRAIN = --model.n_layers=2 --steps=20 --validate_every=20 --sample_tokens=40
LADDER = --model.n_layers=2 --devices=1,2 --steps=2 --warmup_steps=1 --seq_len=64 --micro_batch_seqs=1
GPT3 = --model.n_layers=4 --devices=1024,40960 --layout="fsdp=128,tensor=8"
LLAMA3 = --model.n_layers=4 --devices=4 --seq_len=1024
else
TRAIN = --steps=150
LADDER = --devices=1,2,4,8 --steps=5 --seq_len=128 --micro_batch_seqs=4
GPT3 = --devices=64,1024,4096,16384,40960 --layout="64:fsdp=8,tensor=8;1024:fsdp=128,tensor=8"
LLAMA3 = --devices=64,512 --layout="fsdp=64"
endif

.PHONY: setup demo test layouts lint bench lock clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with venv was found: install one, or give PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,deviceless]"
	@touch $@

demo: setup
	$(BIN)/python -m experiments.train --preset=tiny $(TRAIN) --out=$(OUT)/train
	JAX_NUM_CPU_DEVICES=8 $(BIN)/python -m experiments.ladder --preset=tiny $(LADDER) --out=$(OUT)
	$(BIN)/python -m experiments.forecast --preset=gpt3-175b --device=h100-sxm $(GPT3) --out=$(OUT)
	$(BIN)/python -m experiments.forecast --preset=llama3-8b --device=tpu-v5p $(LLAMA3) --out=$(OUT)
	$(BIN)/python -m experiments.cost $(OUT) --tokens=300e9
	$(BIN)/python -m experiments.report $(OUT) --tokens=300e9

test: setup
	$(BIN)/python -m pytest -n 2 $(TESTS)

LAYOUTS = $(BIN)/python -m experiments.layouts --preset=tiny --devices=8
layouts: setup
	$(LAYOUTS) --out=runs/layouts/decoder
	$(LAYOUTS) --out=runs/layouts/decoder_experts --model.n_experts=8
	$(LAYOUTS) --out=runs/layouts/encoder --model.family=encoder
	$(LAYOUTS) --out=runs/layouts/encoder_experts --model.family=encoder --model.n_experts=8
	$(LAYOUTS) --out=runs/layouts/encoder_decoder --model.family=encoder_decoder
	$(LAYOUTS) --out=runs/layouts/encoder_decoder_experts --model.family=encoder_decoder --model.n_experts=8
	$(LAYOUTS) --out=runs/layouts/decoder_bf16 --precision=bf16
	$(LAYOUTS) --out=runs/layouts/decoder_experts_bf16 --precision=bf16 --model.n_experts=8 --model.experts_per_token=8

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

bench: setup
	$(BIN)/python -m experiments.ladder --preset=tiny --devices=1 --steps=20 --out=runs/bench

lock:
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,gpu tpu deviceless dev) --universal --no-annotate --quiet \
		--custom-compile-command "make lock" --output-file constraints.txt

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
