"""Control networks in ComfyUI's graphs: `ModelPatchLoader` and `AnimaLLLiteApply`, written and read.

Source: comfy_extras/nodes_model_patch.py. The node nearest to the loader acts first.
"""

import re
from collections.abc import Callable
from typing import Any

from anima_jax.data.images import is_transparent
from anima_jax.sampling.comfyui_links import NodeGraph, number_or
from anima_jax.sampling.controls import Control, StoredControl
from anima_jax.sampling.recipe import file_name

STRENGTHS = (-10.0, 10.0)
"""What the node's widget accepts."""

PASSES_ON = re.compile(r"reroute|loadimage|masktoimage|imagetomask|imagescale$|previewimage")
"""Classes of nodes that load a picture, or pass it on as it is."""


def write_control(add: Callable[..., Any], model: Any, control: Control) -> tuple[Any, list[str]]:
    """Add the nodes of a control whose network is a file. Return the link to the model, and what they leave out."""
    left_out: list[str] = []
    if control.kind is not None:
        left_out.append(f"the control picture made by {control.kind}: save it and load that")
    if not STRENGTHS[0] <= control.strength <= STRENGTHS[1]:
        left_out.append(f"control strength {control.strength:g}, which is outside of ComfyUI's -10 to 10")
    mask, names = control.opened[1], control.picture_names
    image = add("LoadImage", image=file_name(names[0]))
    inputs: dict[str, Any] = {"mask": [image[0], 1]} if control.has_transparency else {}
    if mask is not None:
        channel = "alpha" if is_transparent(mask) else "red"
        inputs["mask"] = add("LoadImageMask", image=file_name(names[1]), channel=channel)
    inputs |= {name: float(getattr(control, name)) for name in ("strength", "start_percent", "end_percent")}
    patch = add("ModelPatchLoader", name=file_name(control.path))
    return add("AnimaLLLiteApply", model=model, model_patch=patch, image=image, **inputs), left_out


def read_control(graph: NodeGraph, key: str) -> None:
    """Add what an `AnimaLLLiteApply` does to the recipe, before what nodes after it do."""
    links = graph.links(key)
    loaders = [node for node in graph.chain(links.get("model_patch"), ("model_patch",)) if "name" in graph.inputs(node)]
    names = {part: _picture(graph, links, part) for part in ("image", "mask") if part in links}
    if not loaders or not isinstance(path := graph.value(loaders[0], ("name",)), str) or not all(names.values()):
        graph.leave_out(key, "whose network or pictures are not files")
        return
    image, mask = names.get("image"), names.get("mask")
    if image is None:
        graph.leave_out(key, "which has no picture")
        return
    strength, start, end = (
        number_or(graph.value(key, (name,)), default)
        for name, default in (("strength", 1.0), ("start_percent", 0.0), ("end_percent", 1.0))
    )
    if start > end:
        graph.leave_out(key, "which never acts: it starts after its end")
        return
    # The mask of a picture's own loader is what is transparent in it.
    graph.recipe.controls.insert(0, StoredControl(path, image, strength, start, end, None if mask == image else mask))


def _picture(graph: NodeGraph, links: Any, part: str) -> str | None:
    """Return the name of the file of a picture or mask, or None if the graph computes it."""
    for node in graph.chain(links[part], ("image", "mask", "images", "masks")):
        if not PASSES_ON.search(graph.kind(node)):
            return None
        if isinstance(name := graph.inputs(node).get("image"), str):
            return re.sub(r" \[(input|output|temp)\]$", "", name)
    return None
