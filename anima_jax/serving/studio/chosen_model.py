"""Drawing with another model of the same sizes, such as a checkpoint of the run that the page shows."""

import asyncio
import pathlib
from typing import Any

import jax

from anima_jax.checkpoints.models import load_dit
from anima_jax.errors import UserError, shorten
from anima_jax.models.parameters import Params, cast_to_compute, split
from anima_jax.serving.http.server import Server


async def draw_with(server: Server, path: pathlib.Path, label: str) -> None:
    """Draw with the model in this file from now on; what was ordered before is drawn with the model before.

    Nothing is compiled again. `label` is what the server says that it draws with. Returns when the model is in use.
    Raises UserError if the model has other sizes than the server's, and if that was started with LoRAs merged into it.
    """
    if server.config.files.get("loras"):
        raise UserError(f"{label}: the server draws with --lora, which other models lack; start it without")
    async with server.loading:
        params = await server.in_studio(_params, server, path)
        # Without a pause between these lines, so that the texts of images name the model that draws them.
        replaced = server.engine.replace_params(params, [path])
        server.use_files({**server.config.files, "transformer": str(path), "adapter": None}, label)
        await asyncio.wrap_future(replaced)


def _params(server: Server, path: pathlib.Path) -> Params:
    """Return the parameters of a model as the engine's pipeline has them. Raises UserError if their sizes differ."""
    pipeline, files = server.engine.pipeline, server.config.files
    stored: dict[str, Any] = {name: files.get(name) for name in ("transformer_dtype", "compute")}
    with jax.set_mesh(server.engine.mesh):
        dit = load_dit(path, pipeline.dtype, **stored)
        params = cast_to_compute(split(dit)[1], pipeline.dtype)
    own, new = ({name: (x.shape, x.dtype) for name, x in each.items()} for each in (pipeline.dit_params, params))
    if own != new:
        different = sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name))
        raise UserError(f"{path.name}: has other sizes than the server's model: {shorten(different)}")
    return params
