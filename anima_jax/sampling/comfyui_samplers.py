"""ComfyUI's nodes of samplers with options: a sampler's own node, written and read.

Source: ComfyUI comfy_extras/nodes_custom_sampler.py and nodes_advanced_samplers.py. The nodes' inputs have the names of
our options. `noise_device` stands for the `_gpu` forms of samplers.
"""

from collections.abc import Mapping
from typing import Any

from anima_jax.diffusion.samplers import SAMPLERS, check_options

NODES = {
    "SamplerEulerAncestral": "euler_ancestral",
    "SamplerEulerAncestralCFGPP": "euler_ancestral_cfg_pp",
    "SamplerEulerCFGpp": "euler_cfg_pp",
    "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_ancestral",
    "SamplerDPMPP_SDE": "dpmpp_sde",
    "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde",
    "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde",
    "SamplerDPMAdaptative": "dpm_adaptive",
    "SamplerLMS": "lms",
    "SamplerLCM": "lcm",
    "SamplerER_SDE": "er_sde",
    "SamplerSASolver": "sa_solver",
    "SamplerSEEDS2": "seeds_2",
}
"""Node → sampler. Its inputs are the sampler's options."""

OF_NODE = {node.casefold(): sampler for node, sampler in NODES.items()}
"""Node in lower case → its sampler."""

FORMS_OF = {
    "exp_heun_2_x0": "seeds_2",
    "exp_heun_2_x0_sde": "seeds_2",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde",
    "sa_solver_pece": "sa_solver",
}
"""Samplers that are others with other defaults."""


def sampler_node(sampler: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return class and inputs of the node for a sampler with these options, or None if there is no such node."""
    plain = sampler.removesuffix("_gpu")
    base = FORMS_OF.get(plain, plain)
    name = next((node for node, known in NODES.items() if known == base), None)
    if name is None:
        return None
    inputs = {option: row.default for option, row in SAMPLERS[sampler].options.items()}
    inputs |= check_options(sampler, options)
    if SAMPLERS[sampler].brownian_path_on:
        inputs["noise_device"] = "gpu" if sampler.endswith("_gpu") else "cpu"
    return name, inputs


def sampler_of(kind: str, inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """Return the sampler of a node of `OF_NODE`, its options that are not the defaults, and the inputs left out.

    An input of None means the default.
    """
    sampler = OF_NODE[kind]
    if inputs.get("noise_device") == "gpu" and f"{sampler}_gpu" in SAMPLERS:
        sampler += "_gpu"
    known = SAMPLERS[sampler].options
    options = {option: inputs[option] for option, row in known.items() if inputs.get(option) not in (None, row.default)}
    return sampler, options, [name for name in inputs if name not in known and name != "noise_device"]
