"""Cached latents decoded back to images, to inspect what a run trains on."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from anima_jax.checkpoints.locations import writing_to
from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import PIXEL_MULTIPLE, Size
from anima_jax.data.cache import Cache, progress_bar
from anima_jax.data.examples import Example
from anima_jax.data.inpainting import mask_of
from anima_jax.data.video import FRAME_RATE
from anima_jax.models.dit import PATCH, unpatchify
from anima_jax.models.parameters import merge, split
from anima_jax.models.wan_vae import WanVAE


def dump_dataset(
    folder: str, examples: Sequence[Example], cache: Cache, vae: WanVAE, config: MainConfig
) -> pathlib.Path:
    """Decode the latents of each example to `NAME.WIDTHxHEIGHT.png`, or `NAME.WIDTHxHEIGHTxFRAMES.mp4` for a video.

    Written next to it are the captions (`.txt`, one per line) and, if it has them, the loss mask (`.mask.png`), the
    reference pictures, decoded too (`.reference1.png`, …), the control picture (`.control.png`) and the first epoch's
    mask of what is drawn anew (`.inpaint.png`). Examples that repeat a clip at the same size, with the same partners,
    are written once. Raises UserError if a file cannot be written.
    """
    dtype = config.compute_dtype
    graphdef, params = split(vae)
    decode = jax.jit(lambda params, latents: merge(graphdef, params).decode(latents.astype(dtype)).astype(jnp.float32))

    def decoded(latents_lc: np.ndarray, size: Size) -> np.ndarray:
        latents = unpatchify(jnp.asarray(latents_lc)[None].astype(jnp.float32), *size.grid)
        pixels_tyxc = np.asarray(decode(params, latents))[0]
        return ((pixels_tyxc + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)

    clips: dict[tuple[bytes, Size, tuple[bytes, ...]], list[Example]] = {}
    for example in examples:
        partners = tuple(partner.digest for partner in example.entry.partners)
        clips.setdefault((example.entry.digest, example.bucket.size, partners), []).append(example)
    target, used = pathlib.Path(folder), set[str]()
    with writing_to(str(target)):
        target.mkdir(parents=True, exist_ok=True)
    with progress_bar(len(clips), "clip") as bar:
        for (_, size, _), shown in clips.items():
            bar.update()
            name = f"{shown[0].entry.media.label}.{size.width}x{size.height}"
            stem = target / _unused(name, used)
            with writing_to(str(stem)):
                _write_clip(stem, decoded(cache.latents(shown[0]), size))
                for number, latents_lc in enumerate(_references(shown[0], cache), start=1):
                    Image.fromarray(decoded(latents_lc, size)[0]).save(_path(stem, f".reference{number}.png"))
                if config.control_channels:
                    _write_control(stem, shown[0], cache, config)
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


def _references(example: Example, cache: Cache) -> list[np.ndarray]:
    """Return the latents (l, c) of each reference picture."""
    return np.split(cache.references(example), example.bucket.references) if example.bucket.references else []


def _write_control(stem: pathlib.Path, example: Example, cache: Cache, config: MainConfig) -> None:
    (_, rows, columns), side = example.bucket.size.grid, PIXEL_MULTIPLE
    pixels_yxc = rearrange(cache.control(example), "(y x) (m n c) -> (y m) (x n) c", y=rows, x=columns, m=side, n=side)
    Image.fromarray(pixels_yxc).save(_path(stem, ".control.png"))
    if config.pairs == "inpaint":
        mask_yx = mask_of(example, cache.inpaint_mask(example), config.seed, 0)
        Image.fromarray(mask_yx).save(_path(stem, ".inpaint.png"))


def _write_mask(path: pathlib.Path, mask_lp: np.ndarray, size: Size) -> None:
    _, rows, columns = size.grid
    frame_lp = mask_lp[: rows * columns]
    pixels_yx = rearrange(frame_lp, "(y x) (m n) -> (y m) (x n)", y=rows, x=columns, m=PATCH, n=PATCH)
    levels = (pixels_yx * 255.0).round().astype(np.uint8)
    Image.fromarray(levels).resize((size.width, size.height), Image.Resampling.NEAREST).save(path)
