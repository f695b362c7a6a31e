"""Regions in ComfyUI's graphs: the nodes that set a prompt's area, mask, strength and range, written and read.

Source: `ConditioningSetArea`, `ConditioningSetMask` and their relatives in ComfyUI's nodes.py. They set values of each
prompt that reaches them, so that the last node before the sampler counts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from anima_jax.sampling.comfyui_links import Link, NodeGraph, number_or
from anima_jax.sampling.images import PIXELS_PER_LATENT
from anima_jax.sampling.recipe import file_name
from anima_jax.sampling.regions import Area, Region, StoredRegion

WHOLE = Area(0.0, 0.0, 1.0, 1.0, True)

SMALLEST_SIDE = 64
"""The smallest width and height of ConditioningSetArea's widgets, in pixels."""

MASK_LINKS = ("mask", "image", "masks")


class Conditioning(NamedTuple):
    """A prompt in a graph: its text, the node that encodes it, and what nodes after that one set."""

    text: str
    encoder: str
    settings: Mapping[str, Any]

    @property
    def range(self) -> tuple[float, float]:
        """The part of the sampling in which it counts, in fractions."""
        return self.settings.get("start", 0.0), self.settings.get("end", 1.0)

    @property
    def is_plain(self) -> bool:
        """Whether it counts in the whole image all the time."""
        return not {"area", "mask"} & set(self.settings) and self.range == (0.0, 1.0)

    def region(self) -> StoredRegion:
        """Return it as a region."""
        start, end = self.range
        strength = self.settings.get("strength", 1.0)
        if "mask" not in self.settings:
            return StoredRegion(str(self.settings.get("area", WHOLE)), self.text, strength, False, start, end)
        strength *= self.settings.get("mask_strength", 1.0)
        return StoredRegion(self.settings["mask"], self.text, strength, self.settings.get("bounds", False), start, end)


def settings_of(graph: NodeGraph, key: str, is_loader: Callable[[str], bool]) -> dict[str, Any] | None:
    """Return what a node sets for the prompts that reach it, or None for a node that is not known to set anything.

    `is_loader` says whether a node of a mask's chain passes a file's values on as they are.
    """
    kind = graph.kind(key)

    def number(name: str, default: float) -> float:
        return number_or(graph.value(key, (name,)), default)

    if "timesteprange" in kind:
        return {"start": number("start", 0.0), "end": number("end", 1.0)}
    if kind in ("conditioningsetarea", "conditioningsetareapercentage"):
        values = [number(name, 0.0) for name in ("x", "y", "width", "height")]
        area = Area(*values, fractions=kind.endswith("percentage"))
        return {"area": area, "strength": number("strength", 1.0), "bounds": False}
    if kind == "conditioningsetareastrength":
        return {"strength": number("strength", 1.0)}
    if kind == "conditioningsetmask":
        bounds = graph.value(key, ("set_cond_area",)) == "mask bounds"
        mask = _mask_of(graph, graph.link(graph.inputs(key).get("mask")), is_loader)
        return {"mask": mask, "mask_strength": number("strength", 1.0), "bounds": bounds}
    return None


def _mask_of(graph: NodeGraph, link: Link | None, is_loader: Callable[[str], bool]) -> str | None:
    """Return the name of a mask's file, or None if the graph computes the mask."""
    for key in graph.chain(link, MASK_LINKS):
        if not is_loader(key):
            break
        if isinstance(name := graph.inputs(key).get("image"), str):
            return name
    if link:
        graph.leave_out(link[0], "which computes a mask")
    return None


def read_regions(graph: NodeGraph, found: Sequence[Conditioning]) -> None:
    """Set prompt, regions and the prompt's strength, from the prompts that are combined.

    The first one that counts in the whole image is the prompt; without one its strength is 0.
    """
    recipe = graph.recipe
    if len(found) == 1 and not {"area", "mask"} & set(found[0].settings):
        recipe.values["prompt"] = found[0].text
        return
    base = next((each for each in found if each.is_plain), None)
    for each in found:
        if {"area", "mask"} <= set(each.settings):
            graph.leave_out(each.encoder, "whose prompt has an area and a mask")
        elif each is not base and each.settings.get("mask", "") is not None:
            recipe.regions.append(each.region())
    strength = base.settings.get("strength", 1.0) if base else 0.0
    recipe.values["prompt"] = base.text if base else ""
    if recipe.regions and strength != 1.0:
        recipe.values["base_strength"] = strength


def write_region(
    add: Callable[..., Any], region: Region, conditioning: Any, size_wh: tuple[int, int]
) -> tuple[Any, list[str]]:
    """Add the nodes that make a prompt a region's, and return the link to them and what they leave out."""
    if (region.start_percent, region.end_percent) != (0.0, 1.0):
        ends = {"start": float(region.start_percent), "end": float(region.end_percent)}
        conditioning = add("ConditioningSetTimestepRange", conditioning=conditioning, **ends)
    common: dict[str, Any] = {"conditioning": conditioning, "strength": float(region.strength)}
    if region.area is None:
        mask = add("LoadImageMask", image=file_name(region.where_name), channel=region.channel)
        bounds = "mask bounds" if region.bounds else "default"
        return add("ConditioningSetMask", mask=mask, set_cond_area=bounds, **common), []
    width, height = size_wh
    part = region.area.latent((height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT))
    pixels = {name: PIXELS_PER_LATENT * getattr(part, own) for name, own in _OWN_NAMES.items()}
    left_out = []
    if min(pixels["width"], pixels["height"]) < SMALLEST_SIDE:
        left_out = [f"{region.name}, which is smaller than ComfyUI's {SMALLEST_SIDE} pixels"]
    return add("ConditioningSetArea", **pixels, **common), left_out


_OWN_NAMES = {"width": "columns", "height": "rows", "x": "x", "y": "y"}
