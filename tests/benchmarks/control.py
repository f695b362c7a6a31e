"""The quick start's model learns to draw shapes where a picture of their edges has them (docs/control.md).

`python -m tests.benchmarks.control draw FOLDER` writes captioned drawings to FOLDER/pictures, for training, and 32 of
scenes that neither the model nor the control network saw to FOLDER/held_out. `measure FOLDER --run RUN --control FILE`
draws those again, from their captions and the edges of the drawings, and prints the intersection over union of each
drawn shape with the control's, with and without the control network; `--grid` writes edges above pictures. RUN is the
folder of a run of configs/shapes.toml, FILE the control network or the folder of its run.

The shapes are anywhere in the picture; without control the model draws them near the middle.
"""

import argparse
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from anima_jax import AnimaPipeline
from anima_jax.data.preprocessors import control_picture
from anima_jax.data.shapes import BACKGROUNDS, COLOURS, SIZE, Scene, draw, scenes
from anima_jax.sampling.controls import Control
from anima_jax.training.export import find_export
from tests.small_run import ASSETS

PAIRS, HELD_OUT, GAP = 1600, 32, 4
SAMPLING: dict[str, Any] = {
    "steps": 30,
    "sampler": "euler_ancestral",
    "guidance_scale": 3.0,
    "guidance_interval": (0.0, 0.4),
    "shift": 1.0,
}
"""Those of configs/shapes.toml."""


def drawings(number: int, *, held_out: bool) -> list[tuple[Scene, np.ndarray]]:
    """Return scenes with drawings of them, at random places and sizes."""
    found, own = [], scenes(held_out=held_out)
    for index in range(number):
        rng = np.random.default_rng([11, held_out, index])
        radius = rng.uniform(14.0, 20.0)
        x, y = rng.uniform(radius + 1.0, SIZE - radius - 1.0, size=2)
        scene = own[index % len(own)]
        found.append((scene, draw(scene, (x, y), radius)))
    return found


def write_drawings(folder: pathlib.Path) -> None:
    """Write the drawings with their captions, those for training and the held-out ones."""
    for name, number in (("pictures", PAIRS), ("held_out", HELD_OUT)):
        (folder / name).mkdir(parents=True)
        for index, (scene, drawing) in enumerate(drawings(number, held_out=name == "held_out")):
            Image.fromarray(drawing).save(folder / name / f"{index:04}.png")
            (folder / name / f"{index:04}.txt").write_text(scene.caption)


def inside(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Return which pixels are nearer the scene's colour than its background, along the line between them."""
    back = np.array(BACKGROUNDS[scene.background], np.float32)
    contrast = np.array(COLOURS[scene.colour], np.float32) - back
    return (picture - back) @ contrast > 0.5 * contrast @ contrast


def overlaps(drawn: list[np.ndarray]) -> np.ndarray:
    """Return the intersection over union of each picture's shape with that of its control's drawing."""
    found = []
    for picture, (scene, drawing) in zip(drawn, drawings(HELD_OUT, held_out=True), strict=True):
        own, wanted = inside(picture, scene), inside(drawing, scene)
        found.append((own & wanted).sum() / (own | wanted).sum())
    return np.array(found)


def write_grid(path: str, rows: list[list[Image.Image]], columns: int = 16) -> None:
    """Write pictures in columns: edges, with control, without."""
    cell, bands = SIZE + 1, -(-HELD_OUT // columns)
    height = cell * len(rows) + 2 * GAP
    grid = Image.new("RGB", ((SIZE + GAP) * columns, height * bands), "white")
    for level, pictures in enumerate(rows):
        for index, picture in enumerate(pictures):
            grid.paste(picture, ((SIZE + GAP) * (index % columns), height * (index // columns) + cell * level))
    grid.quantize(256).save(path, optimize=True)


def measure(folder: pathlib.Path, run: pathlib.Path, control: pathlib.Path, grid: str | None) -> None:
    pipeline = AnimaPipeline.load(
        transformer=find_export(run),
        vae=ASSETS / "tiny_vae.safetensors",
        text_encoder=ASSETS / "tiny_qwen3.safetensors",
        tokenizers=ASSETS / "tokenizers",
        dtype=jnp.float32,
    )
    network = find_export(control)
    wanted = [scene for scene, _ in drawings(HELD_OUT, held_out=True)]
    files = sorted((folder / "held_out").glob("*.png"))
    controls = [[Control(network, file, kind="canny")] for file in files]

    def drawn(controls: Any) -> list[Image.Image]:
        captions = [scene.caption for scene in wanted]
        return pipeline(captions, width=SIZE, height=SIZE, seed=0, controls=controls, **SAMPLING)

    rows = {"with control": drawn(controls), "without": drawn(())}
    for name, images in rows.items():
        values = overlaps([np.asarray(image) for image in images])
        print(f"{name}: IoU {values.mean():.3f} ({values.min():.3f} to {values.max():.3f})")
    if grid:
        edges = [control_picture(Image.open(file), "canny") for file in files]
        write_grid(grid, [edges, *rows.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("draw", "measure"):
        commands.add_parser(name).add_argument("folder", type=pathlib.Path)
    measured = commands.choices["measure"]
    for name in ("--run", "--control"):
        measured.add_argument(name, type=pathlib.Path, required=True)
    measured.add_argument("--grid", help="a .png to write")
    arguments = parser.parse_args()
    if arguments.command == "draw":
        write_drawings(arguments.folder)
    else:
        measure(arguments.folder, arguments.run, arguments.control, arguments.grid)


if __name__ == "__main__":
    main()
