"""Write an adapter in another dialect, or for a model of another depth."""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from anima_jax.adapters import dora, peft
from anima_jax.adapters.depths import remapped
from anima_jax.adapters.dialects import COMFYUI, DIALECTS
from anima_jax.adapters.file import open_adapter, write_adapter
from anima_jax.adapters.opening import NETWORKS, WEIGHTS, files_of
from anima_jax.adapters.patch import FLOAT32, Patch
from anima_jax.checkpoints.accounting import looks_like, original_names
from anima_jax.checkpoints.copying import contiguous
from anima_jax.checkpoints.depths import DEPTHS
from anima_jax.checkpoints.joined import open_model
from anima_jax.convert import outputs
from anima_jax.errors import NotFiniteError, UserError, plural, shorten

SUMMARY = "write an adapter (LoRA, LoKr, LoHa, DoRA) in another dialect"

TO = (
    "the dialect; comfyui is diffusion-pipe's too; peft is a folder for PeftModel.from_pretrained on diffusers' "
    "networks, peft_original on a transformer with the original names"
)
BASE = (
    "the model that the adapter is for: with --to comfyui, the magnitudes of a DoRA become those with which ComfyUI, "
    "which divides by the norm of W, gives the trained result at strength 1; otherwise they are changed back"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument("input", metavar="IN", help="an adapter's .safetensors of any dialect, or its folder")
    parser.add_argument("output", metavar="OUT", help="the file to write, or the folder with --to peft")
    parser.add_argument("--to", required=True, choices=DIALECTS, help=TO)
    parser.add_argument("--base", metavar="FILE", nargs="+", help=BASE)
    parser.add_argument(
        "--remap", metavar="FROM:TO", help="move it between models of 28, 40 and 52 blocks, as in --remap 28:40"
    )
    parser.add_argument("--allow_unused", action="store_true", help="ignore keys that belong to no module of Anima's")
    outputs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Convert IN to OUT and print which values were changed, if any."""
    outputs.check(arguments.output, arguments.input, *(arguments.base or ()), force=arguments.force)
    depths = parse_remap(arguments.remap) if arguments.remap else None
    dialect, dtype = DIALECTS[arguments.to], outputs.OUTPUT_DTYPES.get(arguments.dtype)
    if dialect.settings == "beside":
        _check_folder(arguments)
    with contextlib.ExitStack() as stack:
        adapter = stack.enter_context(open_adapter(arguments.input, allow_unused=arguments.allow_unused))
        try:
            patches = remapped(adapter.patches, *depths) if depths else adapter.patches
        except UserError as error:
            raise UserError(f"{adapter.path}: {error}") from error
        if arguments.base:
            weights = _weights(stack, arguments.base)
            patches = _normed(patches, weights, adapter.path, of_base=dialect is COMFYUI)
        messages = write_adapter(arguments.output, patches, dialect, dtype=dtype, metadata=adapter.metadata)
        matched = f"{plural(len(patches), 'module')} matched ({adapter.summary})"
        print(f"{arguments.output}: {matched}, with the key names of {dialect.title}")
    for message in (*messages, *_about_norms(patches, arguments)):
        print(message)


def _check_folder(arguments: argparse.Namespace) -> None:
    """Raise UserError if a file that is written for PEFT would replace one of IN, or exists without --force."""
    is_file = arguments.output.endswith(".safetensors")
    folder = os.path.dirname(arguments.output) if is_file else arguments.output
    files = [os.fspath(file) for file in files_of(arguments.input).values()]
    inputs = [*files, *(os.path.join(os.path.dirname(file), peft.FILE) for file in files), *(arguments.base or ())]
    for network in ("",) if is_file else ("", *NETWORKS):
        for name in (peft.FILE,) if is_file else (peft.FILE, WEIGHTS):
            outputs.check(os.path.join(folder, network, name), *inputs, force=arguments.force)


def _weights(stack: contextlib.ExitStack, paths: list[str]) -> dict[str, Callable[[], np.ndarray]]:
    """Return module → function that reads its weight from one of the files, in float32."""
    found: dict[str, Callable[[], np.ndarray]] = {}
    for path in paths:
        file = stack.enter_context(open_model(path))
        names = original_names(file)
        if not names:
            raise UserError(f"--base {path}: has no weights that an adapter changes; {looks_like(file.tensors)}")
        for name, key in names.items():
            if name.endswith(".weight"):
                read = functools.partial(file.read, key)
                found[name.removesuffix(".weight")] = lambda read=read: contiguous(read()).astype(FLOAT32)
    return found


def _normed(
    patches: Mapping[str, Patch], weights: Mapping[str, Callable[[], np.ndarray]], path: str, *, of_base: bool
) -> dict[str, Patch]:
    """Return the patches with the magnitudes of each DoRA by output for the other norm, where they are not yet."""
    changed = [
        module for module, patch in patches.items() if dora.is_by_output(patch) and patch.norm_of_base != of_base
    ]
    if missing := [module for module in changed if module not in weights]:
        raise UserError(f"{path}: --base lacks the weights of {plural(len(missing), 'module')}: {shorten(missing, 3)}")
    found = dict(patches)
    for module in changed:
        weight = weights[module]()
        if error := patches[module].error(weight.shape):
            raise UserError(f"{path}: {module} {error}")
        found[module] = dora.normed(patches[module], weight, of_base=of_base)
        if not np.isfinite(found[module].parts["dora_scale"].read()).all():
            raise NotFiniteError(f"{path}: {module}: its magnitudes are not finite with the weights of --base")
    return found


def _about_norms(patches: Mapping[str, Patch], arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a message about magnitudes that ComfyUI takes for others, or a --base that nothing needs."""
    by_output = [patch for patch in patches.values() if dora.is_by_output(patch)]
    if arguments.base and not by_output:
        yield "--base changes nothing, as the adapter has no DoRA with a magnitude for each output"
    trained = sum(not patch.norm_of_base for patch in by_output)
    if trained and DIALECTS[arguments.to] is COMFYUI:
        yield (
            f"ComfyUI divides the DoRA of {plural(trained, 'module')} by the norm of W, and it is trained with that of "
            "W + ΔW: --base FILE, the model that it is for, changes the magnitudes for the trained result in ComfyUI"
        )


def parse_remap(text: str) -> tuple[int, int]:
    """Parse `28:40` as two numbers of blocks. Raises UserError for anything else."""
    depths = {str(depth): depth for depth in DEPTHS}
    source, _, target = text.partition(":")
    if source not in depths or target not in depths:
        raise UserError(f"--remap {text}: expected two numbers of blocks, as in 28:40, of {', '.join(depths)}")
    return depths[source], depths[target]
