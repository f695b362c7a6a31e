"""Files that come with the package: networks, tokenizers, configurations and documents."""

import os
import pathlib

ASSETS = pathlib.Path(__file__).parent

PACKAGE = ASSETS.parent


def shipped(folder: str, name: str = "") -> pathlib.Path:
    """Return the path of a file in `configs` or `docs`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / folder
    return (inside if inside.is_dir() else PACKAGE.parent / folder) / name


def docs_page(name: str) -> str:
    """Return the path of a page of the documents, for messages: relative in a checkout that is the current folder."""
    near = os.path.join("docs", name)
    return near if os.path.isfile(near) else os.fspath(shipped("docs", name))
