# Both targets set themselves up: Python 3.11 and make are enough.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: test demo lint clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,torch,hf,rtx,report,view,fast,dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

clean:
	rm -rf .venv .cache out
