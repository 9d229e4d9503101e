# docker build -t moco_ext .
# docker run --rm --shm-size 2g -v "$PWD:/work" moco_ext pretrain --data digits --output runs/demo
#
# With CUDA kernels. pip downloads the compiler; a GPU is only needed to run:
# docker build -t moco_ext --build-arg CUDA=1 --build-arg INDEX=https://download.pytorch.org/whl/cu130 .
# docker run --rm --gpus all moco_ext info
FROM python:3.12-slim-bookworm AS torch
ARG INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$INDEX" torch==2.11.0 torchvision==0.26.0

FROM torch AS build
ARG CUDA=0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN MOCO_EXT_CUDA="$CUDA" TORCH_CUDA_ARCH_LIST=all pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM torch
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
  pip install --no-cache-dir "$(echo /wheels/*.whl)[train]"
WORKDIR /work
ENTRYPOINT ["moco-ext"]
CMD ["info"]
