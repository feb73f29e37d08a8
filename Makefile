# `make demo` and `make test` each work alone on a fresh machine with Python >= 3.10 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEEPSPEED := $(VENV)/deepspeed
TRITON := $(VENV)/triton

.PHONY: demo science test test-slow test-browser check bench gpu-day clean

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

demo: $(STAMP)  ## train the tiny lab model with PGPO and with SDPO, and draw both
	$(BIN)/pgpo demo

science: $(STAMP)  ## the real Science-QA questions with a small model made on the spot
	$(BIN)/pgpo train --task science_qa --domain physics

test: $(STAMP) $(DEEPSPEED) $(TRITON)  ## the default suite: < 10 minutes on 2 cores, no GPU, no network
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-browser: $(STAMP)  ## the report's page in a real browser; Debian: apt-get install chromium
	$(BIN)/python -m pytest -m browser tests/browser

check: $(STAMP)  ## what pre-commit runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/lab_step.py

gpu-day: $(STAMP)  ## all that waits for a GPU: nine minutes, JSON in benchmarks/results/gpu-day; no GPU: --rehearse
	$(BIN)/python benchmarks/gpu_day.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
