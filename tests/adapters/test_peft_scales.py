"""Scales that a file's header or PEFT's settings give: as PEFT itself applies them, and as diffusers writes them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from anima_jax.adapters.file import open_adapter
from anima_jax.adapters.patch import Patch
from tests.adapters.adapter_files import diffusers_name, updates
from tests.golden_files import relative_error
from tests.models.networks import normal

LAYER, CONDITIONER = "blocks.0.self_attn.q_proj", "llm_adapter.blocks.0.self_attn.q_proj"
NAMES = {
    "diffusers": diffusers_name,
    "comfyui": "diffusion_model.{}".format,
    "peft": "base_model.model.{}".format,
    "bare": "{}".format,
}


def patches(path) -> dict[str, Patch]:
    with open_adapter(path) as adapter:
        return dict(adapter.patches)


def lora(path, names: str, metadata=None, alpha=None):
    """A LoRA of rank 4 on a layer of the transformer and one of the LLM adapter."""
    tensors = {}
    for module in (LAYER, CONDITIONER):
        tensors[f"{NAMES[names](module)}.lora_A.weight"] = normal(4, 8)
        tensors[f"{NAMES[names](module)}.lora_B.weight"] = normal(6, 4)
        if alpha:
            tensors[f"{NAMES[names](module)}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path, metadata or {})
    return path


HEADER = {
    "alpha / r": ({"transformer.lora_alpha": 8, "transformer.r": 4}, 2.0, 1.0),
    "both networks": ({"transformer.lora_alpha": 8, "text_conditioner.lora_alpha": 2}, 2.0, 0.5),
    "no component": ({"lora_alpha": 8, "r": 4}, 2.0, 2.0),
    "rslora": ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0, 1.0),
    "a pattern": ({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn1.to_q": 1}}, 0.25, 1.0),
    "the first pattern": ({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 1, ".*": 2}}, 0.25, 1.0),
    "another's pattern": ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_k": 1}}, 2.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADER)
def test_diffusers_settings_in_the_header_scale_each_network(tmp_path, case):
    settings, transformer, conditioner = HEADER[case]
    path = lora(tmp_path / "a.safetensors", "diffusers", {"lora_adapter_metadata": json.dumps(settings)})
    found = patches(path)
    assert (found[LAYER].scale, found[CONDITIONER].scale) == (transformer, conditioner)


@pytest.mark.parametrize("names", NAMES)
def test_settings_in_the_header_count_for_names_of_any_format(tmp_path, names):
    settings = {"transformer.lora_alpha": 8, "transformer.r": 4, "text_conditioner.lora_alpha": 2}
    in_json = lora(tmp_path / "json.safetensors", names, {"lora_adapter_metadata": json.dumps(settings)})
    direct = lora(tmp_path / "direct.safetensors", names, {key: str(value) for key, value in settings.items()})
    for path in (in_json, direct):
        assert [patches(path)[module].scale for module in (LAYER, CONDITIONER)] == [2.0, 0.5]


def test_an_alpha_of_the_module_itself_comes_first(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    assert patches(lora(tmp_path / "a.safetensors", "comfyui", metadata, alpha=12.0))[LAYER].scale == 3.0


def test_a_pattern_that_begins_with_a_caret_is_for_the_whole_name(tmp_path):
    """Our own exports have such patterns: one for the transformer's layer is not for the LLM adapter's."""
    path = lora(tmp_path / "adapter_model.safetensors", "peft")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {r"^blocks\.0\.self_attn\.q_proj": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = patches(path)
    assert (found[LAYER].scale, found[CONDITIONER].scale) == (0.5, 1.0)


PEFT = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 6, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"^blocks.0.+q_proj": 5}},
    ),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 6}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 6}),
    "lokr of two matrices": ("LoKrConfig", {"r": 50, "alpha": 20}),
    "lokr of two matrices with a pattern": ("LoKrConfig", {"r": 50, "alpha": 20, "rank_pattern": {"q_proj": 40}}),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT)
def test_pefts_files_have_pefts_updates(tmp_path, case):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    def layer() -> object:
        return torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(12, 16, bias=False)})})

    class Blocks(torch.nn.Module):
        def __init__(self, *inner):
            super().__init__()
            self.blocks = torch.nn.ModuleList([layer()])
            if inner:
                self.llm_adapter = inner[0]

    kind, settings = PEFT[case]
    config = getattr(peft, kind)(target_modules=["q_proj"], **settings)
    model = peft.get_peft_model(Blocks(Blocks()), config)
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.from_numpy(normal(*parameter.shape, seed=number))
    model.save_pretrained(tmp_path)
    found = updates(tmp_path)
    modules = model.base_model.model
    for name, module in ((LAYER, modules), (CONDITIONER, modules.llm_adapter)):
        expected = module.blocks[0]["self_attn"]["q_proj"].get_delta_weight("default").detach().numpy()
        assert relative_error(found[name], expected) < 1e-6, name
