"""Output files of the commands: they replace an existing file only with --force, and never replace an input."""

import argparse
import os
from collections.abc import Callable, Collection

from anima_jax.checkpoints.locations import check_address, is_remote
from anima_jax.checkpoints.safetensors import DTYPES
from anima_jax.errors import UserError, did_you_mean

OUTPUT_DTYPES = {"bf16": DTYPES["BF16"], "f16": DTYPES["F16"], "f32": DTYPES["F32"]}


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    dtype: str = "by default each tensor keeps its own",
    quantised: Collection[str] = (),
) -> None:
    """Add --dtype and --force; `dtype` describes the default of --dtype, `quantised` are more choices for matrices."""
    more = f"; of the matrices only: {', '.join(quantised)}" if quantised else ""
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        type=_one_of((*OUTPUT_DTYPES, *quantised)),
        help=f"dtype of every tensor: {', '.join(OUTPUT_DTYPES)}{more}; {dtype}",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing OUT")


def _one_of(choices: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            near = did_you_mean(text, choices)
            raise argparse.ArgumentTypeError(f"invalid choice: {text!a}{near}, expected one of {', '.join(choices)}")
        return text

    return parse


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Add --variant, for inputs that are folders."""
    parser.add_argument("--variant", metavar="NAME", help="which files of a folder, as in model.fp16.safetensors")


def check(target: str, *sources: str, force: bool, gguf: bool = False) -> None:
    """Raise UserError if `target` is one of the `sources`, or exists and `force` is not set.

    The name of a GGUF file must end in .gguf and that of another file must not: programs go by it.
    """
    check_address(target, is_output=True)
    if target.endswith(".gguf") != gguf:
        found = "a name for a GGUF file, which" if not gguf else "not a name that ends in .gguf, for a GGUF file, which"
        raise UserError(f"{target}: is {found} `convert checkpoint --dtype gguf:…` writes")
    if is_remote(target) or not os.path.exists(target):
        return
    for source in sources:
        if os.path.exists(source) and os.path.samefile(source, target):
            raise UserError(f"{target}: is IN itself; choose another OUT")
        if os.path.isdir(source) and os.path.realpath(target).startswith(os.path.join(os.path.realpath(source), "")):
            raise UserError(f"{target}: is a file of IN; choose another OUT")
    if not force:
        raise UserError(f"{target}: already exists; choose another OUT, or --force to replace it")


def positive(text: str) -> int:
    """Parse a rank, which is at least 1, from the command line."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number, at least 1")
    return int(text)
