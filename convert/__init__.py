"""Command lines over anima_jax.checkpoints."""

import os

# Decomposing a model's weights is many small steps, for which several threads wait longer than one computes. It has to
# be said before numpy is there.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
