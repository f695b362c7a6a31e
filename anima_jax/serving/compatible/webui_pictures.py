"""Pictures as A1111's web UI prepares them for img2img and puts them back afterwards.

Source: `StableDiffusionProcessingImg2Img.init` in modules/processing.py and `resize_image` in modules/images.py of
AUTOMATIC1111/stable-diffusion-webui. Axes: y rows, x columns, c channels.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from anima_jax.data.images import is_transparent, over_white

LANCZOS, BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR

UPSCALERS = {"None": LANCZOS, "Lanczos": LANCZOS, "Nearest": Image.Resampling.NEAREST}
"""Name of an upscaler → how it resamples. A1111's "None" resizes in the same way."""

ALPHA_OF_MASK = 128
"""Alpha above which a mask with transparency is redrawn."""


def resized_by(
    mode: int, image: Image.Image, size_wh: tuple[int, int], method: Image.Resampling = LANCZOS
) -> Image.Image:
    """Return the image at another size.

    Mode 0 stretches it, 1 covers the size and crops around the centre, and 2 fits into it and continues the edges. Mode
    3, for which A1111 scales latents, is done as mode 0.
    """
    if image.size == size_wh:
        return image
    if mode == 1:
        return ImageOps.fit(image, size_wh, method)
    if mode != 2:
        return image.resize(size_wh, method)
    scale = min(size_wh[0] / image.width, size_wh[1] / image.height)
    inside = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
    left, top = ((outer - inner) // 2 for outer, inner in zip(size_wh, inside.size, strict=True))
    around = ((top, size_wh[1] - inside.height - top), (left, size_wh[0] - inside.width - left))
    pixels = np.asarray(inside)
    return Image.fromarray(np.pad(pixels, [*around, (0, 0)][: pixels.ndim], mode="edge"))


def redrawn_mask(
    mask: Image.Image, size_wh: tuple[int, int], *, invert: bool, blur_xy: tuple[float, float]
) -> Image.Image:
    """Return a mask of mode L at this size, white where the image is redrawn.

    A mask with transparent parts says it with its alpha: what is opaque is redrawn. `blur_xy` are the standard
    deviations of the blur in pixels.
    """
    if is_transparent(mask):
        white = mask.convert("RGBA").getchannel("A").point([255 * (alpha > ALPHA_OF_MASK) for alpha in range(256)])
    else:
        white = mask.convert("L")
    white = resized_by(0, white, size_wh, BILINEAR)
    white = ImageOps.invert(white) if invert else white
    return white.filter(ImageFilter.GaussianBlur(blur_xy)) if any(blur_xy) else white


def crop_around(mask: Image.Image, padding: int, size_wh: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return the part (left, top, right, bottom) that contains what is redrawn, or None if nothing is.

    It is `padding` pixels larger on each side, and then as much larger as the aspect ratio of `size_wh` needs, as far
    as the image reaches.
    """
    if (box := mask.getbbox()) is None:
        return None
    left, right = max(box[0] - padding, 0), min(box[2] + padding, mask.width)
    top, bottom = max(box[1] - padding, 0), min(box[3] + padding, mask.height)
    wanted_width = int((bottom - top) * size_wh[0] / size_wh[1])
    wanted_height = int((right - left) * size_wh[1] / size_wh[0])
    left, right = _widened(left, right, wanted_width, mask.width)
    top, bottom = _widened(top, bottom, wanted_height, mask.height)
    return left, top, right, bottom


def _widened(first: int, last: int, wanted: int, available: int) -> tuple[int, int]:
    """Return the interval grown around its centre to the length `wanted`, moved and cut so that it is inside."""
    if wanted <= last - first:
        return first, last
    first -= (wanted - (last - first)) // 2
    first = max(min(first, available - wanted), 0)
    return first, min(first + wanted, available)


def filled(image: Image.Image, mask: Image.Image, kind: int, seed: int) -> Image.Image:
    """Return an RGB image with other content where the mask is white: `kind` is A1111's `inpainting_fill`.

    0 continues the colours around it, 1 is the image itself. 2 and 3 are noise and nothing in A1111's latents; here
    they are noise from `seed` and grey in pixels.
    """
    if kind == 1:
        return image
    if kind == 2:
        generator = np.random.default_rng(seed % 2**64)
        content = Image.fromarray(generator.integers(0, 256, (image.height, image.width, 3), np.uint8))
    elif kind == 3:
        content = Image.new("RGB", image.size, (128, 128, 128))
    else:
        content = _surroundings(image, mask)
    return Image.composite(content, image, mask)


def _surroundings(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the colours of the unmasked part, spread over the whole image: from far away to near."""
    kept = image.convert("RGBA")
    kept.putalpha(ImageOps.invert(mask))
    spread = Image.new("RGBA", image.size, (128, 128, 128, 255))
    radius = float(max(image.size))
    while radius > 1:
        near = kept.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(3):  # Few kept pixels still give their colour.
            spread.alpha_composite(near)
        radius /= 4
    return spread.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Inpainting:
    """What to draw for a mask, and how to put the result back into the original image.

    `image` and `mask` have the size that is drawn. Without `box`, the drawn image is the result; else it replaces the
    part `box` of `original`, where `original_mask` is white.
    """

    image: Image.Image
    mask: Image.Image
    original: Image.Image
    original_mask: Image.Image
    box: tuple[int, int, int, int] | None = None

    def finish(self, drawn: Image.Image) -> Image.Image:
        """Return the result from the drawn image."""
        if self.box is None:
            return drawn
        left, top, right, bottom = self.box
        whole = self.original.copy()
        whole.paste(resized_by(1, drawn, (right - left, bottom - top)), (left, top))
        return Image.composite(whole, self.original, self.original_mask)


def inpainting(
    image: Image.Image,
    mask: Image.Image,
    size_wh: tuple[int, int],
    *,
    resize_mode: int,
    padding: int | None,
    fill: int,
    seed: int,
) -> Inpainting | None:
    """Return what to draw at `size_wh` for a mask of `redrawn_mask`, of the image's size.

    With `padding`, only the masked part and as many pixels around it ("only masked"); None if nothing is masked then.
    """
    original = over_white(image)
    if padding is None:
        image, mask = resized_by(resize_mode, original, size_wh), resized_by(resize_mode, mask, size_wh, BILINEAR)
        return Inpainting(filled(image, mask, fill, seed), mask, image, mask)
    box = crop_around(mask, padding, size_wh)
    if box is None:
        return None
    part, part_mask = resized_by(2, original.crop(box), size_wh), resized_by(2, mask.crop(box), size_wh, BILINEAR)
    return Inpainting(filled(part, part_mask, fill, seed), part_mask, original, mask, box)
