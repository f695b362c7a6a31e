"""Adapter files of every dialect and kind: the same numbers whichever they come in, and nothing lost on the way."""

import itertools
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anima_jax.adapters import dialects as names
from anima_jax.adapters import planning
from anima_jax.adapters.depths import remapped
from anima_jax.adapters.dialects import DIALECTS
from anima_jax.adapters.file import Adapter, fit_to_weights, open_adapter, write_adapter
from anima_jax.adapters.merge import AdapterStack
from anima_jax.adapters.modules import adapter_spec
from anima_jax.adapters.patch import Part, Patch, truncated
from anima_jax.checkpoints.depths import depth_map
from anima_jax.checkpoints.models import load_dit
from anima_jax.errors import UserError, shell_command
from anima_jax.models import parameters
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from tests.adapters.adapter_files import (
    LOKR,
    LORA,
    SPELLINGS,
    beside,
    flat,
    lora_as,
    merged,
    peft_config,
    split,
    updates,
    velocity,
)
from tests.golden_files import GOLDEN, VALUE_TOLERANCE, channel_last, golden, relative_error
from tests.models.networks import normal, random_model

DIT_FILE = GOLDEN / "dit_image.model.safetensors"


@pytest.fixture
def model():
    return load_dit(DIT_FILE)


def same_updates(path, expected, tolerance=1e-6):
    found = updates(path)
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        assert relative_error(found[module], update) < tolerance, module


# ---- names -----------------------------------------------------------------------------------------------------------


def test_no_two_modules_have_one_spelling():
    modules = set(names._all_names(3).values())
    for spell in (*names.NAMES, *(dialect.module for dialect in DIALECTS.values())):
        spelled = {spelling: module for module in modules if (spelling := spell(module)) is not None}
        assert len(spelled) == sum(spell(module) is not None for module in modules)
        assert names.modules_by_spelling(spelled) == spelled


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
@pytest.mark.parametrize("file", [LORA, LOKR])
def test_comfyui_accepts_every_key_that_is_written_for_the_weight_that_it_means(dialect, file, tmp_path):
    accepted = json.loads((GOLDEN / "comfyui_lora_keys.json").read_text())["accepted"]
    with open_adapter(file) as adapter:
        write_adapter(tmp_path / "out.safetensors", adapter.patches, DIALECTS[dialect])
        modules = set(adapter.patches)
    found = set()
    for key in load_file(tmp_path / "out.safetensors"):
        module = key.split(".lora_")[0].split(".lokr_")[0].removesuffix(".alpha")
        assert module in accepted, key
        found.add(accepted[module].removeprefix("diffusion_model.").removesuffix(".weight"))
    assert found == modules


def test_every_name_that_comfyui_accepts_is_read_as_the_weight_that_it_patches():
    accepted = json.loads((GOLDEN / "comfyui_lora_keys.json").read_text())["accepted"]
    found = names.modules_by_spelling(accepted)
    assert len(found) == len(accepted)
    for spelling, weight in accepted.items():
        assert f"diffusion_model.{found[spelling]}" == weight.removesuffix(".weight")


def test_names_of_the_text_encoder():
    spellings = (
        "text_encoders.qwen3_06b.transformer.model.layers.1.self_attn.q_proj",
        "lora_te_layers_1_self_attn_q_proj",
        "lora_te_model_layers_1_self_attn_q_proj",
        "text_encoder.layers.1.self_attn.q_proj",
    )
    assert set(names.modules_by_spelling(spellings).values()) == {"text_encoder.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize(
    "spelling",
    [
        *(
            "base_model.model.net.{}",
            "pipe.dit.{}",
            "transformer.net.{}",
            "module.model.diffusion_model.{}",
            "_orig_mod.{}",
        ),
        *(
            "base_model.model.transformer.{}",
            "diffusion_model.net.{}",
            "lora_unet_{}",
            "lora_unet_net_{}",
            "lycoris_{}",
        ),
        *("lora_unet_model_{}", "lora_transformer_{}", "lora_prior_unet_{}"),
    ],
)
def test_any_wrappers_before_a_module_are_removed(spelling):
    for module in ("blocks.1.cross_attn.output_proj", "llm_adapter.blocks.0.mlp.2", "final_layer.linear"):
        name = spelling.format(module.replace(".", "_") if spelling.endswith("_{}") else module)
        assert names.modules_by_spelling([name]) == {name: module}


