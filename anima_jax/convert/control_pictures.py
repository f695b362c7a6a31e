"""Make control pictures of a picture or of all pictures in a folder, to look at them or to train with them."""

import argparse
import collections
import functools
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Literal

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from anima_jax.checkpoints.locations import check_local, folders_below, reading_folders, replacing, writing_to
from anima_jax.convert import outputs
from anima_jax.data import memory
from anima_jax.data.images import IMAGE_SUFFIXES, read_picture, set_up_pillow
from anima_jax.data.loader import map_ahead
from anima_jax.data.media import VIDEO_SUFFIXES, read_file, stamp_of
from anima_jax.data.preprocessors import KINDS, Preprocessor, control_picture
from anima_jax.errors import UserError, one_line

SUMMARY = "make control pictures (canny, scribble, …) of pictures"

MADE_FROM = "anima_jax control picture"
"""The name of the PNG chunk that says how a control picture was made: kind, size and time of the picture."""

BYTES_PER_PIXEL = 64
"""What the costliest kind takes at its peak."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("input", metavar="IN", help="a picture, or a folder with pictures, also in sub-folders")
    parser.add_argument("output", metavar="OUT", help="the .png to write; of a folder a folder, with the same names")
    kinds = "; ".join(f"{kind} ({', '.join(options)})" if options else kind for kind, (_, options) in KINDS.items())
    parser.add_argument(
        "--kind",
        required=True,
        metavar="KIND[:OPTION=VALUE…]",
        help=f"{kinds}. resolution=PIXELS: the shorter side to which a picture is scaled first (default: as it is)",
    )
    parser.add_argument(
        "--threads", type=outputs.positive, metavar="N", default=os.cpu_count() or 1, help="pictures at a time"
    )
    parser.add_argument("--force", action="store_true", help="replace pictures in OUT that this command has not made")


def run(arguments: argparse.Namespace) -> None:
    """Write the control pictures and print how many; a picture that cannot be used is named and skipped.

    A control picture that was made with the same options, of a picture that has not changed since, is kept. Raises
    UserError if none can be made, and for a mistake of the command line.
    """
    set_up_pillow()
    kind, target = Preprocessor.parse(arguments.kind), pathlib.Path(arguments.output)
    for path in (arguments.input, arguments.output):
        check_local("found", path)
    source = pathlib.Path(arguments.input)
    pairs = _in_folder(source, target) if source.is_dir() else [(source, _file(source, target))]
    counts = collections.Counter[str]()
    with tqdm(total=len(pairs), unit="picture", dynamic_ncols=True, disable=None) as bar:
        owners = {target: source for source, target in reversed(pairs)}
        make = functools.partial(_make, kind=kind, owners=owners, force=arguments.force)
        for found in map_ahead(make, pairs, threads=arguments.threads or os.cpu_count() or 1):
            if isinstance(found, UserError):
                if len(pairs) == 1:
                    raise found
                bar.write(f"skipped: {one_line(found)}", file=sys.stderr)
            counts["skipped" if isinstance(found, UserError) else found] += 1
            bar.update()
    if not counts["made"] + counts["kept"]:
        raise UserError(f"{source}: {f'none of its {len(pairs)} pictures can be used' if pairs else 'has no pictures'}")
    print(f"{target}: {', '.join(f'{counts[what]} {what}' for what in ('made', 'kept', 'skipped') if counts[what])}")


def _file(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Return the path of the control picture of one picture; `target` may be a folder that exists."""
    if target.is_dir():
        return target / f"{source.stem}.png"
    if target.suffix.lower() != ".png":
        raise UserError(f"{target}: expected a name that ends in .png, or a folder that exists, for {source}")
    return target


def _in_folder(source: pathlib.Path, target: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Return the pictures and videos below `source` with the paths of their control pictures.

    Left out are hidden files and folders, caches of training, and `target`, which may be in `source`.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, expected a folder for the control pictures of {source}")
    own = os.path.realpath(target)
    if own == os.path.realpath(source):
        raise UserError(f"{target}: is IN itself; choose another OUT")
    pairs: list[tuple[pathlib.Path, pathlib.Path]] = []
    with reading_folders(source):
        os.listdir(source)
    for folder, names in folders_below(str(source)):
        below = pathlib.Path(folder).relative_to(source)
        hidden = any(part == "cache" or part.startswith(".") for part in below.parts)
        if not hidden and os.path.commonpath([own, os.path.realpath(folder)]) != own:
            files = [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
            files = [file for file in files if file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)]
            pairs += [(file, target / below / f"{file.stem}.png") for file in files]
    return pairs


def _make(
    pair: tuple[pathlib.Path, pathlib.Path],
    *,
    kind: Preprocessor,
    owners: Mapping[pathlib.Path, pathlib.Path],
    force: bool,
) -> Literal["made", "kept"] | UserError:
    """Write one control picture. Returns what was done, or why it could not be."""
    source, target = pair
    try:
        if (owner := owners[target]) != source:
            raise UserError(f"{source}: has the base name of {owner.name}, whose control picture is {target}")
        if source.suffix.lower() in VIDEO_SUFFIXES and source.suffix.lower() != ".gif":
            raise UserError(f"{source}: is a video, expected a picture")
        size, time = stamp_of(source)
        made_from = f"{kind} of {source.name}, {size} bytes, {time} ns"
        if target.exists() and not force:
            own = _made_from(target)
            if own == made_from:
                return "kept"
            if own is None:
                raise UserError(f"{target}: exists and was not made by this command; --force replaces it")
        with memory.FILES.reserve(size):
            picture = read_picture(read_file(source), str(source))
        scale = max(1.0, kind.resolution / min(picture.size))
        with memory.PIXELS.reserve(int(BYTES_PER_PIXEL * scale**2 * picture.width * picture.height)):
            made = control_picture(picture, kind)
        text = PngImagePlugin.PngInfo()
        text.add_text(MADE_FROM, made_from)
        with writing_to(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            made.save(file, "PNG", pnginfo=text)
    except UserError as error:
        return error if str(source) in str(error) else UserError(f"{source}: {error}")
    return "made"


def _made_from(target: pathlib.Path) -> str | None:
    """Return how a control picture was made, or None if it was not made by this command."""
    try:
        with Image.open(target, formats=["PNG"]) as image:
            return image.info.get(MADE_FROM)
    except Exception:  # PIL raises many types for damaged files
        return None
