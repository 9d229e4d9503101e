# make demo: an environment, pre-training on real images, evaluation, a report.
# make test: the test suite.   make docs: build/docs/index.html.
PYTHON ?= python3
# A pair that is known to work; any torch >= 2.10 with its torchvision does.
TORCH ?= torch==2.11.0 torchvision==0.26.0
BIN := .venv/bin

# Without an NVIDIA driver the kernels for GPUs could not run here, so these targets save the minutes of compiling them;
# with one, they are compiled for the GPUs in this machine. `pip install .` decides by nvcc instead.
ifneq ($(shell command -v nvidia-smi),)
TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | tr '\n' ';')
export TORCH_CUDA_ARCH_LIST
else
MOCO_EXT_CUDA ?= 0
endif
export MOCO_EXT_CUDA

NATIVE := CMakeLists.txt setup.py pyproject.toml tools/build_backend.py $(shell find csrc -name tests -prune -o -type f -print)

.PHONY: demo test docs bench lint native-test gpu gpu-build gpu-test gpu-sanitize gpu-bench clean

demo: .venv/installed
	$(BIN)/moco-ext pretrain --data digits --output runs/demo

test: .venv/installed
	$(BIN)/python -m pytest python_tests

# Pages and the API reference; a broken link or docstring is an error.
docs: .venv/installed
	$(BIN)/python -m pip install --quiet sphinx furo myst-parser
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

# The wheel's metadata names its dependencies; torch goes first so that it is this one.
.venv/installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[train,test]"
	touch $@

# Timings want a machine that does nothing else.
bench: .venv/installed
	$(BIN)/python -m pytest bench --ignore=bench/bench_loader.py --benchmark-json=bench/results/$(or $(NAME),cpu).json
	$(BIN)/python bench/table.py bench/results/$(or $(NAME),cpu).json

lint: .venv/installed
	$(BIN)/python -m pip install --quiet ruff==0.17.6 mypy clang-format==23.1.5
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy
	$(BIN)/python bench/readme.py --check

# CUDA kernels' source run on the host, against float64 loops; needs the CUDA headers, no GPU.
native-test: .venv/installed
	cmake -S . -B build/tests -G Ninja -DMOCO_EXT_TESTS=ON -DMOCO_EXT_PYTHON=OFF -DMOCO_EXT_WERROR=ON \
	  -DTORCH_INCLUDE_DIR=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include
	cmake --build build/tests
	ctest --test-dir build/tests --output-on-failure --parallel 2

# On a machine with a GPU and its own python with torch; needs no network. Each part also alone, and OPS="enqueue ..."
# for some kernels alone; JSON goes to $(OUT).
OUT ?= build/gpu
gpu: gpu-build gpu-test gpu-sanitize gpu-bench
gpu-build gpu-test gpu-sanitize gpu-bench: gpu-%:
	$(PYTHON) tools/gpu.py $* --out $(OUT) $(if $(OPS),--ops $(OPS))

clean:
	rm -rf .venv build dist *.egg-info moco_ext/lib moco_ext/_C*.so compile_commands.json
