# make demo         text -> model -> length direction, in a few minutes, with nothing but this machine's own files
# make test         the tests, WORKERS=2 files at a time
# make check        ruff and mypy
# make reliability  the slow tests and a table of cases and failures; stopped, it goes on where it was; PART=1/4 is a quarter
# make coverage     the tests of the core modules, and which lines and branches of them are run
# make mutants      mistakes put into the core modules, and whether their tests notice; after make coverage; SAMPLE=40
# make bench        the guard, then every benchmark, one after the other
# make guard        fails where the engine is more than 15 % slower beside its peer than recorded; two minutes
# make gpu          the tests that need a GPU, and those that are to hold on one too; without one they say so
# make parity       against mteb, another project's benchmark harness
# make clean        removes the environment and the caches; data.txt and finished models stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH := $(VENV)/.installed-bench
PARITY := $(VENV)/.installed-parity
OUT := finetuned-bert
PART := 1/1
RESULTS := reliability-results.jsonl
SAMPLE := 40
WORKERS := 2
CORE_TESTS := tests/test_files.py tests/fit/test_checkpoint.py tests/reliability/test_damage.py \
	$(addprefix tests/data/test_, $(addsuffix .py, lines read malformed bad_input accounting tags pairs labels retrieval kept scratch stored)) \
	$(addprefix tests/serve/test_, $(addsuffix .py, batcher guard quick server))

# Nothing here asks a model hub for anything; the demo's weights come from the `offline` extra.
export HF_HUB_OFFLINE := 1

.PHONY: demo test check gpu coverage mutants bench guard parity reliability reliability-table environment clean

demo: $(INSTALLED) data.txt
	$(BIN)/embedtune data check data.txt
	$(BIN)/embedtune fit mlm data.txt --out $(OUT) --force --discard
	$(BIN)/embedtune refine length $(OUT) --data data.txt

# A data.txt of your own is used as it is.
data.txt: | $(INSTALLED)
	$(BIN)/embedtune data example --out data.txt --lines 8000

# A file's tests run in one process: what they share is made once.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Exit code 5 of pytest: all tests of this part have passed before.
reliability: $(INSTALLED)
	RELIABILITY_RESULTS=$(RESULTS) RELIABILITY_PART=$(PART) $(BIN)/python -m pytest -m "slow or target"; \
	status=$$?; $(BIN)/python tests/reliability/ledger.py $(RESULTS); test $$status = 0 || test $$status = 5

reliability-table: $(INSTALLED)
	$(BIN)/python tests/reliability/ledger.py $(RESULTS)

# What is measured, and what is asked for, stands in pyproject.toml.
coverage: $(INSTALLED)
	$(BIN)/coverage run -m pytest $(CORE_TESTS)
	$(BIN)/coverage report

mutants: $(INSTALLED)
	$(BIN)/python tests/reliability/mutants.py --sample $(SAMPLE)

gpu: $(INSTALLED)
	EMBEDTUNE_TEST_GPU=1 $(BIN)/python -m pytest -m "gpu or also_gpu"

parity: $(PARITY)
	$(BIN)/python -m pytest -m parity

check: $(INSTALLED)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

guard: $(BENCH)
	$(BIN)/python benchmarks/guard.py

bench: guard
	for script in $(filter-out benchmarks/guard.py benchmarks/steps.py, $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

environment: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[offline,dev]'
	touch $@

$(BENCH): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(PARITY): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[parity]'
	touch $@

clean:
	rm -rf $(VENV) .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
