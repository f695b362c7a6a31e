"""The command line of `anima-start`: every question has a flag that answers it."""

import argparse
import os
from collections.abc import Sequence

from anima_jax.errors import ArgumentParser, program

CAPTIONS = ("names", "leave_out")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is not valid."""
    parser = ArgumentParser(
        prog=program("anima_jax.start"),
        description="From a folder of pictures to a LoRA and a page in the browser. It asks what no flag answers.",
    )
    add = parser.add_argument
    add("--pictures", metavar="DIR", help="a folder of pictures, or a .zip; 'demo': pictures drawn here; 'none'")
    add(
        "--model",
        default="auto",
        metavar="FILE",
        help="a transformer; 'anima': Anima's own files, downloaded if they are not here; 'shapes': the quick start's "
        "model, trained in minutes; 'auto' (default): Anima if it can be had",
    )
    add("--vae", metavar="FILE", help="the VAE (default: found with the model)")
    add("--text_encoder", metavar="FILE", help="the text encoder (default: found with the model)")
    add("--models", action="append", default=[], metavar="DIR", help="where to look for model files; may be repeated")
    add("--fetch", action="store_true", help="only download Anima's files, or what is missing of them, and stop")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--caption", metavar="TEXT", help="the caption of every picture without one")
    captions.add_argument(
        "--captions", choices=CAPTIONS, help="pictures without a caption: use their file names, or leave them out"
    )
    add("--trigger", metavar="WORD", help="a word in front of every caption, which calls what is learnt; '': none")
    add("--steps", type=int, metavar="N", help="training steps (default: by the number of pictures)")
    add("--rank", type=int, metavar="N", help="rank of the LoRA (default: 32; of the quick start's model 8)")
    add(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side of the square whose area pictures get (default: what fits)",
    )
    add("--output", default="runs", metavar="DIR", help="where TOMLs and runs go (default: runs)")
    add("--yes", action="store_true", help="ask nothing: take the default answers")
    add("--no_train", action="store_true", help="stop when the TOML is written")
    add("--no_page", action="store_true", help="do not open the page")
    add("--no_browser", action="store_true", help="serve the page, but open no browser")
    add("--port", type=int, default=8000, help="port of the page (default: 8000, or the next free one)")
    arguments = parser.parse_args(argv)
    for flag, least, most in (("steps", 1, 10**7), ("rank", 1, 1024), ("resolution", 64, 4096), ("port", 1, 65535)):
        value = getattr(arguments, flag)
        if value is not None and not least <= value <= most:
            parser.error(f"--{flag} {value}: expected {least} to {most}")
    if arguments.caption is not None and not arguments.caption.strip():
        parser.error("--caption: expected a text; --captions leave_out leaves pictures without a caption out")
    if arguments.pictures == "":
        parser.error("--pictures: expected a folder, a .zip, 'demo' or 'none'")
    if not arguments.output or "://" in arguments.output:
        parser.error(f"--output {arguments.output!r}: expected a folder on this machine")
    arguments.output = os.path.abspath(os.path.expanduser(arguments.output))
    return arguments
