"""Reference pictures of an image: read, cropped to its size, encoded by the VAE, and joined to its tokens.

The network sees them as further frames (`diffusion.references`), with the positive and the negative prompt alike; the
sampler never sees or changes them.
Axes: b batch, l image tokens with those of the references, c the 64 values of a token; latents are (t, y, x, 16).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageOps

from anima_jax.data.images import over_white
from anima_jax.diffusion.references import with_clean
from anima_jax.errors import UserError
from anima_jax.models.dit import OUT_CHANNELS
from anima_jax.sampling.images import digest_of, name_in_text, read_picture, to_pixels
from anima_jax.sampling.packing import TokenPacking, grid_of


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference picture. Two are equal if their pixels and their paths are; `path` is None for one in memory."""

    digest: str
    """SHA-256 of size and pixels, with transparency over white, in hexadecimal digits."""
    path: str | None = None
    picture: Image.Image = dataclasses.field(default_factory=Image.Image, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What the text of an image calls it."""
        return name_in_text(self.path or self.picture, "picture", self.digest)

    @classmethod
    def of(cls, given: Any) -> "Reference":
        """Return the reference of a PIL image or an image file. Raises UserError for anything else."""
        if isinstance(given, Reference):
            return given
        if not isinstance(given, Image.Image | str | os.PathLike):
            raise UserError(f"reference {given!r}, expected a PIL image or the path of an image")
        path = None if isinstance(given, Image.Image) else os.fspath(given)
        picture = over_white(given if isinstance(given, Image.Image) else read_picture(os.fspath(given)))
        return cls(digest_of(picture), path, picture)

    def fitted(self, width: int, height: int) -> Image.Image:
        """Return the picture scaled to cover this size in pixels (bicubic) and cropped around its centre."""
        if self.picture.size == (width, height):
            return self.picture
        return ImageOps.fit(self.picture, (width, height), Image.Resampling.BICUBIC)


def given_references(given: Any) -> list[Any]:
    """Return the references of all images, or a list of each image's. A single picture is that of all; None is none.

    Raises UserError for what is no picture.
    """
    if isinstance(given, Image.Image | str | os.PathLike | Reference):
        return [Reference.of(given)]
    each: list[Any] = [*(given or ())]
    if any(isinstance(one, list | tuple) for one in each):
        return [[Reference.of(x) for x in (one if isinstance(one, list | tuple) else [one])] for one in each]
    return [Reference.of(one) for one in each]


class ReferenceTokens(NamedTuple):
    """The references of a batch: their tokens, at the places after each image's own, and each image's frames."""

    tokens_blc: Any
    frames_b: Any

    def sizes(self, size_b3: Any) -> Any:
        """Return images' sizes (t, y, x) in latent pixels with the references as further frames."""
        return jnp.concatenate([self.frames_b[:, None], size_b3[:, 1:]], axis=1)


def packed_references(packing: TokenPacking, latents: Sequence[Sequence[np.ndarray]]) -> ReferenceTokens | None:
    """Return the tokens of each image's references, given their latents (1, y, x, 16); None if no image has any."""
    if not any(latents):
        return None
    frames_b = np.array([1 + len(of_image) for of_image in latents], np.int32)
    size_b3 = np.concatenate([frames_b[:, None], packing.size_b3[:, 1:]], axis=1)
    joined = TokenPacking(size_b3.tolist())
    blank = [np.zeros((1, y, x, OUT_CHANNELS), np.float32) for _, y, x in packing.size_b3.tolist()]
    clips = [np.concatenate([own, *others]) for own, others in zip(blank, latents, strict=True)]
    return ReferenceTokens(joined.pack(clips), frames_b)


def layout(size_b3: Any, references: ReferenceTokens | None) -> tuple[np.ndarray, int]:
    """Return the sizes of images with their references, and the token budget of both."""
    seen_b3 = np.asarray(size_b3 if references is None else references.sizes(size_b3))
    return seen_b3, TokenPacking(seen_b3.tolist()).length


def join(x_blc: Array, size_b3: Array, references: ReferenceTokens | None) -> tuple[Array, Array]:
    """Return what the network sees of images: their tokens, those of their references and padding; and its sizes."""
    if references is None:
        return x_blc, size_b3
    sizes = references.sizes(size_b3)
    longer = references.tokens_blc.shape[1] - x_blc.shape[1]
    picture_blc = jnp.pad(x_blc, ((0, 0), (0, longer), (0, 0)))
    return with_clean(picture_blc, references.tokens_blc, grid_of(sizes)), sizes


class EncodedReferences:
    """Encodes each reference once for each size; those of the latest batch are kept for the next."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], np.ndarray] = {}

    def __call__(
        self,
        references: Sequence[Sequence[Reference]],
        sizes_wh: Sequence[tuple[int, int]],
        encode: Callable[[np.ndarray], np.ndarray],
    ) -> list[list[np.ndarray]]:
        """Return the latents of each image's references at its size in pixels.

        `encode` returns the latents (1, y, x, 16) of pixels (1, y, x, 3) in [−1, 1].
        """
        known: dict[tuple[str, int, int], np.ndarray] = {}
        for of_image, size in zip(references, sizes_wh, strict=True):
            for reference in of_image:
                key = (reference.digest, *size)
                if key not in known:
                    found = self._known.get(key)
                    known[key] = encode(to_pixels(reference.fitted(*size))) if found is None else found
        self._known = known
        return [
            [known[reference.digest, *size] for reference in of_image]
            for of_image, size in zip(references, sizes_wh, strict=True)
        ]
