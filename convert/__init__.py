"""`python -m convert` in a checkout. The tools are in `anima_jax.convert`, installed as `anima-convert`."""
