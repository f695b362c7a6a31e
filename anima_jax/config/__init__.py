"""The TOML schema: typed and frozen, with every key documented once.

`load.load_config` is how a program reads its configuration; the code below it gets only these typed values. The package
itself imports nothing: what reads the data set needs `dataset` and `sizes`, but no jax.
"""
