# cogds and torch for NVIDIA GPUs, with the versions of constraints.txt. docs/operations.md#containers explains its use.
#
#   docker build --tag cogds .
#   docker run --rm --gpus all --network host --shm-size 32g cogds     # checks the machine and trains one step
#
# CUDA comes with torch's wheels, so the base needs nothing of NVIDIA's.
ARG BASE=docker.io/library/debian:bookworm-slim
FROM ${BASE}

# torch.compile, Triton and DeepSpeed's CPUAdam compile code at run time, with g++ and the headers of Python.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# torch and CUDA are nearly all of the image and seldom change: a layer of their own.
COPY constraints.txt /opt/cogds/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint /opt/cogds/constraints.txt torch

# Extras of setup.py. Two more are `prepare` and, for quantized base weights, `quant`.
ARG EXTRAS=heif,http,s3
COPY . /opt/cogds
RUN /opt/venv/bin/pip install --no-cache-dir --use-pep517 --constraint /opt/cogds/constraints.txt "/opt/cogds[$EXTRAS]" \
    && rm -rf /opt/cogds/build /opt/cogds/*.egg-info

# Any user may run the image (--user). Caches go to HOME, and torch asks for the name of the user, who may have none.
RUN useradd --uid 1000 --create-home cogds \
    && install --directory --mode 1777 /home/cogds /workspace
ENV HOME=/home/cogds USER=cogds PATH=/opt/venv/bin:$PATH
# enroot and other runtimes of NVIDIA's give a container the GPUs that this asks for.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /workspace
CMD ["cogds", "preflight", "--config", "demo"]
