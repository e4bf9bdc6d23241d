PYTHON ?= python3.11
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format protos clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

install: .venv/installed ## Make .venv with everything

.venv/installed: pyproject.toml constraints.txt
	@echo "setting up .venv; the first time this takes some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,bench,dev]'
	$(BIN)/python -m tramontane.stages.kernels.native
	@touch $@

demo: install ## Serve the embedded model with two stages and stream a dozen prompts through it
	$(BIN)/python -m tramontane.deploy.demo

test: install lint ## Lint, then run all tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

BENCH ?=
bench: install ## Measure a realistic model beside its limits and others (BENCH='--quick' for a minute)
	$(BIN)/python tests/bench/bench_model.py $(BENCH)

lint: install ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tramontane

format: install ## Format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: install ## Generate the gRPC stubs again
	$(BIN)/python -m grpc_tools.protoc -Itramontane/protos=protos --python_out=. --pyi_out=. --grpc_python_out=. \
		tramontane/protos/serving.proto

clean: ## Remove the environment and the caches in this folder
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
