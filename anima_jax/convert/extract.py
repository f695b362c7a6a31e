"""Make a LoRA from a fine-tune: the leading singular vectors of each weight's difference from the base."""

import argparse
import contextlib
from collections.abc import Iterator

import numpy as np

from anima_jax.adapters.base_model import identify
from anima_jax.adapters.file import write_adapter
from anima_jax.adapters.patch import Part, Patch, truncated
from anima_jax.checkpoints.accounting import StoredTensor, looks_like, original_names
from anima_jax.checkpoints.folders import TRANSFORMER, model_files
from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.safetensors import DTYPES
from anima_jax.convert import outputs
from anima_jax.errors import UserError, plural, shorten

SUMMARY = "make a LoRA of the difference between a model and its fine-tune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument("base", metavar="BASE", help="the model's file or folder")
    parser.add_argument("tuned", metavar="TUNED", help="the same model after its training")
    parser.add_argument("output", metavar="OUT", help="the adapter to write")
    parser.add_argument("--rank", type=outputs.positive, required=True, help="maximum rank of every weight's factors")
    outputs.add_variant(parser)
    outputs.add_arguments(parser, dtype="by default f32")


def run(arguments: argparse.Namespace) -> None:
    """Write OUT and print how much of the change it keeps. Norms and biases have no rank and are kept in full."""
    outputs.check(arguments.output, arguments.base, arguments.tuned, force=arguments.force)
    dtype = outputs.OUTPUT_DTYPES.get(arguments.dtype, DTYPES["F32"])
    parts: dict[str, dict[str, Part]] = {}
    total = kept = 0.0
    for name, difference in differences(arguments.base, arguments.tuned, arguments.variant):
        energy = float(np.sum(np.square(difference), dtype=np.float64))
        module, _, kind = name.rpartition(".")
        own = parts.setdefault(module, {})
        if difference.ndim == 2:
            b, a, share = truncated(difference, arguments.rank)
            own["lora_B"], own["lora_A"] = Part.of(b.astype(dtype)), Part.of(a.astype(dtype))
        else:
            own["diff_b" if kind == "bias" else "diff"], share = Part.of(difference.astype(dtype)), 1.0
        total, kept = total + energy, kept + share * energy
    if not parts:
        raise UserError(f"{arguments.tuned}: has the same values as {arguments.base}")
    metadata = {
        "format": "pt",
        "rank": str(arguments.rank),
        **identify(model_files(arguments.base, TRANSFORMER, arguments.variant)).metadata,
    }
    write_adapter(arguments.output, {module: Patch(own) for module, own in parts.items()}, metadata=metadata)
    modules = plural(len(parts), "module")
    print(f"{arguments.output}: {modules}, rank {arguments.rank}, {kept / total:.2%} of the energy kept")


def differences(base: str, tuned: str, variant: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield original name and TUNED − BASE, in float32, of each tensor that differs.

    Raises UserError if the models have different tensors or shapes, or values that are not finite.
    """
    with opened_both(base, tuned, variant=variant) as (mine, theirs):
        alone = sorted(mine.keys() ^ theirs.keys())
        if alone:
            raise UserError(f"{tuned}: {len(alone)} tensors are only in one of it and {base}: {shorten(alone)}")
        for name, source in mine.items():
            if source.info.shape != theirs[name].info.shape:
                raise UserError(f"{tuned}: {name} is {theirs[name].info.shape}, in {base} {source.info.shape}")
            difference = theirs[name].read().astype(np.float32) - source.read().astype(np.float32)
            if not np.isfinite(difference).all():
                raise UserError(f"{tuned}: {name}: NaN or infinite values in it or in {base}")
            if np.any(difference):
                yield name, difference


@contextlib.contextmanager
def opened_both(*paths: str, variant: str | None) -> Iterator[list[dict[str, StoredTensor]]]:
    """Open files or folders and yield, for each, original name → tensor of the transformer and text encoder.

    Of a diffusers folder, it is the transformer with its LLM adapter.

    Raises UserError for a file that has neither.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for path in paths:
            file = stack.enter_context(open_model(path, TRANSFORMER, variant))
            names = original_names(file)
            if not names:
                raise UserError(f"{path}: holds neither a transformer nor a text encoder; {looks_like(file.tensors)}")
            found.append({name: StoredTensor(file, key) for name, key in names.items()})
        yield found
