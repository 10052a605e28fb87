# Every command that a person or CI runs here; `make` alone lists them. ARGS="…" is passed on to the program that a target starts.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
ARGS ?=
VENVS := .venvs
# Do not compile modules at installation: a run imports a small part of the trainer's libraries.
PIP_INSTALL := pip install --quiet --disable-pip-version-check --no-compile
DEV := PYTHONPATH=. $(VENVS)/dev/bin/python
LLM := PYTHONPATH=. HF_HUB_OFFLINE=1 $(VENVS)/llm/bin/python
DATA := PYTHONPATH=. HF_HUB_OFFLINE=1 $(VENVS)/data/bin/python

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  \1|/' | column -t -s '|'

# --- Environments ---------------------------------------------------------------------------------------------------------
# The service (no ML library), what reads datasets (data), the trainer (llm), the tools and tests (dev) and the checks of the infrastructure
# (infra).

.PHONY: setup setup-service setup-dev setup-infra
setup: setup-service setup-data setup-llm ## Install the environments of the service, of datasets and of the trainer, with llama.cpp
setup-service: $(VENVS)/service/.installed
setup-dev: $(VENVS)/dev/.installed
setup-infra: $(VENVS)/infra/.installed

$(VENVS)/service/.installed $(VENVS)/dev/.installed: $(VENVS)/%/.installed: requirements/%.txt pyproject.toml
	$(PYTHON) -m venv $(VENVS)/$*
	$(VENVS)/$*/bin/$(PIP_INSTALL) -r requirements/$*.txt
	$(VENVS)/$*/bin/$(PIP_INSTALL) --no-deps -e .
	@touch $@

$(VENVS)/infra/.installed: requirements/infra.txt
	$(PYTHON) -m venv $(VENVS)/infra
	$(VENVS)/infra/bin/$(PIP_INSTALL) -r requirements/infra.txt
	@touch $@

