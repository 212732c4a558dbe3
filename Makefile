# Every target sets up what it needs. PYTHON chooses the interpreter that .venv is made from (3.11 or newer).
PYTHON = python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
BENCHMARKS = overhead recovery exactly_once ingest codecs link straggler goodput time_to_accuracy \
	table sparse sparse_training shard_faults moving staleness recommend \
	serve overload rollout freshness fuzz_serving

.PHONY: setup demo test check bench docs clean

setup: .venv/.dev

demo: .venv/.demo
	$(BIN)/python examples/00_demo.py

test: .venv/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/house

bench: .venv/.dev
	@for name in $(BENCHMARKS); do \
		echo "$(BIN)/python -m benchmarks.$$name --quick"; \
		$(BIN)/python -m benchmarks.$$name --quick || exit 1; \
	done

docs: .venv/.docs
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first and by itself, so that nothing else decides which build of it is installed.
.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time takes minutes, mostly for torch."
	$(PIP) torch
	$(PIP) hatchling editables
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) --no-build-isolation -e '.[serve]'
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@ .venv/.demo

.venv/.docs: .venv/.dev
	$(PIP) --no-build-isolation -e '.[dev,docs]'
	@touch $@
