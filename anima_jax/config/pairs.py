"""Pairs of images: which runs train on them, and the keys of the dataset TOML that describe them."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from anima_jax.config.schema import InputFolder, documented_as, invalid, resolver, shares

Pairs = Literal["", "control", "inpaint", "edit"]
"""What a run trains on: images alone, or with control pictures, masks to inpaint, or reference pictures."""

NEEDED_BY: Mapping[str, str] = {"control": "[adapter] type = 'lllite'", "edit": "edit = true"}
"""The pairs that need control pictures → the key of the main TOML that asks for them."""

MASK_KINDS = ("boxes", "strokes", "whole")
"""The masks that are drawn at random for inpainting."""

MASK_SHARES: Mapping[str, float] = {"boxes": 45.0, "strokes": 45.0, "whole": 10.0}


def pairs_of(control_channels: int, edit: bool) -> Pairs:
    """Return the pairs of a run that trains a control network of so many channels (0: none), or to edit."""
    return "inpaint" if control_channels == 4 else "control" if control_channels else "edit" if edit else ""


def controls_of(source: Any) -> tuple[str, ...]:
    """Return the folders or features of a source's control pictures, none if it has images alone."""
    return getattr(source, "control_path", None) or getattr(source, "control", None) or ()


_input_folder = resolver("a folder", os.path.isdir)


def _names(found: Any, what: str) -> tuple[str, ...] | None:
    """Return a name, or a list of names, as a tuple."""
    names = [found] if isinstance(found, str) else found
    if names is not None and not (isinstance(names, list | tuple) and names and all(isinstance(x, str) for x in names)):
        raise invalid(f"found {found!r}, expected {what}, or a list of them")
    return tuple(names) if names else None


def _folders(found: Any, info: ValidationInfo) -> Any:
    folders = _names(found, "a folder")
    return folders and tuple(_input_folder(folder, info) for folder in folders)


def _features(found: Any) -> Any:
    return _names(found, "the name of a feature")


def _used(found: Any, info: ValidationInfo) -> Any:
    """Return the control pictures' folders or features, or raise an error if the run lacks them or does not use them.

    The context's `pairs` are those of the run, if they are known. A run that edits may have sources of images alone.
    """
    pairs = (info.context or {}).get("pairs")
    if found is None and pairs == "control":
        what = "a folder of" if info.field_name == "control_path" else "the feature with"
        raise invalid(f"missing, expected {what} control pictures: {NEEDED_BY[pairs]} in the main TOML trains on pairs")
    if found is not None and pairs == "":
        users = " or ".join(NEEDED_BY.values())
        raise invalid(f"nothing uses the control pictures, expected {users} in the main TOML")
    if found is not None and pairs in {"control", "inpaint"} and len(found) > 1:
        raise invalid(f"found {len(found)}, expected one: {NEEDED_BY['control']} takes one control picture of an image")
    return found


def _inpaints(found: Any, info: ValidationInfo) -> Any:
    if found is not None and (info.context or {}).get("pairs") not in {None, "inpaint"}:
        raise invalid("nothing uses it, expected [adapter] type = 'lllite' and cond_in_channels = 4 in the main TOML")
    return found


ControlFolders = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_folders),
    AfterValidator(_used),
    documented_as("folder or [folder, …]"),
]
ControlFeatures = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_features),
    AfterValidator(_used),
    documented_as("text or [text, …]"),
]
InpaintFolder = Annotated[InputFolder | None, AfterValidator(_inpaints)]
MaskShares = Annotated[
    Annotated[Any, shares(MASK_KINDS, "{boxes = 1, strokes = 1, whole = 0}")] | None,
    AfterValidator(_inpaints),
    documented_as("{boxes = …, strokes = …, whole = …}"),
]
