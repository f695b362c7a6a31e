"""The VAE between images and latents: batches of images of one size, in tiles where memory requires it.

Axes: b batch, t frames, y rows, x columns, c channels. Latents are normalised.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.models.constraints import constrain
from anima_jax.models.parameters import Params, jit_network, merge, split
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicas, shard_batch
from anima_jax.sampling.images import PIXELS_PER_LATENT
from anima_jax.sampling.tiles import run_vae


class LatentCodec:
    """A VAE that computes in `dtype`. `params` may be in host memory: they are on the devices only while it runs."""

    def __init__(self, vae: WanVAE, dtype: Any):
        self._graphdef, self.params = split(vae)
        self._width, self._dtype = vae.config.base_width, dtype

    def encode(self, pixels_tyxc: np.ndarray, tile: int | None) -> np.ndarray:
        """Return the latents (t, y, x, c), float32, of pixels in [−1, 1]."""
        return run_vae(self._bound(encode_pixels), pixels_tyxc[None], PIXELS_PER_LATENT, 1, self._width, tile)[0]

    def decode(self, latents: Iterable[np.ndarray], tile: int | None) -> list[np.ndarray]:
        """Return pixels (t, y, x, 3) in about [−1, 1], float32.

        Each device decodes one image at a time; consecutive images of one size are decoded together.
        """
        run, batch_size = self._bound(decode_latents), replicas(current_mesh().shape)
        pixels: list[np.ndarray] = []
        for _, same_size in itertools.groupby(map(np.asarray, latents), key=np.shape):
            images = list(same_size)
            for first in range(0, len(images), batch_size):
                batch_btyxc = np.stack(images[first : first + batch_size])
                pixels += list(run_vae(run, batch_btyxc, 1, PIXELS_PER_LATENT, self._width, tile))
        return pixels

    def _bound(self, run: Callable[..., Array]) -> Callable[[np.ndarray], Array]:
        """Return `run` bound to the parameters, which stay on the device as long as the result exists."""
        params = rules.on_devices(self.params)

        def run_on_mesh(array_btyxc: np.ndarray) -> Array:
            batch = shard_batch(array_btyxc, len(array_btyxc))
            return run(params, batch, graphdef=self._graphdef, dtype=self._dtype)

        return run_on_mesh


@functools.partial(jit_network, program="vae", static_argnames=("graphdef", "dtype"))
def encode_pixels(params: Params, pixels_btyxc: Array, *, graphdef: nnx.GraphDef[Any], dtype: Any) -> Array:
    return constrain(merge(graphdef, params).encode(pixels_btyxc.astype(dtype)).astype(jnp.float32), "nnnnn")


@functools.partial(jit_network, program="vae", static_argnames=("graphdef", "dtype"))
def decode_latents(params: Params, latents_btyxc: Array, *, graphdef: nnx.GraphDef[Any], dtype: Any) -> Array:
    return constrain(merge(graphdef, params).decode(latents_btyxc.astype(dtype)).astype(jnp.float32), "nnnnn")
