"""Add adapters to the weights of a model, one tensor at a time."""

import argparse
import collections
import contextlib

import numpy as np

from anima_jax.adapters.merge import COMFYUI_DORA, changed_shape, changes, match_adapters, merged, parse_lora_argument
from anima_jax.adapters.opening import open_adapter_file
from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.accounting import StoredTensor, looks_like, original_names
from anima_jax.checkpoints.folders import TRANSFORMER, model_files
from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.names.networks import DIT
from anima_jax.checkpoints.quantised.gguf import portable
from anima_jax.checkpoints.safetensors import TensorInfo
from anima_jax.checkpoints.values import first_problem
from anima_jax.convert import copies, outputs
from anima_jax.errors import NotFiniteError, UserError

SUMMARY = "add adapters to the weights of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument(
        "base", metavar="BASE", help="a transformer's, a text encoder's or an all-in-one file or folder"
    )
    parser.add_argument("loras", metavar="LORA[:WEIGHT]", nargs="+", help="adapters of any kind, and their weights")
    parser.add_argument("output", metavar="OUT", help="the file to write, with BASE's names (a folder's: net.…)")
    outputs.add_variant(parser)
    parser.add_argument("--allow_unused", action="store_true", help="ignore keys that fit no module of BASE")
    parser.add_argument("--comfyui_dora", action="store_true", help=COMFYUI_DORA)
    outputs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write OUT, which is BASE with the adapters merged; tensors that no adapter changes are copied.

    Raises NotFiniteError if a changed tensor has NaN or infinite values; nothing is written then.
    """
    paths, weights = zip(*map(parse_lora_argument, arguments.loras), strict=True)
    outputs.check(arguments.output, arguments.base, *paths, force=arguments.force)
    with contextlib.ExitStack() as stack:
        base = model_files(arguments.base, TRANSFORMER, arguments.variant)
        file = stack.enter_context(open_model(base))
        names = {key: name for name, key in original_names(file).items()}
        if not names:
            raise UserError(f"{file.path}: has no weights that an adapter changes; {looks_like(file.tensors)}")
        shapes = {name: file.tensors[key].shape for key, name in names.items()}
        files = [stack.enter_context(open_adapter_file(path)) for path in paths]
        adapters = match_adapters(files, shapes, base=base, allow_unused=arguments.allow_unused, extend=True)
        changed = changes(adapters, weights)

        def stored_dtype(key: str) -> np.dtype:
            return outputs.OUTPUT_DTYPES.get(arguments.dtype, StoredTensor(file, key).written_dtype)

        def array_of(key: str) -> np.ndarray:
            name = names.get(key, key)
            if name not in changed:
                return StoredTensor(file, key).read_as(stored_dtype(key))
            out = merged(name, file.read(key), changed[name], stored_dtype(key), comfyui_dora=arguments.comfyui_dora)
            if not np.isfinite(out).all():
                problem = first_problem([*(one.path for one in files), base])
                raise NotFiniteError(problem or f"{key}: is infinite with the adapters; their weights may be too large")
            return out

        def shape_of(key: str) -> tuple[int, ...]:
            return changed_shape(file.tensors[key].shape, changed.get(names.get(key, key), ()))

        keys = {
            DIT.saved_prefix + names[key] if base.has_prefixes and key in names else key: key for key in file.tensors
        }
        tensors = [TensorInfo(written, stored_dtype(key), shape_of(key)) for written, key in keys.items()]
        safetensors.write(arguments.output, tensors, lambda written: array_of(keys[written]), portable(file.metadata))
        formats = collections.Counter(filter(None, map(file.storage, file.tensors)))
    for line in copies.summary(formats, "written as values"):
        print(line)
    print(f"{arguments.output}: {len(changed)} of {len(tensors)} tensors changed")
