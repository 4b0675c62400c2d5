# Two commands matter: `make demo` and `make test`. Each sets up what it needs first.
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
PIP = PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv/bin/pip install --quiet
# make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu   takes torch from another index (CPU or CUDA builds)
TORCH_INDEX ?=

.PHONY: demo test chaos image bench lint serve up down setup clean

demo: .venv/installed
	.venv/bin/python flows.py demo $(FLAGS)

serve: .venv/installed
	.venv/bin/python -m pipelines serve --store runs/demo --name cartoons $(FLAGS)

# Everything on this machine under a supervisor: store, Prefect with the deployments, Ray, the service and its page.
up: .venv/installed
	.venv/bin/python infra/up.py start $(FLAGS)

down: .venv/installed
	.venv/bin/python infra/up.py stop $(FLAGS)

test: .venv/installed .venv-s3/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(FLAGS)

# Trials that kill processes and nodes and break the way to the store; about 50 minutes.
chaos: .venv/installed .venv-s3/installed
	.venv/bin/python -m pytest -m chaos $(FLAGS)

# The Dockerfile's steps without Docker, in a bare Debian by debootstrap (root only); about five minutes.
image: .venv/installed
	.venv/bin/python -m pytest -m image $(FLAGS)

# Every figure of docs/results.md anew; make bench FLAGS="--only inpainting"
bench: .venv/installed .venv-s3/installed
	.venv/bin/python benchmarks/all.py $(FLAGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

setup: .venv/installed .venv-s3/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "setting up .venv (once; about two minutes)"
	@$(PYTHON) infra/new_venv.py .venv
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) --editable '.[test,lint]'
	@touch $@

# A real S3 endpoint (OpenStack Swift) for the tests, in an environment of its own.
.venv-s3/installed: tests/support/constraints-s3.txt
	@$(PYTHON) infra/new_venv.py .venv-s3
	.venv-s3/bin/pip install --quiet --constraint tests/support/constraints-s3.txt swift
	@touch $@

clean:
	rm -rf .venv .venv-s3 runs .mypy_cache .ruff_cache .pytest_cache
