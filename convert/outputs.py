"""The file that a command writes: never over another without being asked to, and never over what it is made of."""

import argparse
import os

from anima_jax.checkpoints.safetensors import DTYPES
from anima_jax.errors import UserError

OUTPUT_DTYPES = {"bf16": DTYPES["BF16"], "f16": DTYPES["F16"], "f32": DTYPES["F32"]}


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str = "by default each tensor keeps its own") -> None:
    """--dtype and --force; `dtype` says what holds without --dtype."""
    parser.add_argument("--dtype", choices=OUTPUT_DTYPES, help=f"of every tensor; {dtype}")
    parser.add_argument("--force", action="store_true", help="write over an existing OUT")


def check(target: str, *sources: str, force: bool) -> None:
    """Raise UserError if `target` is there already and must stay, or is one of the `sources`."""
    if not os.path.exists(target):
        return
    if any(os.path.exists(source) and os.path.samefile(source, target) for source in sources):
        raise UserError(f"{target}: is IN itself; give another OUT")
    if not force:
        raise UserError(f"{target}: exists already; give another OUT, or --force to write over it")


def positive(text: str) -> int:
    """A rank from the command line."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number, at least 1")
    return int(text)
