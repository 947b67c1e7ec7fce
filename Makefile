# `make` lists the verbs. Each is one visible command: where there is no make, type what it shows (README, "Without make").
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --no-deps --no-build-isolation --require-hashes

.DEFAULT_GOAL := help
.PHONY: help run test lab figures site bench mutants attack lint doctor lock browser clean

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

site: $(VENV)/ready-dev ## notebooks, documents and the report as pages that open from disk: docs/site/index.html
	$(BIN)/python tools/site.py

bench: $(VENV)/ready ## measure every claim of speed (about half an hour); data/results/bench.jsonl and docs/performance.md
	rm -f data/results/bench.jsonl
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --out data/results/bench.jsonl || exit 1; done
	$(BIN)/python benchmarks/page.py

mutants: $(VENV)/ready-dev ## do the tests see it? changes of the core that matter, each shown to them; the table in docs/trust.md
	$(BIN)/python tests/mutation/run.py --docs

attack: $(VENV)/ready-dev ## kills, corruptions, bad inputs, hostile models, crowds of processes; the table in docs/trust.md
	PYTHONPATH=tests $(BIN)/python -m attack --docs

doctor: $(VENV)/ready ## what is installed, cached and missing
	$(BIN)/dfrot-lab doctor

lint: $(VENV)/ready-dev ## ruff, mypy and pip check alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check

lock: $(VENV)/ready-dev ## rewrite locks/ and docs/licences.md after a pin has changed (needs the package index)
	$(PIP) uv==0.13.9
	$(BIN)/python tools/lock.py
	$(LOCKED) -r locks/build.txt -r locks/run.txt -r locks/dev.txt
	$(BIN)/python tools/licences.py

# The browser tests drive the machine's own Chromium. Where there is none, Debian's package is installed if that can be done without asking.
browser:
	@for name in chromium chromium-browser google-chrome; do if command -v $$name >/dev/null; then exit 0; fi; done; \
	get="timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium"; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $$get >/dev/null || { timeout 120 apt-get update -qq && $$get >/dev/null; } && exit 0; fi; \
	echo "No Chromium on PATH and none could be installed: the browser tests will be skipped (install chromium or google-chrome to run them)"

clean: ## remove .venv (the cache of models and results stays)
	rm -rf $(VENV)

# What is installed is what locks/ names, to the byte: pip compares each file's sha256 before it looks into it. torch without CUDA where pip
# finds it (locks/cpu.txt), else the index's, whose CUDA packages pip check then misses (locks/cuda.txt).
$(VENV)/ready: locks/build.txt locks/cpu.txt locks/run.txt locks/cuda.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) -r locks/build.txt
	$(LOCKED) -r locks/cpu.txt 2>/dev/null || true
	$(LOCKED) -r locks/run.txt
	$(BIN)/python -m pip check >/dev/null || $(LOCKED) -r locks/cuda.txt
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

$(VENV)/ready-dev: $(VENV)/ready locks/dev.txt
	$(LOCKED) -r locks/dev.txt
	touch $@
