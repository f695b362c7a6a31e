"""Cached latents decoded back to images, to inspect what a run trains on."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from PIL import Image

from anima_jax.checkpoints.locations import writing_to
from anima_jax.config.sizes import Size
from anima_jax.data.cache import Cache, progress_bar
from anima_jax.data.examples import Example
from anima_jax.data.video import FRAME_RATE
from anima_jax.models.dit import PATCH, unpatchify
from anima_jax.models.parameters import merge, split
from anima_jax.models.wan_vae import WanVAE


def dump_dataset(folder: str, examples: Sequence[Example], cache: Cache, vae: WanVAE, dtype: DTypeLike) -> pathlib.Path:
    """Decode the latents of each example to `NAME.WIDTHxHEIGHT.png`, or `NAME.WIDTHxHEIGHTxFRAMES.mp4` for a video.

    The captions (`.txt`, one per line) and the loss mask, if any (`.mask.png`), are written next to it. Examples that
    repeat a clip at the same size are written once. Raises UserError if a file cannot be written.
    """
    graphdef, params = split(vae)
    decode = jax.jit(lambda params, latents: merge(graphdef, params).decode(latents.astype(dtype)).astype(jnp.float32))
    clips: dict[tuple[bytes, Size], list[Example]] = {}
    for example in examples:
        clips.setdefault((example.entry.digest, example.bucket.size), []).append(example)
    target, used = pathlib.Path(folder), set[str]()
    with writing_to(str(target)):
        target.mkdir(parents=True, exist_ok=True)
    with progress_bar(len(clips), "clip") as bar:
        for (_, size), shown in clips.items():
            bar.update()
            frames, rows, columns = size.grid
            latents = unpatchify(jnp.asarray(cache.latents(shown[0]))[None].astype(jnp.float32), frames, rows, columns)
            pixels_tyxc = np.asarray(decode(params, latents))[0]
            name = f"{shown[0].entry.media.label}.{size.width}x{size.height}"
            stem = target / _unused(name, used)
            with writing_to(str(stem)):
                _write_clip(stem, ((pixels_tyxc + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8))
                _path(stem, ".txt").write_text("\n".join(dict.fromkeys(c for e in shown for c in e.captions)), "utf-8")
                if (mask_lp := cache.mask(shown[0])) is not None:
                    _write_mask(_path(stem, ".mask.png"), mask_lp, size)
    return target


def _unused(name: str, used: set[str]) -> str:
    """Return `name`, with a number appended if it is already in `used`, and add the result to `used`."""
    number, free = 1, name
    while free in used:
        number += 1
        free = f"{name}.{number}"
    used.add(free)
    return free


def _path(stem: pathlib.Path, ending: str) -> pathlib.Path:
    return stem.with_name(stem.name + ending)


def _write_clip(stem: pathlib.Path, frames_tyxc: np.ndarray) -> None:
    if len(frames_tyxc) == 1:
        Image.fromarray(frames_tyxc[0]).save(_path(stem, ".png"))
    else:
        _write_video(_path(stem, f"x{len(frames_tyxc)}.mp4"), frames_tyxc)


def _write_video(path: pathlib.Path, frames_tyxc: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FRAME_RATE, options={"crf": "12"})
        stream.height, stream.width = frames_tyxc.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels_yxc in frames_tyxc:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_yxc, format="rgb24")))
        file.mux(stream.encode())


def _write_mask(path: pathlib.Path, mask_lp: np.ndarray, size: Size) -> None:
    _, rows, columns = size.grid
    frame_lp = mask_lp[: rows * columns]
    pixels_yx = rearrange(frame_lp, "(y x) (m n) -> (y m) (x n)", y=rows, x=columns, m=PATCH, n=PATCH)
    levels = (pixels_yx * 255.0).round().astype(np.uint8)
    Image.fromarray(levels).resize((size.width, size.height), Image.Resampling.NEAREST).save(path)