@pytest.mark.parametrize("prefix", ["transformer.core.", "transformer.", "lycoris_", "base_model.model.core.", ""])
def test_diffusers_names_are_read_after_any_wrappers(prefix):
    for module, name in (
        ("blocks.1.self_attn.q_proj", "transformer_blocks.1.attn1.to_q"),
        ("blocks.0.mlp.layer1", "transformer_blocks.0.ff.net.0.proj"),
    ):
        spelled = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        assert names.modules_by_spelling([spelled]) == {spelled: module}


@pytest.mark.parametrize(
    "spelling",
    [
        *(
            "text_encoders.transformer.model.{}",
            "text_encoders.qwen3_06b.transformer.{}",
            "text_encoder.{}",
            "te.model.{}",
        ),
        *(
            "base_model.model.model.{}",
            "cond_stage_model.qwen3_06b.transformer.model.{}",
            "lora_te_{}",
            "lora_te1_model_{}",
        ),
    ],
)
def test_any_wrappers_before_a_module_of_the_text_encoder_are_removed(spelling):
    module = "layers.1.self_attn.q_proj"
    name = spelling.format(module.replace(".", "_") if spelling.endswith("_{}") else module)
    assert names.modules_by_spelling([name]) == {name: f"text_encoder.{module}"}


@pytest.mark.parametrize(
    "spelling",
    [
        *(
            "diffusion_model.layers.0.self_attn.q_proj",
            "lora_unet_layers_0_self_attn_q_proj",
        ),  # no text encoder's prefix
        *(
            "text_encoders.blocks.0.mlp.layer1",
            "lora_te_blocks_0_mlp_layer1",
            "text_encoders.t5xxl.layers.0.mlp.up_proj",
        ),
        *("control.blocks.0.mlp.layer1", "vace_blocks.0.self_attn.q_proj", "transformer_blocks.0.mlp.layer1"),
        *("transformer.blocks.0.attn1.to_q", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
    ],
)
def test_a_module_of_another_network_is_none_of_animas(spelling):
    assert names.modules_by_spelling([spelling]) == {}


@pytest.mark.parametrize(
    ("module", "a", "b"),
    [
        ("transformer.{}", "_lora.down.weight", "_lora.up.weight"),
        ("base_model.model.net.{}", ".lora_A.default.weight", ".lora_B.default.weight"),
        ("base_model.model.net.{}", ".lora_A.my_style", ".lora_B.my_style"),
        ("lora_unet_{}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_every_ending_of_loras_factors_is_read(tmp_path, module, a, b):
    tensors = {}
    for key, array in load_file(LORA).items():
        name, part = split(key)
        tensors[module.format(name.replace(".", "_") if "unet" in module else name) + {"A": a, "B": b}[part]] = array
    save_file(tensors, tmp_path / "lora.safetensors")
    same_updates(tmp_path / "lora.safetensors", updates(LORA))


@pytest.mark.parametrize(("kept", "advised"), [(1.0, True), (0.5, False), (0.1, False)])
def test_allow_unused_is_advised_only_where_few_keys_are_unused(tmp_path, kept, advised):
    tensors = load_file(LORA)
    known = dict(list(tensors.items())[: int(len(tensors) * kept)])
    other = {f"diffusion_model.single_blocks.{n}.linear1.lora_A.weight": np.ones((4, 4), "f4") for n in range(9)}
    save_file(
        known | (other if kept < 1 else {"odd.lora_A.weight": np.ones((4, 4), "f4")}), tmp_path / "mixed.safetensors"
    )
    with pytest.raises(UserError, match="keys are unused") as caught, open_adapter(tmp_path / "mixed.safetensors"):
        pass
    assert ("--allow_unused" in str(caught.value)) == advised
    assert ("looks like: Flux" in str(caught.value)) == (not advised)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("dialect", SPELLINGS)
def test_every_dialect_of_a_lora_makes_the_same_updates(tmp_path, dialect, alpha):
    same_updates(lora_as(dialect, tmp_path / "lora.safetensors", alpha), updates(LORA))


@pytest.mark.parametrize(
    ("dialect", "alpha"), [("trainer", None), ("up and down", 1.0), ("kohya", 6.0), ("diffusers", 2.0)]
)
def test_a_lora_gives_the_references_velocity_whichever_dialect_it_came_in(model, tmp_path, capsys, dialect, alpha):
    found = velocity(merged(lora_as(dialect, tmp_path / "lora.safetensors", alpha), model))
    assert "68 of 68 modules matched (LoRA of rank 4)" in capsys.readouterr().out
    assert relative_error(found, channel_last(golden("lora_rank4.io")["velocity"])) < VALUE_TOLERANCE


def test_a_lokr_gives_the_references_velocity(model):
    assert (
        relative_error(velocity(merged(LOKR, model)), channel_last(golden("lokr_rank4.io")["velocity"]))
        < VALUE_TOLERANCE
    )


@pytest.mark.parametrize(
    ("dialect", "beside", "metadata", "scale"),
    [
        ("peft", {"lora_alpha": 8}, {}, 2.0),
        ("peft", {"lora_alpha": 8, "use_rslora": True}, {}, 4.0),
        ("peft", {"lora_alpha": 4, "alpha_pattern": {"blocks.0.mlp.layer1": 2}}, {}, {"blocks.0.mlp.layer1": 0.5}),
        ("diffusers", {"lora_alpha": 8}, {}, 1.0),
        ("diffusers", {}, {"transformer.lora_alpha": 8, "text_conditioner.lora_alpha": 2}, 2.0),
        ("trainer", {"lora_alpha": 8}, {}, 1.0),
    ],
)
def test_pefts_alpha_counts_in_pefts_files_and_diffusers_in_theirs(tmp_path, dialect, beside, metadata, scale):
    path = lora_as(dialect, tmp_path / "adapter_model.safetensors")
    if beside:
        peft_config(tmp_path / "adapter_config.json", **beside)
    if metadata:
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(metadata)})
    with open_adapter(path) as adapter:
        scales = {module: patch.scale for module, patch in adapter.patches.items()}
    if isinstance(scale, dict):
        assert {module for module, one in scales.items() if one != 1.0} == set(scale)
        assert scales | scale == scales
    else:
        assert {one for module, one in scales.items() if module.startswith("blocks.")} == {scale}
    if metadata:
        assert {one for module, one in scales.items() if module.startswith("llm_adapter.")} == {0.5}


Q_PROJ, Q_PATH = "blocks.1.self_attn.q_proj", "blocks.self_attn.q_proj"


def random_parts(kind: str, out: int = 64, into: int = 64) -> dict[str, np.ndarray]:
    """Parts of a random adapter of one module, by ComfyUI's names."""
    shapes = {
        "lora": {"lora_A": (3, into), "lora_B": (out, 3)},
        "loha": {"hada_w1_a": (out, 3), "hada_w1_b": (3, into), "hada_w2_a": (out, 3), "hada_w2_b": (3, into)},
        "lokr whole": {"lokr_w1": (4, 8), "lokr_w2": (out // 4, into // 8)},
        "lokr": {"lokr_w1": (4, 8), "lokr_w2_a": (out // 4, 2), "lokr_w2_b": (2, into // 8)},
        "lokr both": {
            "lokr_w1_a": (4, 2),
            "lokr_w1_b": (2, 8),
            "lokr_w2_a": (out // 4, 2),
            "lokr_w2_b": (2, into // 8),
        },
        "diff": {"diff": (out, into)},
    }
    plain = {"dora": "lora", "dora by input": "lora", "loha dora": "loha"}.get(kind, kind)
    parts = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes[plain].items())}
    if "dora" in kind:
        parts["dora_scale"] = np.abs(normal(*((1, into) if "input" in kind else (out, 1)), seed=9))
    if plain != "diff":
        parts["alpha"] = np.array(2.0, np.float32)
    return parts


def expected_weight(weight: np.ndarray, parts: dict[str, np.ndarray], strength: float) -> np.ndarray:
    """The mathematics of each kind, in double precision, written out."""
    p = {name: array.astype(np.float64) for name, array in parts.items()}
    weight = weight.astype(np.float64)
    if "lora_A" in p:
        update = p["lora_B"] @ p["lora_A"] * p["alpha"] / 3
    elif "hada_w1_a" in p:
        update = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * p["alpha"] / 3
    elif "lokr_w2" in p:
        update = np.kron(p["lokr_w1"], p["lokr_w2"])  # no rank: an alpha says nothing
    elif "lokr_w1" in p:
        update = np.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]) * p["alpha"] / 2
    elif "lokr_w1_a" in p:
        update = np.kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]) * p["alpha"] / 2
    else:
        update = p["diff"]
    if "dora_scale" not in p:
        return weight + strength * update
    turned = weight + update
    axis = 1 if p["dora_scale"].shape[1] == 1 else 0
    turned *= p["dora_scale"] / np.linalg.norm(turned, axis=axis, keepdims=True)
    return weight + strength * (turned - weight)


KINDS = ("lora", "dora", "dora by input", "loha", "loha dora", "lokr", "lokr whole", "lokr both", "diff")


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_a_weight_as_its_paper_says(tmp_path, kind, strength):
    parts = random_parts(kind)
    written = {f"{flat(Q_PROJ)}.{name}{'.weight' if 'lora_' in name else ''}": a for name, a in parts.items()}
    save_file(written, tmp_path / "one.safetensors")
    weight = normal(64, 64, seed=50)
    with open_adapter(tmp_path / "one.safetensors") as adapter:
        (patch,) = adapter.patches.values()
        found = patch.applied(weight, strength)
        assert patch.error((64, 64)) is None
        if "dora" not in kind:
            assert patch.norm() == pytest.approx(np.linalg.norm(expected_weight(0 * weight, parts, 1.0)), rel=1e-5)
    assert found.dtype == np.float32
    assert relative_error(found, expected_weight(weight, parts, strength)) < 2e-6


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_beside_a_models_weights_a_file_does_what_it_does_merged_into_them(tmp_path, kind):
    """The networks' own layers against the arithmetic on files."""
    parts = random_parts(kind)
    save_file(
        {
            f"diffusion_model.{Q_PROJ}.{n}{'.weight' if 'lora_' in n else ''}": 0.5 * a if n != "alpha" else a
            for n, a in parts.items()
        },
        tmp_path / "one.safetensors",
    )
    graphdef, params, _ = beside(tmp_path / "one.safetensors", load_dit(DIT_FILE))
    in_weights = velocity(merged(tmp_path / "one.safetensors", load_dit(DIT_FILE)))
    assert relative_error(velocity(parameters.merge(graphdef, params)), in_weights) < VALUE_TOLERANCE
    assert relative_error(in_weights, velocity(load_dit(DIT_FILE))) > 1e-3


def test_a_text_encoder_takes_adapters_too(tmp_path):
    config = Qwen3Config(width=64, layers=3, heads=4, key_heads=2, head_size=16, mlp_width=96, vocabulary=50)
    qwen = random_model(Qwen3, config)
    graphdef, params = parameters.split(qwen)
    parts = random_parts("lora")
    save_file(
        {f"lora_te_layers_1_self_attn_q_proj.{n}{'.weight' if 'lora_' in n else ''}": a for n, a in parts.items()},
        tmp_path / "te.safetensors",
    )
    changed = AdapterStack([tmp_path / "te.safetensors"], {}, params).params_for([1.0])[1]
    assert set(changed) == {"layers.self_attn.q_proj.kernel"}
    kernel = np.asarray(params["layers.self_attn.q_proj.kernel"])
    expected = np.stack([kernel[0], expected_weight(kernel[1].T, parts, 1.0).T, kernel[2]])
    np.testing.assert_allclose(changed["layers.self_attn.q_proj.kernel"], expected, rtol=1e-5, atol=1e-5)
    found = parameters.merge(graphdef, params | changed)(jnp.arange(6)[None])
    assert relative_error(np.asarray(found), qwen(jnp.arange(6)[None])) > 1e-3


# ---- what does not fit -----------------------------------------------------------------------------------------------


def changed(tmp_path, change):
    save_file(change(load_file(LORA)), tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


STRAY = "diffusion_model.blocks.0.self_attn.qkv.lora_A.weight"


def test_keys_that_belong_nowhere_are_listed_and_can_be_left_out(model, tmp_path, capsys):
    path = changed(tmp_path, lambda t: t | {STRAY: np.zeros((4, 64), "f4"), "extra.moe.router": np.zeros(3, "f4")})
    with pytest.raises(UserError, match="2 keys are unused") as error:
        merged(path, model)
    assert STRAY in str(error.value)
    assert "did you mean 'diffusion_model.blocks.0.self_attn." in str(error.value)
    assert "extra.moe.router" in str(error.value)
    found = velocity(merged(path, model, allow_unused=True))
    assert "warning: " in capsys.readouterr().err
    assert relative_error(found, channel_last(golden("lora_rank4.io")["velocity"])) < VALUE_TOLERANCE


def test_blocks_that_the_model_has_not_are_unused(model, tmp_path):
    moved = lambda t: {k.replace("n_model.blocks.2.", "n_model.blocks.30."): a for k, a in t.items()}  # noqa: E731
    with pytest.raises(UserError, match=r"32 keys are unused: diffusion_model.blocks.30"):
        merged(changed(tmp_path, moved), model)


def test_a_part_that_is_there_twice_is_refused(tmp_path):
    twice = lambda t: t | {k.replace("lora_A", "lora_down"): a for k, a in t.items() if "lora_A" in k}  # noqa: E731
    with pytest.raises(UserError, match="a second lora_A of"):
        updates(changed(tmp_path, twice))


def test_a_model_is_no_adapter(tmp_path):
    with pytest.raises(UserError, match="holds no adapter of Anima's; it looks like: Anima transformer"):
        updates(DIT_FILE)


def test_a_lora_of_another_family_is_told_by_its_keys(tmp_path):
    other = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{x}.weight": np.ones((4, 4), "f4") for x in ("up", "down")}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"looks like: Flux \(LoRA\), with the keys lora_unet_double_blocks_0_img_attn_qkv"
    ):
        updates(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("kind", "trained", "part"),
    [
        ("diff", "lora", "diff"),
        ("loha dora", "loha", "dora_scale"),
        ("dora by input", "dora", "dora_scale for each input"),
        ("lora with a core", "lora", "lora_mid"),
        ("lora of another shape", "lora", "reshape_weight"),
    ],
)
def test_what_only_merging_can_do_cannot_be_trained_on(kind, trained, part):
    more = {
        "lora with a core": {"lora_mid": normal(3, 3)},
        "lora of another shape": {"reshape_weight": np.array([64, 64])},
    }
    parts = random_parts(kind.partition(" ")[0] if kind in more else kind) | more.get(kind, {})
    patch = Patch({name: Part.of(array) for name, array in parts.items()})
    specs = {"blocks.self_attn.q_proj": adapter_spec(trained, (3, 64, 64), (3, 3, 3))}
    scales = {"blocks.self_attn.q_proj.lora_scale": np.ones(3, np.float32)}
    with pytest.raises(UserError, match=f"x: {Q_PROJ}: {part} cannot be trained on; merge the file instead"):
        planning.factors_of(Adapter("x", {Q_PROJ: patch}), specs, scales, {}, "x")


def test_a_run_begins_from_factors_of_1x1_convolutions_as_from_matrices():
    parts, spec = random_parts("lora"), {Q_PATH: adapter_spec("lora", (3, 64, 64), (3, 3, 3))}
    scales = {f"{Q_PATH}.lora_scale": np.ones(3, np.float32)}
    fresh = {f"{Q_PATH}.{name}": jnp.zeros((3, *shape)) for name, shape in spec[Q_PATH].shapes.items()}
    convolutions = {name: one if name == "alpha" else one[..., None, None] for name, one in parts.items()}
    found = []
    for own in (parts, convolutions):
        patch = Patch({name: Part.of(array) for name, array in own.items()})
        found.append(planning.factors_of(Adapter("x", {Q_PROJ: patch}), spec, scales, fresh, "x"))
    assert np.any(np.asarray(found[0][f"{Q_PATH}.lora_b"]))
    for path, array in found[0].items():
        np.testing.assert_array_equal(found[1][path], array)


# ---- writing ---------------------------------------------------------------------------------------------------------


def converted(source, target, dialect):
    with open_adapter(source) as adapter:
        return write_adapter(target, adapter.patches, DIALECTS[dialect], metadata=adapter.metadata)


SUFFIX = {name: "" if name.startswith("peft") else ".safetensors" for name in DIALECTS}
"""PEFT's adapters are folders."""


def contents(path) -> list[bytes]:
    return [path.read_bytes() for path in (sorted(path.rglob("*.*")) if path.is_dir() else [path])]


@pytest.mark.parametrize(("first", "second"), itertools.permutations(DIALECTS, 2))
def test_there_and_back_gives_the_same_bytes(tmp_path, first, second):
    start, there, back = (
        tmp_path / f"{name}{SUFFIX[dialect]}" for name, dialect in (("a", first), ("b", second), ("c", first))
    )
    save_file(
        {k: a.astype(ml_dtypes.bfloat16) for k, a in load_file(LORA).items()},
        tmp_path / "lora.safetensors",
        {"format": "pt", "title": "x"},
    )
    converted(tmp_path / "lora.safetensors", start, first)
    converted(start, there, second)
    converted(there, back, first)
    assert contents(back) == contents(start)
    same_updates(there, updates(tmp_path / "lora.safetensors"), 1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "diff"])
def test_all_that_comfyui_knows_kohyas_names_carry_too(tmp_path, kind):
    written = {
        f"diffusion_model.{Q_PROJ}.{n}{'.weight' if 'lora_' in n else ''}": a for n, a in random_parts(kind).items()
    }
    written["text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj.diff"] = normal(3, 4)
    written["diffusion_model.llm_adapter.blocks.0.mlp.0.diff_b"] = normal(192)
    written["diffusion_model.blocks.0.self_attn.q_norm.diff"] = normal(16)
    start, there, back = (tmp_path / f"{name}.safetensors" for name in ("start", "there", "back"))
    save_file(written, start, {"format": "pt"})
    converted(start, there, "kohya")
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in load_file(there))
    converted(there, back, "comfyui")
    found = load_file(back)
    assert found.keys() == written.keys()
    for key, array in written.items():
        np.testing.assert_array_equal(found[key], array)


