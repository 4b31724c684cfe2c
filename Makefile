# Everything a person needs, by name. Each target makes the virtual environment it needs, once.
#
#   make up ARGS="--decode 2 --port 8080"      make test ARGS="-k scheduler"      make test JOBS=0 ARGS="--pdb"

VENV ?= .venv
PROTOS_VENV ?= .venv-protos
BENCH_VENV ?= .venv-bench
ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
# Where it is set, as in many containers, each of the many processes that tests and suites start would compile our modules
# anew, which takes longer than all else that it does at its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install install-dev up test clients tsan chaos lint types protos check-protos bench bench-suite constraints clean

help: ## Lists the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

install: ## Installs what `make up` needs into .venv
	@.ci/venv $(VENV) gateway,worker,cli

install-dev: ## Installs tests and checks too
	@.ci/venv $(VENV) dev

up: install ## Starts Redis, one prefill, one decode and a gateway; Ctrl-C stops them
	@$(BIN)/tandem up $(ARGS)

test: install-dev ## Runs the tests, in JOBS processes; JOBS=0: in this one
	@$(BIN)/python -m pytest --numprocesses $(JOBS) $(ARGS)

clients: ## Installs the pinned clients that tests/e2e/clients runs, each in an environment of its own
	@.ci/clients

chaos: install-dev ## Faults without end against a real suite: make chaos ARGS="--minutes 10"
	@$(BIN)/python -m tests.chaos $(ARGS)

lint: install-dev ## Checks style, format, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: install-dev ## Checks types
	@$(BIN)/mypy

protos: ## Regenerates the protobuf stubs
	@.ci/protos $(PROTOS_VENV)

check-protos: ## Fails when the checked-in stubs are not what the .proto files give
	@rm -rf build/protos && mkdir -p build/protos && cp protos/*_pb2* build/protos
	@.ci/protos $(PROTOS_VENV)
	@for stub in protos/*_pb2*; do cmp "$$stub" "build/$$stub" || { echo "stubs were out of date: commit the regenerated ones"; exit 1; }; done

bench: ## Tandem's CPU engine beside transformers and llama.cpp, which is built once (ten minutes)
	@CMAKE_ARGS="-DGGML_NATIVE=ON" .ci/venv $(BENCH_VENV) gateway,worker,cli,bench
	@$(BENCH_VENV)/bin/python -m loadtest.engine.bench $(ARGS)

bench-suite: install-dev ## The suite against transformers on the same requests, one table
	@$(BIN)/python -m loadtest.bench $(ARGS)

tsan: ## Runs the native CPU kernels' threads under ThreadSanitizer
	@mkdir -p build
	@g++ -std=c++20 -O1 -g -fsanitize=thread -pthread -I kernels/cpu/src -o build/tsan tests/kernels/native/thread_sanitizer.cpp
	@TSAN_OPTIONS=halt_on_error=1 build/tsan && echo "no data races"

constraints: ## Resolves the dependencies anew and rewrites constraints.txt
	@.ci/constraints

clean: ## Removes what the targets made, the virtual environments too
	@rm -rf $(VENV) $(PROTOS_VENV) $(BENCH_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks
	@find kernels protos services shared tests loadtest -name __pycache__ -type d -prune -exec rm -rf {} +
