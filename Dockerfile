# syntax=docker/dockerfile:1
# The service: docker build -t diffusion-kd .
#
# For an NVIDIA GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t diffusion-kd:cuda .
# and run it with --gpus all. The wheels of that index bring CUDA along, so the base stays the same; BASE is for sites that
# have one of their own (it must have python3.11 with venv).
ARG BASE=python:3.11-slim-bookworm

# --- build: a virtual environment with the locked packages ---------------------------------------------

FROM ${BASE} AS build
# Its builds of torch and torchvision count as newer than the registry's of the same version, and so are the ones taken.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
# What decides the packages comes first: a change of code alone leaves this layer as it was.
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY diffusion_kd/__init__.py diffusion_kd/
# The lock says which versions, the extras which packages: nothing for training, judging or developing.
RUN python3.11 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-input --disable-pip-version-check \
        --extra-index-url "${TORCH_INDEX}" --constraint requirements.lock --editable ".[serve,cluster,otel,app]"

# --- the image: that environment and the code ----------------------------------------------------------

FROM ${BASE}
LABEL org.opencontainers.image.title="diffusion-kd" \
      org.opencontainers.image.description="Serves a text-to-image teacher and its few-step student" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin service \
    && install --directory --owner=service --group=service /data
WORKDIR /app
COPY --from=build /opt/venv /opt/venv
COPY pyproject.toml README.md LICENSE ./
COPY diffusion_kd diffusion_kd
COPY eval eval
COPY serve serve
COPY app.py ./
RUN /opt/venv/bin/python -m compileall -q diffusion_kd eval serve

# Reachable from outside the container, so only with keys; DIFFUSION_KD_ADMIN_KEY must be given at the start.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/huggingface \
    DIFFUSION_KD_HOST=0.0.0.0 \
    DIFFUSION_KD_PORT=8000 \
    DIFFUSION_KD_AUTH=keys \
    DIFFUSION_KD_DATA_FOLDER=/data \
    DIFFUSION_KD_LOG_FORMAT=json
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Models load and warm up before the first "ready".
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['DIFFUSION_KD_PORT'] + '/readyz', timeout=4)"]
CMD ["python", "-m", "serve"]
