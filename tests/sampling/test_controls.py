"""Control networks in sampling: against torch, in mixed batches, on meshes, in files, and what is refused."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from anima_jax import AnimaPipeline, generate
from anima_jax.checkpoints import control as control_files
from anima_jax.checkpoints.control import load_control, save_control
from anima_jax.checkpoints.models import save_dit
from anima_jax.data.images import read_image
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import percent_to_sigma
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, ControlConfig, ControlNetwork
from anima_jax.sampling.controls import Control
from anima_jax.sampling.image_text import from_text
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.sampling.scaling import scaled_bicubic, scaled_nearest
from tests.compilation import compilations
from tests.golden_files import golden, relative_error
from tests.models import control_peer, dit_peer
from tests.models.networks import normal, random_params, randomise
from tests.small_run import ASSETS, CONFIG, write_transformer

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BARE = dataclasses.replace(CONFIG, adapter=None)
EULER = SamplingParams(negative_prompt="blue", steps=4, sampler="euler", guidance_scale=2.0)
SIZES = {"trunk_width": 16, "embedding_width": 8, "mlp_width": 8, "blocks": CONFIG.blocks, "width": CONFIG.width}


def network(seed: int, **sizes) -> ControlNetwork:
    graphdef, shapes = parameters.abstract(lambda rngs: ControlNetwork(ControlConfig(**SIZES, **sizes), rngs=rngs))
    params = random_params(shapes, seed)
    return parameters.merge(graphdef, {path: 0.5 * x if ".up." in path else x for path, x in params.items()})


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("controls"))


def write_files(folder):
    """Write a transformer, a LoRA on it, two control networks, one for inpainting, a picture and a mask."""
    params = write_transformer(folder / "base.safetensors")
    if importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers"):
        params |= dit_peer.our_params(randomise(dit_peer.transformer(BARE)), BARE)
    save_dit(folder / "base.safetensors", params)
    lora = {"lora_A.weight": 0.2 * normal(3, 64, seed=1), "lora_B.weight": normal(64, 3, seed=2)}
    prefix = "diffusion_model.blocks.1.self_attn.q_proj"
    save_file({f"{prefix}.{name}": value for name, value in lora.items()}, folder / "lora.safetensors")
    save_control(folder / "edges.safetensors", network(1, layers=LAYERS[:1] + LAYERS[4:]))
    save_control(folder / "inpaint.safetensors", network(2, layers=LAYERS, channels=4, masked_input=True))
    Image.fromarray(picture(3, 50, 70)).save(folder / "picture.png")
    Image.fromarray(np.where(picture(4, 50, 70)[..., 0] < 99, 255, 0).astype(np.uint8)).save(folder / "mask.png")
    return folder


def load(folder, **options) -> AnimaPipeline:
    networks = {name: ASSETS / f"{file}.safetensors" for name, file in NETWORKS.items()}
    networks |= {"tokenizers": ASSETS / "tokenizers", "transformer": folder / "base.safetensors"}
    return AnimaPipeline.load(**networks, dtype=jnp.float32, **options)


NETWORKS = {"vae": "tiny_vae", "text_encoder": "tiny_qwen3"}


@pytest.fixture(scope="module")
def pipeline(files):
    return load(files, loras=[(files / "lora.safetensors", 0.7)])


def controls(folder) -> tuple[tuple[Control, ...], ...]:
    """Those of three images: both networks, none, and the other order, each with pictures of its own."""
    edges, inpaint = folder / "edges.safetensors", folder / "inpaint.safetensors"
    own, mask = folder / "picture.png", folder / "mask.png"
    other = Image.fromarray(picture(5, 80, 33))
    return (
        (Control(edges, own, 0.8, 0.0, 0.75), Control(inpaint, own, 1.2, 0.25, 1.0, mask)),
        (),
        (Control(inpaint, own, -0.5, mask=mask), Control(edges, other)),
    )


def requests(folder) -> list[ImageRequest]:
    sizes = [("a red square", 64, 48), ("a cross", 56, 72), ("a circle", 40, 56)]  # the last two are odd in latents
    own = controls(folder)
    return [ImageRequest(*size, seed=seed, controls=own[seed]) for seed, size in enumerate(sizes)]


def on_torch(peer, folder, pipeline, request) -> np.ndarray:
    """Euler's method with guidance, in which networks act as ComfyUI's AnimaLLLitePatch lets them, (1, y, x, 16)."""
    import torch

    def scaled(pixels_yxc: np.ndarray, size_yx, mode):
        (height, width), (y, x) = pixels_yxc.shape[:2], size_yx
        dx = round((width - width * (x / y) / (width / height)) / 2) if width / height > x / y else 0
        dy = round((height - height * (width / height) / (x / y)) / 2) if width / height < x / y else 0
        crop = torch.from_numpy(np.moveaxis(pixels_yxc[dy : height - dy, dx : width - dx], -1, 0)[None].copy())
        return torch.nn.functional.interpolate(crop.float() / 255, size_yx, mode=mode)

    sigmas, shift = EULER.levels(), EULER.shift
    noise = BatchNoise([request], EULER.noise, SAMPLERS["euler"], sigmas).start[0]
    x, (_, rows, columns, _) = sigmas[0] * noise, noise.shape
    whole = 16 * -(-rows // 2), 16 * -(-columns // 2)
    steering = []
    for own in request.controls:
        tensors = {name: torch.from_numpy(value) for name, value in load_file(own.path).items()}
        image, mask = (part and np.atleast_3d(np.asarray(part)) for part in own.opened)
        seen = 2 * scaled(image, whole, "bicubic").clamp(0, 1) - 1
        if mask is not None:
            seen = control_peer.with_mask(seen, scaled(mask, whole, "nearest-exact"), masked_input=True)
        start, end = (percent_to_sigma(percent, shift) for percent in (own.start_percent, own.end_percent))
        steering.append((tensors, control_peer.embedding(tensors, seen), own.strength, start, end))
    contexts = [np.asarray(pipeline.encode([text]).rows_bnd) for text in (EULER.negative_prompt, request.prompt)]
    for sigma, after in itertools.pairwise(sigmas):
        seen = np.pad(x, [(0, 0), (0, rows % 2), (0, columns % 2), (0, 0)], mode="wrap")
        latents, times = np.moveaxis(seen, -1, 0)[None].astype(np.float32), np.array([sigma], np.float32)
        with contextlib.ExitStack() as stack, torch.inference_mode():
            for tensors, embedding, strength, start, end in steering:
                if end < float(sigma) <= start:
                    stack.enter_context(control_peer.steered(peer, tensors, embedding, strength))
            negative, positive = (
                dit_peer.velocity(peer, latents, times, context)[0, :, :rows, :columns] for context in contexts
            )
        x = x + (after - sigma) * (negative + EULER.guidance_scale * (positive - negative))
    return x


def test_a_mixed_batch_with_a_lora_equals_torchs_networks_each_with_its_own_controls(files, pipeline):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    peer = randomise(dit_peer.transformer(BARE))
    lora = load_file(files / "lora.safetensors")
    down, up = (next(value for name, value in lora.items() if end in name) for end in ("lora_A", "lora_B"))
    with torch.no_grad():
        peer.transformer_blocks[1].attn1.to_q.weight += 0.7 * torch.from_numpy(up @ down)
    found = pipeline.draw_latents(requests(files), EULER)
    expected = [on_torch(peer, files, pipeline, request) for request in requests(files)]
    for latents, wanted in zip(found, expected, strict=True):
        # A random network amplifies the rounding of one velocity, 2e-5, a little over the steps.
        np.testing.assert_allclose(latents, wanted, atol=2e-4 * np.abs(wanted).max())
    for ours, theirs in zip(*map(pipeline.decode, (found, expected)), strict=True):
        assert 20 * np.log10(2.0 / np.sqrt(np.mean((ours - theirs) ** 2))) > 80.0


def test_a_mixed_batch_is_what_comfyuis_own_nodes_make_of_each_image(files, tmp_path):
    write_transformer(tmp_path / "base.safetensors")
    expected = golden("lllite_sampling")
    for number, found in enumerate(load(tmp_path).draw_latents(requests(files), EULER)):
        # float32's rounding in another order, over four steps.
        assert relative_error(np.moveaxis(found, -1, 0)[None], expected[f"latents.{number}"]) < 1e-5


def test_strengths_percents_pictures_and_other_files_of_these_sizes_share_a_program(files, pipeline, tmp_path):
    first, _, third = controls(files)
    others = requests(files)
    pipeline.draw_latents(others, EULER)
    save_control(tmp_path / "other.safetensors", network(9, layers=LAYERS[:1] + LAYERS[4:]))
    changed = [
        dataclasses.replace(first[0], strength=0.1, end_percent=0.5, path=tmp_path / "other.safetensors"),
        dataclasses.replace(first[1], image=Image.fromarray(picture(7, 50, 70)), start_percent=0.5),
    ]
    with compilations() as names:
        found = pipeline.draw_latents([dataclasses.replace(others[0], controls=tuple(changed)), *others[1:]], EULER)
        own = third[0], dataclasses.replace(third[1], image=files / "picture.png")
        again = pipeline.draw_latents([*others[:2], dataclasses.replace(others[2], controls=own)], EULER)
    assert names == []
    before = pipeline.draw_latents(others, EULER)
    assert [np.array_equal(*pair) for pair in zip(before, found, strict=True)] == [False, True, True]
    assert [np.array_equal(*pair) for pair in zip(before, again, strict=True)] == [True, True, False]


def test_strength_0_and_an_empty_range_change_nothing_and_an_image_is_as_alone(files, pipeline):
    settings = dataclasses.replace(EULER, cache="first_block:0.1", sampler="dpm_2", apg=True)
    own = requests(files)
    off = [dataclasses.replace(own[0].controls[0], strength=0.0)]
    off.append(dataclasses.replace(own[0].controls[1], start_percent=0.5, end_percent=0.5))
    blank = dataclasses.replace(own[0], controls=())
    found = pipeline.draw_latents([dataclasses.replace(own[0], controls=tuple(off)), *own[1:]], settings)
    (alone,) = pipeline.draw_latents([own[2]], settings)
    np.testing.assert_array_equal(found[0], pipeline.draw_latents([blank, *own[1:]], settings)[0])
    np.testing.assert_allclose(found[2], alone, atol=1e-4 * np.abs(alone).max())
    plain = pipeline.draw_latents([blank, own[1], dataclasses.replace(own[2], controls=())], settings)
    np.testing.assert_allclose(found[0], plain[0], atol=1e-4 * np.abs(plain[0]).max())
    assert np.abs(found[2] - plain[2]).max() > 0.01 * np.abs(plain[2]).max()


def test_networks_are_loaded_once_and_few_are_kept(files, pipeline, monkeypatch):
    loaded = []

    def load_and_count(path, **sizes):
        loaded.append(path)
        return load_control(path, **sizes)

    monkeypatch.setattr("anima_jax.sampling.control_networks.load_control", load_and_count)
    pipeline._controls._files.clear()
    for _ in range(2):
        pipeline.draw_latents(requests(files), EULER)
    assert sorted(path.name for path in loaded) == ["edges.safetensors", "inpaint.safetensors"]
    given = load_control(files / "edges.safetensors")
    same = [
        dataclasses.replace(own, path=given) if own.path.name == "edges.safetensors" else own
        for own in requests(files)[0].controls
    ]
    (by_path,), (by_network,) = (
        pipeline.draw_latents([dataclasses.replace(requests(files)[0], controls=tuple(own))], EULER)
        for own in (requests(files)[0].controls, same)
    )
    np.testing.assert_array_equal(by_path, by_network)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_a_network_acts_at_its_borders_as_comfyui_compares_them(shift):
    for steps in range(1, 31):
        levels = SamplingParams(steps=steps, shift=shift, sampler="euler").levels()
        for done in range(steps + 1):
            first, last = Control("a", "b", 1.0, done / steps, done / steps).levels(shift)
            # There, `float(sigmas.max().item())` is a level of float32 as a Python float.
            border = percent_to_sigma(done / steps, shift)
            assert (last < levels).tolist() == [border < level for level in levels.tolist()]
            assert done == 0 or (levels <= first).tolist() == [level <= border for level in levels.tolist()]


def test_transparency_is_white_as_in_training_except_for_an_inpainting_network():
    """Lines on a transparent ground, whose hidden colours are black, as programs for drawing write them."""
    image = Image.new("RGBA", (32, 48), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 10, 32, 13))
    file = io.BytesIO()
    image.save(file, "PNG")
    trained = read_image(file.getvalue(), image.size, name="lines.png")
    control = Control("lines.safetensors", image)
    np.testing.assert_allclose(control.pixels(image.size, 3), trained / np.float32(127.5) - 1, atol=1e-6)
    assert (trained[0] == 255).all()
    masked = control.pixels(image.size, 4)
    assert (masked[..., :3] == -1).all()
    np.testing.assert_array_equal(masked[..., 3] == 1, (trained == 255).all(axis=2))


def test_pictures_scale_as_in_torch():
    torch = pytest.importorskip("torch")
    for seed, (height, width, size) in enumerate([(50, 70, (48, 32)), (31, 200, (64, 64)), (300, 47, (80, 160))]):
        pixels = picture(seed, height, width)[:, :, :1] / np.float32(255)
        for ours, mode in ((scaled_bicubic, "bicubic"), (scaled_nearest, "nearest-exact")):
            own, target = width / height, size[0] / size[1]
            x = round((width - width * target / own) / 2) if own > target else 0
            y = round((height - height * own / target) / 2) if own < target else 0
            crop = torch.from_numpy(pixels[y : height - y, x : width - x, 0].copy())[None, None]
            expected = torch.nn.functional.interpolate(crop, size[::-1], mode=mode)[0, 0]
            np.testing.assert_allclose(ours(pixels, size)[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("end", ["=p.png", "=p.png:0.5:0.1:1", "=a:0.5", "=a:0.5:0.7", "=x=y.png:-2e-1"])
def test_names_may_have_colons_and_equals_signs(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    for name in ("p.png", "a:0.5", "x=y.png"):
        (tmp_path / name).touch()
    expected = {
        "=p.png": ("p.png", 1.0, 0.0, 1.0),
        "=p.png:0.5:0.1:1": ("p.png", 0.5, 0.1, 1.0),
        "=a:0.5": ("a:0.5", 1.0, 0.0, 1.0),
        "=a:0.5:0.7": ("a:0.5", 0.7, 0.0, 1.0),
        "=x=y.png:-2e-1": ("x=y.png", -0.2, 0.0, 1.0),
    }
    for file in ("f.safetensors", "C:\\d\\f.safetensors", "k=v.SAFETENSORS", "hf://o/r/f.safetensors"):
        found = Control.parse(file + end)
        assert (found.path, found.image, found.strength, found.start_percent, found.end_percent) == (
            file,
            *expected[end],
        )


def flags(folder, *more: object) -> list[str]:
    words = [f"--{name}={ASSETS / file}.safetensors" for name, file in NETWORKS.items()]
    words += [f"--transformer={folder / 'base.safetensors'}", f"--tokenizers={ASSETS / 'tokenizers'}"]
    return [*words, "--dtype=float32", "--width=40", "--height=24", "--steps=2", *map(str, more)]


def test_an_image_names_its_controls_and_like_draws_it_again(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    first, again, other = (tmp_path / f"{name}.png" for name in "abc")
    own = ["--control", "edges.safetensors=picture.png:0.5:0:0.9", "--control", "inpaint.safetensors=picture.png"]
    own += ["--control_mask", "mask.png", "--control_from", "canny:50:150", "--control_from", "none"]
    generate.main(flags(files, "--prompt", "x", *own, "-o", files / "own.png"))
    text = Image.open(files / "own.png").text
    stored = json.loads(text["anima_jax"])["controls"]
    assert [(one["path"], one["image"], one["strength"], one["mask"], one["kind"]) for one in stored] == [
        ("edges.safetensors", "picture.png", 0.5, None, "canny:low=50:high=150"),
        ("inpaint.safetensors", "picture.png", 1.0, "mask.png", None),
    ]
    recipe = from_text("own.png", {"prompt": text["prompt"]})
    webui = 'ControlNet 1: "Module: none, Model: inpaint [' in text["parameters"]
    assert [webui, *((one.path, one.image, one.mask, one.end_percent) for one in recipe.controls)] == [
        True,
        ("edges.safetensors", "picture.png", None, 0.9),
        ("inpaint.safetensors", "picture.png", "mask.png", 1.0),
    ]
    generate.main(["--like", str(files / "own.png"), "-o", str(again)])
    np.testing.assert_array_equal(Image.open(files / "own.png"), Image.open(again))
    assert "is not" not in capsys.readouterr().err
    generate.main(["--like", str(files / "own.png"), "--no-control", "-o", str(first)])
    assert np.any(np.asarray(Image.open(first)) != np.asarray(Image.open(again)))
    (files / "moved").mkdir()
    for name in ("own.png", "mask.png"):
        (files / "moved" / name).write_bytes((files / name).read_bytes())
    Image.fromarray(picture(11, 50, 70)).save(files / "moved" / "picture.png")
    generate.main(["--like", str(files / "moved" / "own.png"), "-o", str(other)])
    assert f"{files / 'moved' / 'picture.png'}: is not the control picture that" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bad(files):
    """Files that cannot be used, beside those of `files`."""
    save_control(files / "wide.safetensors", parameters.merge(*wide()))
    (files / "broken.png").write_bytes(b"PNG")
    (files / "video.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(64))
    Image.new("L", (8, 8)).save(files / "small.png")
    return files


def wide():
    config = ControlConfig(**(SIZES | {"width": 96}))
    return parameters.split(ControlNetwork(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("flags_given", "message"),
    [
        (["--control", "edges.safetensors"], "expected FILE.safetensors=PICTURE"),
        (["--control", "edges.safetensors=no.png:0.5"], "there is no picture no.png"),
        (["--control", "none.safetensors=picture.png"], "none.safetensors: no such file"),
        (["--control", "edges.safetensors=picture.png:1:0:1:2"], "at most three numbers"),
        (["--control", "edges.safetensors=picture.png:nan"], "strength nan, expected a number"),
        (
            ["--control", "edges.safetensors=picture.png:1:0.9:0.1"],
            "start 0.9, end 0.1, expected two ascending numbers",
        ),
        (["--control", "edges.safetensors=broken.png"], "broken.png: cannot be read as an image"),
        (["--control", "edges.safetensors=video.mp4"], "video.mp4: "),
        (["--control", "base.safetensors=picture.png"], "base.safetensors: is no control network"),
        (["--control", "wide.safetensors=picture.png"], "for a transformer of width 96, the model's is 64"),
        (["--control", "inpaint.safetensors=picture.png"], "takes a mask; picture.png has no transparent pixels"),
        (
            ["--control", "edges.safetensors=picture.png", "--control_mask", "mask.png"],
            "--control_mask mask.png: none of --control is an inpainting network, which takes one",
        ),
        (["--control_mask", "mask.png"], "--control_mask mask.png: there is no --control"),
        (
            ["--control", "inpaint.safetensors=picture.png", *["--control_mask", "mask.png"] * 2],
            "2 values of --control_mask for 1 inpainting network of --control, expected one or as many",
        ),
        (["--base_strength", "0.5"], "base_strength 0.5 without regions: expected a region, too"),
        (
            ["--control", "inpaint.safetensors=picture.png", "--control_mask", "small.png"],
            "small.png: the control mask is 8×8, expected the control picture's 70×50",
        ),
        (["--control", "edges.safetensors=picture.png", "--control_from", "cany"], "did you mean 'canny'"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line_before_anything_is_drawn(bad, monkeypatch, capsys, flags_given, message):
    monkeypatch.chdir(bad)
    with pytest.raises(SystemExit) as ended:
        generate.main(flags(bad, "--prompt", "x", *flags_given, "-o", "none.png"))
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, message in line) == (2, True), line
    assert not (bad / "none.png").exists()


def test_a_networks_file_is_read_once_before_the_transformer_is(bad, monkeypatch):
    read = []
    check = control_files.check_values
    monkeypatch.setattr(control_files, "check_values", lambda file: read.append(file.path) or check(file))
    monkeypatch.chdir(bad)
    used = ["--control", "edges.safetensors=picture.png"] * 2 + ["--control", "wide.safetensors=picture.png"]
    with pytest.raises(SystemExit):  # wide.safetensors is for another transformer
        generate.main(flags(bad, "--prompt", "x", *used, "-o", "none.png"))
    assert read == ["edges.safetensors", "wide.safetensors"]


def test_wrong_controls_in_python_are_named(files, pipeline):
    picture = files / "picture.png"
    other = parameters.merge(*wide())
    with pytest.raises(UserError, match=r"base_strength 0\.5 without regions"):
        pipeline("x", width=32, height=32, steps=1, base_strength=0.5)
    for control, message in [
        ("edges.png", "controls 'edges.png', expected Control"),
        (Control(other, picture), "for 2 blocks of width 96, the transformer has 2 of width 64"),
        (Control(files / "edges.safetensors", picture, mask=files / "mask.png"), "takes no mask"),
        (Control(files / "edges.safetensors", 3), "control picture 3, expected a PIL image or the path"),
        (Control(5, picture), "control 5, expected a file or a ControlNetwork"),
        (Control(files / "edges.safetensors", picture, "1"), "strength 1, expected a number"),
    ]:
        with pytest.raises(UserError, match=message):
            pipeline("x", width=32, height=32, steps=1, controls=[control])
