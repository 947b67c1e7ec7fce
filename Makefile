# `make` lists the verbs. Each is one visible command: where there is no make, type what it shows (README, "Without make").
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test lab figures bench mutants attack lint doctor browser clean

BENCHMARKS := refinement evaluation hadamard gptq capture growth explorers

help: ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/ready ## the main job, end to end, on the default model; results in runs/<date>/
	$(BIN)/dfrot-lab run

test: $(VENV)/ready-dev browser ## lint, types, unit tests, tests on the default model, notebooks, explorers in a browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: $(VENV)/ready ## JupyterLab on the notebooks, at the explorers: Run > Run All Cells
	$(BIN)/jupyter lab notebooks/09-explorer.ipynb

figures: $(VENV)/ready ## rewrite figures/ and data/results/ from the same code; computes what is not stored (hours), goes on where stopped
	$(BIN)/dfrot-lab figures

bench: $(VENV)/ready ## measure every claim of speed (about half an hour); data/results/bench.jsonl and docs/performance.md
	rm -f data/results/bench.jsonl
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --out data/results/bench.jsonl || exit 1; done
	$(BIN)/python benchmarks/page.py

mutants: $(VENV)/ready-dev ## do the tests see it? 136 changes of the core, each shown to them; the table in docs/trust.md
	$(BIN)/python tests/mutation/run.py --docs

attack: $(VENV)/ready-dev ## kills, corruptions, bad inputs, hostile models, crowds of processes; the table in docs/trust.md
	PYTHONPATH=tests $(BIN)/python -m attack --docs

doctor: $(VENV)/ready ## what is installed, cached and missing
	$(BIN)/dfrot-lab doctor

lint: $(VENV)/ready-dev ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The browser tests drive the machine's own Chromium. Where there is none, Debian's package is installed if that can be done without asking.
browser:
	@for name in chromium chromium-browser google-chrome; do if command -v $$name >/dev/null; then exit 0; fi; done; \
	get="timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium"; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $$get >/dev/null || { timeout 120 apt-get update -qq && $$get >/dev/null; } && exit 0; fi; \
	echo "No Chromium on PATH and none could be installed: the browser tests will be skipped (install chromium or google-chrome to run them)"

clean: ## remove .venv (the cache of models and results stays)
	rm -rf $(VENV)

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
