"""Reference pictures of Anima Edit: clean latents on the frame axis after the picture's own frame.

As in Hetaneko/ComfyUI-Cosmos-Reference (cosmos_temporal_reference.py): the network sees [x_t, reference, …] with one
time for all frames, and of its output only frame 0 is used. An example's tokens are the picture's, those of each
reference, and padding; its grid is (1 + number of references, rows, columns).
Variants would be here: a padding-mask channel of each frame, or keys and values of references with a strength of their
own, which `AnimaDiT.velocity` would take from this module.
Axes: b batch, l tokens of picture and references, c the 64 values of a token.
"""

import jax.numpy as jnp
from jax import Array


def picture_of(grid_b3: Array) -> Array:
    """Return the grids of the pictures alone: one frame."""
    return jnp.asarray(grid_b3).at[:, 0].set(1)


def is_picture(grid_b3: Array, length: int) -> Array:
    """Return which of `length` tokens are the picture's, bool (b, l): neither a reference's nor padding."""
    return jnp.arange(length) < (grid_b3[:, 1] * grid_b3[:, 2])[:, None]


def with_clean(picture_blc: Array, clean_blc: Array, grid_b3: Array) -> Array:
    """Return the picture's tokens of `picture_blc`, followed by the references of `clean_blc`."""
    return jnp.where(is_picture(grid_b3, picture_blc.shape[1])[..., None], picture_blc, clean_blc)
