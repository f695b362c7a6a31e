"""Every kind of adapter that ComfyUI reads changes weights as ComfyUI's `load_lora` and `calculate_weight` do."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest

from anima_jax.adapters.file import open_adapter
from anima_jax.adapters.merge import AdapterStack, changes, match_adapters, merged
from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.models import load_dit
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from anima_jax.models import parameters
from convert.__main__ import main as convert
from tests.adapters.adapter_files import updates
from tests.golden_files import GOLDEN, relative_error
from tests.models.networks import normal

STRENGTHS = (1.0, 0.7, -0.5)

TOLERANCE = 1e-6
"""Both compute in float32, with products in another order."""

DIT_FILE = GOLDEN / "dit_image.model.safetensors"
Q_PROJ, NORM, BIASED = "blocks.1.self_attn.q_proj", "blocks.1.self_attn.q_norm", "llm_adapter.blocks.0.mlp.0"


@functools.cache
def golden() -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """The arrays by their names in the file, and the adapters and strengths of each stack."""
    with SafetensorsFile(GOLDEN / "adapter_kinds.safetensors") as file:
        return {key: np.array(file.read(key)) for key in file.tensors}, json.loads(file.metadata["stacks"])


def of(*what: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with these parts, by the rest of their names."""
    prefix = "|".join(what) + "|"
    return {key.removeprefix(prefix): array for key, array in golden()[0].items() if key.startswith(prefix)}


CASES = list(dict.fromkeys(key.split("|")[1] for key in golden()[0] if key.startswith("adapter|")))


def written(path, tensors, metadata=None):
    infos = [safetensors.TensorInfo(key, array.dtype, array.shape) for key, array in tensors.items()]
    safetensors.write(path, infos, tensors.__getitem__, metadata or {})
    return path


