# `make demo` and `make test` work from a fresh clone with nothing but Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch by exactly this version, in one pip call with the rest: a looser request brings gigabytes of CUDA libraries
TORCH ?= torch==2.13.0
# constraints.txt names one version of every direct and transitive dependency of every extra. The variables hold for
# the isolated environment that builds the package, too; which of the two pip reads there depends on pip's version.
LOCK := $(CURDIR)/constraints.txt
LOCKED := PIP_CONSTRAINT='$(LOCK)' PIP_BUILD_CONSTRAINT='$(LOCK)'
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
UV := uv==0.13.9
# what is resolved: all extras, for every platform and every Python that pyproject.toml allows
RESOLVE := pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate --custom-compile-command 'make lock'

.PHONY: demo test test-lowest test-latest lock clean

demo: $(VENV)/demo.done  ## set up, then find, break and put back the patient's vital weights; writes demo/report.html
	$(BIN)/surgeon demo -o demo
	@echo "open $(CURDIR)/demo/report.html"

test: $(VENV)/test.done  ## set up with the test extra, then lint, type-check and run every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 -m slow

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: $(BIN)/python pyproject.toml constraints.txt
	$(LOCKED) $(BIN)/python $(PIP_INSTALL) -e '.[report]' $(TORCH)
	touch $@

$(VENV)/test.done: $(BIN)/python pyproject.toml constraints.txt
	$(LOCKED) $(BIN)/python $(PIP_INSTALL) -e '.[test]' $(TORCH)
	touch $@ $(VENV)/demo.done

# Before a release, by hand: the quick round with the lowest versions that pyproject.toml claims.
test-lowest: .venv-lock/bin/uv
	printf '$(TORCH)\n' | .venv-lock/bin/uv $(RESOLVE) --resolution lowest-direct pyproject.toml - -o .venv-lock/lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	PIP_CONSTRAINT=.venv-lock/lowest.txt .venv-lowest/bin/python $(PIP_INSTALL) -e '.[test]' $(TORCH)
	.venv-lowest/bin/python -m pytest -n 2 -o filterwarnings=default

# Before a release, by hand: the quick round with the newest version of everything but torch (TORCH=torch for that, too).
# A new warning of a dependency is printed at the end and is not an error.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python $(PIP_INSTALL) --upgrade -e '.[test]' $(TORCH)
	.venv-latest/bin/python -m pytest -n 2 -o filterwarnings=default

lock: .venv-lock/bin/uv  ## renew constraints.txt, and say what changed
	cp constraints.txt .venv-lock/before.txt
	printf '$(TORCH)\nhatchling\n' | .venv-lock/bin/uv $(RESOLVE) --upgrade pyproject.toml - -o constraints.txt
	@diff .venv-lock/before.txt constraints.txt | grep '^[<>]' || echo "nothing changed"

.venv-lock/bin/uv: Makefile
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(PIP_INSTALL) $(UV)
	touch $@

clean:
	rm -rf .venv .venv-lock .venv-lowest .venv-latest
