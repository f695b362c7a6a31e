"""Adapters in the pipeline: any number of them, at weights that can be changed, exactly back and without compiling."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from anima_jax import AnimaPipeline
from anima_jax.adapters.merge import parse_lora_argument
from anima_jax.checkpoints.models import load_dit
from anima_jax.errors import UserError
from anima_jax.generate import main as generate
from anima_jax.models import parameters
from anima_jax.sampling.prompt_loras import apply_tags, tags, without_tags
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.training.profiling import watch_compilation
from convert.__main__ import main as convert
from tests.models.networks import normal
from tests.small_run import ASSETS, write_config, write_transformer

SETTINGS = {"width": 32, "height": 48, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A transformer in bfloat16, a kohya LoRA on it and on the text encoder, and a LoKr in ComfyUI's names."""
    folder = tmp_path_factory.mktemp("loras")
    write_transformer(folder / "base.safetensors")
    base = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(folder / "base.safetensors").items()}
    save_file(base, folder / "base.safetensors")
    tensors = {}
    for seed, module in enumerate(("blocks_0_self_attn_q_proj", "blocks_1_mlp_layer1", "blocks_1_cross_attn_v_proj")):
        out, into = {"mlp_layer1": (128, 64), "cross_attn_v_proj": (64, 32)}.get(module[9:], (64, 64))
        tensors[f"lora_unet_{module}.lora_down.weight"] = 0.2 * normal(3, into, seed=seed)
        tensors[f"lora_unet_{module}.lora_up.weight"] = normal(out, 3, seed=seed + 10)
        tensors[f"lora_unet_{module}.alpha"] = np.array(2.0, np.float32)
    tensors["lora_te_layers_0_self_attn_v_proj.lora_down.weight"] = normal(3, 64, seed=20)
    tensors["lora_te_layers_0_self_attn_v_proj.lora_up.weight"] = normal(32, 3, seed=21)
    save_file(tensors, folder / "style.safetensors")
    lokr = {"lokr_w1": normal(4, 4, seed=30), "lokr_w2": 0.1 * normal(32, 16, seed=31)}
    save_file({f"diffusion_model.blocks.0.mlp.layer1.{n}": a for n, a in lokr.items()}, folder / "lokr.safetensors")
    return folder


def load(files, base="base", dtype=jnp.bfloat16, **options):
    return AnimaPipeline.load(
        transformer=files / f"{base}.safetensors",
        vae=ASSETS / "tiny_vae.safetensors",
        text_encoder=ASSETS / "tiny_qwen3.safetensors",
        tokenizers=ASSETS / "tokenizers",
        dtype=dtype,
        **options,
    )


def both(files, *weights):
    return load(files, loras=list(zip((files / "style.safetensors", files / "lokr.safetensors"), weights, strict=True)))


def all_params(pipeline):
    return {**pipeline.dit_params, **{f"text_encoder.{p}": v for p, v in pipeline.text_encoder_params.items()}}


def different(first, second):
    first, second = all_params(first), all_params(second)
    assert first.keys() == second.keys()
    return {path for path in first if not np.array_equal(np.asarray(first[path]), np.asarray(second[path]))}


TOUCHED = {
    "blocks.self_attn.q_proj.kernel",
    "blocks.mlp.layer1.kernel",
    "blocks.cross_attn.v_proj.kernel",
    "text_encoder.layers.self_attn.v_proj.kernel",
}


def test_weights_add_up_in_float32_and_are_rounded_once(files):
    plain, found = load(files), both(files, 0.8, -0.5)
    assert different(plain, found) == TOUCHED
    style, lokr = load_file(files / "style.safetensors"), load_file(files / "lokr.safetensors")
    kernel = np.asarray(plain.dit_params["blocks.mlp.layer1.kernel"], np.float64)
    name = "lora_unet_blocks_1_mlp_layer1"
    kernel[1] += 0.8 * 2 / 3 * (style[f"{name}.lora_up.weight"] @ style[f"{name}.lora_down.weight"]).T
    kernel[0] -= 0.5 * np.kron(*(lokr[f"diffusion_model.blocks.0.mlp.layer1.lokr_{w}"] for w in ("w1", "w2"))).T
    got = np.asarray(found.dit_params["blocks.mlp.layer1.kernel"])
    expected = kernel.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert np.mean(got != expected) < 1e-3  # bfloat16's last bit where the sum lies at a boundary


