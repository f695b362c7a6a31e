"""Convert a model to another prefix or dtype, or to or from a diffusers folder."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from anima_jax.checkpoints import accounting, diffusers
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.control import holds_control, open_control
from anima_jax.checkpoints.folders import INDEXES, TRANSFORMER, component_files, components_in, model_files
from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.locations import check_local, files_in, writing_to
from anima_jax.checkpoints.models import open_dit, open_network
from anima_jax.checkpoints.names.dit import ADAPTER
from anima_jax.checkpoints.names.networks import DIT, QWEN3, WAN_VAE, Network, locate
from anima_jax.checkpoints.quantised.gguf import portable
from anima_jax.convert import copies, outputs, quantise
from anima_jax.errors import UserError, plural, shorten
from anima_jax.text.tokenizers import (
    TOKENIZER_FOLDERS,
    Tokenizers,
    load_tokenizers,
    save_packaged,
    tokenizer_folders,
)

SUMMARY = "write a model with another prefix, in another dtype, or as a diffusers folder and back"

PREFIXES = {"net.": "net.", "model.diffusion_model.": "model.diffusion_model.", "none": ""}
FORMATS = ("diffusers", "anima", "comfyui")
PREFIX_OF_FORMAT = {"anima": "net.", "comfyui": "model.diffusion_model."}

_OTHERS = ("text_encoder", "vae")
"""Networks that have a flag of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "input", metavar="IN", help="a transformer's or text encoder's file or folder, or hf://owner/repo"
    )
    parser.add_argument("output", metavar="OUT", help="the file to write; with --to diffusers, the folder")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--prefix", choices=PREFIXES, help="prefix of the names")
    names.add_argument(
        "--to", choices=FORMATS, help="diffusers: a folder; anima: prefix net.; comfyui: prefix model.diffusion_model."
    )
    parser.add_argument(
        "--text_encoder", metavar="FILE", help="the text encoder's file, to copy into the folder, or from it"
    )
    parser.add_argument("--vae", metavar="FILE", help="the VAE's file, to copy into the folder, or from it")
    parser.add_argument("--tokenizers", metavar="FOLDER", help="qwen/ and t5/ to copy (default: the package's own)")
    outputs.add_variant(parser)
    parser.add_argument("--allow_unused", action="store_true", help="leave out tensors that belong to no network")
    outputs.add_arguments(parser, quantised=quantise.QUANTISERS)
    quantise.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Convert IN to OUT and print what was left out."""
    source, target = arguments.input, arguments.output
    inputs = (source, arguments.text_encoder, arguments.vae)
    outputs.check(target, *filter(None, inputs), force=arguments.force, gguf=_is_gguf(arguments))
    if arguments.keep is not quantise.KEEP and arguments.dtype not in quantise.QUANTISERS:
        raise UserError(f"--keep: needs a quantised --dtype: {', '.join(quantise.QUANTISERS)}")
    if holds_control(source):
        _control(arguments)
        return
    components = components_in(source)
    if arguments.to == "diffusers":
        if components:
            raise UserError(f"{source}: is already a diffusers folder")
        if arguments.dtype in quantise.QUANTISERS:
            raise UserError(f"--to diffusers: cannot hold {arguments.dtype}; use --to comfyui, or --dtype bf16")
        _to_folder(arguments)
        return
    for name in _OTHERS if components else ():  # they are copied out of the folder
        if path := getattr(arguments, name):
            if name not in components:
                raise UserError(f"{source}: has no {name} to write to the file of --{name}")
            outputs.check(path, source, force=arguments.force, gguf=_is_gguf(arguments) and name != WAN_VAE.component)
    _to_file(arguments, _main_network(arguments), target)
    for name in _OTHERS if components else ():
        if path := getattr(arguments, name):
            network = diffusers.COMPONENTS[name].network
            _to_file(arguments, network, path, network.saved_prefix)


def _control(arguments: argparse.Namespace) -> None:
    """Write a control network in another dtype, with its names and metadata as they are."""
    given = (flag for flag in ("prefix", "to", *_OTHERS, "tokenizers", "variant") if getattr(arguments, flag))
    if flag := next(given, None):
        raise UserError(f"--{flag}: {arguments.input} is a control network, of which only --dtype can be changed")
    if arguments.dtype not in outputs.OUTPUT_DTYPES:
        found = f", not in {arguments.dtype}" if arguments.dtype else ""
        choices = ", ".join(outputs.OUTPUT_DTYPES)
        raise UserError(f"--dtype: {arguments.input} is a control network, written in one of {choices}{found}")
    with open_control(arguments.input) as checkpoint:
        wanted = outputs.OUTPUT_DTYPES[arguments.dtype]
        lines = copies.write(arguments.output, checkpoint.sources, "", wanted, checkpoint.metadata, keep_codes=False)
        for line in lines:
            print(line)
        print(f"{arguments.output}: control network, {plural(len(checkpoint.sources), 'tensor')}")


def _to_file(arguments: argparse.Namespace, network: Network, target: str, prefix: str | None = None) -> None:
    """Write a network of IN with another prefix (None: the flags') or dtype, and print what was left out."""
    files = component_files(arguments.input, network.component, arguments.variant)
    if network is DIT:
        files = model_files(arguments.input, TRANSFORMER, arguments.variant)
    with open_network(network, files, allow_unused=arguments.allow_unused) as checkpoint:
        stored, located = checkpoint.stored(), checkpoint.located
        options = arguments if prefix is None else _options_for(network, arguments)
        prefix = _prefix(arguments, located.prefix, network) if prefix is None else prefix
        _write(options, target, stored, prefix, checkpoint.metadata)
    left_out = {
        "extra buffer": located.skipped,
        "tensor of other networks": located.elsewhere,
        "unknown tensor": checkpoint.unused,
    }
    for what, keys in left_out.items():
        if keys:
            print(f"left out {plural(len(keys), what)}: {shorten(keys)}")
    prefixes = f"{located.prefix or 'none'} -> {prefix or 'none'}"
    print(f"{target}: {plural(len(stored), 'tensor')}, prefix {prefixes}")


def _main_network(arguments: argparse.Namespace) -> Network:
    """Return the network that is written to OUT: the transformer, or the text encoder if IN has no transformer."""
    components = components_in(arguments.input)
    if components:
        return QWEN3 if components == [QWEN3.component] else DIT
    with open_model(arguments.input, variant=arguments.variant) as file:
        return QWEN3 if accounting.networks_in(file.tensors) == [QWEN3] else DIT


def _is_gguf(arguments: argparse.Namespace) -> bool:
    return arguments.dtype is not None and arguments.dtype.startswith("gguf:")


def _prefix(arguments: argparse.Namespace, present: str, network: Network) -> str:
    """Return the prefix to write: the chosen one, or with only a --dtype the one in IN, which is `present`.

    Of a folder, it is by default the network's own.
    """
    if _is_gguf(arguments):
        if arguments.prefix not in (None, "none") or arguments.to not in (None, "comfyui"):
            raise UserError(
                f"--dtype {arguments.dtype}: names have no prefix, as ComfyUI-GGUF reads them; leave it out"
            )
        return ""
    if files_in(arguments.input) is not None and not arguments.prefix and network is not DIT:
        return network.saved_prefix
    if files_in(arguments.input) is None and not (arguments.prefix or arguments.to):
        if not arguments.dtype:
            choices = f"--to {', --to '.join(FORMATS)}, --prefix or --dtype"
            raise UserError(f"{arguments.input}: choose an output format: {choices}")
        return present
    if network is QWEN3:
        if arguments.prefix not in (None, "none"):
            raise UserError(f"--prefix {arguments.prefix}: {arguments.input} is a text encoder, expected none or --to")
        return "" if arguments.prefix else QWEN3.saved_prefix
    return _chosen_prefix(arguments)


def _chosen_prefix(arguments: argparse.Namespace) -> str:
    return PREFIXES[arguments.prefix] if arguments.prefix else PREFIX_OF_FORMAT[arguments.to or "anima"]


def _to_folder(arguments: argparse.Namespace) -> None:
    """Write the index and a subfolder per network. The folder appears only when it is complete."""
    check_local("OUT", arguments.output)
    target = pathlib.Path(os.path.abspath(arguments.output))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{arguments.output}: already exists; choose a new folder or an empty one")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing_to(str(target)):
            temporary.mkdir(parents=True)
        rows, components = dict[str, int](), list[str]()
        for name, config, tensors in _networks(arguments):
            _write_component(arguments, temporary / name, name, config, tensors)
            components.append(name)
            rows[name] = getattr(config, "vocabulary", 0)
        problem = _tokenizer_problem(_copy_tokenizers(arguments.tokenizers, temporary), rows)
        components += TOKENIZER_FOLDERS.values()
        _write_json(temporary / "scheduler" / "scheduler_config.json", diffusers.SCHEDULER)
        _write_json(temporary / INDEXES[0], diffusers.index(target, [*components, "scheduler"]))
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{arguments.output}: {', '.join(components)}, scheduler")
    missing = [name for name in diffusers.COMPONENTS if name not in components]
    if missing:
        print(f"without {', '.join(missing)}: not in IN, and no flag names a file; the folder cannot draw without them")
    if problem:
        print(f"{problem}; the folder cannot draw with these tokenizers: --tokenizers FOLDER gives the model's own")


def _tokenizer_problem(tokenizers: Tokenizers, rows: Mapping[str, int]) -> str | None:
    """Return why tokenizers do not fit the networks, given component → rows of its embedding; None if they do."""
    for name, tokens in (("text_encoder", tokenizers.qwen_vocabulary), ("text_conditioner", tokenizers.t5_vocabulary)):
        if tokens > rows.get(name, tokens):
            return f"{name} has {rows[name]} embeddings, its tokenizer {tokens} tokens"
    return None


def _networks(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, Mapping[str, StoredTensor]]]:
    """Yield component, config and tensors (by original name) of each network in IN or in a file given by a flag."""
    with open_dit(arguments.input, variant=arguments.variant, allow_unused=arguments.allow_unused) as checkpoint:
        transformer, adapter = {}, {}
        for name, tensor in checkpoint.stored().items():
            (adapter if name.startswith(ADAPTER) else transformer)[name] = tensor
        yield "transformer", checkpoint.config, transformer
        if adapter:
            yield "text_conditioner", checkpoint.config.adapter, adapter
    with open_model(arguments.input, TRANSFORMER, arguments.variant) as file:
        keys = list(file.tensors)
    for name in _OTHERS:
        network = diffusers.COMPONENTS[name].network
        path = getattr(arguments, name) or (arguments.input if locate(network, keys) else None)
        if path is not None:
            files = component_files(path, name, arguments.variant)
            with open_network(network, files, allow_unused=arguments.allow_unused) as checkpoint:
                yield name, checkpoint.config, checkpoint.stored()


