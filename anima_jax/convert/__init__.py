"""Command-line tools on top of anima_jax.checkpoints and anima_jax.adapters."""

import os

# The SVDs of a model's weights consist of many small steps, where waiting for other threads takes longer than computing
# in one. OpenBLAS reads the variable when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