def test_weights_are_changed_and_changed_back_without_a_trace_or_a_program(files):
    plain, pipeline = load(files), both(files, 0.8, -0.5)
    first = np.asarray(pipeline("a red circle", **SETTINGS)[0])
    with watch_compilation() as compilation:
        pipeline.set_lora_weights([0.3, 1.0])
        other = np.asarray(pipeline("a red circle", **SETTINGS)[0])
        pipeline.set_lora_weights([0.0, 0.0])
        assert different(plain, pipeline) == set()
        bare = np.asarray(pipeline("a red circle", **SETTINGS)[0])
        pipeline.set_lora_weights([0.8, -0.5])
        again = np.asarray(pipeline("a red circle", **SETTINGS)[0])
    assert compilation.lookups == 0
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(bare, np.asarray(plain("a red circle", **SETTINGS)[0]))
    assert np.any(first != other)
    assert np.any(first != bare)
    with pytest.raises(UserError, match="found 1 weights, expected one for each of 2 LoRAs"):
        pipeline.set_lora_weights([1.0])
    for weight in (float("nan"), {"blocks.0": float("inf")}):
        with pytest.raises(UserError, match=r"style\.safetensors: weight (nan|inf), expected a finite number"):
            pipeline.set_lora_weights([weight, 1.0])
    with pytest.raises(UserError, match="the pipeline was loaded without LoRAs"):
        plain.set_lora_weights([1.0])


def test_each_block_can_have_its_weight(files):
    weights = {"blocks.0-9": 0.5, "blocks.1": 0.0, "blocks.1.cross_attn": 2.0, "text_encoder": 0.25}
    by_block = load(files, loras=[(files / "style.safetensors", weights)])
    plain = load(files)
    factors = {
        "blocks.self_attn.q_proj.kernel": (0, 0.5),
        "blocks.cross_attn.v_proj.kernel": (1, 2.0),
        "text_encoder.layers.self_attn.v_proj.kernel": (0, 0.25),
    }
    assert different(plain, by_block) == set(factors)
    for path, (layer, factor) in factors.items():
        alone = all_params(load(files, loras=[(files / "style.safetensors", factor)]))[path]
        np.testing.assert_array_equal(np.asarray(all_params(by_block)[path][layer]), np.asarray(alone[layer]))
    rest = load(files, loras=[(files / "style.safetensors", {"blocks.0": 0.0})])
    full = load(files, loras=[(files / "style.safetensors", 1.0)])
    assert different(rest, full) == {"blocks.self_attn.q_proj.kernel"}
    with pytest.raises(UserError, match=r"weight of 'blocks.7-9': the adapter has no such module"):
        load(files, loras=[(files / "style.safetensors", {"blocks.7-9": 0.5})])


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.7", "x.safetensors", 0.7),
        ("x.safetensors:-1e-1", "x.safetensors", -0.1),
        ("x.safetensors:0.7:0.5", "x.safetensors", (0.7, 0.5)),
        ("F:0.7:0.5", "F", (0.7, 0.5)),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:0.7", r"C:\loras\x.safetensors", 0.7),
        ("C:/x.safetensors:0.7:0.5", "C:/x.safetensors", (0.7, 0.5)),
        ("C:x.safetensors:0.7", "C:x.safetensors", 0.7),
        ("hf://owner/repo/x.safetensors", "hf://owner/repo/x.safetensors", 1.0),
        ("hf://owner/repo@main/x.safetensors:0.7:0", "hf://owner/repo@main/x.safetensors", (0.7, 0.0)),
    ],
)
def test_an_adapters_weights_follow_its_path(text, path, weight):
    if isinstance(weight, tuple):
        weight = {"": weight[0], "text_encoder": weight[1]}
    assert parse_lora_argument(text) == (path, weight)


@pytest.mark.parametrize(
    "text", ["style:y", "style:nan", "style:0.5:y", "style:y:0.5", "style:", ":0.5", "hf://owner/repo/x:y"]
)
def test_a_weight_that_is_no_finite_number_is_an_error(text):
    with pytest.raises(UserError, match="expected FILE, FILE:WEIGHT or FILE:MODEL:TEXT_ENCODER with numbers, found '"):
        parse_lora_argument(text)


def test_a_file_with_a_colon_in_its_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:0.5").touch()
    assert parse_lora_argument("x:0.5") == ("x:0.5", 1.0)
    assert parse_lora_argument("x:0.5:0.7") == ("x:0.5", 0.7)


