# The organisers' base by default; any image with Python 3.11 or newer and pip will do.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Where torch comes from: the default wheels are built for CUDA 13 and need an NVIDIA driver of 580
# or newer. For an older driver: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=

LABEL org.opencontainers.image.title="abdoseg" \
      org.opencontainers.image.description="Abdominal CT multi-organ segmentation" \
      org.opencontainers.image.licenses="MIT"

ENV PYTHONUNBUFFERED=1

WORKDIR /workspace

COPY requirements.txt .
RUN if [ -n "${TORCH_INDEX}" ]; then \
        torch=$(grep '^torch==' requirements.txt) && \
        pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${torch}"; \
    fi && \
    pip install --no-cache-dir --compile -r requirements.txt

COPY predict.sh .
COPY inference inference
COPY weights weights
# Whatever user the container runs as may read it, whatever the checkout's own permissions were.
RUN python3 -m compileall -q inference && chmod -R a+rX .

CMD ["sh", "predict.sh"]
