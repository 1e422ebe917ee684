# make demo   real images → latents → a trained Transformer → its score → a report, on this machine
# make test   linters, types, layers and tests
# make check  the same without the tests that start processes, in under two minutes
# make study  the paper's comparison of Transformer and UNet (an hour)
# make speedrun  a record of the demo's recipe, in records/ and in the README's table
# make setup  the environment in .venv (the other two call it)

SHELL := /bin/bash
BIN := .venv/bin
export OMP_NUM_THREADS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo study speedrun check test lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -d .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	ldt encode configs/encode/fashion_mnist.yaml
	deepspeed --num_accelerators 2 --module ldt train configs/fashion_mnist.yaml
	deepspeed --num_accelerators 2 --module ldt evaluate runs/fashion_mnist evaluate.checkpoint=all
	ldt report runs/fashion_mnist

# the paper's comparison: three arms, two seeds each; an hour on two cores. Started again, it goes on where it stopped
STUDY := $(foreach seed,0 1,$(foreach arm,transformer unet unet_flops,$(arm)-$(seed)))

study: setup
	ldt encode configs/encode/fashion_mnist.yaml
	for run in $(STUDY); do \
	  arm=$${run%-*} seed=$${run#*-} && \
	  deepspeed --num_accelerators 2 --module ldt train configs/study/$$arm.yaml seed=$$seed run_dir=runs/study/$$run && \
	  deepspeed --num_accelerators 2 --module ldt evaluate runs/study/$$run || exit 1; \
	done
	ldt report $(STUDY:%=runs/study/%) output=runs/study/report.html

# what anyone can play again: `ldt verify records/NAME`
SPEEDRUN ?= configs/fashion_mnist.yaml
RECORD ?= records/$(notdir $(SPEEDRUN:.yaml=))-$(shell date -u +%F)

speedrun: setup
	ldt encode configs/encode/fashion_mnist.yaml
	deepspeed --num_accelerators 2 --module ldt train $(SPEEDRUN) run_dir=runs/speedrun log.every_samples=320 checkpoint.every_samples=6000 checkpoint.keep=100
	deepspeed --num_accelerators 2 --module ldt evaluate runs/speedrun evaluate.checkpoint=all
	ldt verify runs/speedrun samples=1280
	python tools/make_record.py runs/speedrun $(RECORD)
	python tools/records.py

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

# what starts no processes: for while one works; what it leaves out is in `make test`
CHECKED := architecture average checkpoint_paths config configs docs ema errors follow frechet inspect_shards \
  latent_files manifest mixture objectives order paths plan rng samplers shards sizes unet

check: lint
	pytest -q $(CHECKED:%=tests/test_%.py)

test: lint .venv/peers .venv/s3 .venv/text .venv/triton
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# apart from the environment: torchvision's CUDA build beside a CPU torch breaks whoever finds it
.venv/peers: .venv/ready tests/requirements-peers.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ -r tests/requirements-peers.txt
	touch $@

.venv/s3: .venv/ready tests/requirements-s3.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ -r tests/requirements-s3.txt
	touch $@

.venv/text: .venv/ready tests/requirements-text.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ -r tests/requirements-text.txt
	touch $@

# apart as well: beside a CPU torch, torch.compile would take it for a GPU's
.venv/triton: .venv/ready tests/requirements-triton.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ -r tests/requirements-triton.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
