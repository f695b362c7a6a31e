"""Control networks of a pipeline: loaded once, and made into inputs of the sampling program for a batch of images.

Axes: b images, l image tokens, e width of the embedding, p values of a patch of pixels, y rows, x columns, c channels.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from anima_jax.checkpoints.control import abstract_control, load_control
from anima_jax.errors import UserError
from anima_jax.models import dit
from anima_jax.models.constraints import constrain
from anima_jax.models.control import PATCH, ControlConfig, ControlNetwork, ControlTerm
from anima_jax.models.dit import DiTConfig
from anima_jax.models.parameters import Params, cast_to_compute, jit_network, merge, split
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicate, replicated
from anima_jax.sampling.controls import Control
from anima_jax.sampling.packing import grid_of
from anima_jax.sampling.region_rows import EvaluatedRows

KEPT = 4
"""Files whose networks a pipeline keeps, besides those of its latest batch."""

TRUNK = "trunk."

CELLS = dit.PATCH**2
"""Latent pixels of a token."""


class ControlInputs(NamedTuple):
    """One control network in the sampling program: the embeddings and strengths of all images, and where it acts.

    It acts on an image at the noise levels end < σ ≤ start. An image without it has strength 0.
    """

    network: Any
    embedding_ble: Any
    strength_b: Any
    start_b: Any
    end_b: Any

    def term(self, sigma: Array, image_r: Array, rows: EvaluatedRows | None) -> ControlTerm:
        """Return what `AnimaDiT.velocity` takes at this level for rows of these images.

        `rows` are those of images with regions: a part of an image has the embedding of that part.
        """
        is_active_b = (self.end_b < sigma) & (sigma <= self.start_b)
        strength_b = jnp.where(is_active_b, self.strength_b, 0.0)
        embedding_rle = self.embedding_ble[image_r]
        if rows is not None and rows.source_rk is not None:
            token_rl1 = rows.source_rk[:, ::CELLS, None] // CELLS
            embedding_rle = jnp.take_along_axis(embedding_rle, token_rl1, axis=1, mode="fill", fill_value=0.0)
        return self.network, embedding_rle, strength_b[image_r]


@dataclasses.dataclass
class PlacedControl:
    """A place in the order of a batch's control networks: whose network, and the controls of the images that use it."""

    key: Any
    controls: dict[int, Control]


class ControlNetworks:
    """The control networks of a transformer: those of files are loaded once.

    Modules are in `dtype`, the trunk is in float32.
    """

    def __init__(self, config: DiTConfig, dtype: Any):
        self._config, self._dtype = config, dtype
        self._files: dict[Any, ControlNetwork] = {}
        self._embeddings: dict[tuple[Any, ...], Array] = {}

    def inputs(
        self, controls: Sequence[Sequence[Control]], size_b3: np.ndarray, length: int, shift: float
    ) -> tuple[ControlInputs, ...]:
        """Return the inputs for a batch of images, each with its own controls, in the order in which they act.

        `size_b3` are the images' sizes (t, y, x) in latent pixels, `length` is the token budget. A picture is embedded
        once, and its embedding is kept for the next batch. Raises UserError for a file that cannot be read or is for
        another transformer, and for a picture that the network cannot take.
        """
        networks = self._networks([own for of_image in controls for own in of_image])
        embeddings: dict[tuple[Any, ...], Array] = {}
        inputs: list[ControlInputs] = []
        for place in in_order(controls):
            network = networks[place.key]
            blank_le = jnp.zeros((length, network.config.embedding_width), jnp.float32)
            rows, numbers = [blank_le] * len(controls), np.zeros((3, len(controls)), np.float32)
            for image, own in place.controls.items():
                grid = tuple(grid_of(size_b3)[image].tolist())
                key = own, place.key, grid, length
                known = embeddings.get(key, self._embeddings.get(key))
                embeddings[key] = self._embed(network, own, grid, length) if known is None else known
                rows[image], numbers[:, image] = embeddings[key], (own.strength, *own.levels(shift))
            inputs.append(ControlInputs(network, *replicate((jnp.stack(rows), *numbers))))
        self._embeddings = embeddings
        return tuple(inputs)

    def _networks(self, controls: Sequence[Control]) -> dict[Any, ControlNetwork]:
        """Return key → network on the devices of the current mesh. Raises UserError for one that does not fit."""
        found: dict[Any, ControlNetwork] = {}
        for own in controls:
            if (key := network_key(own)) in found:
                continue
            if isinstance(own.path, ControlNetwork):
                check_fits(own.path.config, self._config)
                found[key] = self._placed(own.path)
            else:
                network = self._files.pop(key, None)
                if network is None:
                    network = load_control(own.path, blocks=self._config.blocks, width=self._config.width)
                found[key] = self._files[key] = self._placed(network)
        for oldest in list(self._files)[: -max(KEPT, len(found))]:
            del self._files[oldest]
        return found

    def _placed(self, network: ControlNetwork) -> ControlNetwork:
        graphdef, params = split(network)
        return merge(graphdef, rules.on_devices(in_sampling_dtypes(params, self._dtype)))

    def _embed(self, network: ControlNetwork, control: Control, grid: tuple[int, ...], length: int) -> Array:
        """Return the embedding (l, e) of a control picture for an image of `grid` patches."""
        _, rows, columns = grid
        pixels_yxc = control.pixels((columns * PATCH, rows * PATCH), network.config.channels)
        own_lp = rearrange(pixels_yxc, "(y m) (x n) c -> (y x) (m n c)", m=PATCH, n=PATCH)
        patches_blp = np.zeros((1, length, own_lp.shape[1]), np.float32)
        patches_blp[0, : len(own_lp)] = own_lp
        return embed(network, *replicate((patches_blp, np.array([grid], np.int32))))[0]


