"""Write an adapter in another dialect, or for a model of another depth."""

import argparse

from anima_jax.adapters.depths import DEPTHS, remapped
from anima_jax.adapters.dialects import DIALECTS
from anima_jax.adapters.file import open_adapter, write_adapter
from anima_jax.convert import outputs
from anima_jax.errors import UserError, plural

SUMMARY = "write an adapter (LoRA, LoKr, LoHa, DoRA) in another dialect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument("input", metavar="IN", help="an adapter's .safetensors of any dialect, or its folder")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--to", required=True, choices=DIALECTS, help="the dialect; comfyui is diffusion-pipe's too")
    parser.add_argument(
        "--remap", metavar="FROM:TO", help="move it between models of 28, 40 and 52 blocks, as in --remap 28:40"
    )
    parser.add_argument("--allow_unused", action="store_true", help="ignore keys that belong to no module of Anima's")
    outputs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Convert IN to OUT and print which values were changed, if any."""
    outputs.check(arguments.output, arguments.input, force=arguments.force)
    depths = parse_remap(arguments.remap) if arguments.remap else None
    dialect, dtype = DIALECTS[arguments.to], outputs.OUTPUT_DTYPES.get(arguments.dtype)
    with open_adapter(arguments.input, allow_unused=arguments.allow_unused) as adapter:
        try:
            patches = remapped(adapter.patches, *depths) if depths else adapter.patches
        except UserError as error:
            raise UserError(f"{adapter.path}: {error}") from error
        messages = write_adapter(arguments.output, patches, dialect, dtype=dtype, metadata=adapter.metadata)
        matched = f"{plural(len(patches), 'module')} matched ({adapter.summary})"
        print(f"{arguments.output}: {matched}, with the key names of {dialect.title}")
    for message in messages:
        print(message)


def parse_remap(text: str) -> tuple[int, int]:
    """Parse `28:40` as two numbers of blocks. Raises UserError for anything else."""
    depths = {str(depth): depth for depth in DEPTHS}
    source, _, target = text.partition(":")
    if source not in depths or target not in depths:
        raise UserError(f"--remap {text}: expected two numbers of blocks, as in 28:40, of {', '.join(depths)}")
    return depths[source], depths[target]