# An environment of attempts is a folder of jobs/environments. It is installed from its constraints and requirements, by its own install.sh
# where it has one, and then writes the manifest of what it can run: `make setup-<name>`.
ENVIRONMENTS := $(notdir $(patsubst %/,%,$(dir $(wildcard jobs/environments/*/requirements.txt))))

.PHONY: $(ENVIRONMENTS:%=setup-%)
$(ENVIRONMENTS:%=setup-%): setup-%: $(VENVS)/%/.installed

.SECONDEXPANSION:
$(ENVIRONMENTS:%=$(VENVS)/%/.installed): $(VENVS)/%/.installed: $$(wildcard jobs/environments/$$*/*.txt jobs/environments/$$*/install.sh) infra/llama_cpp.sh
	$(PYTHON) -m venv $(VENVS)/$*
	if [[ -f jobs/environments/$*/install.sh ]]; then bash jobs/environments/$*/install.sh $(VENVS)/$*/bin/python; \
	  else $(VENVS)/$*/bin/$(PIP_INSTALL) -c jobs/environments/$*/constraints.txt -r jobs/environments/$*/requirements.txt; fi
	PYTHONPATH=. $(VENVS)/$*/bin/python -m jobs.runtime.probe $* --output jobs/environments/$*/capabilities.json
	@touch $@

# What tests need in an environment of attempts. The fault campaign runs parts of itself in the trainer's.
$(ENVIRONMENTS:%=$(VENVS)/%/.installed-tests): $(VENVS)/%/.installed-tests: $(VENVS)/%/.installed jobs/environments/%/requirements-test.txt
	$(VENVS)/$*/bin/$(PIP_INSTALL) -c jobs/environments/$*/constraints.txt -r jobs/environments/$*/requirements-test.txt
	@touch $@

# --- Run ------------------------------------------------------------------------------------------------------------------

.PHONY: dev demo cloud-local demo-cloud-local
dev: setup-dev setup-data setup-llm ## Start a service from this folder, in the environment that has the test tools
	$(VENVS)/dev/bin/tunesmith serve $(ARGS)

demo: setup ## Fine-tune the real Gemma 3 270M through the HTTP API and compare its answers
	$(VENVS)/service/bin/python infra/demo.py $(ARGS)

cloud-local: setup-dev setup-data setup-llm ## Run the service on emulators of Google Cloud on this machine; stop with Ctrl-C
	$(DEV) -m infra.cloud_local $(ARGS)

demo-cloud-local: setup-dev setup-data setup-llm ## Run the demo on those emulators, through Google's client libraries
	$(DEV) -m infra.cloud_local -- $(VENVS)/dev/bin/python infra/demo.py $(ARGS)

# --- Deploy ---------------------------------------------------------------------------------------------------------------

.PHONY: deploy destroy
deploy: ## Create or update a deployment in a Google Cloud project: make deploy PROJECT_ID=… REGION=…
	infra/deploy.sh "$(PROJECT_ID)" "$(REGION)"

destroy: ## Remove a deployment, except its data: make destroy PROJECT_ID=… REGION=…
	infra/destroy.sh "$(PROJECT_ID)" "$(REGION)"

# --- Check ----------------------------------------------------------------------------------------------------------------

.PHONY: check format lock
check: setup-dev ## Check format, lint, types and import boundaries
	$(VENVS)/dev/bin/ruff format --check .
	$(VENVS)/dev/bin/ruff check .
	$(VENVS)/dev/bin/pyright
	PYTHONPATH=. $(VENVS)/dev/bin/lint-imports

format: setup-dev ## Format the code and fix what ruff can fix
	$(VENVS)/dev/bin/ruff format .
	$(VENVS)/dev/bin/ruff check --fix .

lock: setup-dev ## Pin requirements/*.in again
	cd requirements && for name in service dev infra; do ../$(VENVS)/dev/bin/pip-compile --quiet --strip-extras --no-header \
	  --annotation-style=line --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options -o $$name.txt $(ARGS) $$name.in; done

# --- Test -----------------------------------------------------------------------------------------------------------------

.PHONY: test test-fast test-ingest test-cloud test-infra test-llm test-chaos test-attack test-e2e coverage-report
# A worker takes a whole file, whose tests share models and services; the longest files come first (tests/conftest.py).
BY_FILE := --dist loadfile --no-loadscope-reorder
# One torch thread: two threads on two busy cores are slower.
test: export OMP_NUM_THREADS = 1
# Tests that run the service in their own process measure its coverage. Tracing takes half as much processor time again for these, and
# little of the whole; the trainer's tests and the service's child processes are not traced. test-cloud mostly waits, so test-infra
# runs beside it, then test-ingest beside test-attack.
test: export COVERAGE = --cov --cov-report=
test: test-fast ## Run every test, with real processes and models, and report coverage: about 20 minutes on two cores
	$(MAKE) --no-print-directory --jobs 2 --output-sync test-cloud test-infra test-ingest test-attack
	$(MAKE) --no-print-directory test-llm
	$(MAKE) --no-print-directory test-chaos
	$(MAKE) --no-print-directory test-e2e
	$(MAKE) --no-print-directory coverage-report

test-fast: setup-dev setup-data ## Run unit and contract tests: a minute
	COVERAGE_FILE=.coverage.fast $(DEV) -m pytest tests/unit tests/contract -n 2 --dist loadfile $(COVERAGE)

test-ingest: $(VENVS)/data/.installed-tests ## Test the ingestion of datasets: formats, mappings, rows, reports
	$(DATA) -m pytest tests/ingest -n 2

test-cloud: setup-dev setup-data ## Test the service while connections to Google fail; three at a time, because they mostly wait
	COVERAGE_FILE=.coverage.cloud $(DEV) -m pytest tests/cloud -n 3 $(COVERAGE)

test-infra: setup-infra ## Check Terraform, Dockerfiles, Cloud Build and the documented gcloud commands without an account
	PYTHONPATH=. $(VENVS)/infra/bin/python -m pytest tests/infra

test-llm: $(VENVS)/llm/.installed-tests ## Test the trainer and the exporters on a tiny model; three files at a time, because they often wait
	$(LLM) -m pytest tests/jobs tests/exports -n 3 $(BY_FILE)

test-chaos: setup-dev setup-data $(VENVS)/llm/.installed-tests ## Run the fault campaign in its short form
	$(DEV) -m pytest tests/chaos -n 3 --maxschedchunk 1

test-attack: setup-dev setup-data $(VENVS)/llm/.installed-tests ## Attack a real service in the short form; two at a time, because they often wait
	OMP_NUM_THREADS=1 $(DEV) -m pytest tests/attack -n 2 --maxschedchunk 1

test-e2e: setup-dev setup-service setup-data setup-llm ## Test real HTTP, child processes, the README's commands and the real Gemma; three files at a time
	$(DEV) -m pytest tests/e2e -n 3 $(BY_FILE)

coverage-report: setup-dev ## Combine and show the coverage that `make test` measured
	$(VENVS)/dev/bin/coverage combine --quiet .coverage.*
	$(VENVS)/dev/bin/coverage report --skip-covered

# --- Measure and long tests -----------------------------------------------------------------------------------------------

.PHONY: chaos attack nightly test-nightly test-bare-clone bench
chaos: setup-dev setup-data $(VENVS)/llm/.installed-tests ## Run the whole fault campaign and count what was lost: a quarter of an hour
	OMP_NUM_THREADS=1 $(DEV) -m tests.chaos $(ARGS)

attack: setup-dev setup-data $(VENVS)/llm/.installed-tests ## Run the whole attack suite and print what each attack achieved: ten minutes
	OMP_NUM_THREADS=1 $(DEV) -m tests.attack $(ARGS)

nightly: test-nightly test-bare-clone ## Run the long tests, and every target of this file from a bare clone: hours

test-nightly: $(VENVS)/llm/.installed-tests ## Run the long tests, and every trainer type and method on the real Gemma 3 270M: most of an hour
	OMP_NUM_THREADS=1 $(LLM) -m pytest tests/jobs tests/exports -m nightly
	OMP_NUM_THREADS=1 $(LLM) -W ignore -m tests.jobs.matrix --real $(ARGS)

test-bare-clone: ## Try every target of this file in a bare clone of its own; ARGS="chaos lock" tries only these
	$(PYTHON) infra/bare_clone_targets.py $(ARGS)

bench: setup-dev setup-data setup-llm ## Measure against the goals of docs/benchmarks.md, beside comparable servers
	$(DEV) -m bench $(ARGS)

.PHONY: clean
clean: ## Remove environments and caches; trained models stay
	rm -rf $(VENVS) .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
