# make demo   set up, then the whole job on the built-in model and data
# make test   set up, then the tests
# make check  lint, format and types
# make test-oldest  the tests that concern Transformers and TRL, with the oldest of them in an environment beside
# make bench  truetune beside TRL on this GPU (benchmarks/compare.py has more recipes and peers)
VENV        ?= .venv
PYTHON      ?= python3
CONSTRAINTS  = constraints.txt
TESTS        =
BIN         := $(VENV)/bin
READY       := $(VENV)/.ready

.PHONY: demo test test-oldest check bench format setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $(READY)

setup: $(READY)

demo: $(READY)
	$(BIN)/truetune demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

OLDEST = tests/models tests/train tests/compat tests/trajectories tests/ops $(addprefix tests/test_,run.py cli.py recipe.py launch.py)

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TESTS="$(OLDEST)"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/compare.py --systems truetune,trl --recipe 0.6b-lora --recipe 0.6b-qlora --recipe 0.6b-full

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .mypy_cache .ruff_cache .pytest_cache
