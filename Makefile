# make demo   set up, then the whole job on the built-in model and data
# make test   set up, then the tests
# make soak   set up, then runs killed at random moments, for half an hour (SOAK_SEED=N repeats one)
# make fuzz   the fuzz tests with 20,000 new cases each
# make check  lint, format and types
# make test-oldest  the tests that concern Transformers and TRL, with the oldest of them in an environment beside
# make bench  truetune beside TRL on this GPU (benchmarks/compare.py has more recipes and peers)
VENV        ?= .venv
PYTHON      ?= python3
CONSTRAINTS  = constraints.txt
TESTS        =
BIN         := $(VENV)/bin
READY       := $(VENV)/.ready

.PHONY: demo test test-oldest soak fuzz check bench format setup clean
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

OLDEST = tests/models tests/train tests/compat tests/trajectories tests/ops tests/proof $(addprefix tests/test_,run.py cli.py mistakes.py recipe.py launch.py)

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TESTS="$(OLDEST)"

soak: $(READY)
	$(BIN)/python -m pytest -m soak -n 2 -rP tests/soak

fuzz: $(READY)
	TRUETUNE_FUZZ=20000 $(BIN)/python -m pytest -n 2 --dist loadfile --timeout=0 tests/fuzz

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/compare.py --systems truetune,trl --recipe 0.6b-lora --recipe 0.6b-qlora --recipe 0.6b-full \
		--out runs/bench.json

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .mypy_cache .ruff_cache .pytest_cache
