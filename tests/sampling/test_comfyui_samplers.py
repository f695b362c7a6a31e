"""ComfyUI's nodes of samplers with options, written into our images and read from others'."""

import dataclasses

import pytest

from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.sampling.comfyui_graph import comfyui_graph
from anima_jax.sampling.comfyui_reader import from_comfyui
from anima_jax.sampling.request import ImageRequest, SamplingParams

NODES = {
    "SamplerEulerAncestral": ("euler_ancestral", {"eta": 0.5, "s_noise": 1.1}, {}),
    "SamplerEulerAncestralCFGPP": ("euler_ancestral_cfg_pp", {"eta": 0.5, "s_noise": 1.1}, {}),
    "SamplerEulerCFGpp": ("euler_cfg_pp", {"version": "alternative"}, {}),
    "SamplerDPMPP_2S_Ancestral": ("dpmpp_2s_ancestral", {"eta": 0.5, "s_noise": 1.1}, {}),
    "SamplerDPMPP_SDE": ("dpmpp_sde_gpu", {"eta": 0.5, "s_noise": 1.1, "r": 0.4}, {"noise_device": "gpu"}),
    "SamplerDPMPP_2M_SDE": ("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}, {"noise_device": "cpu", "s_noise": 1}),
    "SamplerDPMPP_3M_SDE": ("dpmpp_3m_sde", {"eta": 0.5, "s_noise": 1.1}, {"noise_device": "cpu"}),
    "SamplerLMS": ("lms", {"order": 2}, {}),
    "SamplerLCM": ("lcm", {"s_noise": 1.2, "s_noise_end": 0.9, "noise_clip_std": 2.5}, {}),
    "SamplerDPMAdaptative": (
        "dpm_adaptive",
        {"order": 2, "rtol": 0.01, "atol": 0.001, "h_init": 0.1, "pcoeff": 0.1, "icoeff": 0.9, "dcoeff": 0.2}
        | {"accept_safety": 0.8, "eta": 0.1, "s_noise": 1.1},
        {},
    ),
    "SamplerER_SDE": ("er_sde", {"solver_type": "ODE", "max_stage": 2}, {"eta": 1.0, "s_noise": 1.0}),
    "SamplerSASolver": (
        "sa_solver",
        {"eta": 0.5, "sde_start_percent": 0.1, "sde_end_percent": 0.9, "s_noise": 1.1, "predictor_order": 2}
        | {"corrector_order": 3, "use_pece": True, "simple_order_2": True},
        {"model": ["3", 0]},
    ),
    "SamplerSEEDS2": ("seeds_2", {"solver_type": "phi_2", "eta": 0.5, "s_noise": 1.1, "r": 0.7}, {}),
}
"""Node → our sampler and options, and the node's other inputs (comfy_extras/nodes_custom_sampler.py and others)."""


def graph_of(**params):
    values = ImageRequest("a").settings() | dataclasses.asdict(SamplingParams(**params))
    return comfyui_graph(values, {"transformer": "t.safetensors", "vae": "v.safetensors", "text_encoder": "q"}, [])


@pytest.mark.parametrize("name", NODES)
def test_a_samplers_node_is_read_and_written(name):
    sampler, options, others = NODES[name]
    graph, left_out = graph_of(sampler=sampler, sampler_options=options, schedule="karras", steps=9)
    (node,) = (
        node for node in graph.values() if node["class_type"].startswith("Sampler") and "cfg" not in node["inputs"]
    )
    assert not left_out
    assert (node["class_type"], node["inputs"].keys()) == (name, (options | others).keys())
    assert {**node["inputs"], "model": None} == {**options, **others, "model": None}
    recipe = from_comfyui("x.png", graph)
    assert not recipe.messages
    found = {key: recipe.values[key] for key in ("sampler", "sampler_options", "schedule", "steps", "seed")}
    assert found == {"sampler": sampler, "sampler_options": options, "schedule": "karras", "steps": 9, "seed": 0}


@pytest.mark.parametrize("sampler", ["exp_heun_2_x0", "dpmpp_2m_sde_heun", "sa_solver_pece"])
def test_forms_of_another_sampler_are_that_samplers_node(sampler):
    graph, _ = graph_of(sampler=sampler, sampler_options={"eta": 0.25})
    recipe = from_comfyui("x.png", graph)
    own, other = SAMPLERS[sampler], SAMPLERS[recipe.values["sampler"]]
    defaults = {name: option.default for name, option in other.options.items()}
    assert defaults | recipe.values["sampler_options"] == {name: row.default for name, row in own.options.items()} | {
        "eta": 0.25
    }


def test_what_no_node_does_is_named():
    _, left_out = graph_of(sampler="ipndm", sampler_options={"max_order": 2})
    assert left_out == ["options of the sampler: max_order"]
    graph, _ = graph_of(sampler="lcm", sampler_options={"s_noise": 0.9})
    (node,) = (node for node in graph.values() if node["class_type"] == "SamplerLCM")
    node["inputs"] |= {"new_input": 2.5, "s_noise": 1.0}
    assert "new_input" in from_comfyui("x.png", graph).messages[0]