def test_transformer_and_text_encoder_have_weights_of_their_own(files):
    pair = load(files, loras=[(files / "style.safetensors", {"": 0.7, "text_encoder": 0.25})])
    by_part = load(files, loras=[(files / "style.safetensors", {"blocks": 0.7, "text_encoder": 0.25})])
    assert different(pair, by_part) == set()
    assert different(load(files), pair) == TOUCHED
    # An adapter without modules of one of the two takes a pair as well.
    weights = 0.5, {"": 0.5, "text_encoder": 9.0}
    lokr = [load(files, loras=[(files / "lokr.safetensors", weight)]) for weight in weights]
    assert different(*lokr) == set()


def test_merging_is_loading(files, tmp_path):
    style = {key: array for key, array in load_file(files / "style.safetensors").items() if "lora_te" not in key}
    save_file(style, tmp_path / "style.safetensors")
    arguments = [files / "base.safetensors", f"{tmp_path / 'style.safetensors'}:0.8", files / "lokr.safetensors"]
    convert(["merge", *map(str, arguments), str(tmp_path / "merged.safetensors")])
    loaded = load(files, loras=[(tmp_path / "style.safetensors", 0.8), (files / "lokr.safetensors", 1.0)])
    merged = parameters.split(load_dit(tmp_path / "merged.safetensors"))[1]
    for path, value in loaded.dit_params.items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(merged[path], np.float32), err_msg=path)


def test_the_base_is_kept_once_where_memory_is_the_hosts(files):
    pipeline = load(files, loras=[(files / "style.safetensors", 0.0)])
    assert jax.default_backend() == "cpu"
    assert pipeline._loras is not None
    assert all(not base.flags.owndata for base in pipeline._loras._base.values())


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("a red circle", "a red circle", []),
        ("a <lora:x:0.8>", "a", [("x", 0.8)]),
        ("<LORA:x>, a, b", "a, b", [("x", 1.0)]),
        ("a, <lyco:sub/x.y:-1>, b", "a, b", [("sub/x.y", -1.0)]),
        ("a, <lora:x:0.8:0.5> <lora:y:te=0.5:unet=0.8>", "a", [("x", (0.8, 0.5)), ("y", (0.8, 0.5))]),
        ("a <lora:x:te=0.5> b", "a b", [("x", 0.5)]),
        ("a <b:1> (c:1.2) <hypernet:x:1>", "a <b:1> (c:1.2) <hypernet:x:1>", []),
    ],
)
def test_tags_are_read_and_leave_no_gap(prompt, text, found):
    pairs = [(name, {"": w[0], "text_encoder": w[1]} if isinstance(w, tuple) else w) for name, w in found]
    assert (without_tags(prompt), tags(prompt)) == (text, pairs)


@pytest.mark.parametrize("tag", ["<lora:x:a>", "<lora::1>", "<lora:x:nan>", "<lora:x:1:2:3>", "<lora:x:1:lbw=2>"])
def test_a_tag_that_cannot_be_read_is_an_error(tag):
    with pytest.raises(UserError, match=f"{tag}: expected <lora:NAME:WEIGHT> or "):
        tags(tag)


