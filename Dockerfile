# The image for GPU machines; docs/docker.md explains how to build and run it.
ARG CUDA=13.0.1
ARG UBUNTU=24.04

# pycuda is compiled against CUDA's headers; the final image does not need them.
FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/comask
ENV PATH=/opt/comask/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY comask comask
COPY export export
COPY runtime runtime
COPY cli cli
COPY calib calib
ARG EXTRAS=train,export,gpu,video
ARG TENSORRT=tensorrt-rtx-cu13
RUN pip install --no-cache-dir ".[${EXTRAS}]" "${TENSORRT}"

FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 comask
COPY --from=build /opt/comask /opt/comask
# NVDEC and NVENC need the capability `video`.
ENV PATH=/opt/comask/bin:$PATH NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER 10001
WORKDIR /work
CMD ["comask", "doctor", "--need", "gpu"]
