"""The TOML schema: typed and frozen, with every key documented once.

Programs read their configuration with `load.load_config`; the code below them gets only these typed values. This file
imports nothing, so that the data readers can import `dataset` and `sizes` without jax.
"""