def test_kohya_gets_alphas_which_are_the_ranks(tmp_path):
    converted(LORA, tmp_path / "kohya.safetensors", "kohya")
    tensors = load_file(tmp_path / "kohya.safetensors")
    assert len(tensors) == 3 * 68
    assert {float(array) for key, array in tensors.items() if key.endswith(".alpha")} == {4.0}


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_diffusers_has_alpha_in_its_settings_and_the_factors_as_they_are(tmp_path, alpha):
    start = lora_as("kohya", tmp_path / "start.safetensors", alpha)
    assert converted(start, tmp_path / "out.safetensors", "diffusers") == []
    out, original = load_file(tmp_path / "out.safetensors"), load_file(LORA)
    assert all(key.startswith(("transformer.transformer_blocks.", "text_conditioner.blocks.")) for key in out)
    assert len(out) == 2 * 68
    spell = SPELLINGS["diffusers"][0]
    for key, array in original.items():
        module, part = split(key)
        expected = array if part == "A" else array * (4 / alpha)
        np.testing.assert_array_equal(out[f"{spell(module)}.lora_{part}.weight"], expected)
    same_updates(tmp_path / "out.safetensors", updates(start), 1e-12)


@pytest.mark.parametrize(
    ("key", "array", "named"),
    [
        (f"diffusion_model.{Q_PROJ}.dora_scale", np.ones((64, 1), "f4"), "dora_scale of 1 module "),
        ("lora_te_layers_0_mlp_up_proj.diff", np.ones((3, 4), "f4"), "text encoder of 1 modules"),
        ("diffusion_model.llm_adapter.blocks.0.mlp.0.diff_b", np.ones(192, "f4"), "diff_b of 1 modules"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(tmp_path, key, array, named):
    path = changed(tmp_path, lambda t: t | {key: array})
    with pytest.raises(UserError, match="files of diffusers have no place for") as error:
        converted(path, tmp_path / "out.safetensors", "diffusers")
    assert named in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_diffusers_has_no_pipeline_that_loads_a_lokr_which_is_said(tmp_path):
    (note,) = converted(LOKR, tmp_path / "out.safetensors", "diffusers")
    assert "load_lora_adapter" in note
    same_updates(tmp_path / "out.safetensors", updates(LOKR), 1e-12)


# ---- depths ----------------------------------------------------------------------------------------------------------


def test_blocks_move_as_the_community_moved_them():
    assert {n: depth_map(28, 40)[n] for n in (0, 2, 14, 18, 27)} == {0: 0, 2: 3, 14: 20, 18: 26, 27: 39}
    for source, target in ((28, 40), (40, 52), (28, 52)):
        there = depth_map(source, target)
        assert sorted(there) == list(range(source))
        assert list(there.values()) == sorted(set(there.values()))
        assert depth_map(target, source) == {new: old for old, new in there.items()}
    assert depth_map(28, 52) == {n: depth_map(40, 52)[m] for n, m in depth_map(28, 40).items()}
    with pytest.raises(UserError, match="36 blocks: expected one of 28, 40, 52"):
        depth_map(28, 36)


def test_an_adapter_is_moved_without_its_text_side_and_back_if_nothing_is_lost():
    patch = Patch({"diff": Part.of(np.ones(1))})
    patches = {
        "blocks.18.mlp.layer1": patch,
        "llm_adapter.blocks.5.mlp.0": patch,
        "text_encoder.layers.27.mlp.up_proj": patch,
    }
    there = remapped(patches, 28, 40)
    assert set(there) == {"blocks.26.mlp.layer1", "llm_adapter.blocks.5.mlp.0", "text_encoder.layers.27.mlp.up_proj"}
    assert remapped(there, 40, 28) == patches
    with pytest.raises(UserError, match="changes blocks 2, which a model of 28 blocks does not have"):
        remapped({"blocks.2.mlp.layer1": patch}, 40, 28)
    with pytest.raises(UserError, match="changes blocks 30, which a model of 28 blocks does not have either"):
        remapped({"blocks.30.mlp.layer1": patch}, 28, 40)


@pytest.mark.parametrize(("blocks", "depth"), [(28, 40), (40, 28), (28, 28), (27, 40)])
def test_an_adapter_that_ends_with_another_models_blocks_is_pointed_out(tmp_path, capsys, blocks, depth):
    patch = {"diff": Part.of(np.ones((2, 2), "f4"))}
    patches = {f"blocks.{n}.mlp.layer1": Patch(patch) for n in range(blocks)}
    write_adapter(tmp_path / "lora.safetensors", patches)
    weights = {f"blocks.{n}.mlp.layer1.weight": (2, 2) for n in range(depth)}
    with open_adapter(tmp_path / "lora.safetensors") as adapter:
        if blocks > depth:
            with pytest.raises(UserError, match=r"12 keys are unused: .*; it seems made for 40.* lora --remap 40:28`"):
                fit_to_weights(adapter, weights)
        else:
            fit_to_weights(adapter, weights)
    command = shell_command("anima_jax.convert", "lora", "--remap", "28:40")
    advice = f"made for 28 blocks, and the model has 40; `{command}`"
    assert (advice in capsys.readouterr().err) == ((blocks, depth) == (28, 40))


# ---- singular values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(530, 560), (560, 530), (60, 40)])
def test_truncation_keeps_what_the_best_one_keeps(shape):
    """Against LAPACK's exact decomposition, for a spectrum that falls slowly, which is the hard case."""
    u, _, vt = np.linalg.svd(normal(*shape), full_matrices=False)
    spectrum = 1.0 / np.sqrt(1.0 + np.arange(len(vt)))
    matrix = ((u * spectrum) @ vt).astype(np.float32)
    b, a, share = truncated(matrix, 16)
    best = np.sum(spectrum[:16] ** 2) / np.sum(spectrum**2)
    assert share == pytest.approx(best, rel=1e-3)
    left = np.sum((matrix - b @ a) ** 2) / np.sum(matrix**2)
    assert 1 - left == pytest.approx(best, rel=1e-3)


def test_what_is_no_module_has_no_spelling():
    assert not list(names.modules_by_spelling(["lora_unet_blocks_0_self", "blocks_0_mlp", ""]))
