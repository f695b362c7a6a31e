"""ComfyUI's nodes that make noise levels, read into a schedule or into a list of levels.

Source: ComfyUI comfy_extras/nodes_custom_sampler.py and comfy/k_diffusion/sampling.py (get_sigmas_karras and others).
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from anima_jax.diffusion.schedules import SCHEDULES, TABLE_SIZE, beta, sigmas
from anima_jax.sampling.comfyui_links import MAX_DEPTH, Link, NodeGraph, number_or
from anima_jax.sampling.request import MIN_DENOISE

BETAS = {(0.6, 0.6): "beta", (0.5, 0.7): "beta57"}
"""BetaSamplingScheduler's alpha and beta → the schedule that they are."""

RAMPS: dict[str, tuple[float, Callable[[np.ndarray, float, float, float], np.ndarray]]] = {
    "karrasscheduler": (
        7.0,
        lambda ramp, low, high, rho: (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho,
    ),
    "exponentialscheduler": (1.0, lambda ramp, low, high, rho: low * (high / low) ** (1 - ramp)),
    "polyexponentialscheduler": (1.0, lambda ramp, low, high, rho: low * (high / low) ** ((1 - ramp) ** rho)),
}
"""Node → default of rho, and function of (ramp from 0 to 1, smallest, largest level, rho) that returns the levels."""


def read_sigmas(graph: NodeGraph, link: Link, shift: float, depth: int = 0) -> dict[str, Any]:
    """Return what a node of noise levels means: `schedule`, `steps` and `denoise`, or `sigmas`; nothing if unknown.

    `shift` is the model's, for schedules that no name stands for.
    """
    key, index = link
    kind, inputs = graph.kind(key), graph.inputs(key)
    found: dict[str, Any] = {}
    if "scheduler" in inputs:
        rows = (("schedule", str, "scheduler"), ("steps", int, "steps"), ("denoise", float, "denoise"))
        read = {field: graph.typed(key, of_type, name) for field, of_type, name in rows}
        found = {field: value for field, value in read.items() if value is not None}
    elif kind == "betasamplingscheduler":
        found = _beta(graph, key, shift)
    elif kind == "manualsigmas":
        levels = re.findall(r"[-+]?\d*\.?\d+", str(graph.value(key, ("sigmas",))))
        found = {"sigmas": tuple(map(float, levels))} if levels else {}
    elif kind in RAMPS:
        found = _ramp(graph, key)
    elif (inner := graph.link(inputs.get("sigmas"))) and depth < MAX_DEPTH:
        found = _changed(graph, key, index, _numbers(read_sigmas(graph, inner, shift, depth + 1), shift))
    if not found:
        graph.leave_out(key)
    return found


def _beta(graph: NodeGraph, key: str, shift: float) -> dict[str, Any]:
    alpha, second = (number_or(graph.value(key, (name,)), 0.6) for name in ("alpha", "beta"))
    steps = graph.typed(key, int, "steps")
    if steps is None or not 0 < steps <= TABLE_SIZE or min(alpha, second) <= 0:
        return {}
    if (alpha, second) in BETAS:
        return {"schedule": BETAS[alpha, second], "steps": steps}
    return _listed([*beta(steps, shift, alpha, second), 0.0])


def _ramp(graph: NodeGraph, key: str) -> dict[str, Any]:
    default, function = RAMPS[graph.kind(key)]
    steps = graph.typed(key, int, "steps")
    low, high = (number_or(graph.value(key, (name,)), 0.0) for name in ("sigma_min", "sigma_max"))
    rho = number_or(graph.value(key, ("rho",)), default)
    if steps is None or not 0 < steps <= TABLE_SIZE or min(low, high, rho) <= 0:
        return {}
    return _listed([*function(np.linspace(0.0, 1.0, steps), low, high, rho), 0.0])


def _changed(graph: NodeGraph, key: str, index: int, levels: list[float]) -> dict[str, Any]:
    """Return levels that a node changes, or takes a part of: its output 1 is the second part."""
    kind = graph.kind(key)
    if kind == "setfirstsigma":
        return _listed([number_or(graph.value(key, ("sigma",)), 1.0), *levels[1:]])
    step = max(0, int(number_or(graph.value(key, ("step",)), 0)))
    if kind == "splitsigmasdenoise":
        step = len(levels) - 1 - round((len(levels) - 1) * number_or(graph.value(key, ("denoise",)), 1.0))
    elif kind != "splitsigmas":
        return {}
    return _listed(levels[step:] if index else levels[: step + 1])


def _listed(levels: Iterable[Any]) -> dict[str, Any]:
    """Return levels as the field `sigmas`, in float32's precision; nothing if there are none."""
    numbers = tuple(float(np.float32(level)) for level in levels)
    return {"sigmas": numbers} if numbers else {}


def _numbers(read: dict[str, Any], shift: float) -> list[float]:
    """Return the levels of what was read, none if they cannot be computed."""
    if "sigmas" in read:
        return list(read["sigmas"])
    steps, denoise = read.get("steps", 0), read.get("denoise", 1.0)
    if read.get("schedule") not in SCHEDULES or not 0 < steps <= TABLE_SIZE or not MIN_DENOISE <= denoise <= 1:
        return []
    return sigmas(read["schedule"], steps, shift, denoise=denoise).tolist()
