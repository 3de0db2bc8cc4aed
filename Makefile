# Each command does all its own set-up; all that is needed is Python 3.11 or newer, with its venv module.
#   make quickstart   train, grow, race and report on the embedded corpus
#   make test         linters and the whole test suite
PYTHON ?= python3
BIN := .venv/bin
# Tests are many small ones: one thread each and two side by side is faster than two threads each.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: quickstart test lint
.NOTPARALLEL:

quickstart: .venv/core.stamp
	$(BIN)/tokenformer quickstart --resume

test: lint
	$(TEST)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

# The stamps stand for "installed"; a change of either file installs again.
.venv/core.stamp: pyproject.toml constraints.txt | .venv/created.stamp
	@echo "Installing into .venv (minutes, the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/created.stamp
	@echo "Installing into .venv (minutes, the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ .venv/core.stamp

.venv/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "This Python has no venv module (on Debian: apt install python3-venv); or make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@
