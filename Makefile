# Everything runs from .venv, built once from pyproject.toml under the pins in constraints.txt.

PYTHON ?= python3
PIP_ARGS ?=
STAMP := .venv/.setup-done

export PYTHON PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-examples lint docs bench bench-quick soak clean

help:
	@echo 'make setup   build .venv; a second call reuses it'
	@echo 'make demo    set up, then run the demo: phinetune demo'
	@echo 'make test    set up, then run the tests'
	@echo 'make test-slow   set up, then run the tests that `make test` leaves out: several processes, a browser; minutes'
	@echo 'make test-examples   set up, then run everything in examples/; minutes'
	@echo 'make lint    set up, then check style, types and imports'
	@echo 'make docs    set up, then build the pages of docs/ as a site into build/site'
	@echo 'make bench   set up, then measure layers, training and answering beside loralib, PEFT, TRL and transformers; hours'
	@echo 'make bench-quick   the main ratios of these in five minutes'
	@echo 'make soak    set up, then fail every file operation and large allocation of a run in turn, try properties with'
	@echo '             thousands of inputs, fuzz the readers, kill `phinetune serve` and its jobs; hours (FORMS=, FAULTS=, SEED=,'
	@echo '             MOST=, FUZZ_MINUTES=, KILLS=; JOURNAL=file goes on where a sweep was cut off)'
	@echo '             AT=17 FAULTS=KILL FORMS=plain replays one fault'
	@echo 'make clean   delete .venv and the caches; runs/ stays'
	@echo
	@echo 'PYTHON=python3.12                  use this Python (3.10 to 3.13) instead of python3'
	@echo 'PIP_ARGS="--extra-index-url URL"   give pip more options, such as an index that has a CPU-only torch'

setup: $(STAMP)
	@echo 'Ready: .venv/bin/phinetune'

$(STAMP): pyproject.toml constraints.txt
	@sh tools/setup_venv.sh $@

demo: $(STAMP)
	@.venv/bin/phinetune demo

# Two tests at a time: each is one thread's work, and two processes with two threads each slow one another tenfold.
WORKERS = 2
test: $(STAMP)
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

# One after the other: they start several processes themselves.
test-slow: $(STAMP)
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow

test-examples: $(STAMP)
	@.venv/bin/python -m pytest tests/examples

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# A warning, such as a link that leads nowhere, ends it.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo 'Wrote build/site: open build/site/index.html'

bench: $(STAMP)
	@.venv/bin/python -m benchmarks.lora_layers
	@.venv/bin/python -m benchmarks.train
	@.venv/bin/python -m benchmarks.long_rows
	@.venv/bin/python -m benchmarks.data
	@.venv/bin/python -m benchmarks.plan
	@.venv/bin/python -m benchmarks.qlora
	@.venv/bin/python -m benchmarks.generate
	@.venv/bin/python -m benchmarks.answers
	@.venv/bin/python -m benchmarks.startup
	@.venv/bin/python -m benchmarks.serving
	@.venv/bin/python -m benchmarks.waiting
	@.venv/bin/python -m benchmarks.preferences
	@.venv/bin/python -m benchmarks.styles
	@.venv/bin/python -m benchmarks.forgetting
	@.venv/bin/python -m benchmarks.attention
	@.venv/bin/python -m benchmarks.processes

bench-quick: $(STAMP)
	@.venv/bin/python -m benchmarks.quick

FORMS = plain packed nf4
FAULTS = ENOSPC,EIO,EINTR,SHORT,KILL,LOST,LOST-NAMES,MEMORY
FUZZ_MINUTES = 10
KILLS = 200
FUZZED = data weights adapters config templates
soak: $(STAMP)
	@for form in $(FORMS); do .venv/bin/python tests/soak/sweep.py --form $$form --faults $(FAULTS) \
	  --seed $(or $(SEED),0) $(if $(MOST),--most $(MOST)) $(if $(AT),--at $(AT)) \
	  $(if $(JOURNAL),--journal $(JOURNAL)) || exit 1; done
ifndef AT
	.venv/bin/python -m pytest tests/soak/test_properties.py --hypothesis-profile=soak
	@for target in $(FUZZED); do .venv/bin/python tests/soak/fuzz.py $$target --minutes $(FUZZ_MINUTES) || exit 1; done
	.venv/bin/python tests/soak/serve_kills.py --kills $(KILLS) --seed $(or $(SEED),0)
	.venv/bin/python tests/soak/serve_schemas.py --minutes $(FUZZ_MINUTES)
endif

clean:
	rm -rf .venv .venv-setup.log build dist src/*.egg-info
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
