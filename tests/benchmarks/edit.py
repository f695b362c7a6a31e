"""The quick start's model learns one edit from pairs of pictures, "make it red".

`python -m tests.benchmarks.edit --run RUN --folder NEW` writes pairs of pictures, trains a LoRA on them as a user would
and edits 32 pictures of scenes that neither the model nor the LoRA saw: the reference's shape and place should stay,
and its colour change. Printed are the intersection over union of the drawn shape with the reference's, with and without
the reference, and the shares of pictures that are red and that keep shape and background. `--grid` writes references
above their edits. RUN is the folder of a run of configs/shapes.toml.
"""

import argparse
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from anima_jax import AnimaPipeline
from anima_jax.data.shapes import BACKGROUNDS, COLOURS, SIZE, Scene, draw, sample_placement, scenes
from anima_jax.train import main as train
from anima_jax.training.export import find_export
from tests.shapes_judge import judge
from tests.small_run import ASSETS, write_config

CAPTION, COLOUR = "make it red", "red"
PAIRS, HELD_OUT, GAP = 1536, 32, 4
SAMPLING: dict[str, Any] = {"steps": 30, "guidance_scale": 1.0, "shift": 1.0, "sampler": "euler_ancestral"}


def pairs(number: int, *, held_out: bool) -> list[tuple[Scene, np.ndarray, np.ndarray]]:
    """Return scenes of other colours, each with its picture and that of the same shape and place in red."""
    found, own = [], [scene for scene in scenes(held_out=held_out) if scene.colour != COLOUR]
    for index in range(number):
        scene, placement = own[index % len(own)], sample_placement(np.random.default_rng([held_out, index]))
        edited = Scene(scene.shape, COLOUR, scene.background)
        found.append((scene, draw(scene, *placement), draw(edited, *placement)))
    return found


def trained(folder: pathlib.Path, run: pathlib.Path, epochs: int) -> pathlib.Path:
    """Train the LoRA, and return its file."""
    targets, references = folder / "pairs", folder / "references"
    for place in (targets, references):
        place.mkdir(parents=True)
    for index, (_, reference, target) in enumerate(pairs(PAIRS, held_out=False)):
        Image.fromarray(target).save(targets / f"{index:04}.png")
        Image.fromarray(reference).save(references / f"{index:04}.png")
        (targets / f"{index:04}.txt").write_text(CAPTION)
    shutil.copy(find_export(run), folder / "base.safetensors")
    config = write_config(
        folder,
        targets,
        f"edit = true\nepochs = {epochs}\nsave_every_n_epochs = {epochs}\nwarmup_steps = 50\n"
        "micro_batch_size_per_gpu = 32\nlr_scheduler = 'cosine'\nema_decay = 0.98\nsave_dtype = 'float32'\n"
        "caching_batch_size = 32\nsteps_per_print = 20\n",
        model="llm_adapter_lr = 0\n",
        optimizer="type = 'adamw'\nlr = 3e-3\nbetas = [0.9, 0.99]\nweight_decay = 0.0",
        adapter="type = 'lora'\nrank = 32",
    )
    dataset = folder / "dataset.toml"
    dataset.write_text(f"{dataset.read_text()}control_path = '{references}'\n")
    train(["--config", str(config)])
    return find_export(next((folder / "runs").iterdir()))


def inside(picture: np.ndarray, colour: str, background: str) -> np.ndarray:
    """Return which pixels are nearer the colour than the background, along the line between them."""
    back = np.array(BACKGROUNDS[background], np.float32)
    contrast = np.array(COLOURS[colour], np.float32) - back
    return (picture - back) @ contrast > 0.5 * contrast @ contrast


def overlaps(drawn: list[np.ndarray]) -> list[float]:
    """Return the intersection over union of each picture's red shape with its reference's."""
    found = []
    for picture, (scene, reference, _) in zip(drawn, pairs(HELD_OUT, held_out=True), strict=True):
        wanted = inside(reference, scene.colour, scene.background)
        own = inside(picture, COLOUR, scene.background)
        found.append(float((wanted & own).sum() / (wanted | own).sum()))
    return found


def grid(path: str, drawn: list[np.ndarray], columns: int = 14) -> None:
    """Write the first references, each above its edit."""
    cell = SIZE + GAP
    picture = Image.new("RGB", (cell * columns - GAP, 2 * cell - GAP), "white")
    for index, (edited, (_, reference, _)) in enumerate(zip(drawn, pairs(columns, held_out=True), strict=False)):
        picture.paste(Image.fromarray(reference), (cell * index, 0))
        picture.paste(Image.fromarray(edited), (cell * index, cell))
    picture.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new folder for the pairs and the run")
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--grid", help="a .png to write")
    arguments = parser.parse_args()
    lora = trained(arguments.folder, arguments.run, arguments.epochs)
    networks = {"vae": ASSETS / "tiny_vae.safetensors", "text_encoder": ASSETS / "tiny_qwen3.safetensors"}
    pipeline = AnimaPipeline.load(
        transformer=find_export(arguments.run),
        **networks,
        tokenizers=ASSETS / "tokenizers",
        loras=[(lora, 1.0)],
        dtype=jnp.float32,
    )

    def edited(references: Any) -> list[np.ndarray]:
        size = {"width": SIZE, "height": SIZE, "batch_size": HELD_OUT}
        return [np.asarray(one) for one in pipeline(CAPTION, **size, references=references, **SAMPLING)]

    drawn = edited([[Image.fromarray(reference)] for _, reference, _ in pairs(HELD_OUT, held_out=True)])
    for name, pictures in (("with its reference", drawn), ("without", edited(()))):
        values, judged = overlaps(pictures), [judge(picture) for picture in pictures]
        kept = [
            (one.shape, one.background) == (scene.shape, scene.background)
            for one, (scene, _, _) in zip(judged, pairs(HELD_OUT, held_out=True), strict=True)
        ]
        red = np.mean([one.colour == COLOUR for one in judged])
        print(f"{name}: IoU {np.mean(values):.3f} (lowest {min(values):.2f}), red {red:.3f}, kept {np.mean(kept):.3f}")
    if arguments.grid:
        grid(arguments.grid, drawn)


if __name__ == "__main__":
    main()
