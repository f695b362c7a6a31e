"""python -m convert: the same as `python -m anima_jax.convert`."""

if __name__ == "__main__":
    from anima_jax.launch import convert

    convert()

from anima_jax.convert.__main__ import main

__all__ = ["main"]
