"""Adapters written for PEFT and diffusers. Oracle: what they load, and the change of the weights that they make."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anima_jax.adapters.file import open_adapter
from convert.__main__ import main
from tests.adapters.adapter_files import diffusers_name
from tests.golden_files import relative_error
from tests.models.networks import normal, randomise

torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

WIDTH = 32
MODULES = ("blocks.0.self_attn.q_proj", "blocks.0.cross_attn.output_proj", "blocks.0.adaln_modulation_mlp.1")
KINDS = {
    "lora": {"lora_A.weight": (3, WIDTH), "lora_B.weight": (WIDTH, 3)},
    "dora": {"lora_A.weight": (3, WIDTH), "lora_B.weight": (WIDTH, 3), "dora_scale": (WIDTH, 1)},
    "loha": {"hada_w1_a": (WIDTH, 3), "hada_w1_b": (3, WIDTH), "hada_w2_a": (WIDTH, 3), "hada_w2_b": (3, WIDTH)},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 8)},
    "lokr of two matrices": {"lokr_w1": (2, 2), "lokr_w2": (16, 16)},
}


def write(path, kind: str, modules=MODULES):
    """An adapter in ComfyUI's names and bfloat16, with ranks and alphas that differ between modules."""
    tensors = {}
    for number, module in enumerate(modules):
        for part, shape in KINDS[kind].items():
            sizes = [size + number * (size == 3) * (kind == "lora") for size in shape]
            name = f"diffusion_model.{module}"
            tensors[f"{name}.{part}"] = normal(*sizes, seed=len(tensors)).astype(ml_dtypes.bfloat16)
        tensors[f"diffusion_model.{module}.alpha"] = np.array(5 + number % 2, np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def weights():
    """Weights of diffusers' transformer, in which the modules are square."""
    return {name: parameter.detach().clone() for name, parameter in transformer().named_parameters()}


def transformer(weights=None):
    pytest.importorskip("diffusers")
    from diffusers import CosmosTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "adaln_lora_dim": WIDTH}
    model = CosmosTransformer3DModel(**sizes, text_embed_dim=8, mlp_ratio=1.0, extra_pos_embed_type=None)
    if weights is None:
        return randomise(model)
    model.load_state_dict(weights, strict=False)
    return model


def with_adapter(path, weights) -> dict[str, np.ndarray]:
    """Module → the weight with a file's adapter, as we compute it."""
    with open_adapter(path) as adapter:
        named = {name: weights[f"{peer(name)}.weight"].numpy() for name in adapter.patches}
        return {name: patch.applied(named[name], 1.0) for name, patch in adapter.patches.items()}


def peer(module: str) -> str:
    return diffusers_name(module).removeprefix("transformer.")


def same(model, path, weights):
    found = {
        name.replace(".base_layer", ""): parameter.detach().numpy() for name, parameter in model.named_parameters()
    }
    for module, expected in with_adapter(path, weights).items():
        change = expected - weights[f"{peer(module)}.weight"].numpy()
        assert relative_error(found[f"{peer(module)}.weight"], expected) < 1e-6, module
        assert np.linalg.norm(change) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_all_of_an_adapter_that_is_written_for_it(tmp_path, weights, kind):
    source = write(tmp_path / "a.safetensors", kind)
    main(["lora", str(source), str(tmp_path / "peft"), "--to", "peft"])
    model = peft.PeftModel.from_pretrained(transformer(weights), str(tmp_path / "peft"))
    back = peft.get_peft_model_state_dict(model)
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert back.keys() == written.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(back[name].float().numpy(), values.astype(np.float32))
    with open_adapter(source) as adapter:
        for name, patch in adapter.patches.items():
            assert model.base_model.model.get_submodule(peer(name)).scaling["default"] == patch.scale
    same(model.merge_and_unload(), source, weights)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "lokr of two matrices"])
def test_diffusers_loads_alphas_and_magnitudes(tmp_path, weights, kind):
    source, target = write(tmp_path / "a.safetensors", kind), tmp_path / "b.safetensors"
    main(["lora", str(source), str(target), "--to", "diffusers"])
    model = transformer(weights)
    model.load_lora_adapter(str(target), use_safetensors=True, adapter_name="x")
    with open_adapter(source) as adapter:
        for name, patch in adapter.patches.items():
            assert model.get_submodule(peer(name)).scaling["x"] == patch.scale
    model.fuse_lora()
    same(model, source, weights)


class Networks(torch.nn.Module):
    """A transformer with the original names, and the LLM adapter in it."""

    def __init__(self, inner: bool = True):
        super().__init__()
        attention = {"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(WIDTH, WIDTH, bias=False)})}
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(attention)])
        if inner:
            self.llm_adapter = Networks(inner=False)


def test_peft_leaves_the_llm_adapter_alone_if_the_adapter_does(tmp_path):
    source, out = write(tmp_path / "a.safetensors", "lora", MODULES[:1]), tmp_path / "out"
    main(["lora", str(source), str(out), "--to", "peft_original"])
    base = Networks()
    before = {name: values.detach().clone() for name, values in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, str(out)).merge_and_unload()
    differing = {name for name, values in merged.named_parameters() if not torch.equal(values, before[name])}
    assert differing == {f"{MODULES[0]}.weight"}


def test_each_network_of_diffusers_has_a_folder_for_peft(tmp_path):
    modules = ("blocks.0.self_attn.q_proj", "llm_adapter.blocks.0.self_attn.q_proj")
    source, out = write(tmp_path / "a.safetensors", "lora", modules), tmp_path / "out"
    main(["lora", str(source), str(out), "--to", "peft"])
    conditioner = Networks(inner=False)  # which has the conditioner's names, as diffusers calls the LLM adapter
    model = peft.PeftModel.from_pretrained(conditioner, str(out / "text_conditioner"))
    before = conditioner.blocks[0]["self_attn"]["q_proj"].weight.detach().clone()
    change = model.merge_and_unload().blocks[0]["self_attn"]["q_proj"].weight.detach() - before
    for path in (source, out):
        with open_adapter(path) as adapter:
            assert set(adapter.patches) == set(modules)
            assert relative_error(adapter.patches[modules[1]].update(), change.numpy()) < 1e-5
    with open_adapter(out / "text_conditioner") as adapter:  # by PEFT's own auto_mapping
        assert list(adapter.patches) == [modules[1]]
