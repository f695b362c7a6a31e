"""The formats that are tried: valid inputs of each, and what the program does with a folder that holds one."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable

from tests.fuzz import data_files, model_files, settings_files
from tests.fuzz.mutations import Files

CORPUS = pathlib.Path(__file__).parent / "corpus"


@dataclasses.dataclass(frozen=True)
class Format:
    """`seeds` makes valid inputs, which are then changed; `read` is what is tested."""

    seeds: Callable[[], list[Files]]
    read: Callable[[pathlib.Path], None]


FORMATS = {
    name: Format(seeds, read)
    for module in (model_files, data_files, settings_files)
    for name, (seeds, read) in module.FORMATS.items()
}


def corpus(name: str) -> list[Files]:
    """Inputs of a format that were once lost."""
    found = []
    for path in sorted((CORPUS / name).glob("*.zip")):
        with zipfile.ZipFile(path) as file:
            found.append({inside: file.read(inside) for inside in file.namelist()})
    return found