def merge(folder, cases, strengths) -> dict[str, np.ndarray]:
    """The changed weights, as `convert merge` computes them, with ComfyUI's DoRA."""
    weights = of("weight")
    files = [SafetensorsFile(written(folder / f"{case}.safetensors", of("adapter", case))) for case in cases]
    adapters = match_adapters(files, {name: array.shape for name, array in weights.items()}, extend=True)
    found = changes(adapters, strengths)
    return {name: merged(name, weights[name], patches, comfyui_dora=True) for name, patches in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_changes_weights_as_in_comfyui(tmp_path, case):
    expected = of("merged", case)
    assert merge(tmp_path, [case], [0.0]) == {}  # ComfyUI's LoraLoader does not apply it, not even a `set_weight`
    for number, strength in enumerate(STRENGTHS):
        found = merge(tmp_path, [case], [strength])
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.shape == expected[name][number].shape
            assert relative_error(array, expected[name][number]) < TOLERANCE, (name, strength)


@pytest.mark.parametrize("stack", golden()[1])
def test_several_adapters_are_applied_one_after_the_other(tmp_path, stack):
    found, expected = merge(tmp_path, *zip(*golden()[1][stack], strict=True)), of("stack", stack)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert relative_error(array, expected[name]) < TOLERANCE, name


def test_the_golden_adapters_have_the_dtypes_of_their_names():
    dtypes = {case: next(iter(of("adapter", case).values())).dtype for case in CASES}
    assert dtypes["lora of float8"] == ml_dtypes.float8_e4m3fn
    assert dtypes["lora of int8"] == np.int8


# ---- commands --------------------------------------------------------------------------------------------------------

ONLY_COMFYUI = {"set of a bias": "set_b of 1 modules"}
"""Cases that kohya's names cannot express."""


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_the_same_after_a_way_through_kohyas_names(tmp_path, case, capsys):
    path, there, back = (tmp_path / f"{name}.safetensors" for name in ("start", "there", "back"))
    written(path, of("adapter", case))
    if case in ONLY_COMFYUI:
        with pytest.raises(SystemExit):
            convert(["lora", str(path), str(there), "--to", "kohya"])
        assert ONLY_COMFYUI[case] in capsys.readouterr().err
        return
    convert(["lora", str(path), str(there), "--to", "kohya"])
    convert(["lora", str(there), str(back), "--to", "comfyui"])
    with open_adapter(path) as start, open_adapter(back) as found:
        assert start.patches.keys() == found.patches.keys()
        for module, patch in start.patches.items():
            parts = found.patches[module].parts
            assert parts.keys() == patch.parts.keys()
            assert all(parts[name].dtype == part.dtype for name, part in patch.parts.items())
            assert all(np.array_equal(parts[name].read(), part.read()) for name, part in patch.parts.items())


def test_comfyui_gets_what_it_reads(tmp_path):
    """It ignores `lora_mid` beside `lora_A`, and takes a magnitude of one axis for a row."""
    module = f"diffusion_model.{Q_PROJ}"
    tensors = {f"{module}.lora_A.weight": normal(3, 64), f"{module}.lora_B.weight": normal(64, 3)}
    more = {"lora_mid.weight": normal(3, 3), "lora_magnitude_vector": normal(64), "reshape_weight": np.array([64, 64])}
    start = written(tmp_path / "start.safetensors", tensors | {f"{module}.{name}": one for name, one in more.items()})
    convert(["lora", str(start), str(tmp_path / "out.safetensors"), "--to", "comfyui", "--dtype", "bf16"])
    with SafetensorsFile(tmp_path / "out.safetensors") as file:
        found = {key.removeprefix(f"{module}."): tensor for key, tensor in file.tensors.items()}
    assert found.keys() == {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "dora_scale", "reshape_weight"}
    assert found["dora_scale"].shape == (64, 1)
    assert found["reshape_weight"].dtype == np.int64


@pytest.mark.parametrize("command", ["resize", "extract"])
def test_nan_is_told_by_resize_and_extract(tmp_path, command, capsys):
    out = str(tmp_path / "out.safetensors")
    if command == "resize":
        a, b = np.full((9, 64), np.nan, np.float32), normal(64, 9)
        tensors = {f"diffusion_model.{Q_PROJ}.lora_A.weight": a, f"diffusion_model.{Q_PROJ}.lora_B.weight": b}
        files = [written(tmp_path / "nan.safetensors", tensors)]
    else:
        with SafetensorsFile(DIT_FILE) as file:
            tensors = {key: file.read(key) for key in file.tensors}
        name = f"net.{Q_PROJ}.weight"
        files = [
            DIT_FILE,
            written(tmp_path / "nan.safetensors", {**tensors, name: np.full_like(tensors[name], np.nan)}),
        ]
    with pytest.raises(SystemExit):
        convert([command, *map(str, files), out, "--rank", "2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "nan.safetensors" in line
    assert Q_PROJ in line
    assert "NaN or infinite values" in line


@pytest.mark.parametrize(
    ("case", "title", "resized"),
    [
        ("lora with a mid", "LoRA", None),
        ("loha of a core", "LoHa", None),
        ("lokr with a core", "LoKr", None),
        ("glora", "GLoRA", "GLoRA cannot become a LoRA without the model"),
        ("oft", "OFT", "OFT cannot become a LoRA without the model"),
        ("boft", "BOFT", "BOFT cannot become a LoRA without the model"),
        ("set", "new weights", None),
        ("diff beside a lora", "differences of weights", None),
        ("loha with dora by input", "LoHa", "LoHa with dora_scale cannot become a LoRA"),
    ],
)
def test_inspect_names_the_kind_and_resize_makes_a_lora_or_says_why_not(tmp_path, case, title, resized, capsys):
    path = written(tmp_path / "adapter.safetensors", of("adapter", case))
    convert(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert f"kind      {title} (adapter)" in shown
    assert ("depends on the model's weights" in shown) == (title in ("GLoRA", "OFT", "BOFT", "new weights"))
    command = ["resize", str(path), str(tmp_path / "out.safetensors"), "--rank", "4"]
    if resized:
        with pytest.raises(SystemExit):
            convert(command)
        assert resized in capsys.readouterr().err
    else:
        convert(command)
        for module, update in updates(path).items():
            assert relative_error(updates(tmp_path / "out.safetensors")[module], update) < 1e-5  # 4 is its full rank


# ---- in a model's parameters -----------------------------------------------------------------------------------------


def kernel(path, **options) -> np.ndarray:
    """The query projection of block 1 with an adapter, from the parameters of a model that the pipeline would run."""
    params = parameters.split(load_dit(DIT_FILE))[1]
    changed = AdapterStack([path], params, {}, **options).params_for([0.6])[0]
    return np.asarray(changed["blocks.self_attn.q_proj.kernel"])[1].T


def base() -> np.ndarray:
    return np.asarray(parameters.split(load_dit(DIT_FILE))[1]["blocks.self_attn.q_proj.kernel"])[1].T


def test_a_model_draws_with_an_oft_as_merged(tmp_path):
    blocks = 0.1 * normal(8, 8, 8)
    path = written(tmp_path / "oft.safetensors", {f"diffusion_model.{Q_PROJ}.oft_blocks": blocks})
    skew = (blocks - blocks.swapaxes(1, 2)).astype(np.float64)
    rotation = (np.eye(8) + skew) @ np.linalg.inv(np.eye(8) - skew)
    rotated = np.einsum("knm,kni->kmi", rotation, base().reshape(8, 8, 64)).reshape(64, 64)
    assert relative_error(kernel(path), base() + 0.6**2 * (rotated - base())) < TOLERANCE


def test_a_dora_by_output_is_what_was_trained_or_comfyuis(tmp_path):
    a, b, m = normal(3, 64, seed=1), normal(64, 3, seed=2), np.abs(normal(64, 1, seed=3))
    names = {"lora_A.weight": a, "lora_B.weight": b, "dora_scale": m}
    path = written(tmp_path / "dora.safetensors", {f"diffusion_model.{Q_PROJ}.{n}": x for n, x in names.items()})
    changed = base() + b @ a
    for norms, options in ((changed, {}), (base(), {"comfyui_dora": True})):
        full = m * changed / np.linalg.norm(norms, axis=1, keepdims=True)
        assert relative_error(kernel(path, **options), base() + 0.6 * (full - base())) < TOLERANCE


def test_a_lora_that_extends_a_weight_is_merged_but_not_sampled_with(tmp_path, capsys):
    module = f"diffusion_model.{Q_PROJ}"
    a, b = normal(3, 80, seed=1), normal(64, 3, seed=2)
    tensors = {
        f"{module}.lora_A.weight": a,
        f"{module}.lora_B.weight": b,
        f"{module}.reshape_weight": np.array([64, 80]),
    }
    path, out = written(tmp_path / "wide.safetensors", tensors), tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=rf"extends {Q_PROJ}.weight to \(64, 80\); the network takes \(64, 64\)"):
        kernel(path)
    convert(["merge", str(DIT_FILE), str(path), str(out)])
    with SafetensorsFile(out) as file:
        found = file.read(f"net.{Q_PROJ}.weight")
    assert relative_error(found, np.pad(base(), ((0, 0), (0, 16))) + b @ a) < TOLERANCE


# ---- inv_scale -------------------------------------------------------------------------------------------------------

SCALED = {
    "lora": {"lora_A.weight": (3, 64), "lora_B.weight": (64, 3)},
    "loha": {"hada_w1_a": (64, 3), "hada_w1_b": (3, 64), "hada_w2_a": (64, 3), "hada_w2_b": (3, 64)},
    "lokr": {"lokr_w1": (8, 8), "lokr_w2": (8, 8)},
}


@pytest.mark.parametrize("kind", SCALED)
def test_inv_scale_multiplies_each_input_of_the_adapter(tmp_path, kind, capsys):
    """As anima_lora's merge does: ΔW (x · inv_scale), so ΔW's columns are multiplied."""
    parts = {
        f"diffusion_model.{Q_PROJ}.{name}": normal(*shape, seed=n)
        for n, (name, shape) in enumerate(SCALED[kind].items())
    }
    plain, scale = written(tmp_path / "plain.safetensors", parts), np.abs(normal(64, seed=9))
    path = written(tmp_path / "scaled.safetensors", parts | {f"diffusion_model.{Q_PROJ}.inv_scale": scale})
    assert relative_error(updates(path)[Q_PROJ], updates(plain)[Q_PROJ] * scale) < TOLERANCE
    command = ["lora", str(path), str(tmp_path / "out.safetensors"), "--to", "comfyui"]
    if kind == "lokr":
        with pytest.raises(SystemExit):
            convert(command)
        assert "have no place for inv_scale of 1 modules" in capsys.readouterr().err
        return
    convert(command)
    with SafetensorsFile(tmp_path / "out.safetensors") as file:
        assert file.tensors.keys() == parts.keys()
    assert relative_error(updates(tmp_path / "out.safetensors")[Q_PROJ], updates(path)[Q_PROJ]) < TOLERANCE


def test_inv_scale_of_a_fused_projection_counts_for_each_of_its_parts(tmp_path):
    """As anima_lora exported its files: factors split into q, k and v, one `inv_scale` for all."""
    attention, scale, factors = "lora_unet_blocks_1_self_attn", np.abs(normal(64, seed=9)), {}
    for n, letter in enumerate("qkv"):
        factors[f"{attention}_{letter}_proj.lora_down.weight"] = normal(3, 64, seed=n)
        factors[f"{attention}_{letter}_proj.lora_up.weight"] = normal(64, 3, seed=10 + n)
    plain = updates(written(tmp_path / "plain.safetensors", factors))
    path = written(tmp_path / "scaled.safetensors", factors | {f"{attention}_qkv_proj.inv_scale": scale})
    for module, update in updates(path).items():
        assert relative_error(update, plain[module] * scale) < TOLERANCE


# ---- what is no adapter ----------------------------------------------------------------------------------------------

LORA = {"lora_up.weight": (64, 4), "lora_down.weight": (4, 64)}
BROKEN = {
    r"has lora_B but not lora_A": {"lora_up.weight": (64, 4)},
    r"lora_B is \(64, 0\) and lora_A \(0, 64\)": {"lora_up.weight": (64, 0), "lora_down.weight": (0, 64)},
    r"lora_B is \(\) and lora_A \(4, 64\)": {**LORA, "lora_up.weight": ()},
    r"lora_B is \(64, 4\) and lora_mid \(5, 4\)": {**LORA, "lora_mid.weight": (5, 4, 1, 1)},
    r"changes a weight of shape \(64, 576\), the model's is \(64, 64\)": {**LORA, "lora_down.weight": (4, 64, 3, 3)},
    r"alpha is \(2,\), expected one number": {**LORA, "alpha": (2,)},
    r"alpha is nan, expected a finite number": {**LORA, "alpha": np.array(np.nan, "f4")},
    r"dora_scale is \(3, 1\), the weight \(64, 64\)": {**LORA, "dora_scale": (3, 1)},
    r"inv_scale is \(63,\), and ΔW \(64, 64\)": {**LORA, "inv_scale": (63,)},
    r"reshape_weight is \(64, 32\), smaller than the weight \(64, 64\)": {**LORA, "reshape_weight": np.array([64, 32])},
    r"reshape_weight is float32, expected integers": {**LORA, "reshape_weight": (2,)},
    r"has lora_mid \(4, 4, 1, 1\), which is no adapter": {"lora_mid.weight": (4, 4, 1, 1)},
    r"hada_w1_a is \(4, 64\) and hada_t1 \(4, 4\)": {
        **{f"hada_w{n}_{x}": (64, 4) if x == "a" else (4, 64) for n in "12" for x in "ab"},
        "hada_t1": (4, 4, 1, 1),
    },
    r"has a1 but not b1": {"a1.weight": (64, 4), "a2.weight": (4, 64)},
    r"do not fit together: a1 \(64, 4\), a2 \(4, 64\), b1 \(64, 3\), b2 \(4, 64\)": {
        "a1.weight": (64, 4), "a2.weight": (4, 64), "b1.weight": (64, 3), "b2.weight": (4, 64),
    },
    r"has oft_blocks \(8, 8\), which is no adapter": {"oft_blocks": (8, 8)},
    r"changes a weight of shape \(32, any\), the model's is \(64, 64\)": {"oft_blocks": (4, 8, 8)},
    r"do not fit together: oft_blocks \(8, 8, 4\)": {"oft_blocks": (8, 8, 4)},
    r"do not fit together: oft_blocks \(5, 8, 8, 8\)": {"oft_blocks": (5, 8, 8, 8)},
    r"has dora_scale beside OFT, which has no scale": {"oft_blocks": (8, 8, 8), "dora_scale": (64, 1)},
    r"changes a weight of shape \(64, 32\), the model's is \(64, 64\)": {"set_weight": (64, 32)},
    r"it looks like: PEFT's OFT, which cannot be read": {"oft_R.weight": (8, 28)},
    r"anima_lora's Hydra .*, which cannot be read": {"lora_ups.0.weight": (64, 4), "lora_down.weight": (4, 64)},
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_no_adapter_is_told_in_one_line(tmp_path, message):
    values = {name: normal(*one) if isinstance(one, tuple) else one for name, one in BROKEN[message].items()}
    path = written(
        tmp_path / "odd.safetensors", {f"diffusion_model.{Q_PROJ}.{name}": one for name, one in values.items()}
    )
    with pytest.raises(UserError, match=message) as error:
        match_adapters([SafetensorsFile(path)], {f"{Q_PROJ}.weight": (64, 64)}, extend=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_names_the_key_in_the_file(tmp_path):
    path = written(tmp_path / "half.safetensors", {"lora_unet_blocks_1_self_attn_q_proj.lora_up.weight": normal(64, 4)})
    named = (
        r"blocks.1.self_attn.q_proj \(lora_unet_blocks_1_self_attn_q_proj.lora_up.weight\) has lora_B but not lora_A"
    )
    with pytest.raises(UserError, match=named):
        updates(path)
