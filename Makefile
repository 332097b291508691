# Everything a developer runs. Needs Python 3.11 to 3.14, pip and make; the rest goes into .venv.
#
#   make test ARGS="tests/core -k island"     passes ARGS on
#   make PYTHON=python3.12 test               chooses the interpreter of a new .venv

PYTHON ?= python3
ARGS ?=
ROUNDS ?= 1
WORKERS ?= 4
RAY ?= 2.52.1
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-engines chaos soak mutants lint format bench wheel release clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/stamp ## place on simulated GPU nodes, on this machine (no GPU needed)
	@$(BIN)/placement demo $(ARGS)

test: .venv/stamp ## run the tests, by file, in four processes: make test WORKERS=0
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-ray
test-ray: .venv-ray-$(RAY)/stamp ## run the demo and the tests with another Ray, in a venv of its own: make test-ray RAY=2.55.1 ARGS=tests/integration/test_mig.py
	@.venv-ray-$(RAY)/bin/placement demo
	@.venv-ray-$(RAY)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(or $(ARGS),tests/integration)

test-engines: .venv-engines/stamp ## run the engines for real, vLLM on CPUs and Ray Serve: a venv of 4 GB of its own; skipped where it cannot be had
	@test ! -e .venv-engines/stamp || .venv-engines/bin/python -m pytest tests/engines $(ARGS)

chaos: .venv/stamp ## kill the service, its node actors, nodes and the head, and tell how long recovery took: make chaos ROUNDS=5
	@$(BIN)/python -m tests.chaos --rounds $(ROUNDS)

soak: .venv/stamp ## all of that in any order on a real cluster, for as long as you like: make soak ARGS='--minutes 30 --seed 7'
	@$(BIN)/python -m tests.soak $(ARGS)

mutants: .venv/stamp ## change the code in small ways and tell what no test notices: make mutants ARGS='--sample 300 --seed 1 --minutes 60'
	@$(BIN)/python -m tests.mutants $(ARGS)

lint: .venv/stamp ## check style, format, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: .venv/stamp ## mend what `make lint` can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/stamp ## measure what placing costs, what the choice is worth, and how planning and the service grow
	@$(BIN)/python -m benchmarks.place $(ARGS)
	@$(BIN)/python -m benchmarks.drop_in $(ARGS)
	@$(BIN)/python -m benchmarks.choice
	@$(BIN)/python -m benchmarks.plan
	@$(BIN)/python -m benchmarks.scale

.PHONY: bench-results
bench-results: .venv/stamp ## record the quick benchmarks of this version in benchmarks/results; docs/cost.md tells how to compare
	@$(BIN)/python -m benchmarks.results record $(ARGS)

.PHONY: docs
docs: .venv/stamp .venv-docs/stamp ## build the documentation into site/; a warning is an error
	@$(BIN)/python -m scripts.reference
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet

wheel: .venv/stamp ## build dist/ray_placement-*.whl
	@rm -rf dist
	@$(BIN)/python -m build --wheel --no-isolation .

release: .venv/stamp ## check, build and tag a release, and print how to publish it: docs/releasing.md
	@scripts/release

clean: ## remove .venv and those of test-ray, test-engines and docs, builds and caches
	@rm -rf .venv .venv-ray-* .venv-engines .venv-docs site dist build mutants .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made again when the dependencies change; the editable install follows the sources by itself.
.venv/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, as: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "this Python cannot make a venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (once, about a minute)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv-ray-%/stamp: pyproject.toml
	@echo "installing Ray $* into .venv-ray-$* (once, about a minute)"
	@$(PYTHON) -m venv --clear .venv-ray-$*
	@.venv-ray-$*/bin/python -m pip install -qq --disable-pip-version-check --editable '.[test]' 'ray[default]==$*'
	@touch $@

.venv-docs/stamp: docs/requirements.txt
	@echo "installing into .venv-docs (once, about half a minute)"
	@$(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# Where a wheel cannot be had there is no stamp, and the tests are skipped.
.venv-engines/stamp: tests/engines/requirements.txt
	@echo "installing into .venv-engines (once, about three minutes)"
	@$(PYTHON) -m venv --clear .venv-engines
	@if .venv-engines/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile --only-binary :all: \
		-r tests/engines/requirements.txt 2>.venv-engines/pip.log; then \
		.venv-engines/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation \
			--editable . && touch $@; \
	else \
		echo "tests/engines: skipped, since its wheels cannot be had here: $$(tail -n 1 .venv-engines/pip.log)"; \
	fi
