# make demo    pretrain on real images, evaluate, write a report
# make test    the tests, in minutes; make test-slow: those of more than ten seconds; make torture: kills, random calls
# make sanitize   the CPU operators with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make lint    style, types, imports, spelling
# make docs    build/docs/index.html
# make wheel   dist/: an sdist and a wheel
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# These versions work together. Any torch >= 2.10 with its torchvision does: make TORCH="torch==2.13.0 torchvision==0.28.0"
TORCH ?= torch==2.11.0 torchvision==0.26.0

# Without an NVIDIA driver: no CUDA kernels, which take minutes to compile, and torch's CPU build if it can be downloaded
# (the default build for Linux includes the CUDA libraries). macOS has only one build.
NVIDIA_SMI := $(shell command -v nvidia-smi 2>/dev/null)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(NVIDIA_SMI),)
MOCO_EXT_CUDA ?= 0
export MOCO_EXT_CUDA
ifeq ($(origin TORCH)-$(shell uname -s 2>/dev/null),file-Linux)
CPU_TORCH := $(addsuffix +cpu,$(TORCH))
endif
endif

NATIVE := CMakeLists.txt setup.py pyproject.toml tools/build_backend.py $(shell find csrc -name tests -prune -o -type f -print)

.NOTPARALLEL:  # pip, CMake and pytest use all cores themselves
.PHONY: demo test test-slow torture sanitize sanitize-address sanitize-thread docs wheel wheel-aarch64 bench lint native-test aarch64-test gpu gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 gpu-rehearsal clean

demo: $(VENV)/installed
	$(BIN)/moco-ext pretrain --data digits --output runs/demo --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest python_tests -m "not slow and not torture" -n auto --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest python_tests -m slow

# Three quarters of an hour: lost processes and nodes, a hundred kills at random moments, and random calls of the
# operators with a new SEED.
SEED ?= $(shell date +%s)
SECONDS_OF_CALLS ?= 900
torture: $(VENV)/installed
	$(BIN)/python -m pytest python_tests -m torture
	$(BIN)/python tools/torture.py --kills 100 --out bench/results/torture.json
	$(BIN)/python tools/fuzz.py --seconds $(SECONDS_OF_CALLS) --seed $(SEED)

# The test of the vector loops, those of the operators, and random calls, with sanitizers. Python keeps memory until its
# end; a test asks for more memory than there is; torch and OpenMP are compiled without ThreadSanitizer; sanitizers use
# memory of their own.
sanitize: sanitize-address sanitize-thread
sanitize-address: LIBRARY := libasan.so
sanitize-thread: LIBRARY := libtsan.so
sanitize-address sanitize-thread: sanitize-%: $(VENV)/installed
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CXX_COMPILER=$(CXX) \
	  -DMOCO_EXT_SANITIZE=$* -DMOCO_EXT_TESTS=ON \
	  -DTORCH_INCLUDE_DIR=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include
	$(BIN)/cmake --build build/$@ --target moco_ext test_vector_loops
	$(BIN)/ctest --test-dir build/$@ --output-on-failure --no-tests=error --tests-regex vector_loops
	mkdir -p build/$@/package && cp -r moco_ext build/$@/package
	$(BIN)/cmake --install build/$@ --prefix build/$@/package/moco_ext
	cd build/$@ && export PYTHONPATH=$$PWD/package OMP_NUM_THREADS=3 \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:allocator_may_return_null=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=$(LIBRARY)) $$($(CXX) -print-file-name=libstdc++.so.6)" && \
	$(abspath $(BIN))/python -m pytest -q -s -p no:cacheprovider -k "not compiles and not older_processors and not peak_memory" \
	  $(addprefix $(CURDIR)/python_tests/test_,$(addsuffix .py,info_nce info_nce_options soft_labels nearest_keys enqueue \
	  momentum_update l2_normalize augment)) && \
	$(abspath $(BIN))/python $(CURDIR)/tools/fuzz.py --seconds 60

# A broken link or docstring is an error.
docs: $(VENV)/installed
	$(PIP) install --quiet --group docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

