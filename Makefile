# thinkimg: the targets that README and docs name. Everything happens in .venv; nothing outside the clone is changed.
PYTHON ?= python3.11
BIN := .venv/bin
export PREFECT_HOME ?= $(CURDIR)/.prefect
# CLOSURE=cpu or gpu: which packages; left out, those that .venv holds, or that fit the machine.
CLOSURE ?=
READY := .venv/ready$(addprefix -,$(CLOSURE))

.PHONY: demo setup test test-all lint ui server deploy worker chaos

demo: $(READY)
	@$(BIN)/thinkimg run --preset tiny

setup: $(READY)

$(READY): pyproject.toml $(wildcard requirements/*)
	@PYTHON="$(PYTHON)" CLOSURE="$(CLOSURE)" bash requirements/setup.sh

.venv/ready-test: $(READY) requirements/test.txt
	@PYTHON="$(PYTHON)" CLOSURE="$(CLOSURE)" bash requirements/setup.sh test

test: .venv/ready-test
	$(BIN)/pytest -q -m "not long"

test-all: .venv/ready-test
	@bash requirements/chromium.sh
	$(BIN)/pytest -q -m long

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

ui: $(READY)
	@$(BIN)/thinkimg track ui --preset tiny

# Scheduled runs: three terminals, or three services. Whoever sets PREFECT_API_URL has a server of his own.
API := $(or $(PREFECT_API_URL),http://127.0.0.1:4200/api)
PREFECT := PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=true $(BIN)/prefect --no-prompt

# Leases on disk: else whoever held a concurrency limit when the server is restarted holds it for ever.
server: $(READY)
	@PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem \
		$(PREFECT) server start --host 127.0.0.1 --port $(or $(filter-out //%,$(lastword $(subst :, ,$(API:/api=)))),4200)

# The pool, the device's concurrency limit, the deployments as prefect.yaml has them, with their schedules.
deploy: $(READY)
	@PREFECT_API_URL=$(API) $(PREFECT) work-pool create thinkimg --type process --overwrite
	@PREFECT_API_URL=$(API) $(BIN)/python -m flows._device
	@PWD="$(CURDIR)" PREFECT_API_URL=$(API) $(PREFECT) deploy --all

worker: $(READY)
	@PREFECT_API_URL=$(API) $(PREFECT) worker start --pool thinkimg --type process

# Hundreds of kills; THINKIMG_SEED=… replays.
chaos: .venv/ready-test
	THINKIMG_KILLS=$(or $(KILLS),300) $(BIN)/pytest -q -m long tests/system/test_chaos.py
