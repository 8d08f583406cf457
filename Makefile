# Both targets work from a fresh clone with nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch by exactly this version, in one pip call with the rest: a looser request brings gigabytes of CUDA libraries
TORCH := torch==2.13.0

.PHONY: demo test check clean

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

$(VENV)/demo.done: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[report]' $(TORCH)
	touch $@

$(VENV)/test.done: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]' $(TORCH)
	touch $@ $(VENV)/demo.done

clean:
	rm -rf $(VENV)
