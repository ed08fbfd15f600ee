# Each of these is enough alone on a fresh machine with Python 3.11: they make .venv from constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
ROOMS := server memory kernels clients
IMAGE ?= loraplex:0.1.0
WORKERS ?= 2

.PHONY: serve test check lint types unit format docs bench-peers bench-mixture bench-gpu bench-work tune-gpu
.PHONY: bench-tiers bench-pool bench-cold soak-identity docs-test image deploy-test
.PHONY: bench-metrics dashboards dashboards-check cluster-test clean

serve: $(STAMP)  ## serve the built-in demo on http://127.0.0.1:8000
	$(BIN)/loraplex demo

test: check  ## everything that CI runs: lint, types, tests

check: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers cannot follow the import hook of an editable install: they get a tree of links.
types: $(STAMP)
	mkdir -p .types/loraplex
	for room in $(ROOMS); do ln -sfn ../../$$room .types/loraplex/$$room; done
	$(BIN)/mypy $(addprefix .types/loraplex/,$(ROOMS))

unit: $(STAMP)
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## pages that are made from code
	$(BIN)/python -m loraplex.server.settings_table > docs/settings.md
	$(BIN)/python deploy/helm/values_schema.py schema > deploy/helm/loraplex/values.schema.json
	$(BIN)/python deploy/helm/values_schema.py table > docs/helm-values.md

dashboards: $(STAMP)  ## Grafana's, from deploy/dashboards
	$(BIN)/python deploy/dashboards/write.py

dashboards-check: $(STAMP)  ## a demo server under load, a Prometheus that scrapes it, and every query of the dashboards
	$(BIN)/python tests/deploy/dashboard_check.py $(ARGS)

bench-peers: $(STAMP)  ## this engine beside transformers + PEFT; prints a record
	$(BIN)/python tests/bench/bench_peers.py

bench-mixture: $(STAMP)  ## step times of mixtures beside LoRA and the base; prints a record
	$(BIN)/python tests/bench/bench_mixture.py

# These two need nothing installed but torch, triton, transformers, safetensors and numpy, in .venv or in GPU_PYTHON.
bench-gpu:  ## correctness, then all records of an NVIDIA GPU, in under ten minutes; prints a table and JSON
	$(GPU_PYTHON) tests/bench/gpu/bench.py --device cuda $(ARGS)

tune-gpu:  ## time block shapes of the low-rank kernels; prints the tables of kernels/lora_tuning.py
	$(GPU_PYTHON) tests/bench/gpu/tune.py --device cuda $(ARGS)

bench-work: $(STAMP)  ## what steps make a GPU do, counted, and the host's times; needs no GPU; prints a record
	$(BIN)/python tests/bench/gpu/work.py $(ARGS)

bench-tiers: $(STAMP)  ## a pool of a quarter of the adapters, and ten thousand of them; prints records
	$(BIN)/python tests/bench/bench_tiers.py $(ARGS)

bench-pool: $(STAMP)  ## cost of pages by the size of the pool, and what a simulated day wastes; prints a record
	$(BIN)/python tests/bench/bench_pool.py $(ARGS)

bench-cold: $(STAMP)  ## loads from disk and from host memory beside plain reads and copies; prints a record
	$(BIN)/python tests/bench/bench_cold_load.py $(ARGS)

bench-metrics: $(STAMP)  ## CPU time of a scrape of /metrics; prints a record
	$(BIN)/python tests/bench/bench_metrics.py $(ARGS)

soak-identity: $(STAMP)  ## ten million operations in which nothing may be found under another identity
	$(BIN)/python tests/bench/soak_identity.py $(ARGS)

image: $(STAMP)  ## the image by buildah, as $(IMAGE), and its SBOM in build/; see docs/containers.md
	PYTHON=$(BIN)/python deploy/image/build.sh $(IMAGE) $(ARGS)

deploy-test: $(STAMP)  ## build the image, run it by podman from the chart's manifests, watch it by Prometheus; root on Debian
	tests/deploy/live/run.sh $(ARGS)

docs-test: $(STAMP)  ## the documentation's commands, those too that need clients which the suite does without
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --requirement tests/docs/clients.txt
	DOCS_CLIENT_PYTHON=$(CURDIR)/.venv-docs/bin/python $(BIN)/pytest tests/docs

cluster-test: $(STAMP)  ## chart and image on a real Kubernetes cluster, made here and gone afterwards; root on Debian
	deploy/cluster/test.sh $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .types .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
