# An image that trains, samples and converts. The accelerator is a build argument: cpu, cuda (NVIDIA's driver and container
# toolkit are the host's) or tpu.
#
#     docker build -t anima_jax:cuda --build-arg ACCELERATOR=cuda .
#     docker run --rm --gpus all -v "$PWD:/work" anima_jax:cuda anima-train --config shapes
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG ACCELERATOR=cpu
# A mistyped one ends here, not after minutes.
RUN case "$ACCELERATOR" in cpu|cuda|tpu) ;; *) echo "ACCELERATOR=$ACCELERATOR: expected cpu, cuda or tpu" >&2; exit 2;; esac

WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY anima_jax anima_jax
COPY configs configs
COPY docs docs
RUN extra=$([ "$ACCELERATOR" = cpu ] || echo "[$ACCELERATOR]") && pip install --no-cache-dir ".$extra"

# Everything that is read and written: mount a folder here.
WORKDIR /work
# Without a shell around it, the program gets SIGTERM, and saves a checkpoint.
CMD ["anima-train", "--help"]
