# thinkimg: the targets that README and docs name. Everything happens in .venv; nothing outside the clone is changed.
PYTHON ?= python3.11
BIN := .venv/bin
export PREFECT_HOME ?= $(CURDIR)/.prefect
# CLOSURE=cpu or gpu: which packages; left out, those that .venv holds, or that fit the machine.
CLOSURE ?=
export PYTHON CLOSURE
READY := .venv/ready$(addprefix -,$(CLOSURE))

.PHONY: demo setup test test-all test-inspect test-evaluators test-verifiers families lint ui server deploy worker chaos

demo: $(READY)
	@$(BIN)/thinkimg run --preset tiny

setup: $(READY)

$(READY): pyproject.toml $(wildcard requirements/*)
	@bash requirements/setup.sh

.venv/ready-test: $(READY) requirements/test.txt
	@bash requirements/setup.sh test

test: .venv/ready-test
	$(BIN)/pytest -q -n 2 --dist loadfile --durations=25 -m "not long and not extra"

test-all: .venv/ready-test
	@bash requirements/chromium.sh
	$(BIN)/pytest -q -m long

# An environment for each extra, over the packages of .venv; Inspect's tests need Chromium, too.
.venv-%/ready: .venv/ready-test requirements/%.txt requirements/extra.sh
	@bash requirements/extra.sh $*

test-inspect: .venv-inspect/ready
	@bash requirements/chromium.sh
	.venv-inspect/bin/python -m pytest -q tests/extras/test_inspect.py

test-evaluators: .venv-evaluators/ready
	$(BIN)/pytest -q tests/extras/test_evaluators.py

test-verifiers: .venv-verifiers/ready
	$(BIN)/python -m pip --disable-pip-version-check --quiet --python .venv-verifiers/bin/python install --no-deps \
	  -e thinkimg/environments/verifiers
	.venv-verifiers/bin/python -m pytest -q tests/extras/test_verifiers.py

# The table of docs/families.md, from the results of the tests that it names.
families: .venv/ready-test
	$(BIN)/pytest -q -n 2 --dist loadfile --junitxml=.families.xml $(addprefix tests/,families engine/test_families.py \
	  trainer images/test_patches.py)
	$(BIN)/python tests/support/family_table.py .families.xml --write

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

ui: $(READY)
	@$(BIN)/thinkimg track ui --preset tiny

# Scheduled runs: three terminals, or three services. Whoever sets PREFECT_API_URL has a server of his own.
API := $(or $(PREFECT_API_URL),http://127.0.0.1:4200/api)
PREFECT := $(BIN)/prefect --no-prompt
# Exported, not written into the commands, where a shell would read what is special in a path or an address.
deploy worker: export PREFECT_API_URL := $(API)
# Prefect's client would ask a proxy for this machine, too. Both spellings, with the user's exceptions of both.
comma := ,
blank := $(subst ,, )
LOCAL := $(subst $(blank),$(comma),$(strip $(subst $(comma), ,$(no_proxy) $(NO_PROXY)) 127.0.0.1 localhost ::1))
server deploy worker: export NO_PROXY := $(LOCAL)
server deploy worker: export no_proxy := $(LOCAL)
deploy: export PWD := $(CURDIR)
server deploy worker: export PREFECT_SERVER_ANALYTICS_ENABLED := false
server deploy worker: export DO_NOT_TRACK := true
server: export PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE := prefect.server.concurrency.lease_storage.filesystem
chaos: export THINKIMG_KILLS := $(or $(KILLS),300)

# Leases on disk: else whoever held a concurrency limit when the server is restarted holds it for ever.
server: $(READY)
	@$(PREFECT) server start --host 127.0.0.1 --port $(or $(filter-out //%,$(lastword $(subst :, ,$(API:/api=)))),4200)

# The pool, the device's concurrency limit, the deployments as prefect.yaml has them, with their schedules.
deploy: $(READY)
	@$(PREFECT) work-pool create thinkimg --type process --overwrite
	@$(BIN)/python -m flows._device
	@$(PREFECT) deploy --all

worker: $(READY)
	@$(PREFECT) worker start --pool thinkimg --type process

# Hundreds of kills; THINKIMG_SEED=… replays.
chaos: .venv/ready-test
	$(BIN)/pytest -q -m long tests/system/test_chaos.py
