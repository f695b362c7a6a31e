"""python -m anima_jax.convert: inspect files and convert them between formats."""

if __name__ == "__main__":
    from anima_jax.launch import convert

    convert()  # which imports this module under its own name

from collections.abc import Sequence
from types import ModuleType

from anima_jax.convert import checkpoint, control_pictures, diff, extract, inspect, lora, merge, resize
from anima_jax.errors import ArgumentParser, command_line, program

COMMANDS: dict[str, ModuleType] = {
    "inspect": inspect,
    "checkpoint": checkpoint,
    "lora": lora,
    "merge": merge,
    "extract": extract,
    "diff": diff,
    "resize": resize,
    "control-pictures": control_pictures,
}
"""Modules with `SUMMARY`, `add_arguments(parser)` and `run(arguments)`."""


def parser() -> ArgumentParser:
    """Return the parser of the commands; what it parses has the command as `run`."""
    whole = ArgumentParser(
        prog=program("anima_jax.convert"), description="Inspect Anima files and convert them between formats."
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return whole


@command_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command given on the command line."""
    parsed = parser().parse_args(arguments)
    parsed.run(parsed)