# Only an index that answers within 10 seconds and has the CPU build is used.
$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@if [ -n "$(CPU_TORCH)" ] && timeout 10 $(PIP) index versions torch --extra-index-url $(CPU_INDEX) \
	    --retries 0 --timeout 5 2>/dev/null | grep -qF '$(patsubst torch==%,%,$(firstword $(CPU_TORCH)))'; then \
	  echo "Downloading $(CPU_TORCH): the CPU build, about 200 MB"; \
	  $(PIP) install --extra-index-url $(CPU_INDEX) $(CPU_TORCH); \
	else \
	  echo "Downloading $(TORCH): about 2.7 GB if it includes the CUDA libraries"; \
	  $(PIP) install $(TORCH); \
	fi
	touch $@

$(VENV)/installed: $(NATIVE) | $(VENV)/torch
	@echo "Installing the dependencies and compiling moco_ext: a few minutes"
	$(PIP) install --quiet --group build --editable ".[train,test]"
	touch $@

# dist/: the sdist and, built from it, one wheel for every Python >= 3.10 and torch >= 2.10; its glibc is that of this
# Linux. For all GPUs: make wheel MOCO_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=all
wheel: | $(VENV)/torch
	$(PIP) install --quiet --group wheel
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist
	$(PIP) wheel --quiet --no-deps --wheel-dir build/wheels dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist build/wheels/*.whl

# The wheel for aarch64, for CPUs only, after `make wheel`. Needs Debian's g++-aarch64-linux-gnu.
AARCH64 := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
wheel-aarch64: $(VENV)/installed
	_PYTHON_HOST_PLATFORM=linux-aarch64 MOCO_EXT_CUDA=0 MOCO_EXT_CMAKE_ARGS="$(AARCH64)" \
	  $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheels dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist build/wheels/*aarch64.whl

# Meaningful only on an idle machine.
bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --ignore=bench/bench_loader.py --benchmark-json=bench/results/$(or $(NAME),cpu).json
	$(BIN)/python bench/table.py bench/results/$(or $(NAME),cpu).json

lint: $(VENV)/installed
	$(PIP) install --quiet --group lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/python bench/readme.py --check
	$(BIN)/python bench/ablations.py --check

# Runs the CUDA kernels' source on the host and compares with float64 loops. Needs the CUDA headers but no GPU.
native-test: $(VENV)/installed
	-$(PIP) install --quiet --no-deps --group native-test  # without it, CuTe is not compared
	$(BIN)/cmake -S . -B build/tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DMOCO_EXT_TESTS=ON -DMOCO_EXT_WERROR=ON \
	  -DCUTLASS_INCLUDE_DIR=$$(ls -d $(abspath $(VENV))/lib/python*/site-packages/cutlass_library/source/include) \
	  -DTORCH_INCLUDE_DIR=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure --parallel 2

# The operators compiled for aarch64, and the test of the CPU kernels' vector loops under QEMU. Needs Debian's
# g++-aarch64-linux-gnu and qemu-user-static.
aarch64-test: $(VENV)/installed
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(AARCH64) \
	  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64-static;-L;/usr/aarch64-linux-gnu" \
	  -DMOCO_EXT_TESTS=ON -DMOCO_EXT_WERROR=ON \
	  -DTORCH_INCLUDE_DIR=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include
	$(BIN)/cmake --build build/aarch64 --target moco_ext test_vector_loops
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure --no-tests=error --tests-regex vector_loops

# On a machine with a GPU, with the torch of $(PYTHON); needs no network. JSON goes to $(OUT). STAGE="1 2" or gpu-1 .. gpu-5
# selects stages, MINUTES limits each, ONLY=expression selects cases.
OUT ?= build/gpu
COMMIT ?= $(shell git describe --always --abbrev=40 --dirty 2>/dev/null)
gpu gpu-1 gpu-2 gpu-3 gpu-4 gpu-5: export COMMIT := $(COMMIT)
gpu:
	$(PYTHON) tools/gpu.py $(STAGE) --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only '$(ONLY)')
gpu-1 gpu-2 gpu-3 gpu-4 gpu-5: gpu-%:
	$(MAKE) gpu STAGE=$*

# The same script with stand-ins for the programs of a GPU machine.
gpu-rehearsal: $(VENV)/installed
	$(BIN)/python tools/gpu_rehearsal.py

clean:
	rm -rf $(VENV) build dist *.egg-info moco_ext/lib compile_commands.json
