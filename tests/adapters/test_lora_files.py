"""Files in the trainer's format on the golden model: what peft computes with them, and back to the same bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anima_jax.adapters import modules
from anima_jax.adapters.dialects import ADAPTER_RULES
from anima_jax.adapters.file import patches_of, write_adapter
from anima_jax.checkpoints.models import load_dit
from anima_jax.checkpoints.names import file_tensors
from anima_jax.errors import UserError
from anima_jax.models import parameters
from tests.adapters.adapter_files import beside, merged
from tests.golden_files import GOLDEN, GRADIENT_TOLERANCE, VALUE_TOLERANCE, channel_last, golden, relative_error

LORA = GOLDEN / "lora_rank4.safetensors"
LOKR = GOLDEN / "lokr_rank4.safetensors"


@pytest.fixture
def model():
    return load_dit(GOLDEN / "dit_image.model.safetensors")


@pytest.mark.parametrize("path", [LORA, LOKR], ids=["lora", "lokr"])
def test_velocity_loss_and_adapter_gradients_equal_the_reference(model, path):
    graphdef, params, _ = beside(path, model)
    inputs, expected = golden("dit_image.io"), golden(f"{path.stem}.io")
    text = [jnp.asarray(inputs[key]) for key in ("qwen", "t5_ids", "qwen_mask", "t5_mask")]

    def loss_of(adapter):
        model = parameters.merge(graphdef, params | adapter)
        context = model.llm_adapter(*text)
        velocity = model(jnp.asarray(channel_last(inputs["x_t"])), jnp.asarray(inputs["t"]), context)
        return jnp.mean((velocity - channel_last(inputs["target"])) ** 2), (velocity, context)

    adapter = {path: value for path, value in params.items() if modules.is_factor(path)}
    (loss, (velocity, context)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(adapter)
    assert relative_error(velocity, channel_last(expected["velocity"])) < VALUE_TOLERANCE
    assert relative_error(context, expected["context_train"]) < VALUE_TOLERANCE
    assert float(loss) == pytest.approx(expected["loss"][0], rel=VALUE_TOLERANCE)
    tensors = file_tensors(ADAPTER_RULES, adapter)
    assert len(tensors) == sum(name.startswith("grad.") for name in expected)
    for tensor in tensors:
        grad = tensor.layout.to_file(np.asarray(grads[tensor.path][tensor.layer]))
        assert relative_error(grad, expected[f"grad.{tensor.name}"]) < GRADIENT_TOLERANCE, tensor.name


def saved_again(source, model, path):
    _, params, specs = beside(source, model)
    write_adapter(path, patches_of(params, specs))
    return load_file(path)


@pytest.mark.parametrize("path", [LORA, LOKR], ids=["lora", "lokr"])
def test_loading_and_saving_gives_the_same_tensors(model, tmp_path, path):
    original, again = load_file(path), saved_again(path, model, tmp_path / "again.safetensors")
    assert original.keys() == again.keys()
    for name, array in original.items():
        assert array.dtype == again[name].dtype
        np.testing.assert_array_equal(array, again[name], err_msg=name)


def test_modules_and_layers_that_a_file_leaves_out_stay_out_and_ranks_may_differ(model, tmp_path):
    kept = {name: array for name, array in load_file(LORA).items() if "blocks.1." not in name and ".mlp." not in name}
    for name in kept:
        if "blocks.2.self_attn.q_proj" in name:
            kept[name] = np.ascontiguousarray(kept[name][:2] if "lora_A" in name else kept[name][:, :2])
    save_file(kept, tmp_path / "part.safetensors")
    again = saved_again(tmp_path / "part.safetensors", model, tmp_path / "again.safetensors")
    assert kept.keys() == again.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


def mismatched_loha():
    names, shapes = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ((64, 2), (2, 64), (1, 2), (2, 64))
    module = "diffusion_model.blocks.0.self_attn.q_proj"
    return {f"{module}.{name}": np.ones(shape, "f4") for name, shape in zip(names, shapes, strict=True)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"diffusion_model.blocks.9.mlp.layer9.lora_A.weight": np.zeros((4, 64), "f4")}, "blocks.9"),
        (lambda t: {k: v for k, v in t.items() if k != next(iter(t))}, "but not"),
        (
            lambda t: {k: v[:, :-1].copy() if ".lora_A." in k else v for k, v in t.items()},
            r"a weight of shape \(16, 63\), the model's is \(16, 64\)",
        ),
        (
            lambda t: {k: v[:3] if "2.mlp.layer1.lora_A" in k else v for k, v in t.items()},
            r"expected \(out, rank\) and \(rank, in\)",
        ),
        (lambda t: {"lora_unet_blocks_0.alpha": np.ones(1, "f4")}, "holds no adapter of Anima's"),
        (lambda t: {}, "holds no adapter of Anima's"),
        (lambda t: mismatched_loha(), "has two products of different shapes"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(model, tmp_path, change, message):
    save_file(change(load_file(LORA)), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message) as error:
        merged(tmp_path / "bad.safetensors", model)
    assert "\n" not in str(error.value)
