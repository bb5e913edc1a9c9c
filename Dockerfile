# Two images: `test` runs the tests on a CPU, `gpu` trains. How to build and run them: docs/container.md.
#
# In both, what is downloaded depends on pyproject.toml and requirements/ alone: a change of the code rebuilds only the last
# layers. The package is installed editable, from a stub first, so that the code can follow it.

ARG BASE_IMAGE=python:3.11-slim
# Transformer Engine and Apex come with NVIDIA's image. megatron-core 0.16 takes Transformer Engine 2.9 to 2.11:
# images of about 25.11 to 26.01.
ARG NVIDIA_PYTORCH=25.12-py3
ARG GPU_BASE_IMAGE=nvcr.io/nvidia/pytorch:${NVIDIA_PYTORCH}


FROM ${GPU_BASE_IMAGE} AS gpu
ARG MEGATRON_CORE=0.16.1
WORKDIR /opt/megatron-dtrpo
COPY setup.py pyproject.toml LICENSE ./
# Everything the image brings is held at its version, torch above all: what does not fit it fails here, at once. Without
# build isolation, because the image's constraints would hold for the packages that it builds with, too.
RUN python -m pip list --format=freeze > image-constraints.txt \
    && mkdir megatron_dtrpo && touch megatron_dtrpo/__init__.py \
    && python -m pip install --no-cache-dir --no-build-isolation -c image-constraints.txt \
        "megatron-core==${MEGATRON_CORE}" -e ".[datasets]"
COPY . .
# A run folder is mounted here.
WORKDIR /workspace
CMD ["megatron-dtrpo", "doctor"]


# The last target is the one that a build without --target makes.
FROM ${BASE_IMAGE} AS test
# The test of the page that replays a decoding opens it in a browser. BROWSER="" saves 0.7 GB and skips that test.
ARG BROWSER=chromium
RUN apt-get update \
    && apt-get install -y --no-install-recommends ${BROWSER} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home tester && install -d -o tester /checkout
USER tester
WORKDIR /checkout
COPY --chown=tester setup.py pyproject.toml LICENSE ./
COPY --chown=tester requirements requirements
COPY --chown=tester tests/run.sh tests/run.sh
# The script that runs the tests installs what they need; asked for pytest's version it does no more than that.
ENV PIP_NO_CACHE_DIR=1
RUN mkdir megatron_dtrpo && touch megatron_dtrpo/__init__.py && bash tests/run.sh --version
COPY --chown=tester . .
CMD ["bash", "tests/run.sh"]
