"""Give an adapter a lower rank, or turn a LoKr or LoHa into a LoRA."""

import argparse

from anima_jax.adapters.file import open_adapter, write_adapter
from anima_jax.adapters.patch import resized
from anima_jax.convert import outputs
from anima_jax.errors import UserError, plural

SUMMARY = "give an adapter a lower rank; LoKr and LoHa become LoRA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument("input", metavar="LORA", help="an adapter's .safetensors of any dialect and kind")
    parser.add_argument("output", metavar="OUT", help="the adapter to write, in ComfyUI's names")
    parser.add_argument("--rank", type=outputs.positive, required=True, help="maximum rank of every module")
    parser.add_argument("--allow_unused", action="store_true", help="ignore keys that belong to no module of Anima's")
    outputs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write OUT and print how much of the adapter it keeps. Alphas are multiplied in where the rank changes."""
    outputs.check(arguments.output, arguments.input, force=arguments.force)
    with open_adapter(arguments.input, allow_unused=arguments.allow_unused) as adapter:
        patches, total, kept = {}, 0.0, 0.0
        for module, patch in adapter.patches.items():
            try:
                patches[module], before, after = resized(patch, arguments.rank)
            except UserError as error:
                raise UserError(f"{adapter.path}: {module}: {error}") from error
            total, kept = total + before, kept + after
        metadata = {**adapter.metadata, "rank": str(arguments.rank)}
        metadata |= {key: str(arguments.rank) for key in ("ss_network_dim", "ss_network_alpha") if key in metadata}
        metadata.pop("alpha", None)
        dtype = outputs.OUTPUT_DTYPES.get(arguments.dtype)
        write_adapter(arguments.output, patches, dtype=dtype, metadata=metadata)
    share = kept / total if total else 1.0
    modules = plural(len(patches), "module")
    print(f"{arguments.output}: {modules}, rank {arguments.rank}, {share:.2%} of the energy kept")
