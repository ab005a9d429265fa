# qat with its CPU kernels compiled ahead, as an ordinary user, in the folder /work.
#
#   docker build -t qat .
#   docker run --rm -v "$PWD:/work" qat train recipe=quickstart
#
# PIP_INDEX_URL (--build-arg) chooses where packages come from: PyPI's torch for Linux brings CUDA, gigabytes of it; the index
# of torch's CPU wheels does not. The compiler stays in the image: `.pt2` exports and torch.compile need one.
FROM python:3.11-slim

ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 QAT_BUILD_DIR=/opt/qat/build OMP_WAIT_POLICY=passive

# Debian's security fixes come with the base image's own versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 qat \
    && mkdir -p /work \
    && chown 1000 /work

# What changes seldom first: torch, then everything else that is pinned.
WORKDIR /opt/qat
COPY constraints.txt ./
RUN pip install -c constraints.txt torch==2.13.0 setuptools

COPY pyproject.toml setup.py README.md LICENSE ./
COPY qat ./qat
COPY conf ./conf
COPY recipes ./recipes
COPY csrc ./csrc
RUN pip install -c constraints.txt --no-build-isolation ".[quickstart,gguf]" && qat build

USER 1000
WORKDIR /work
ENTRYPOINT ["qat"]
CMD ["--help"]