def _write_component(
    arguments: argparse.Namespace,
    folder: pathlib.Path,
    component: str,
    config: Any,
    tensors: Mapping[str, StoredTensor],
) -> None:
    _write_json(folder / "config.json", diffusers.settings(component, config))
    renamed = {diffusers.folder_name(component, name, config): tensor for name, tensor in tensors.items()}
    target = str(folder / diffusers.COMPONENTS[component].weights)
    _write(arguments, target, renamed, "", {"format": "pt"}, keep_codes=False)


def _copy_tokenizers(source: str | None, folder: pathlib.Path) -> Tokenizers:
    if source is None:
        return save_packaged({ours: folder / theirs for ours, theirs in TOKENIZER_FOLDERS.items()})
    tokenizers = load_tokenizers(source)
    for ours, path in tokenizer_folders(source).items():
        shutil.copytree(path, folder / TOKENIZER_FOLDERS[ours])
    return tokenizers


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    with writing_to(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _options_for(network: Network, arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the flags for a network beside a folder's transformer: a VAE is not quantised, and --keep has no names."""
    is_quantised = arguments.dtype in quantise.QUANTISERS
    return argparse.Namespace(
        dtype=None if network is WAN_VAE and is_quantised else arguments.dtype, keep=quantise.KEEP
    )


def _write(
    arguments: argparse.Namespace,
    target: str,
    stored: Mapping[str, StoredTensor],
    prefix: str,
    metadata: Mapping[str, str],
    *,
    keep_codes: bool = True,
) -> None:
    """Write the tensors (by name without `prefix`) one at a time, each in its own dtype or in that of --dtype."""
    metadata = portable(metadata)
    if arguments.dtype in quantise.QUANTISERS:
        lines = quantise.write(target, stored, arguments.dtype, arguments.keep, prefix, metadata)
    else:
        wanted = outputs.OUTPUT_DTYPES.get(arguments.dtype)
        lines = copies.write(target, stored, prefix, wanted, metadata, keep_codes=keep_codes)
    for line in lines:
        print(line)