def test_each_image_has_the_loras_of_its_prompt(files, tmp_path, capsys):
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    (tmp_path / "loras" / "sub" / "style.safetensors").symlink_to(files / "style.safetensors")
    (tmp_path / "loras" / "lokr.safetensors").symlink_to(files / "lokr.safetensors")
    prompts = ["a <lora:style:0.8:0.5>", "a", "a <lora:lokr:0.5> <lora:style:-1>"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    networks = {"transformer": files / "base.safetensors", "vae": ASSETS / "tiny_vae.safetensors"}
    networks |= {"text_encoder": ASSETS / "tiny_qwen3.safetensors", "tokenizers": ASSETS / "tokenizers"}
    command = [word for name, file in networks.items() for word in (f"--{name}", str(file))]
    command += ["--width", "32", "--height", "32", "--steps", "1", "--seed", "5"]
    command += ["--negative_prompt", "b <lora:lokr:0.25>"]
    folder = ["--lora_dir", str(tmp_path / "loras")]
    generate([*command, *folder, "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "x.png")])
    expected = AnimaPipeline.load(**networks, loras=[(files / f"{n}.safetensors", 0.0) for n in ("style", "lokr")])
    for number, weights in enumerate([({"": 0.8, "text_encoder": 0.5}, 0.25), (0.0, 0.25), (-1.0, 0.75)], 1):
        expected.set_lora_weights(weights)
        (alone,) = expected("a", "b", width=32, height=32, steps=1, seed=5)
        assert levels_apart(Image.open(tmp_path / f"x_{number}.png"), alone) <= 1  # bfloat16's rounding of 0.5 and 0.25
    generate(["--like", str(tmp_path / "x_1.png"), "-o", str(tmp_path / "again.png")])
    assert levels_apart(Image.open(tmp_path / "again.png"), Image.open(tmp_path / "x_1.png")) <= 1
    assert levels_apart(Image.open(tmp_path / "x_1.png"), Image.open(tmp_path / "x_2.png")) > 1


def levels_apart(first, second):
    return np.abs(np.asarray(first, int) - np.asarray(second, int)).max()


def test_unknown_and_unclear_names_in_a_prompt_are_errors_and_no_folder_is_remarked_on(files, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "style.safetensors").touch()
        (tmp_path / name / "up").symlink_to(tmp_path)  # a circle, which the search does not follow
    requests = [ImageRequest("x <lora:style:1>")]
    for prompt, message in (
        (
            "x <lora:style:1>",
            r"<lora:style>: names 2 files: .*a/style.saf.*, .*b/style.saf.* in --lora_dir",
        ),
        ("x <lora:stile:1>", r"<lora:stile>: there is no stile.safetensors \(did you mean 'style'\?\) in --lora_dir"),
    ):
        with pytest.raises(UserError, match=message):
            apply_tags([ImageRequest(prompt)], SamplingParams(), str(tmp_path))
    found, _, loras = apply_tags([ImageRequest("x <lora:a/style:1>")], SamplingParams(), str(tmp_path))
    assert (found[0].prompt, loras) == ("x", [[(str(tmp_path / "a" / "style.safetensors"), 1.0)]])
    assert apply_tags(requests, SamplingParams(), None) == (requests, SamplingParams(), [()])
    pipeline = load(files)
    for _ in range(2):
        pipeline.encode(["x <lora:style:1>", "y"])
    said = "prompt 'x <lora:style:1>': <lora:style:1> is read as words, as in ComfyUI; --lora_dir DIR applies it\n"
    assert capsys.readouterr().err == said


def test_generate_takes_several_and_names_what_it_cannot_use(files, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    config = write_config(files, tmp_path / "pictures", "epochs = 1\nsave_every_n_epochs = 1")
    command = ["--config", str(config), "--prompt", "a red circle", "--width", "32", "--height", "32", "--steps", "1"]
    loras = ["--lora", f"{files / 'style.safetensors'}:0.8", "--lora", str(files / "lokr.safetensors")]
    generate([*command, *loras, "-o", str(tmp_path / "out.png")])
    said = capsys.readouterr().out
    assert "style.safetensors: 4 of 4 modules matched (LoRA of rank 3)" in said
    assert "lokr.safetensors: 1 of 1 modules matched (LoKr)" in said
    stray = load_file(files / "style.safetensors") | {"lora_unet_blocks_7_mlp_layer1.alpha": np.ones(1, np.float32)}
    save_file(stray, tmp_path / "stray.safetensors")
    with pytest.raises(SystemExit) as stopped:
        generate([*command, "--lora", str(tmp_path / "stray.safetensors"), "-o", str(tmp_path / "no.png")])
    assert stopped.value.code == 2
    assert "lora_unet_blocks_7" in capsys.readouterr().err or not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("stored", [{"transformer_dtype": "int8"}, {"compute": "int8"}, {"transformer_dtype": "nf4"}])
def test_loras_on_quantised_weights_are_not_rounded_away(files, stored, capsys):
    small = [(files / "style.safetensors", 1e-3), (files / "lokr.safetensors", 0.5)]
    base, changed = load(files, dtype=jnp.float32, **stored), load(files, dtype=jnp.float32, loras=small, **stored)
    assert "1 quantised stack of matrices changed by adapters other than LoRAs: dequantised" in capsys.readouterr().err
    merged = load(files, dtype=jnp.float32, loras=small)
    plain = load(files, dtype=jnp.float32)
    assert different(base, changed) == TOUCHED
    for path in TOUCHED:
        own, expected = (
            np.asarray(all_params(after)[path], np.float64) - np.asarray(all_params(before)[path], np.float64)
            for after, before in ((changed, base), (merged, plain))
        )
        # A thousandth of a LoRA, less than a step of int8; float32 rounds its sum with a weight of about 1.
        np.testing.assert_allclose(own, expected, atol=1e-6 + 1e-5 * np.abs(expected).max())
    changed.set_lora_weights([0.0, 0.0])
    assert not different(base, changed)
