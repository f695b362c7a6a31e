"""Write a model in another form: under another prefix, in another dtype, as diffusers' folder, or out of one."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anima_jax.checkpoints import copying, diffusers, safetensors
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.locations import writing_to
from anima_jax.checkpoints.models import open_dit, open_text_encoder, open_vae
from anima_jax.checkpoints.names.dit import ADAPTER
from anima_jax.checkpoints.names.networks import QWEN3, WAN_VAE, locate
from anima_jax.checkpoints.safetensors import SafetensorsFile, TensorInfo
from anima_jax.errors import UserError, shorten
from convert import outputs

SUMMARY = "write a model under another prefix, in another dtype, or as a folder of diffusers' and back"

PREFIXES = {"net.": "net.", "model.diffusion_model.": "model.diffusion_model.", "none": ""}
FORMS = ("diffusers", "anima", "comfyui")
PREFIX_OF_FORM = {"anima": "net.", "comfyui": "model.diffusion_model."}

TOKENIZERS = {"qwen": "tokenizer", "t5": "t5_tokenizer"}
"""Folder of a tokenizer as this package has it → as diffusers has it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    parser.add_argument("input", metavar="IN", help="a transformer's .safetensors, any known prefix, or a folder")
    parser.add_argument("output", metavar="OUT", help="the file to write; with --to diffusers, the folder")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--prefix", choices=PREFIXES, help="what the names shall begin with")
    form.add_argument("--to", choices=FORMS, help="diffusers: a folder; anima: prefix net.; comfyui: its saved models'")
    parser.add_argument(
        "--text_encoder", metavar="FILE", help="the text encoder's file: to put into the folder, or out"
    )
    parser.add_argument("--vae", metavar="FILE", help="the VAE's file, likewise")
    parser.add_argument("--tokenizers", metavar="FOLDER", help="with qwen/ and t5/, to put into diffusers' folder")
    outputs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Convert IN to OUT and say on stdout what was left out."""
    source, target = arguments.input, arguments.output
    inputs = (source, arguments.text_encoder, arguments.vae)
    outputs.check(target, *filter(None, inputs), force=arguments.force)
    from_folder = os.path.isdir(source)
    if arguments.to == "diffusers":
        if from_folder:
            raise UserError(f"{source}: is a folder of diffusers' already")
        _to_folder(arguments)
        return
    prefix = PREFIXES[arguments.prefix] if arguments.prefix else PREFIX_OF_FORM.get(arguments.to or "anima")
    assert prefix is not None
    if from_folder:
        _from_folder(arguments, prefix)
    elif not arguments.prefix and not arguments.to:
        raise UserError(f"{source}: into which form? give --to {' or --to '.join(FORMS)}, or --prefix")
    else:
        _renamed(arguments, prefix)


def _renamed(arguments: argparse.Namespace, prefix: str) -> None:
    with open_dit(arguments.input) as checkpoint:
        sources = {prefix + tensor.name: checkpoint.sources[tensor.name] for tensor in checkpoint.tensors}
        _write(arguments.output, sources, arguments.dtype, checkpoint.metadata)
    for what, keys in (("extra buffers", checkpoint.skipped), ("tensors of other networks", checkpoint.elsewhere)):
        if keys:
            print(f"left out {len(keys)} {what}: {shorten(keys)}")
    names = arguments.prefix or arguments.to
    print(f"{arguments.output}: {len(sources)} tensors, prefix {checkpoint.prefix or 'none'} -> {names}")


def _to_folder(arguments: argparse.Namespace) -> None:
    """Every network that is given, each in its folder, and the index; the folder appears whole or not at all."""
    target = pathlib.Path(os.path.abspath(arguments.output))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{arguments.output}: exists already; give a folder that is not there, or an empty one")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing_to(str(target)):
            temporary.mkdir(parents=True)
        components = [
            name for name, one in _given(arguments) if _write_component(temporary, name, one, arguments.dtype)
        ]
        components += _copy_tokenizers(arguments.tokenizers, temporary)
        _write_json(temporary / "scheduler" / "scheduler_config.json", diffusers.SCHEDULER)
        _write_json(temporary / diffusers.INDEX, diffusers.index(target, [*components, "scheduler"]))
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{arguments.output}: {', '.join(components)}, scheduler")
    missing = [name for name in diffusers.COMPONENTS if name not in components]
    if missing:
        print(f"without {', '.join(missing)}: IN has none, and no flag names its file")


def _given(arguments: argparse.Namespace) -> Iterator[tuple[str, tuple[Any, Mapping[str, StoredTensor]]]]:
    """Name, config and tensors (original name → source) of each network that the command line gives."""
    with open_dit(arguments.input) as checkpoint:
        inside = {name for name in checkpoint.sources if name.startswith(ADAPTER)}
        own = {tensor.name: checkpoint.sources[tensor.name] for tensor in checkpoint.tensors}
        yield "transformer", (checkpoint.config, {name: one for name, one in own.items() if name not in inside})
        if inside:
            yield "text_conditioner", (checkpoint.config.adapter, {name: own[name] for name in own if name in inside})
    with SafetensorsFile(arguments.input) as file:
        bundled = {network for network in (QWEN3, WAN_VAE) if locate(network, file.tensors)}
    for name, opener in (("text_encoder", open_text_encoder), ("vae", open_vae)):
        path = getattr(arguments, name)
        if path is None and diffusers.COMPONENTS[name].network in bundled:
            path = arguments.input
        if path is not None:
            with opener(path) as checkpoint:
                yield name, (checkpoint.config, {t.name: checkpoint.sources[t.name] for t in checkpoint.tensors})


def _write_component(
    folder: pathlib.Path, name: str, given: tuple[Any, Mapping[str, StoredTensor]], dtype: str
) -> bool:
    config, tensors = given
    _write_json(folder / name / "config.json", diffusers.settings(name, config))
    sources = {diffusers.spelled(name, tensor, config): source for tensor, source in tensors.items()}
    _write(str(folder / name / diffusers.COMPONENTS[name].weights), sources, dtype, {"format": "pt"})
    return True


def _copy_tokenizers(source: str | None, folder: pathlib.Path) -> list[str]:
    if source is None:
        return []
    for own, theirs in TOKENIZERS.items():
        if not (pathlib.Path(source) / own).is_dir():
            raise UserError(f"{source}: has no folder {own}, expected qwen/ and t5/ in it")
        shutil.copytree(pathlib.Path(source) / own, folder / theirs)
    return list(TOKENIZERS.values())


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    with writing_to(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _from_folder(arguments: argparse.Namespace, prefix: str) -> None:
    """The transformer with its adapter as one file, and the other networks where flags name files for them."""
    present = diffusers.components_in(arguments.input)
    targets: dict[tuple[str, ...], tuple[str, str]] = {("transformer", "text_conditioner"): (arguments.output, prefix)}
    for name, own_prefix in (("text_encoder", "model."), ("vae", "")):
        if path := getattr(arguments, name):
            if name not in present:
                raise UserError(f"{arguments.input}: has no {name}, which --{name} is to be written from")
            outputs.check(path, force=arguments.force)
            targets[(name,)] = (path, own_prefix)
    for components, (path, own_prefix) in targets.items():
        with contextlib.ExitStack() as stack:
            sources = {}
            for name in filter(present.__contains__, components):
                checkpoint = stack.enter_context(diffusers.open_component(arguments.input, name))
                sources |= {own_prefix + tensor.name: checkpoint.sources[tensor.name] for tensor in checkpoint.tensors}
            _write(path, sources, arguments.dtype, {"format": "pt"})
            print(f"{path}: {len(sources)} tensors, from {' and '.join(filter(present.__contains__, components))}")


def _write(target: str, sources: Mapping[str, StoredTensor], dtype: str | None, metadata: Mapping[str, str]) -> None:
    """Write the tensors, one at a time, each in its own dtype or in the one that is asked for."""
    wanted = outputs.OUTPUT_DTYPES.get(dtype or "")

    def stored_dtype(key: str) -> np.dtype:
        return wanted or sources[key].tensor.dtype

    def array_of(key: str) -> np.ndarray:
        values = sources[key].read()
        if wanted is not None:
            _warn_of_non_finite(values, sources[key].key)
        return copying.cast(values, stored_dtype(key), sources[key].key)

    tensors = [TensorInfo(key, stored_dtype(key), source.tensor.shape) for key, source in sources.items()]
    safetensors.write(target, tensors, array_of, metadata)


def _warn_of_non_finite(values: np.ndarray, key: str) -> None:
    count = values.size - int(np.count_nonzero(np.isfinite(values)))
    if count:
        print(f"warning: {key}: {count} NaN or infinite values, as in the input", file=sys.stderr)
