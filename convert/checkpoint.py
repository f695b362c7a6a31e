"""Write a transformer under another prefix or in another dtype, one tensor at a time."""

import argparse
import os
import sys

import numpy as np

from anima_jax.checkpoints import copying, safetensors
from anima_jax.checkpoints.accounting import shorten
from anima_jax.checkpoints.models import open_dit
from anima_jax.checkpoints.safetensors import DTYPES, Tensor
from anima_jax.errors import UserError

SUMMARY = "write a transformer under another prefix or in another dtype"

PREFIXES = {"net.": "net.", "model.diffusion_model.": "model.diffusion_model.", "none": ""}
OUTPUT_DTYPES = {"bf16": DTYPES["BF16"], "f16": DTYPES["F16"], "f32": DTYPES["F32"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    parser.add_argument("input", metavar="IN", help="a transformer's .safetensors, any known prefix")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--prefix", required=True, choices=PREFIXES, help="what the names shall begin with")
    parser.add_argument("--dtype", choices=OUTPUT_DTYPES, help="of every tensor; by default each keeps its own")
    parser.add_argument("--force", action="store_true", help="write over an existing OUT")


def run(arguments: argparse.Namespace) -> None:
    """Convert IN to OUT and say on stdout what was left out."""
    source, target = arguments.input, arguments.output
    if os.path.exists(target):
        if os.path.exists(source) and os.path.samefile(source, target):
            raise UserError(f"{target}: is IN itself; give another OUT")
        if not arguments.force:
            raise UserError(f"{target}: exists already; give another OUT, or --force to write over it")
    prefix = PREFIXES[arguments.prefix]
    with open_dit(source) as checkpoint:
        sources = {prefix + tensor.name: checkpoint.sources[tensor.name] for tensor in checkpoint.tensors}

        def stored_dtype(key: str) -> np.dtype:
            return OUTPUT_DTYPES[arguments.dtype] if arguments.dtype else sources[key].tensor.dtype

        def array_of(key: str) -> np.ndarray:
            values = sources[key].read()
            if arguments.dtype:
                _warn_of_non_finite(values, sources[key].key)
            return copying.cast(values, stored_dtype(key), sources[key].key)

        tensors = [Tensor(key, stored_dtype(key), source.tensor.shape) for key, source in sources.items()]
        safetensors.write(target, tensors, array_of, checkpoint.metadata)
    for what, keys in (("extra buffers", checkpoint.skipped), ("tensors of other networks", checkpoint.elsewhere)):
        if keys:
            print(f"left out {len(keys)} {what}: {shorten(keys)}")
    print(f"{target}: {len(tensors)} tensors, prefix {checkpoint.prefix or 'none'} -> {arguments.prefix}")


def _warn_of_non_finite(values: np.ndarray, key: str) -> None:
    count = values.size - int(np.count_nonzero(np.isfinite(values)))
    if count:
        print(f"warning: {key}: {count} NaN or infinite values, as in the input", file=sys.stderr)
