"""Files of control networks: every bit back, sizes from shapes, deeper models, and one clear line for all others."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from anima_jax.checkpoints.control import load_control, save_control
from anima_jax.checkpoints.names.control import BLOCKS, LAYERS, MODULES, TRUNK, blocks_in
from anima_jax.convert.__main__ import main
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.control import ControlConfig, ControlNetwork
from tests.golden_files import GOLDEN
from tests.models.networks import random_params

FILE = GOLDEN / "lllite.safetensors"
INPAINTING = ControlConfig(4, 8, 6, 5, 2, (1, 3), LAYERS, 4, True, 12, absent=("0.mlp_layer1", "2.self_attn_q_proj"))


@pytest.fixture(scope="module")
def tensors():
    return load_file(FILE)


def written(tmp_path, tensors, metadata=None):
    path = tmp_path / "network.safetensors"
    save_file(tensors, path, metadata)
    return path


def network_of(config: ControlConfig) -> ControlNetwork:
    graphdef, shapes = parameters.abstract(lambda rngs: ControlNetwork(config, rngs=rngs))
    return parameters.merge(graphdef, random_params(shapes))


def metadata_in(path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_network_is_written_with_every_key_and_bit(tmp_path, tensors, dtype):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_control(path, load_control(FILE), dtype=dtype)
    save_control(out, load_control(path), metadata={"modelspec.title": "lines"})
    before, after = (raw_tensors(each) for each in (path, out))
    assert before == after
    assert before.keys() == tensors.keys()
    assert metadata_in(FILE).items() <= metadata_in(out).items()
    assert metadata_in(out)["modelspec.title"] == "lines"


def test_an_odd_trunk_is_halved_downwards_as_in_sd_scripts(tmp_path):
    config = ControlConfig(trunk_width=9, embedding_width=2, mlp_width=2, blocks=1, width=4)
    save_control(tmp_path / "odd.safetensors", network_of(config))
    assert load_control(tmp_path / "odd.safetensors").config == config


def raw_tensors(path) -> dict[str, tuple[str, bytes]]:
    """Name → dtype and bytes, also of dtypes that NumPy does not have."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    return {
        name: (info["dtype"], data[slice(*(start + offset for offset in info["data_offsets"]))])
        for name, info in header.items()
    }


def test_sizes_are_read_from_shapes_and_the_rest_from_metadata(tmp_path):
    path, bare = tmp_path / "network.safetensors", tmp_path / "bare.safetensors"
    save_control(path, network_of(INPAINTING))
    assert load_control(path).config == INPAINTING
    assert not any(name.startswith((f"{MODULES}0_mlp", f"{MODULES}2_self_attn_q")) for name in load_file(path))
    # Without metadata: sd-scripts' defaults for what shapes do not say.
    save_file({name: value for name, value in load_file(path).items() if "aspp" not in name}, bare)
    found = load_control(bare).config
    assert (found.masked_input, found.dilations, found.channels) == (False, (), 4)


@pytest.mark.parametrize(("blocks", "places"), [(28, (0, 1, 2)), (40, (0, 1, 3)), (52, (0, 1, 4))])
def test_a_network_of_28_blocks_is_used_on_deeper_models(blocks, places):
    """Blocks 0, 1 and 2 are 0, 1 and 3 of the 40, and those 0, 1 and 4 of the 52 (ECOSYSTEM's inserted blocks)."""
    shallow, deep = load_control(FILE), load_control(FILE, blocks=blocks)
    assert deep.config.blocks == blocks
    for path, value in parameters.split(deep)[1].items():
        expected = parameters.split(shallow)[1][path]
        if path.startswith("blocks."):
            np.testing.assert_array_equal(value[np.array(places)], expected)
            assert not np.delete(np.asarray(value), places, axis=0).any()
    there = np.asarray(deep.present())
    assert there[list(places)].all()
    assert there.sum() == len(places) * len(deep.config.layers)


def test_a_network_without_modules_in_the_last_blocks_is_for_the_depth_that_its_file_says(tmp_path):
    layer, path, other = "self_attn_q_proj", tmp_path / "network.safetensors", tmp_path / "other.safetensors"
    absent = tuple(f"{block}.{layer}" for block in range(28, 40))
    config = dataclasses.replace(INPAINTING, layers=(layer,), blocks=40, width=2048, absent=absent)
    network = network_of(config)
    save_control(path, network)
    stored = parameters.split(network)[1]["blocks.self_attn_q_proj.down.kernel"]
    for blocks in (None, 40):
        found = load_control(path, blocks=blocks)
        assert found.config == config
        np.testing.assert_array_equal(
            parameters.split(found)[1]["blocks.self_attn_q_proj.down.kernel"][:28], stored[:28]
        )
    save_control(other, network, metadata={BLOCKS: "27"})
    assert load_control(other).config.blocks == 28
    assert not any(blocks_in({BLOCKS: said}, 28) for said in ("27", "99999", "9" * 5000, "x", "-40", "٤٠", ""))


def lacking(*parts):
    return lambda tensors: {name: value for name, value in tensors.items() if not any(part in name for part in parts)}


def having(name, *shape, dtype=np.float32):
    return lambda tensors: tensors | {name: np.zeros(shape, dtype)}


def not_finite(tensors):
    name = f"{MODULES}1_mlp_layer1.up.weight"
    return tensors | {name: np.where(np.arange(10) == 3, np.nan, tensors[name])}


UP = f"{MODULES}1_mlp_layer1.up.weight"

