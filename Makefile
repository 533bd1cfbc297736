# thinkimg: the targets that the README names. Everything happens in .venv; nothing outside the clone is changed.
PYTHON ?= python3.11
BIN := .venv/bin
export PREFECT_HOME ?= $(CURDIR)/.prefect
READY := .venv/ready

.PHONY: demo setup test test-all lint ui clean-venv

demo: $(READY)
	@$(BIN)/thinkimg run --preset tiny

setup: $(READY)

$(READY): pyproject.toml $(wildcard requirements/*) thinkimg/torchvision_hook.py
	@PYTHON="$(PYTHON)" bash requirements/setup.sh

$(READY)-test: $(READY) requirements/test.txt
	@PYTHON="$(PYTHON)" bash requirements/setup.sh test

test: $(READY)-test
	$(BIN)/pytest -q -m "not long"

test-all: $(READY)-test
	$(BIN)/pytest -q -m long

lint: $(READY)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

ui: $(READY)
	@$(BIN)/thinkimg track ui --preset tiny
