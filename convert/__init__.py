"""Command lines over anima_jax.checkpoints and anima_jax.adapters."""

import os

# The SVDs of a model's weights consist of many small steps, for which several threads wait longer than one computes.
# OpenBLAS reads the variable when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
