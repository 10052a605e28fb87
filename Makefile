# Everything that a person or CI does here. `make` alone tells.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-service setup-llm setup-dev setup-infra demo cloud-local demo-cloud-local deploy destroy dev test test-fast test-cloud test-infra test-llm test-chaos test-e2e chaos nightly check format bench lock clean

PYTHON ?= python3.11
VENVS := .venvs
# Modules are compiled when they are first imported: of the trainer's libraries that is a small part.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile

help: ## This list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  \1|/' | column -t -s '|'

setup: setup-service setup-llm ## Both environments: the service's, without any ML library, and the trainer's with llama.cpp

setup-service: $(VENVS)/service/.installed
setup-dev: $(VENVS)/dev/.installed
setup-llm: $(VENVS)/llm/.installed
setup-infra: $(VENVS)/infra/.installed

$(VENVS)/service/.installed: requirements/service.txt pyproject.toml
	$(PYTHON) -m venv $(VENVS)/service
	$(VENVS)/service/bin/pip install $(PIP_FLAGS) -r requirements/service.txt
	$(VENVS)/service/bin/pip install $(PIP_FLAGS) --no-deps -e .
	@touch $@

$(VENVS)/dev/.installed: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENVS)/dev
	$(VENVS)/dev/bin/pip install $(PIP_FLAGS) -r requirements/dev.txt
	$(VENVS)/dev/bin/pip install $(PIP_FLAGS) --no-deps -e .
	@touch $@

$(VENVS)/infra/.installed: requirements/infra.txt
	$(PYTHON) -m venv $(VENVS)/infra
	$(VENVS)/infra/bin/pip install $(PIP_FLAGS) -r requirements/infra.txt
	@touch $@

# torch first and alone: its version decides everything else's.
$(VENVS)/llm/.installed: jobs/environments/llm/requirements.txt jobs/environments/llm/constraints.txt infra/llama_cpp.sh
	$(PYTHON) -m venv $(VENVS)/llm
	$(VENVS)/llm/bin/pip install $(PIP_FLAGS) -c jobs/environments/llm/constraints.txt torch
	$(VENVS)/llm/bin/pip install $(PIP_FLAGS) -c jobs/environments/llm/constraints.txt -r jobs/environments/llm/requirements.txt
	infra/llama_cpp.sh $(VENVS)/llm/bin/python
	@touch $@

demo: setup ## Fine-tune the real Gemma 3 270M through the HTTP API and talk to it
	$(VENVS)/service/bin/python infra/demo.py

cloud-local: setup-dev setup-llm ## The whole Google stack on loopback, with the service on it; Ctrl-C ends it
	PYTHONPATH=. $(VENVS)/dev/bin/python -m infra.cloud_local

demo-cloud-local: setup-dev setup-llm ## The demo, through Google's client libraries, on loopback
	PYTHONPATH=. $(VENVS)/dev/bin/python -m infra.cloud_local -- $(VENVS)/dev/bin/python infra/demo.py

deploy: ## Make or update everything in a Google Cloud project: make deploy PROJECT_ID=… REGION=…
	infra/deploy.sh "$(PROJECT_ID)" "$(REGION)"

destroy: ## Remove what deploy made, except the data: make destroy PROJECT_ID=… REGION=…
	infra/destroy.sh "$(PROJECT_ID)" "$(REGION)"

dev: setup-dev setup-llm ## A service here, with what the tests use
	$(VENVS)/dev/bin/tunesmith serve

check: setup-dev ## Format, lint, types, import walls
	$(VENVS)/dev/bin/ruff format --check .
	$(VENVS)/dev/bin/ruff check .
	$(VENVS)/dev/bin/pyright
	PYTHONPATH=. $(VENVS)/dev/bin/lint-imports

format: setup-dev ## Format and mend what can be mended
	$(VENVS)/dev/bin/ruff format .
	$(VENVS)/dev/bin/ruff check --fix .

# A worker takes a whole file, whose tests share models and services; the longest files come first (tests/conftest.py).
BY_FILE := --dist loadfile --no-loadscope-reorder

# Two torch threads on two busy cores are slower than one.
test: export OMP_NUM_THREADS = 1
test: test-fast ## Everything, real processes and models too: about 18 minutes on two cores
	$(MAKE) --jobs 2 --output-sync test-cloud test-infra
	$(MAKE) test-llm
	$(MAKE) test-chaos
	$(MAKE) test-e2e

test-fast: setup-dev ## Unit and contract tests: a minute
	PYTHONPATH=. $(VENVS)/dev/bin/python -m pytest tests/unit tests/contract -n 2 --dist loadfile

$(VENVS)/llm/.installed-tests: $(VENVS)/llm/.installed jobs/environments/llm/requirements-test.txt
	$(VENVS)/llm/bin/pip install $(PIP_FLAGS) -c jobs/environments/llm/constraints.txt -r jobs/environments/llm/requirements-test.txt
	@touch $@

test-llm: $(VENVS)/llm/.installed-tests ## The trainer and the exporters, on a tiny model: three files at a time, as they wait a lot
	PYTHONPATH=. HF_HUB_OFFLINE=1 $(VENVS)/llm/bin/python -m pytest tests/jobs tests/exports -n 3 $(BY_FILE)

test-cloud: setup-dev ## What the service does when a line to Google breaks: mostly waiting, so three at a time
	PYTHONPATH=. $(VENVS)/dev/bin/python -m pytest tests/cloud -n 3

test-infra: $(VENVS)/infra/.installed ## Terraform, Dockerfiles, Cloud Build and every gcloud line in the docs, checked without an account
	PYTHONPATH=. $(VENVS)/infra/bin/python -m pytest tests/infra

test-chaos: setup-dev setup-llm ## The fault campaign in short
	PYTHONPATH=. $(VENVS)/dev/bin/python -m pytest tests/chaos -n 3 --maxschedchunk 1

test-e2e: setup-dev setup-service setup-llm ## Real HTTP, real child processes, the README's commands, the real Gemma: three files at a time
	PYTHONPATH=. $(VENVS)/dev/bin/python -m pytest tests/e2e -n 3 $(BY_FILE)

chaos: setup-dev setup-llm ## Break what can break, hundreds of times, and count what was lost: a quarter of an hour
	OMP_NUM_THREADS=1 PYTHONPATH=. $(VENVS)/dev/bin/python -m tests.chaos

nightly: $(VENVS)/llm/.installed-tests ## Every trainer type and method on the real Gemma 3 270M, and the tests that take long: the better part of an hour
	OMP_NUM_THREADS=1 PYTHONPATH=. HF_HUB_OFFLINE=1 $(VENVS)/llm/bin/python -m pytest tests/jobs tests/exports -m nightly
	OMP_NUM_THREADS=1 PYTHONPATH=. HF_HUB_OFFLINE=1 $(VENVS)/llm/bin/python -W ignore -m tests.jobs.matrix --real

bench: setup-dev setup-llm ## Measure against the figures of docs/benchmarks.md, peers side by side
	PYTHONPATH=. $(VENVS)/dev/bin/python -m bench

lock: setup-dev ## Pin requirements/*.in anew
	cd requirements && for name in service dev infra; do ../$(VENVS)/dev/bin/pip-compile --quiet --strip-extras --no-header \
	  --annotation-style=line --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options -o $$name.txt $$name.in; done

clean: ## Remove environments and caches; what was trained stays
	rm -rf $(VENVS) .pytest_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
