"""What a dry run says of every shipped configuration on every kind of device: tests/golden/dry_runs.json.

python -m tests.dry_runs > tests/golden/dry_runs.json

One device, but 256 for pod.toml; three images of 1024 × 1024 pixels and short captions. For each kind: the GiB that the
run needs as it is, seconds per step of its first tier where that fits, else the flags with which it fits (null: none).
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import huggingface_hub.constants
import jax
import ml_dtypes
import numpy as np
from PIL import Image

from anima_jax import assets
from anima_jax.checkpoints.names import dit, file_tensors, qwen3
from anima_jax.checkpoints.safetensors_header import TensorInfo, build
from anima_jax.config.load import load_config
from anima_jax.data.dataset import read_data
from anima_jax.data.problems import Problems
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from anima_jax.parallel.devices import DEVICE_SPECS
from anima_jax.parallel.mesh import replicas, resolve_sizes
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import estimate, fit
from anima_jax.training.run import Run
from anima_jax.training.step import StepConfig
from anima_jax.training.target import Target

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ASSETS = pathlib.Path(assets.__file__).parent
NAMES = ("anima_control", "anima_full", "anima_lora", "anima_video", "pod", "shapes")


def write_sparse(path: pathlib.Path, rules, build_model, prefix: str) -> None:
    """A file of the right names, shapes and length, whose data are a hole that takes no space on the disk."""
    _, params = parameters.abstract(build_model)
    tensors = [TensorInfo(prefix + t.name, np.dtype(ml_dtypes.bfloat16), t.shape) for t in file_tensors(rules, params)]
    header = build(tensors, {"format": "pt"})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(tensor.nbytes for tensor in tensors))


def write_folder(root: pathlib.Path, *, blocks: int = 0) -> pathlib.Path:
    """Write a working folder with everything that the shipped configurations name, and return it.

    Anima's files are in `hub`, which has the layout of the hub's cache. `blocks`, if given, is the transformer's depth.
    """
    models = root / "hub" / "models--circlestone-labs--Anima"
    files = models / "snapshots" / "abc" / "split_files"
    for path in (models / "refs", *(files / name for name in ("diffusion_models", "text_encoders", "vae"))):
        path.mkdir(parents=True)
    (models / "refs" / "main").write_text("abc")
    for name in ("data/pictures", "data/clips", "data/edges"):
        (root / name).mkdir(parents=True)
    transformer = files / "diffusion_models" / "anima-base-v1.0.safetensors"
    write_sparse(
        transformer,
        dit.RULES,
        lambda rngs: AnimaDiT(DiTConfig(blocks=blocks) if blocks else DiTConfig(), rngs=rngs),
        "net.",
    )
    text_encoder = files / "text_encoders" / "qwen_3_06b_base.safetensors"
    write_sparse(text_encoder, qwen3.RULES, lambda rngs: Qwen3(Qwen3Config(), rngs=rngs), "model.")
    (files / "vae" / "qwen_image_vae.safetensors").symlink_to(ASSETS / "tiny_vae.safetensors")
    for number, size in enumerate(((640, 480), (480, 640), (512, 512))):
        for place in ("pictures", "clips", "edges"):
            Image.new("RGB", size).save(root / "data" / place / f"{number}.png")
            (root / "data" / place / f"{number}.txt").write_text("a picture")
    return root


def rows(name: str, *, levers: bool = True) -> dict[str, dict[str, Any]]:
    """Return the rows of a shipped configuration by the kinds' names; the current folder is that of `write_folder`."""
    options = [] if name == "shapes" else [f"model.tokenizer_path={ASSETS / 'tokenizers'}"]

    def load(keys=()):
        return load_config(str(CONFIGS / f"{name}.toml"), [*options, *keys])

    config, devices = load(), 256 if name == "pod" else 1
    sizes = resolve_sizes(config.mesh.sizes, devices)
    run = Run(config, replicas(sizes))
    data = read_data(config, Problems(), batch_size_of=run.global_batch, keep=False)
    text_rows = data.text_rows(load_tokenizers(config.model.tokenizer_path))
    partition = estimate.abstract_partition(config)
    variants = fit.RunVariants(run, partition, data, text_rows, load, devices=devices)
    found = {}
    for platform in ("gpu", "tpu", "cpu"):
        on = variants.on(platform)
        for spec in DEVICE_SPECS:
            if spec.platform == platform and not (platform == "cpu" and devices > 1):
                found[spec.name] = _row(on, spec, run, data, text_rows, sizes, levers)
    return {spec.name: found[spec.name] for spec in DEVICE_SPECS if spec.name in found}


def _row(variants, spec, run, data, text_rows, sizes, levers) -> dict[str, Any]:
    plain = variants.of({})
    needed = plain.found.total
    row = {"GiB": round(needed / estimate.GIB, 2), "fits": needed <= spec.memory}
    if row["fits"]:
        work = estimate.step_workloads(run, data, *text_rows)[0]
        settings, partition = StepConfig.of(plain.config), plain.partition
        example, sent = (
            {work: estimate.example_flops(partition, settings, work)},
            estimate.traffic_of(settings, partition, [work], sizes),
        )
        seconds = estimate.seconds_of(settings, {spec.platform: plain.found}, example, sent, sizes, [spec])
        row["seconds"] = float(f"{seconds[work, spec].most:.3g}")
    elif levers:
        given = fit.float16_keys(plain.config, Target(None, [spec], spec.memory, spec.name, True))
        keys = fit.fitting_keys(variants, spec.memory, given=given)
        row["flags"] = keys and fit.set_line(keys)
    return row


@contextlib.contextmanager
def in_folder(blocks: int = 0) -> Iterator[None]:
    """Run the block in a temporary folder that has everything, from which TFDS_DATA_DIR is read too."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["TFDS_DATA_DIR"] = os.path.join(root, "tfds")
        folder = write_folder(pathlib.Path(root) / "work", blocks=blocks)
        huggingface_hub.constants.HF_HUB_CACHE = str(folder / "hub")
        with contextlib.chdir(folder):
            yield


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with in_folder():
        lines = [
            f'"{name}": {{\n' + ",\n".join(f'  "{kind}": {json.dumps(row)}' for kind, row in rows(name).items()) + "\n}"
            for name in NAMES
        ]
    print("{\n" + ",\n".join(lines) + "\n}")