def in_sampling_dtypes(params: Params, dtype: Any) -> Params:
    """Return a control network's parameters with the modules in `dtype` and the trunk in float32."""
    modules = {path: value for path, value in params.items() if not path.startswith(TRUNK)}
    trunk = {path: value.astype(jnp.float32) for path, value in params.items() if path.startswith(TRUNK)}
    return trunk | cast_to_compute(modules, dtype)


def abstract_inputs(config: ControlConfig, dtype: Any, images: int, length: int) -> ControlInputs:
    """Return the shapes of `ControlNetworks.inputs` of one network of these sizes, sharded over the current mesh."""
    graphdef, params = abstract_control(config)
    shapes = jax.eval_shape(lambda given: in_sampling_dtypes(given, dtype), params)
    mesh = current_mesh()
    network = merge(graphdef, rules.placed(shapes, rules.shardings(shapes, shapes, mesh)))
    of_images = ((images, length, config.embedding_width), (images,), (images,), (images,))
    return ControlInputs(
        network, *(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(mesh)) for shape in of_images)
    )


@jit_network
def embed(network: ControlNetwork, patches_blp: Array, grid_b3: Array) -> Array:
    """Return the embedding of control pictures, the same on every device."""
    return constrain(network.embed_patches(patches_blp, grid_b3), "nnn")


def in_order(images: Sequence[Sequence[Control]]) -> list[PlacedControl]:
    """Return the networks of all images in an order that is each image's own; a place has the images that use it."""
    found: list[PlacedControl] = []
    for image, controls in enumerate(images):
        place = 0
        for own in controls:
            key = network_key(own)
            index = next((index for index in range(place, len(found)) if found[index].key == key), None)
            if index is None:
                found.insert(index := place, PlacedControl(key, {}))
            found[index].controls[image] = own
            place = index + 1
    return found


def check_fits(config: ControlConfig, transformer: DiTConfig) -> None:
    """Raise UserError unless a control network is for a transformer of these sizes."""
    if (config.blocks, config.width) != (transformer.blocks, transformer.width):
        raise UserError(
            f"control: the network is for {config.blocks} blocks of width {config.width}, the transformer has "
            f"{transformer.blocks} of width {transformer.width}"
        )


def network_key(control: Control) -> Any:
    """Return what tells networks apart, and a file from what stood under its name before."""
    if isinstance(control.path, ControlNetwork):
        return id(control.path)
    path = os.fspath(control.path)
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return path, status.st_mtime_ns, status.st_size
    return path
