# Each target works from a clean clone on its own. PYTHON picks the interpreter (3.11 or newer).
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= auto
# Which tests `make test` runs.
MARKS   ?= not parity and not long and not gpu_compile
BIN      = $(VENV)/bin

# The newest JAX needs Python 3.12; empty where there is none.
NEWEST ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3 python3.13 python3.14; \
	do $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-long parity test-newest test-gpu-compile test-device lint bench bench-gpu clean
COMMA   := ,

demo: $(VENV)/.base
	$(BIN)/python -m jaxalope.train --config=demo --workdir=runs/demo
	$(BIN)/python -m jaxalope.infer --model=runs/demo --policy='temperature=0.7' --max_new_tokens=400 \
	  --prompt='def '
	@echo 'Loss picture: runs/demo/loss.png'

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(WORKERS) -m '$(MARKS)'

# Laws of our own making that take long: exact distributions, every form of a kernel, eight devices.
test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m long

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -n $(WORKERS) -m parity tests/parity

# The same suite under Python 3.12 or newer, hence the newest JAX, where such a Python is found.
test-newest:
	@if [ -z "$(NEWEST)" ]; then echo 'No Python 3.12 or newer: the newest JAX is not tested here.'; \
	else $(MAKE) test PYTHON="$(NEWEST)" VENV=.venv-newest; fi

# Compiles for GPUs that are not there; in an environment of its own, as JAX with its CUDA plugin asks
# for a driver wherever JAX_PLATFORMS does not say otherwise.
GPU_COMPILE = .venv-gpu-compile
test-gpu-compile:
	$(MAKE) $(GPU_COMPILE)/.cuda-compile VENV=$(GPU_COMPILE)
	$(GPU_COMPILE)/bin/python -c 'import jax_plugins.xla_cuda12'  # without it, every test would be skipped
	$(GPU_COMPILE)/bin/python -m pytest -n $(WORKERS) -m gpu_compile

# The kernels' laws on the accelerator of this machine: DEVICE=cuda, or tpu, which one process holds.
DEVICE ?= cuda
test-device: $(VENV)/.dev $(VENV)/.$(DEVICE)
	JAX_PLATFORMS=$(DEVICE),cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest \
	  -n $(if $(filter tpu,$(DEVICE)),0,4 --dist=load) -m device tests/layers/ops

bench: $(VENV)/.parity
	$(BIN)/python bench/kda.py
	$(BIN)/python bench/moe.py
	$(BIN)/python bench/data_pipeline.py
	$(BIN)/python bench/decode_overhead.py
	$(BIN)/python bench/speculative.py
	$(BIN)/python bench/policy_chain.py --batches=1,8
	$(BIN)/python bench/autodeco.py --task=step
	$(BIN)/python bench/power.py --chains=1 --chains=16 --turns=2
	$(BIN)/python bench/vs_transformers.py
	$(BIN)/python bench/cross_entropy.py
	$(BIN)/python bench/latent_decode.py
	$(BIN)/python bench/hybrid_decode.py
	$(BIN)/python bench/calm.py --task=generation

# What only a CUDA machine can say, recorded; with fla-core and torch for CUDA also against fla. One
# benchmark's failure leaves the others alone. SHORT=1 takes the sizes that say most, in minutes.
ROWS = bench/results
BENCH_GPU = kda train hybrid latents experts policies denoise vectors tune
bench-gpu: $(VENV)/.cuda
	$(MAKE) --keep-going $(BENCH_GPU:%=bench-gpu-%)

.PHONY: $(BENCH_GPU:%=bench-gpu-%)
$(BENCH_GPU:%=bench-gpu-%): $(VENV)/.cuda
bench-gpu-kda:
	$(BIN)/python bench/kda_gpu.py $(if $(SHORT),--heads=32 --lengths=8192$(COMMA)65536) --output=$(ROWS)/kda_gpu.jsonl
bench-gpu-train:
	$(BIN)/python bench/train_step.py --config=kimi_linear_653m --set data.batch_size=8 --set optimizer=muon \
	  --side=kda_implementation=xla --side=kda_implementation=pallas_gpu --output=$(ROWS)/train_step.jsonl
bench-gpu-hybrid:
	$(BIN)/python bench/hybrid_decode.py --model=kimi_linear_48b --layers=4 --memory_gib=60 \
	  --contexts=$(if $(SHORT),4096$(COMMA)1048576,4096$(COMMA)32768$(COMMA)131072$(COMMA)524288$(COMMA)1048576) \
	  --output=$(ROWS)/hybrid_decode.jsonl
bench-gpu-latents:
	$(BIN)/python bench/latent_decode.py --shape=kimi_48b --dtype=bfloat16 --batches=1,8,64 \
	  --contexts=$(if $(SHORT),32768,4096$(COMMA)32768$(COMMA)262144$(COMMA)1048576) \
	  --implementations=xla,pallas_gpu --output=$(ROWS)/latent_decode.jsonl
bench-gpu-experts:
	$(BIN)/python bench/moe.py --shape=kimi_48b --tokens=8192 --dtype=bfloat16 --forms=blocked,pallas_gpu,tokamax \
	  --output=$(ROWS)/moe.jsonl
bench-gpu-policies:
	$(BIN)/python bench/policy_chain.py --batches=64 --output=$(ROWS)/policy_chain.jsonl
bench-gpu-denoise:
	$(BIN)/python bench/denoise.py --output=$(ROWS)/denoise.jsonl
bench-gpu-vectors:
	$(BIN)/python bench/calm.py --task=generation --output=$(ROWS)/calm_generation.jsonl
# Rewrites layers/ops/tuning.json where a choice is faster than the default: commit it.
bench-gpu-tune:
	$(BIN)/python bench/tune.py --op=kda --shape=kimi_48b --dtype=bfloat16 --tokens=8192 --output=$(ROWS)/tune.jsonl
	$(BIN)/python bench/tune.py --op=grouped_matmul --shape=kimi_48b --dtype=bfloat16 --tokens=8192 --output=$(ROWS)/tune.jsonl
	$(BIN)/python bench/tune.py --op=latent_decode --shape=kimi_48b --dtype=bfloat16 --tokens=32768 --output=$(ROWS)/tune.jsonl

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv* .cache runs *.egg-info build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Jaxalope needs Python 3.11 or newer; this is %d.%d. Set PYTHON=/path/to/python3.11." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp a set of extras; a changed pyproject.toml installs again.
$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
$(VENV)/.cuda: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[cuda]'
	touch $@
$(VENV)/.tpu: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[tpu]'
	touch $@
$(VENV)/.cuda-compile: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev,cuda-compile]'
	touch $@
$(VENV)/.parity: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[parity]'
	touch $@