REFUSED = {
    "older": (having("lllite_modules.0.down.weight", 4, 4), {}, "older ControlNet-LLLite"),
    "SDXL": (lambda _: {"lllite_unet_input_blocks_4_1.down.0.weight": np.zeros((4, 4))}, {}, "for SDXL"),
    "semantic": (None, {"lllite.trunk": "semantic"}, "lllite.trunk = semantic, which is not supported"),
    "semantic by name": (having(f"{TRUNK}proj_in.weight", 4, 4), {}, "lllite.trunk = semantic"),
    "gate": (None, {"lllite.gate": "scalar"}, "lllite.gate = scalar"),
    "latent": (None, {"lllite.cond_input_space": "latent"}, "lllite.cond_input_space = latent"),
    "latent by name": (having(f"{TRUNK}lat_conv1.weight", 4, 4, 3, 3), {}, "lllite.cond_input_space = latent"),
    "version": (None, {"lllite.version": "3"}, "lllite.version = 3"),
    "another ControlNet": (lambda _: {"control_model.input_blocks.0.0.weight": np.zeros(4)}, {}, "like: a ControlNet"),
    "a LoRA": (lambda _: load_file(GOLDEN / "lora_rank4.safetensors"), {}, "is no control network"),
    "no module": (lacking("blocks"), {}, "has no module"),
    "missing": (lacking(UP), {}, f"1 missing for the model: {UP}"),
    "missing trunk": (lacking("conv3.weight"), {}, f"missing for the control network: {TRUNK}conv3.weight"),
    "unknown": (having("extra", 3), {}, "1 unknown in the file: extra"),
    "unknown layer": (having(f"{MODULES}0_cross_attn_k_proj.up.weight", 3), {}, "cross_attn_k_proj"),
    "misshaped": (having(UP, 3, 3), {}, f"{UP} is (3, 3), expected (64, 10)"),
    "no axes": (having(f"{TRUNK}conv1.weight"), {}, "conv1.weight is (), expected 4 axes"),
    "5 channels": (having(f"{TRUNK}conv1.weight", 8, 5, 4, 4), {}, "reads 5 channels"),
    "odd trunk": (having(f"{TRUNK}conv3.weight", 15, 8, 4, 4), {}, "conv3 has 15 channels, expected 16"),
    "integers": (having(UP, 64, 10, dtype=np.int32), {}, f"{UP}: integers"),
    "not finite": (not_finite, {}, f"NaN or infinite values in 1 tensor: {UP} (64)"),
    "far block": (having(f"{MODULES}99999999_mlp_layer1.up.weight", 1), {}, "no model has so many blocks"),
    "gap": (having(f"{TRUNK}resblocks.3.conv1.weight", 1), {}, "but no lllite_conditioning1.resblocks.1"),
    "dilations": (having(f"{TRUNK}aspp.proj.0.weight", 1), {"lllite.aspp_dilations": "1,x"}, "aspp_dilations = 1,x"),
    "branches": (having(f"{TRUNK}aspp.branches.0.0.weight", 1), {}, "has 1 ASPP branches for 4 dilations"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_in_one_line(tmp_path, tensors, case, capsys):
    change, metadata, expected = REFUSED[case]
    path = written(tmp_path, change(tensors) if change else tensors, metadata)
    with pytest.raises(UserError) as error:
        load_control(path)
    (message,) = error.value.messages
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "allow_unused" not in message
    main(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert "ControlNet" in shown or case == "a LoRA"
    assert expected in shown or case in ("SDXL", "another ControlNet", "a LoRA")


def test_a_network_for_another_transformer_is_refused(tmp_path, tensors):
    deep = written(tmp_path, {name.replace("blocks_2_", "blocks_30_"): value for name, value in tensors.items()})
    for options, expected in (
        ({"width": 2048}, "for a transformer of width 64, the model's is 2048"),
        ({"blocks": 2}, "for 3 blocks, the model has 2: nothing corresponds to block 2"),
    ):
        with pytest.raises(UserError, match=expected):
            load_control(FILE, **options)
    with pytest.raises(UserError, match="for 40 blocks, the model has 28: nothing corresponds to block 30"):
        load_control(deep, blocks=28)


def test_a_folder_with_one_network_is_a_network(tmp_path, tensors):
    written(tmp_path, tensors)
    assert load_control(tmp_path).config == load_control(FILE).config
    save_file(tensors, tmp_path / "second.safetensors")
    with pytest.raises(UserError, match=r"holds 2 \.safetensors files, expected one control network: network"):
        load_control(tmp_path)


def test_convert_changes_only_the_dtype(tmp_path, tensors, capsys):
    out = str(tmp_path / "out.safetensors")
    main(["checkpoint", str(FILE), out, "--dtype", "f16"])
    found = load_file(out)
    assert all(np.array_equal(found[name], value.astype(np.float16)) for name, value in tensors.items())
    assert metadata_in(out) == metadata_in(FILE)
    for flags, expected in (
        (["--to", "diffusers"], "--to: "),
        (["--dtype", "int8"], "written in one of bf16, f16, f32, not in int8"),
        ([], "written in one of bf16, f16, f32"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", str(FILE), out, "--force", *flags])
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


def test_inspect_says_what_a_network_is_for(tmp_path, capsys):
    path = tmp_path / "network.safetensors"
    save_control(path, network_of(INPAINTING))
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "v2 (control network) for inpainting (4 channels: image and mask), colours hidden under the mask" in out
    assert "4 channels, trunk 8 with 2 residual blocks, ASPP 1, 3, embedding 6, MLP 5, for 4 blocks of width 12" in out
    assert "self_attn_q_proj in blocks 0-1, 3" in out
    graphdef, params = parameters.split(network_of(INPAINTING))
    params = {name: jax.numpy.zeros_like(value) if ".up." in name else value for name, value in params.items()}
    save_control(path, parameters.merge(graphdef, params))
    main(["inspect", str(path)])
    assert "it changes nothing: every up is zero" in capsys.readouterr().out
